"""The ranking of examples by how wrong their labels look."""

from __future__ import annotations

import importlib.util
import types

from absl import flags
import common
import experiment
import experiments
import keras
import noisy_labels
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf


@pytest.fixture
def network():
    keras.utils.set_random_seed(0)
    return common.build_network("mlp", (3,), 4)


def _examples(count):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(count, 3)).astype(np.float32)
    return x, generator.integers(0, 4, count)


def test_scores_are_those_of_a_loop_over_examples(network):
    x, label = _examples(7)
    found = noisy_labels.scores(network, x, label, seed=0)
    for i, y in enumerate(label):
        with tf.GradientTape() as tape:
            logits = network(x[i : i + 1])
            loss = keras.losses.sparse_categorical_crossentropy(
                label[i : i + 1], logits, from_logits=True
            )[0]
        gradient = tape.gradient(loss, network.trainable_weights)
        squares = sum(float(tf.reduce_sum(g * g)) for g in gradient)
        probabilities = keras.ops.softmax(logits).numpy()[0]
        margin = np.delete(probabilities, y).max() - probabilities[y]
        assert found["loss"][i] == pytest.approx(float(loss), rel=1e-5)
        assert found["margin"][i] == pytest.approx(margin, rel=1e-4, abs=1e-6)
        assert found["given trace"][i] == pytest.approx(squares, rel=1e-4)


def test_sampled_trace_does_not_see_the_given_label(network):
    x, label = _examples(7)
    first = noisy_labels.scores(network, x, label, seed=0)
    second = noisy_labels.scores(network, x, (label + 1) % 4, seed=0)
    np.testing.assert_array_equal(
        first["sampled trace"], second["sampled trace"]
    )
    assert (first["given trace"] != second["given trace"]).all()


def test_confident_learning_puts_what_it_flags_first(network, monkeypatch):
    confident_learning = pytest.importorskip("cleanlab.filter")
    given = types.SimpleNamespace(value=True)
    monkeypatch.setattr(noisy_labels, "_CLEANLAB", given)
    x, label = _examples(80)
    found = noisy_labels.scores(network, x, label, seed=0)
    probabilities = keras.ops.softmax(network(x)).numpy()
    # The loss, and the margin, are two of its own scores.
    rank = pytest.importorskip("cleanlab.rank")
    for score, method in (
        ("loss", "self_confidence"),
        ("margin", "normalized_margin"),
    ):
        theirs = rank.get_label_quality_scores(
            label, probabilities, method=method, adjust_pred_probs=False
        )
        np.testing.assert_array_equal(
            np.argsort(found[score]), np.argsort(-theirs)
        )
    flagged = confident_learning.find_label_issues(label, probabilities)
    first = np.argsort(-found["confident learning"])
    assert 0 < flagged.sum() < 80
    by_loss = np.argsort(-found["loss"])
    expected = [i for i in by_loss if flagged[i]]
    expected += [i for i in by_loss if not flagged[i]]
    np.testing.assert_array_equal(first, expected)


def test_cleanlab_is_asked_for_before_anything_trains(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(flags.IllegalFlagValueError, match="pip install clean"):
        flags.FLAGS.cleanlab = True


def test_area_is_the_share_of_pairs_in_the_right_order(monkeypatch):
    values = np.array([0.1, 0.9, 0.5, 0.5, 0.7, 0.2])
    is_noisy = np.array([False, True, True, False, False, False])
    x = np.zeros((6, 3), np.float32)
    y = {"label": np.zeros(6, np.int64), "is_noisy": is_noisy}
    examples = tf.data.Dataset.from_tensors((x, y))
    data = common.Data(examples, lambda _: examples, examples, examples, 4)
    monkeypatch.setattr(noisy_labels, "scores", lambda *args: {"loss": values})
    run = experiment.from_flags(learning_rate=0.1)
    ranking = noisy_labels.Ranking(None, data, run, {2})
    for epoch in range(3):
        ranking.on_epoch_end(epoch)
    pairs = [
        (a > b) + 0.5 * (a == b)
        for a in values[is_noisy]
        for b in values[~is_noisy]
    ]
    [row] = ranking.rows
    assert row == {
        "epoch": 2,
        "score": "loss",
        "area": pytest.approx(np.mean(pairs)),
        "precision": 0.5,  # of the examples with 0.9 and 0.7
    }


@pytest.mark.slow
def test_ranking_changes_nothing_about_the_training():
    run = experiment.from_flags(learning_rate=0.1, label_noise=0.4)
    often, seldom = (noisy_labels.rank(run, m) for m in ([1, 2], [2]))
    assert often["rows"][4:] == seldom["rows"]
    assert often["test_accuracy"] == seldom["test_accuracy"]


@pytest.mark.slow
def test_script_ends_with_a_table_and_goes_on_where_it_was(
    tmp_path, monkeypatch
):
    def fail(*args):
        raise AssertionError("runs again")

    flags.FLAGS.unparse_flags()
    flags.FLAGS(
        [
            "test",
            *experiments.QUICK,
            f"--output_dir={tmp_path}",
            "--seeds=1",
            "--moments=1,2",
        ]
    )
    noisy_labels.main(["test"])
    rows = pd.read_csv(tmp_path / "noisy_labels.csv")
    groups = rows.groupby(["method", "epoch"])["score"].apply(list)
    assert groups.index.tolist() == [
        (method, epoch) for method in ("bounded FP", "none") for epoch in (1, 2)
    ]
    assert all(
        scores == ["loss", "margin", "given trace", "sampled trace"]
        for scores in groups
    )
    assert rows["area"].between(0, 1).all()
    first = (tmp_path / "noisy_labels.md").read_text()
    assert (tmp_path / "noisy_labels.png").stat().st_size > 10_000
    monkeypatch.setattr(noisy_labels, "rank", fail)
    noisy_labels.main(["test"])
    assert (tmp_path / "noisy_labels.md").read_text() == first
