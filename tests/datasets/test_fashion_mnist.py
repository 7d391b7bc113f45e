"""Tests of Fashion-MNIST, on small files and on those of the package."""

import gzip
import shutil
import struct

import idx_files
import numpy as np
import pytest
import requests
import tensorflow as tf
import tensorflow_datasets as tfds

from keras_fisher.datasets import fashion_mnist
from keras_fisher.datasets import load
from keras_fisher.datasets import normalize

needs_package = pytest.mark.skipif(
    not fashion_mnist.SYSTEM_FOLDER.is_dir(),
    reason=f"needs the package {fashion_mnist.PACKAGE}",
)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def no_route(*args, **kwargs):
        raise requests.exceptions.ConnectionError("no route")

    monkeypatch.setattr(requests.Session, "get", no_route)


@pytest.fixture
def no_package(monkeypatch, tmp_path):
    monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDER", tmp_path / "none")


@pytest.fixture
def folder(tmp_path, no_package):
    folder = tmp_path / "files"
    idx_files.write(folder)
    return folder


def _content(folder, prefix):
    """Returns images and labels, read with no code of the package."""
    images, labels = (
        gzip.decompress((folder / f"{prefix}-{suffix}.gz").read_bytes())
        for suffix in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    (count,) = struct.unpack(">I", labels[4:8])
    images = np.frombuffer(images[16:], np.uint8).reshape(count, 28, 28, 1)
    return images, np.frombuffer(labels[8:], np.uint8)


def _sorted(images, labels):
    order = np.lexsort(images.reshape(len(images), -1).T)
    return images[order], labels[order]


def _assert_same(dataset, images, labels):
    x, y = map(np.stack, zip(*dataset.as_numpy_iterator(), strict=True))
    x, y = _sorted(x, y)
    images, labels = _sorted(images, labels)
    np.testing.assert_allclose(x, images / 255.0, rtol=1e-6)
    np.testing.assert_array_equal(y, labels)


@pytest.mark.parametrize("compressed", [True, False])
def test_local_files_are_prepared_once_and_read_again(
    folder, tmp_path, compressed
):
    expected = {prefix: _content(folder, prefix) for prefix in idx_files.SIZES}
    if not compressed:
        for path in [*folder.iterdir()]:
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    load("fashion_mnist", data_dir=tmp_path, manual_dir=folder)
    shutil.rmtree(folder)
    datasets, info = load("fashion_mnist", data_dir=tmp_path, with_info=True)
    for split, prefix in ("train", "train"), ("test", "t10k"):
        assert datasets[split].element_spec == (
            tf.TensorSpec((28, 28, 1), tf.float32),
            tf.TensorSpec((), tf.int64),
        )
        _assert_same(datasets[split], *expected[prefix])
    assert info.features["label"].int2str(9) == "Ankle boot"


def test_files_may_be_where_tfds_looks_for_them(folder, tmp_path):
    data_dir = tmp_path / "data"
    shutil.copytree(folder, data_dir / "downloads" / "manual")
    dataset = load("fashion_mnist", "train", data_dir=data_dir)
    _assert_same(dataset, *_content(folder, "train"))


def test_folder_comes_before_the_package(folder, tmp_path, monkeypatch):
    package = tmp_path / "package"
    shutil.copytree(folder, package)
    for path in package.glob("train-*"):
        shutil.copy(package / path.name.replace("train", "t10k"), path)
    monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDER", package)
    sizes = [
        len(load("fashion_mnist", "train", data_dir=tmp_path / name, **kwargs))
        for name, kwargs in [("a", {}), ("b", {"manual_dir": folder})]
    ]
    assert sizes == [5, 12]


def test_order_is_that_of_tfds(folder, tmp_path, monkeypatch):
    """The builder of TFDS, which reads 60,000 images, given few."""
    images, labels = _content(folder, "train")
    builder = tfds.image_classification.FashionMNIST

    def split_generators(self, manager):
        examples = enumerate(zip(images, labels, strict=True))
        return {
            "train": ((k, {"image": x, "label": y}) for k, (x, y) in examples)
        }

    monkeypatch.setattr(builder, "_split_generators", split_generators)
    theirs = builder(data_dir=tmp_path / "theirs")
    theirs.download_and_prepare()
    theirs = [int(y) for _, y in theirs.as_dataset("train", as_supervised=True)]
    monkeypatch.undo()
    ours = load("fashion_mnist", "train", data_dir=tmp_path, manual_dir=folder)
    assert [int(y) for _, y in ours] == theirs
    assert theirs != labels.tolist(), "TFDS does not shuffle"


def _cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def _cut_inside(path):
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[:-1]))


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def _html(path):
    path.write_bytes(b"<html>404</html>")


