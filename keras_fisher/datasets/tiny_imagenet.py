"""Tiny ImageNet from a local folder, through the ImageFolder of TFDS."""

from __future__ import annotations

import hashlib
import os
import pathlib
import tempfile
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds

_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_FOLDER = "tiny-imagenet-200"
_SHAPE = (64, 64, 3)


def load_tiny_imagenet(
    split: Any,
    *,
    data_dir: pathlib.Path,
    manual_dir: pathlib.Path,
    shuffle_files: bool = False,
    download: bool = True,
    **kwargs: Any,
) -> tuple[Any, tfds.core.DatasetInfo]:
    """Read the unpacked archive, or a folder in the layout of ImageFolder.

    The archive keeps its images in `train/<class>/images`, and in `val/images`
    with their classes in a text file. ImageFolder wants `<split>/<class>`: it
    gets a tree of symbolic links, made once and kept in `data_dir`. Nothing is
    written to `manual_dir`.

    The test set is what the archive calls `val`, since the images of its
    `test` have no labels; a `test` with a folder for each class comes first.

    Part of a split is cut out while reading: the images before it are read as
    well, in every epoch that is not cached.

    Args:
        split: What to load, as for `tfds.load`.
        data_dir: Folder for the links.
        manual_dir: The unpacked folder, or the one it is in.
        shuffle_files: Whether to read the images of a split in a new order
            each time.
        download: Not used, since nothing is downloaded.
        **kwargs: Further arguments of `tfds.core.DatasetBuilder.as_dataset`.

    Returns:
        Data sets of pairs of a uint8 image of shape `(64, 64, 3)` and an int64
        label, in the structure of `split`, and their `tfds.core.DatasetInfo`.
        Classes are numbered in the order of their names.

    Raises:
        FileNotFoundError: If there is no such folder.
        RuntimeError: If the links cannot be written.
        ValueError: If the folder is not as described above, if there is no
            split of that name, or if part of a split is to be shuffled.
    """
    del download
    links = _links(_find(manual_dir))
    # A name that tells the links apart, should the images move or change.
    digest = hashlib.sha256(repr(sorted(links.items())).encode()).hexdigest()
    tree = data_dir / "tiny_imagenet" / digest[:16]
    _write_once(links, tree)
    builder = tfds.folder_dataset.ImageFolder(str(tree), shape=_SHAPE)
    splits = builder.info.splits

    def read(spec: Any) -> tf.data.Dataset:
        parts = tfds.core.ReadInstruction.from_spec(spec).to_absolute(splits)
        first, *others = map(read_part, parts)
        for other in others:
            first = first.concatenate(other)
        return first

    # ImageFolder reads whole splits only.
    def read_part(part: Any) -> tf.data.Dataset:
        size = splits[part.splitname].num_examples
        start = 0 if part.from_ is None else part.from_
        stop = size if part.to is None else part.to
        is_whole = (start, stop) == (0, size)
        if shuffle_files and not is_whole:
            raise ValueError(
                "With shuffle_files=True a part of Tiny ImageNet would hold "
                f"other images each time. Received: split={split!r}. Call "
                "`.shuffle()` on the result instead."
            )
        dataset = builder.as_dataset(
            split=part.splitname,
            shuffle_files=shuffle_files,
            as_supervised=True,
            **kwargs,
        )
        return dataset if is_whole else dataset.skip(start).take(stop - start)

    split = {name: name for name in splits} if split is None else split
    return tf.nest.map_structure(read, split), builder.info


def _find(manual_dir: pathlib.Path) -> pathlib.Path:
    """Returns the folder that holds the training images."""
    for root in (manual_dir / _FOLDER, manual_dir):
        if (root / "train").is_dir():
            return root
    raise FileNotFoundError(
        f"No folder 'train' of Tiny ImageNet in {manual_dir / _FOLDER} or "
        f"{manual_dir}. Download {_URL}, unpack it, and pass the unpacked "
        "folder, or the one it is in, as `manual_dir`."
    )


def _links(root: pathlib.Path) -> dict[str, str]:
    """Returns what each link is to point to: classes, or single images."""
    classes = _class_folders(root / "train")
    links = {f"train/{name}": images for name, images in classes.items()}
    for split in ("test", "val"):
        # All images without labels are in one folder, which is no class.
        labelled = _class_folders(root / split)
        if labelled and labelled.keys() <= classes.keys():
            test = {f"test/{name}": path for name, path in labelled.items()}
            return links | test
    annotations = root / "val" / "val_annotations.txt"
    if not (classes and annotations.is_file()):
        raise ValueError(
            "The folder of Tiny ImageNet must have train/<class>/images, "
            "val/images and val/val_annotations.txt, or else train/<class> "
            f"and test/<class>. Received: {root}. Unpack {_URL} again."
        )
    return links | _annotated_images(annotations, classes)


def _class_folders(split: pathlib.Path) -> dict[str, str]:
    """Returns the folder of images for each class of a split."""
    if not split.is_dir():
        return {}
    return {
        folder.name: str(
            folder / "images" if (folder / "images").is_dir() else folder
        )
        for folder in split.iterdir()
        if folder.is_dir() and not folder.name.startswith(".")
    }


def _annotated_images(
    annotations: pathlib.Path, classes: dict[str, str]
) -> dict[str, str]:
    """Returns links to the images that a text file names the classes of."""
    images = annotations.parent / "images"
    present = set(os.listdir(images)) if images.is_dir() else set()
    links = {}
    missing = []
    for line in annotations.read_text().splitlines():
        # The rest of the line is a bounding box.
        image, label, *_ = line.split("\t")
        links[f"test/{label}/{image}"] = str(images / image)
        if image not in present or label not in classes:
            missing.append(image)
    if missing or not links:
        raise ValueError(
            f"{len(missing)} of the {len(links)} images in {annotations} are "
            f"missing, or have a class that is, such as {missing[:1]}. Unpack "
            f"{_URL} again."
        )
    return links


def _write_once(links: dict[str, str], tree: pathlib.Path) -> None:
    """Makes a folder of symbolic links, all of them or none."""
    if tree.is_dir():
        return
    try:
        tree.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=tree.parent) as temporary:
            draft = pathlib.Path(temporary, "links")
            for name, target in links.items():
                link = draft / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(target, target_is_directory=True)
            draft.rename(tree)
    except OSError as error:
        # Another process was first, with the same links.
        if tree.is_dir():
            return
        raise RuntimeError(
            f"Could not write links to the images of Tiny ImageNet to {tree}: "
            f"{type(error).__name__}: {error}. Pass a `data_dir` that can be "
            "written to and has symbolic links."
        ) from error
