"""Tests of `keras_fisher.datasets.load` and of the embedded data sets."""

import os
import pathlib
import random
import shutil
import subprocess
import sys
import types
import urllib.error

import numpy as np
import pytest
import requests
import tensorflow as tf
import tensorflow_datasets as tfds

from keras_fisher.datasets import load
from keras_fisher.datasets import random_state

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tensorflow_datasets")


def _arrays(dataset):
    """Returns all examples as two arrays, sorted by their inputs."""
    pairs = list(dataset.as_numpy_iterator())
    x = np.stack([x for x, _ in pairs])
    y = np.stack([y for _, y in pairs])
    order = np.lexsort(x.reshape(len(x), -1).T)
    return x[order], y[order]


def _run(script, *arguments, **environment):
    """Starts a fresh interpreter that finds this package."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(_ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _result(process):
    """Returns the last line that a process printed, and its standard error."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output.splitlines()[-1], errors


@pytest.mark.parametrize(
    ("name", "shape", "sizes"),
    [
        ("mnist1d", (40, 1), {"train": 4000, "test": 1000}),
        ("digits", (8, 8, 1), {"train": 1437, "test": 360}),
    ],
)
def test_embedded_data_set_has_the_stated_size_and_types(
    data_dir, name, shape, sizes
):
    datasets = load(name, data_dir=data_dir)
    assert {key: len(value) for key, value in datasets.items()} == sizes
    for dataset in datasets.values():
        assert dataset.element_spec == (
            tf.TensorSpec(shape, tf.float32),
            tf.TensorSpec((), tf.int64),
        )
        classes = {int(y) for _, y in dataset}
        assert classes == set(range(10)), f"classes {classes}"


def test_mnist1d_is_what_its_package_generates(data_dir):
    import mnist1d.data

    expected = mnist1d.data.make_dataset(mnist1d.data.get_dataset_args())
    for split, suffix in [("train", ""), ("test", "_test")]:
        signals = expected[f"x{suffix}"].astype(np.float32)
        order = np.lexsort(signals.T)
        x, y = _arrays(load("mnist1d", split, data_dir=data_dir))
        np.testing.assert_array_equal(x[..., 0], signals[order])
        np.testing.assert_array_equal(y, expected[f"y{suffix}"][order])


def test_digits_are_those_of_scikit_learn_scaled_to_one(data_dir):
    import sklearn.datasets

    expected = sklearn.datasets.load_digits()
    images = expected.data.astype(np.float32) / 16
    order = np.lexsort(images.T)
    x, y = _arrays(load("digits", "train+test", data_dir=data_dir))
    np.testing.assert_array_equal(x.reshape(-1, 64), images[order])
    np.testing.assert_array_equal(y, expected.target[order])
    assert (x.min(), x.max()) == (0, 1)


def test_digits_give_every_class_its_share_of_the_test_split(data_dir):
    train, test = (
        np.bincount([y for _, y in load("digits", split, data_dir=data_dir)])
        for split in ("train", "test")
    )
    error = np.abs(test - (train + test) / 5)
    assert error.max() <= 1, f"off by {error} examples"


def test_split_takes_the_forms_that_tfds_takes(data_dir):
    first, last = load(
        "digits", ["train[:10]", "train[-5:]"], data_dir=data_dir
    )
    assert (len(first), len(last)) == (10, 5)
    assert len(load("digits", "train[:10%]+test", data_dir=data_dir)) == 504
    assert set(load("digits", data_dir=data_dir)) == {"train", "test"}


def test_examples_come_in_the_same_order_every_time(data_dir):
    first, second = (
        [y for _, y in load("digits", "train", data_dir=data_dir)]
        for _ in range(2)
    )
    assert first == second


def test_batch_size_batches_and_keeps_the_smaller_last_batch(data_dir):
    dataset = load("digits", "test", data_dir=data_dir, batch_size=100)
    sizes = [len(y) for _, y in dataset]
    assert sizes == [100, 100, 100, 60]
    assert dataset.element_spec[0].shape.as_list() == [None, 8, 8, 1]


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "100"])
def test_batch_size_that_is_no_positive_integer_is_an_error(
    data_dir, batch_size
):
    with pytest.raises(ValueError, match="an integer of at least 1") as error:
        load("digits", "test", data_dir=data_dir, batch_size=batch_size)
    assert f"batch_size={batch_size!r}" in str(error.value)


