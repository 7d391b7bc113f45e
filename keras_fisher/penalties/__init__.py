"""Penalties: squared gradient norms that are added to the loss."""

from keras_fisher.penalties.base import Penalty
from keras_fisher.penalties.base import Term
from keras_fisher.penalties.kinds import FisherPenalty
from keras_fisher.penalties.kinds import GradientPenalty
from keras_fisher.penalties.kinds import InputGradientPenalty
from keras_fisher.penalties.kinds import UniformLabelPenalty
from keras_fisher.penalties.kinds import get

__all__ = [
    "FisherPenalty",
    "GradientPenalty",
    "InputGradientPenalty",
    "Penalty",
    "Term",
    "UniformLabelPenalty",
    "get",
]