def _no_idx(path):
    path.write_bytes(gzip.compress(b"<html>404</html>"))


def _empty(path):
    path.write_bytes(gzip.compress(b""))


@pytest.mark.parametrize(
    "name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]
)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_cut, "Cannot decompress"),
        (_flip, "Cannot decompress"),
        (_html, "Cannot decompress"),
        (_cut_inside, "says that it holds"),
        (_no_idx, "Received: 3c 68 74 6d 6c"),
        (_empty, "Received: nothing"),
    ],
)
def test_damaged_file_is_an_error_that_names_it(
    folder, tmp_path, name, damage, said
):
    damage(folder / name)
    with pytest.raises(ValueError, match=said) as error:
        load("fashion_mnist", data_dir=tmp_path, manual_dir=folder)
    message = str(error.value)
    assert str(folder / name) in message
    assert "'dataset-fashion-mnist'" in message
    # Nothing is left that would be read the next time.
    assert not (tmp_path / "fashion_mnist" / "3.0.1").exists()


@pytest.mark.parametrize(
    ("suffix", "array"),
    [
        ("images-idx3", np.zeros((12, 27, 28), np.uint8)),
        ("images-idx3", np.zeros((11, 28, 28), np.uint8)),
        ("labels-idx1", np.full(12, 10, np.uint8)),
    ],
)
def test_other_pictures_are_an_error(folder, tmp_path, suffix, array):
    idx_files.write_array(folder / f"train-{suffix}-ubyte.gz", array)
    with pytest.raises(ValueError, match=r"28x28.*below 10.*Received") as error:
        load("fashion_mnist", data_dir=tmp_path, manual_dir=folder)
    assert str(folder) in str(error.value)


def test_missing_file_is_an_error_that_names_it(folder, tmp_path):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="four files") as error:
        load("fashion_mnist", data_dir=tmp_path, manual_dir=folder)
    assert "lacks ['t10k-labels-idx1-ubyte']" in str(error.value)


def test_without_files_and_network_the_error_names_the_package(
    no_package, tmp_path
):
    with pytest.raises(RuntimeError, match="no route") as error:
        load("fashion_mnist", data_dir=tmp_path)
    assert "apt-get install dataset-fashion-mnist" in str(error.value)


def test_nothing_is_prepared_that_shall_not_be(folder, tmp_path):
    with pytest.raises(AssertionError, match="could not find data"):
        load(
            "fashion_mnist",
            data_dir=tmp_path,
            manual_dir=folder,
            download=False,
        )


@needs_package
def test_package_has_the_pictures_that_the_statistics_are_of():
    images, labels = fashion_mnist.read_split(
        fashion_mnist.SYSTEM_FOLDER, "train"
    )
    assert np.bincount(labels).tolist() == [6000] * 10
    x = tf.convert_to_tensor(images[..., np.newaxis] / np.float32(255))
    dataset = tf.data.Dataset.from_tensors((x, labels))
    ((x, _),) = normalize(dataset, "fashion_mnist")
    # The statistics have four digits.
    assert np.mean(x, dtype=np.float64) == pytest.approx(0, abs=2e-4)
    assert np.std(x, dtype=np.float64) == pytest.approx(1, abs=2e-4)


@needs_package
@pytest.mark.slow
def test_package_is_found_by_itself(tmp_path):
    datasets = load("fashion_mnist", data_dir=tmp_path)
    sizes = {split: len(dataset) for split, dataset in datasets.items()}
    assert sizes == {"train": 60_000, "test": 10_000}
    _assert_same(
        datasets["test"], *_content(fashion_mnist.SYSTEM_FOLDER, "t10k")
    )