def test_features_that_are_no_pairs_are_refused(data_dir):
    with pytest.raises(ValueError, match="as_supervised=False"):
        load("digits", "test", data_dir=data_dir, as_supervised=False)
    load("digits", "test", data_dir=data_dir, as_supervised=True)


def test_info_tells_the_classes(data_dir):
    dataset, info = load("digits", "test", data_dir=data_dir, with_info=True)
    assert info.features["label"].num_classes == 10
    assert info.splits["test"].num_examples == len(dataset) == 360


@pytest.mark.parametrize("name", ["mnist1d", "digits"])
def test_loading_leaves_the_global_random_state_alone(tmp_path, name):
    random.seed(3)
    np.random.seed(3)
    expected = random.random(), np.random.rand()
    for moment in ("preparing", "reading"):
        random.seed(3)
        np.random.seed(3)
        load(name, "train", data_dir=tmp_path)
        drawn = random.random(), np.random.rand()
        assert drawn == expected, f"after {moment}: {drawn}, not {expected}"


def test_what_is_borrowed_is_random_anew():
    random.seed(3)
    np.random.seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist()
    drawn = []
    for _ in range(2):
        with random_state.borrowed_random_state():
            drawn += [random.random(), np.random.random()]
    assert len({*drawn}) == 4, drawn
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_builder_alone_leaves_the_global_random_state_alone(data_dir, tmp_path):
    load("mnist1d", data_dir=data_dir)  # Registers the builder.
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    tfds.builder("mnist1d", data_dir=tmp_path).download_and_prepare()
    assert np.random.rand() == expected


def test_what_a_package_lacks_itself_is_not_explained(tmp_path, monkeypatch):
    package = tmp_path / "mnist1d"
    package.mkdir()
    (package / "__init__.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [*sys.modules]:
        if name.partition(".")[0] == "mnist1d":
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="no_such_module") as error:
        load("mnist1d", "train", data_dir=tmp_path)
    assert "pip install" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("mnist1d", "mnist1d", "'mnist1d'"),
        ("digits", "sklearn", "'scikit-learn'"),
        ("mnist1d", "tensorflow_datasets", "'tensorflow-datasets'"),
    ],
)
def test_missing_package_is_named_with_the_way_to_install_it(
    tmp_path, monkeypatch, name, module, package
):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"{module}.data", raising=False)
    monkeypatch.delitem(sys.modules, f"{module}.datasets", raising=False)
    with pytest.raises(ImportError, match=package) as error:
        load(name, "train", data_dir=tmp_path)
    assert 'pip install "keras_fisher[data]"' in str(error.value)


@pytest.mark.parametrize(
    ("name", "module"), [("mnist1d", "mnist1d"), ("digits", "sklearn")]
)
def test_prepared_data_set_is_read_without_its_package(
    data_dir, monkeypatch, name, module
):
    load(name, data_dir=data_dir)
    monkeypatch.setitem(sys.modules, module, None)
    assert len(load(name, "test", data_dir=data_dir)) > 0


@pytest.mark.parametrize("name", ["no_such_set", "", " ", None])
def test_unknown_name_is_an_error_that_lists_the_embedded(name, tmp_path):
    with pytest.raises(ValueError, match=f"name={name!r}") as error:
        load(name, "train", data_dir=tmp_path)
    message = str(error.value)
    assert "'digits' and 'mnist1d'" in message
    assert "'tiny_imagenet' and any other name of TensorFlow" in message
    assert len(message) < 300, f"{len(message)} characters"


def test_unknown_split_is_an_error_that_lists_the_splits(data_dir):
    with pytest.raises(ValueError, match="train") as error:
        load("digits", "validation", data_dir=data_dir)
    assert "validation" in str(error.value)


