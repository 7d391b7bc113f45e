"""Data sets to watch the Fisher Information Matrix on."""

from keras_fisher.datasets.label_noise import add_label_noise
from keras_fisher.datasets.loading import load

__all__ = ["add_label_noise", "load"]
