"""Tests of `keras_fisher.datasets.load("tiny_imagenet", ...)`."""

import os
import pathlib
import sys

import numpy as np
import pytest
import tensorflow as tf

from keras_fisher.datasets import load

_CLASSES = ["n01443537", "n02124075", "n07734744"]
_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


def _write_image(path, level, channels=3):
    """Writes an image of one grey level, which JPEG keeps exactly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.full((64, 64, channels), level, np.uint8)
    path.write_bytes(tf.io.encode_jpeg(image, quality=100).numpy())


def _write_archive(root):
    """Writes what the official archive holds, with a few images a class.

    A training image has the grey level `50 * label + number`, a test image
    `200 + 10 * label + number`.
    """
    for label, name in enumerate(_CLASSES):
        for i in range(4):
            # Some of the real images have one channel as well.
            _write_image(
                root / "train" / name / "images" / f"{name}_{i}.JPEG",
                50 * label + i,
                channels=1 if i == 0 else 3,
            )
        (root / "train" / name / f"{name}_boxes.txt").write_text("boxes")
    lines = []
    # In the order of the files, the classes are mixed.
    for i, label in enumerate([2, 0, 1, 2]):
        image = f"val_{i}.JPEG"
        _write_image(root / "val" / "images" / image, 200 + 10 * label + i)
        lines.append(f"{image}\t{_CLASSES[label]}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    for i in range(2):
        _write_image(root / "test" / "images" / f"test_{i}.JPEG", 255)
    (root / "wnids.txt").write_text("\n".join(reversed(_CLASSES)) + "\n")
    (root / "words.txt").write_text("n01443537\tgoldfish\n")


def _write_folders(root, train="{}", test="test/{}"):
    """Writes the images of `_write_archive` with a folder for each class."""
    for label, name in enumerate(_CLASSES):
        for i in range(4):
            folder = root / "train" / train.format(name)
            _write_image(folder / f"{i}.JPEG", 50 * label + i)
    for i, label in enumerate([2, 0, 1, 2]):
        folder = root / test.format(_CLASSES[label])
        _write_image(folder / f"{i}.png", 200 + 10 * label + i)


_TRAIN = sorted((50 * label + i, label) for label in range(3) for i in range(4))
_TEST = sorted((200 + 10 * y + i, y) for i, y in enumerate([2, 0, 1, 2]))


@pytest.fixture
def archive(tmp_path):
    root = tmp_path / "manual" / "tiny-imagenet-200"
    _write_archive(root)
    return root


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "data"


def _pairs(dataset):
    """Returns the grey level and the label of every image, in order."""
    pairs = []
    for x, y in dataset.as_numpy_iterator():
        assert x.shape == (64, 64, 3)
        assert np.ptp(x) == 0
        pairs.append((round(255 * float(x[0, 0, 0])), int(y)))
    return pairs


def _files(root):
    """Returns every file under `root` with its content."""
    return {
        str(path): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_archive_gives_its_training_images_and_val_as_test(archive, data_dir):
    datasets, info = load(
        "tiny_imagenet", data_dir=data_dir, manual_dir=archive, with_info=True
    )
    assert set(datasets) == {"train", "test"}
    for dataset in datasets.values():
        assert dataset.element_spec == (
            tf.TensorSpec((64, 64, 3), tf.float32),
            tf.TensorSpec((), tf.int64),
        )
    assert sorted(_pairs(datasets["train"])) == _TRAIN
    assert sorted(_pairs(datasets["test"])) == _TEST
    assert info.features["label"].names == _CLASSES
    assert info.splits["train"].num_examples == len(datasets["train"]) == 12
    assert info.splits["test"].num_examples == len(datasets["test"]) == 4


def test_folder_of_the_user_stays_as_it_is(archive, data_dir):
    before = _files(archive.parent)
    for _ in range(2):
        load("tiny_imagenet", data_dir=data_dir, manual_dir=archive)
    assert _files(archive.parent) == before


def test_links_are_written_once_and_anew_if_the_images_change(
    archive, data_dir
):
    def trees():
        load("tiny_imagenet", data_dir=data_dir, manual_dir=archive)
        return set((data_dir / "tiny_imagenet").iterdir())

    first = trees()
    assert trees() == first
    assert len(first) == 1
    _write_image(archive / "train" / "n09999999" / "images" / "0.JPEG", 250)
    assert len(trees()) == 2
    _, info = load(
        "tiny_imagenet", data_dir=data_dir, manual_dir=archive, with_info=True
    )
    assert info.features["label"].num_classes == 4


def test_links_that_another_process_has_written_are_taken(
    archive, data_dir, monkeypatch
):
    rename = pathlib.Path.rename

    def late(self, target):
        rename(self, target)  # as the other one does, a moment before
        raise FileExistsError(target)

    monkeypatch.setattr(pathlib.Path, "rename", late)
    datasets = load("tiny_imagenet", data_dir=data_dir, manual_dir=archive)
    assert sorted(_pairs(datasets["test"])) == _TEST


def test_folder_is_found_where_tfds_keeps_manual_downloads(
    monkeypatch, tmp_path
):
    _write_archive(tmp_path / "downloads" / "manual" / "tiny-imagenet-200")
    assert len(load("tiny_imagenet", "train", data_dir=tmp_path)) == 12
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert len(load("tiny_imagenet", "test")) == 4


def test_folder_above_the_archive_and_relative_paths_will_do(
    monkeypatch, archive, data_dir
):
    monkeypatch.chdir(archive.parent)
    dataset = load(
        "tiny_imagenet", "test", data_dir=data_dir, manual_dir=os.curdir
    )
    monkeypatch.chdir("/")
    assert sorted(_pairs(dataset)) == _TEST


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("{}", "test/{}"),
        ("{}", "val/{}"),
        # Only the test images sorted into classes, as many scripts do.
        ("{}/images", "val/{}"),
        ("{}/images", "val/{}/images"),
    ],
)
def test_folder_with_classes_in_each_split_is_taken_too(
    tmp_path, data_dir, train, test
):
    root = tmp_path / "images"
    _write_folders(root, train, test)
    # Left there by a notebook.
    (root / "train" / ".ipynb_checkpoints").mkdir()
    datasets = load("tiny_imagenet", data_dir=data_dir, manual_dir=root)
    assert sorted(_pairs(datasets["train"])) == _TRAIN
    assert sorted(_pairs(datasets["test"])) == _TEST


def test_split_takes_the_forms_that_tfds_takes(archive, data_dir):
    def read(split):
        return load(
            "tiny_imagenet", split, data_dir=data_dir, manual_dir=archive
        )

    whole = _pairs(read("train"))
    first, last = map(_pairs, read(["train[:25%]", "train[25%:]"]))
    assert first == whole[:3]
    assert last == whole[3:]
    assert _pairs(read("train[-2:]")) == whole[-2:]
    assert len(read("train[1:3]")) == 2
    assert sorted(_pairs(read("train+test"))) == _TRAIN + _TEST


def test_images_come_mixed_and_in_the_same_order_unless_shuffled(
    archive, data_dir
):
    def read(**kwargs):
        return load(
            "tiny_imagenet",
            "train",
            data_dir=data_dir,
            manual_dir=archive,
            **kwargs,
        )

    pairs = _pairs(read())
    assert pairs != sorted(pairs)
    assert _pairs(read()) == pairs
    shuffled = read(shuffle_files=True)
    epochs = [_pairs(shuffled) for _ in range(3)]
    assert any(epoch != pairs for epoch in epochs)
    assert all(sorted(epoch) == _TRAIN for epoch in epochs)


def test_batch_size_and_arguments_of_tfds_work(archive, data_dir):
    dataset = load(
        "tiny_imagenet",
        "train",
        data_dir=data_dir,
        manual_dir=archive,
        batch_size=5,
        download=False,
    )
    assert [len(y) for _, y in dataset] == [5, 5, 2]


def test_part_of_a_split_is_not_shuffled_by_files(archive, data_dir):
    with pytest.raises(ValueError, match=r"Received: split='train\[:5\]'"):
        load(
            "tiny_imagenet",
            "train[:5]",
            data_dir=data_dir,
            manual_dir=archive,
            shuffle_files=True,
        )


def test_unknown_split_is_an_error_that_lists_the_splits(archive, data_dir):
    with pytest.raises(ValueError, match="train") as error:
        load("tiny_imagenet", "val", data_dir=data_dir, manual_dir=archive)
    assert "'val'" in str(error.value)


def test_missing_folder_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load("tiny_imagenet", "train", data_dir=tmp_path)
    message = str(error.value)
    manual_dir = tmp_path / "downloads" / "manual"
    for part in (
        str(manual_dir / "tiny-imagenet-200"),
        _URL,
        "unpack",
        "`manual_dir`",
    ):
        assert part in message, f"{part!r} is not in {message!r}"
    assert not list(tmp_path.iterdir()), "left something behind"


def test_folder_without_labelled_test_images_is_an_error(archive, data_dir):
    (archive / "val" / "val_annotations.txt").unlink()
    with pytest.raises(ValueError, match=r"val_annotations\.txt") as error:
        load("tiny_imagenet", "train", data_dir=data_dir, manual_dir=archive)
    assert str(archive) in str(error.value)
    assert _URL in str(error.value)


def test_archive_unpacked_in_part_is_an_error(archive, data_dir):
    (archive / "val" / "images" / "val_2.JPEG").unlink()
    with pytest.raises(ValueError, match=r"1 of the 4 .*val_2\.JPEG"):
        load("tiny_imagenet", "train", data_dir=data_dir, manual_dir=archive)


def test_links_that_cannot_be_written_are_an_error(archive, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RuntimeError, match="`data_dir`") as error:
        load(
            "tiny_imagenet",
            "train",
            data_dir=tmp_path / "file",
            manual_dir=archive,
        )
    assert isinstance(error.value.__cause__, OSError)


def test_missing_package_is_named_with_the_way_to_install_it(
    monkeypatch, archive, data_dir
):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.delitem(
        sys.modules, "keras_fisher.datasets.tiny_imagenet", raising=False
    )
    monkeypatch.delattr("keras_fisher.datasets.tiny_imagenet", raising=False)
    with pytest.raises(ImportError, match="pip install"):
        load("tiny_imagenet", data_dir=data_dir, manual_dir=archive)
