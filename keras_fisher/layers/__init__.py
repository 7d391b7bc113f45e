"""Layers: the Fisher Penalty in any Keras model, and memory for it."""

from keras_fisher.layers.regularization import FisherRegularization
from keras_fisher.layers.rematerialization import Rematerialization

__all__ = ["FisherRegularization", "Rematerialization"]
