"""The handwritten digits of scikit-learn as a TFDS builder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

# One example in five is a test example.
_TEST_STRIDE = 5

_DESCRIPTION = """\
1,797 handwritten digits, scanned and reduced to 8x8 pixels with values from 0
to 16: the copy of the UCI data set that comes with scikit-learn.
"""

_CITATION = """\
@misc{alpaydin1998optical,
  title = {Optical Recognition of Handwritten Digits},
  author = {Alpaydin, Ethem and Kaynak, Cenk},
  howpublished = {UCI Machine Learning Repository},
  year = {1998},
  doi = {10.24432/C50P49}
}
"""


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,437 training and 360 test images of scikit-learn's digits.

    The split is fixed, and every digit has the same share of both parts.

    Source: [Optical Recognition of Handwritten Digits](
    https://doi.org/10.24432/C50P49) (Alpaydin and Kaynak, 1998).
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://doi.org/10.24432/C50P49",
            citation=_CITATION,
            # The white of these images is 16, not the 255 of their dtype.
            metadata=tfds.core.MetadataDict(max_pixel=16),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # Nothing to download.
        # Not at the top: only preparing the data needs the package.
        import sklearn.datasets

        digits = sklearn.datasets.load_digits()
        train, test = _stratified_split(digits.target)
        return {
            "train": self._generate_examples(
                digits.images[train], digits.target[train]
            ),
            "test": self._generate_examples(
                digits.images[test], digits.target[test]
            ),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        images = images.astype(np.uint8)[..., np.newaxis]
        for key, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield key, {"image": image, "label": int(label)}


def _stratified_split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the training and of the test examples.

    Taking every fifth example of the list sorted by label gives each class
    its share, to within one example, without a random number.
    """
    by_label = np.argsort(labels, kind="stable")
    is_test = np.arange(len(labels)) % _TEST_STRIDE == 0
    return np.sort(by_label[~is_test]), np.sort(by_label[is_test])
