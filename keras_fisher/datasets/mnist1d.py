"""MNIST-1D as a TFDS builder that needs no download."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from keras_fisher.datasets.random_state import borrowed_random_state

_DESCRIPTION = """\
Ten hand-drawn templates of the digits 0 to 9, padded, scaled, shifted, sheared
and covered with noise: 5,000 signals of length 40 that tell apart linear,
dense, convolutional and recurrent models in about a minute of training.
"""

_CITATION = """\
@inproceedings{greydanus2024mnist1d,
  title = {Scaling Down Deep Learning with {MNIST-1D}},
  author = {Greydanus, Sam and Kobak, Dmitry},
  booktitle = {International Conference on Machine Learning},
  year = {2024}
}
"""


class Mnist1d(tfds.core.GeneratorBasedBuilder):
    """4,000 training and 1,000 test signals of the `mnist1d` package.

    The signals are drawn anew with the default arguments of the package, seed
    included, so every machine gets the same ones.

    Source: [Scaling Down Deep Learning with MNIST-1D](
    https://arxiv.org/abs/2011.14439) (ICML 2024).
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "signal": tfds.features.Tensor(
                        shape=(40, 1), dtype=np.float32
                    ),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("signal", "label"),
            homepage="https://github.com/greydanus/mnist1d",
            citation=_CITATION,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # Nothing to download.
        data = _make_dataset()
        return {
            "train": self._generate_examples(data["x"], data["y"]),
            "test": self._generate_examples(data["x_test"], data["y_test"]),
        }

    def _generate_examples(
        self, signals: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        signals = signals.astype(np.float32)[..., np.newaxis]
        for key, (signal, label) in enumerate(
            zip(signals, labels, strict=True)
        ):
            yield key, {"signal": signal, "label": int(label)}


def _make_dataset() -> dict[str, np.ndarray]:
    """Draws the signals; the package seeds the global generators to do so."""
    # Not at the top: the package imports matplotlib.
    import mnist1d.data

    with borrowed_random_state():
        return mnist1d.data.make_dataset(mnist1d.data.get_dataset_args())
