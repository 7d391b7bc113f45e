"""Callbacks that show the Fisher information while a model trains."""

from keras_fisher.callbacks.backup import BackupAndRestore
from keras_fisher.callbacks.early_phase import EarlyPhase
from keras_fisher.callbacks.tensorboard import FisherTensorBoard

__all__ = ["BackupAndRestore", "EarlyPhase", "FisherTensorBoard"]
