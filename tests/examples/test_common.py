"""What the example scripts share."""

from __future__ import annotations

import math
import os
import re
import types

from absl import flags
import common
import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_fisher


def test_no_reader_fills_the_cache_and_stops_early():
    read = []

    def examples():
        for i in range(20):
            read.append(i)
            yield i

    spec = tf.TensorSpec((), tf.int64)
    dataset = tf.data.Dataset.from_generator(examples, output_signature=spec)
    cached = common._cached(dataset)
    assert read == [*range(20)]
    assert len([*cached.take(3)]) == 3
    assert [*cached.as_numpy_iterator()] == [*range(20)]
    assert len(read) == 20, "read again"


@pytest.mark.parametrize("holdout", [0.0, 0.2])
def test_a_smaller_training_set_is_the_first_examples(holdout):
    data = common.load_data("digits", 64, train_examples=100, holdout=holdout)
    images = keras_fisher.datasets.load("digits", "train")
    first = [x.tobytes() for x, _ in images.take(100).as_numpy_iterator()]
    kept = [x.tobytes() for x, _ in data.examples.unbatch().as_numpy_iterator()]
    assert kept == first[: 80 if holdout else 100]
    test = [x.tobytes() for x, _ in data.test.unbatch().as_numpy_iterator()]
    assert test == first[80:] if holdout else len(test) == 360


def test_data_that_cannot_be_had_end_the_script_with_one_message(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Could not prepare it. Install the package.")

    monkeypatch.setattr(keras_fisher.datasets, "load", fail)
    with pytest.raises(SystemExit, match="Install the package") as error:
        common.load_data("fashion_mnist", 64)
    assert isinstance(error.value.code, str), "printed, with status 1"


def test_less_than_a_batch_is_said_before_it_trains():
    with pytest.raises(SystemExit, match="There are 50 examples") as error:
        common.load_data("digits", 64, train_examples=50)
    assert "lower --batch_size" in error.value.code


def test_networks_and_data_that_do_not_fit_end_the_script_with_one_message():
    with pytest.raises(SystemExit, match="--model=vgg11") as error:
        common.build_network("vgg11", (8, 8, 1), 10)
    assert "at least 32 pixels" in error.value.code, error.value.code
    with pytest.raises(SystemExit, match="shifts and flips") as error:
        common.load_data("mnist1d", 64, augment=True)
    assert "mnist1d has none" in error.value.code, error.value.code


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_flag_that_is_no_finite_number_ends_the_script(value, monkeypatch):
    values = flags.FlagValues()
    flags.DEFINE_float("rate", 1.0, "A rate.", flag_values=values)
    flags.DEFINE_string("name", "nan", "A name.", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    common.check_finite_flags()
    values["rate"].value = value
    with pytest.raises(SystemExit, match=f"--rate={value}"):
        common.check_finite_flags()


def test_a_file_that_cannot_be_written_is_told_of_before(tmp_path):
    path = tmp_path / "new" / "model.keras"
    common.check_writable(str(path))
    assert os.listdir(path.parent) == []
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SystemExit, match="cannot be written"):
        common.check_writable(str(tmp_path / "file" / "model.keras"))
    with pytest.raises(SystemExit, match="is a directory"):
        common.check_writable(str(path.parent))


def test_held_out_examples_are_of_the_training_set():
    whole = common.load_data("digits", 64)
    parts = common.load_data("digits", 64, holdout=0.25)

    def examples(batches):
        return {x.tobytes() for x, _ in batches.unbatch().as_numpy_iterator()}

    kept, held_out = examples(parts.examples), examples(parts.test)
    assert kept | held_out == examples(whole.examples)
    share = len(held_out) / len(kept | held_out)
    assert share == pytest.approx(0.25, abs=0.01)
    assert not kept & held_out
    assert not held_out & examples(whole.test)


@pytest.mark.parametrize("augment", [False, True])
def test_the_order_of_an_epoch_goes_by_the_step(augment):
    def batches_at(steps):
        """All batches of passes that begin at some steps, in a new process."""
        data = common.load_data("digits", 256, augment=augment, seed=3)
        model = keras.Sequential([keras.Input((1,))])
        model.compile(keras.optimizers.SGD())
        dataset, passes = common.by_step(data, model), []
        assert int(dataset.cardinality()) == 5
        iter(dataset)  # one that nobody reads, as in Keras
        for step in steps:
            model.optimizer.iterations.assign(step)
            x, y = zip(*dataset.as_numpy_iterator(), strict=True)
            passes.append((np.concatenate(x), np.concatenate(y)))
        return passes

    whole, resumed = batches_at([0, 5, 10]), batches_at([10, 5])
    for (x, y), (expected_x, expected_y) in zip(resumed, [whole[2], whole[1]]):
        np.testing.assert_array_equal(x, expected_x)
        np.testing.assert_array_equal(y, expected_y)
    first, second = whole[0][1], whole[1][1]
    assert np.any(first != second), "the same order in each epoch"
    if not augment:
        everyone = common.load_data("digits", 256).examples.unbatch()
        known = {x.tobytes() for x, _ in everyone.as_numpy_iterator()}
        seen = [x.tobytes() for x in whole[1][0]]
        assert len({*seen}) == 5 * 256
        assert {*seen} <= known


@pytest.mark.parametrize("holdout", [0.0, 0.2])
def test_held_out_labels_are_as_noisy_and_those_of_the_test_are_not(holdout):
    data = common.load_data("digits", 64, label_noise=0.5, holdout=holdout)
    _, y = next(data.test.unbatch().batch(2000).as_numpy_iterator())
    assert isinstance(y, dict) == (holdout > 0)
    if holdout:
        assert 0.3 < np.mean(y["is_noisy"]) < 0.6


@pytest.mark.parametrize(
    "shape, classes, told",
    [((None, None, 3), 2, "(None, None, 3)"), ((4, 4, 1), None, "no classes")],
)
def test_what_the_scripts_cannot_classify_is_said(
    shape, classes, told, monkeypatch
):
    spec = tf.TensorSpec(shape), tf.TensorSpec([], tf.int64)
    data = tf.data.Dataset.from_generator(list, output_signature=spec)
    info = types.SimpleNamespace(
        supervised_keys=("image", "of_it"),
        features={"of_it": types.SimpleNamespace(num_classes=classes)},
    )
    monkeypatch.setattr(
        keras_fisher.datasets, "load", lambda *_, **__: ([data, data], info)
    )
    with pytest.raises(SystemExit, match=re.escape(told)):
        common.load_data("odd", 2)
