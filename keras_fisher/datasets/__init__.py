"""Data sets to watch the Fisher Information Matrix on."""

from keras_fisher.datasets.images import augment
from keras_fisher.datasets.images import normalize
from keras_fisher.datasets.label_noise import add_label_noise
from keras_fisher.datasets.loading import load

__all__ = ["add_label_noise", "augment", "load", "normalize"]