@pytest.mark.parametrize(
    "failure",
    [
        requests.exceptions.ConnectionError("no route"),
        urllib.error.URLError("no route"),
        tfds.download.DownloadError("HTTP code: 404"),
    ],
)
def test_failed_download_is_an_error_that_says_what_to_do(
    monkeypatch, tmp_path, failure
):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(
        tfds.download.DownloadManager, "download_and_extract", fail
    )
    with pytest.raises(RuntimeError, match="'cifar10'") as error:
        load("cifar10", "train", data_dir=tmp_path)
    assert error.value.__cause__ is failure
    message = str(error.value)
    for part in (
        str(failure),
        str(tmp_path),
        "Check the network",
        "`data_dir`",
        "TFDS_DATA_DIR",
        "`manual_dir`",
        "'digits' and 'mnist1d' need no network",
    ):
        assert part in message, f"{part!r} is not in {message!r}"


@pytest.mark.parametrize(
    ("name", "classes"), [("cifar10", 10), ("cifar100", 100)]
)
def test_cifar_comes_as_pairs_of_images_and_labels(tmp_path, name, classes):
    with tfds.testing.mock_data(num_examples=7):
        datasets, info = load(
            name, ["train", "test"], data_dir=tmp_path, with_info=True
        )
        for dataset in datasets:
            assert dataset.element_spec == (
                tf.TensorSpec((32, 32, 3), tf.float32),
                tf.TensorSpec((), tf.int64),
            )
            x, y = _arrays(dataset)
            assert len(y) == 7
            assert 0 <= x.min() < 0.1
            assert 0.9 < x.max() <= 1
            assert set(y) <= set(range(classes)), f"labels {set(y)}"
    assert info.features["label"].num_classes == classes


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_prepared_from_its_archive_and_read_again(
    monkeypatch, tmp_path, name
):
    train, test = _write_cifar(tmp_path / "archive", name)
    data_dir = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(
            tfds.download.DownloadManager,
            "download_and_extract",
            lambda self, url: str(tmp_path / "archive"),
        )
        load(name, data_dir=data_dir)
    # The archive is not there any more.
    shutil.rmtree(tmp_path / "archive")
    for split, (images, labels) in [("train", train), ("test", test)]:
        order = np.lexsort(images.reshape(len(images), -1).T)
        x, y = _arrays(load(name, split, data_dir=data_dir))
        np.testing.assert_allclose(x, images[order] / 255.0, rtol=1e-6)
        np.testing.assert_array_equal(y, labels[order])


def test_archive_in_manual_dir_is_not_downloaded(monkeypatch, tmp_path):
    def download(*args, **kwargs):
        raise AssertionError("downloads")

    monkeypatch.setattr(requests.Session, "get", download)
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"not the real one")
    # TFDS has found it, and knows the checksum of the real one.
    with pytest.raises(Exception, match="wrong checksum") as error:
        load(
            "cifar10",
            "train",
            data_dir=tmp_path / "data",
            manual_dir=str(tmp_path),
        )
    assert str(tmp_path / "cifar-10-binary.tar.gz") in str(error.value)


