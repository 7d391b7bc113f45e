"""Models of the experiments, without weights."""

from keras_fisher.applications.simple_cnn import SimpleCNN

__all__ = ["SimpleCNN"]