def _write_cifar(folder, name):
    """Writes the files of the official archive with a few random images.

    Returns:
        The images and labels of the training and of the test set.
    """
    fine = name == "cifar100"
    folder = folder / ("cifar-100-binary" if fine else "cifar-10-batches-bin")
    folder.mkdir(parents=True)
    names = "\n".join(f"class{i}" for i in range(100 if fine else 10))
    if fine:
        coarse = "\n".join(f"group{i}" for i in range(20))
        (folder / "fine_label_names.txt").write_text(names)
        (folder / "coarse_label_names.txt").write_text(coarse)
        train_files, test_files = ["train.bin"], ["test.bin"]
    else:
        (folder / "batches.meta.txt").write_text(names + "\n\n")
        train_files = [f"data_batch_{i}.bin" for i in range(1, 6)]
        test_files = ["test_batch.bin"]
    generator = np.random.default_rng(0)

    def write(file):
        images = generator.integers(0, 256, (3, 3, 32, 32), np.uint8)
        labels = generator.integers(0, 100 if fine else 10, 3, np.uint8)
        # A record is the label or labels, then red, green and blue.
        columns = [labels // 5, labels] if fine else [labels]
        records = [*(c[:, None] for c in columns), images.reshape(3, -1)]
        (folder / file).write_bytes(np.hstack(records).tobytes())
        return images.transpose(0, 2, 3, 1), labels

    def write_all(files):
        images, labels = zip(*map(write, files))
        return np.concatenate(images), np.concatenate(labels)

    return write_all(train_files), write_all(test_files)


@pytest.mark.parametrize(
    ("feature", "value", "expected"),
    [
        (tfds.features.Image(shape=(1, 1, 1)), np.uint8(255), 1.0),
        (tfds.features.Image(shape=(1, 1, 1)), np.uint8(51), 0.2),
        (
            tfds.features.Image(shape=(1, 1, 1), dtype=np.uint16),
            np.uint16(65535),
            1.0,
        ),
        (
            tfds.features.Image(shape=(1, 1, 1), dtype=np.float32),
            np.float32(0.5),
            0.5,
        ),
        (tfds.features.Tensor(shape=(), dtype=np.uint8), np.uint8(7), 7.0),
        (tfds.features.Tensor(shape=(), dtype=np.float64), 0.25, 0.25),
    ],
)
def test_images_are_scaled_and_other_numbers_cast(
    monkeypatch, feature, value, expected
):
    dataset = _load_stub(monkeypatch, feature, value, np.int32(3))
    x, y = next(iter(dataset))
    assert (x.dtype, y.dtype) == (tf.float32, tf.int64)
    np.testing.assert_allclose(x.numpy(), expected, rtol=1e-6)
    assert int(y) == 3


def test_text_stays_text_and_real_targets_stay_real(monkeypatch):
    feature = tfds.features.Text()
    dataset = _load_stub(monkeypatch, feature, "text", np.float64(0.5))
    x, y = next(iter(dataset))
    assert x.numpy() == b"text"
    assert (y.dtype, float(y)) == (tf.float64, 0.5)


def _load_stub(monkeypatch, feature, x, y):
    """Loads a data set of one example as if TFDS had it."""
    info = types.SimpleNamespace(
        features={"x": feature}, supervised_keys=("x", "y"), metadata=None
    )
    dataset = tf.data.Dataset.from_tensors((x, y))
    monkeypatch.setattr(tfds, "load", lambda *args, **kwargs: (dataset, info))
    return load("stub", "train")


def test_importing_and_loading_import_no_more_than_they_need(data_dir):
    load("digits", data_dir=data_dir)
    script = """
import sys
import keras, tensorflow
before = set(sys.modules)
import keras_fisher.datasets
imported = set(sys.modules) - before
keras_fisher.datasets.load("digits", "train", data_dir=sys.argv[1])
loaded = set(sys.modules) - before
wanted = {"tensorflow_datasets", "mnist1d", "sklearn.datasets"}
print(sorted(imported & wanted), sorted(loaded & wanted))
"""
    printed, errors = _result(_run(script, data_dir))
    assert printed == "[] ['tensorflow_datasets']"
    assert "WARNING:absl" not in errors, errors


@pytest.mark.slow
def test_two_processes_prepare_one_data_set_at_the_same_time(tmp_path):
    script = """
import pathlib, random, sys, time
import numpy as np
import tensorflow_datasets
from keras_fisher.datasets import load
# The same seeds must not lead to the same temporary folder.
random.seed(0)
np.random.seed(0)
folder = pathlib.Path(sys.argv[1])
(folder / sys.argv[2]).touch()
while len(list(folder.glob("process*"))) < 2:
    time.sleep(0.001)
dataset = load("mnist1d", "train")
print(len(dataset), sum(float(abs(x).sum()) for x, _ in
                        dataset.as_numpy_iterator()))
"""
    data_dir = tmp_path / "data"
    processes = [
        _run(script, tmp_path, name, TFDS_DATA_DIR=str(data_dir))
        for name in ("process1", "process2")
    ]
    (first, first_errors), (second, second_errors) = map(_result, processes)
    assert first == second
    assert first.startswith("4000 ")
    assert "WARNING:absl" not in first_errors + second_errors
    folders = [path.name for path in (data_dir / "mnist1d").iterdir()]
    assert folders == ["1.0.0"], f"left behind: {folders}"
