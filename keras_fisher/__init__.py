"""See and control the Fisher information of a network while it trains."""

from keras_fisher._common import keras_3 as _keras_3

_keras_3.check_backend()

from keras_fisher import applications
from keras_fisher import callbacks
from keras_fisher import datasets
from keras_fisher import estimates
from keras_fisher import layers
from keras_fisher import likelihoods
from keras_fisher import logs
from keras_fisher import penalties
from keras_fisher import plotting
from keras_fisher._measuring.derivative_report import DerivativeReport
from keras_fisher._measuring.derivative_report import check_derivatives
from keras_fisher._measuring.fisher_trace import fisher_trace
from keras_fisher._measuring.hessian_trace import hessian_trace
from keras_fisher.estimates import Estimate
from keras_fisher.estimates import Estimates
from keras_fisher.model import FisherModel
from keras_fisher.penalties import FisherPenalty
from keras_fisher.penalties import GradientPenalty
from keras_fisher.penalties import InputGradientPenalty
from keras_fisher.penalties import UniformLabelPenalty

__all__ = [
    "DerivativeReport",
    "Estimate",
    "Estimates",
    "FisherModel",
    "FisherPenalty",
    "GradientPenalty",
    "InputGradientPenalty",
    "UniformLabelPenalty",
    "applications",
    "callbacks",
    "check_derivatives",
    "datasets",
    "estimates",
    "fisher_trace",
    "hessian_trace",
    "layers",
    "likelihoods",
    "logs",
    "penalties",
    "plotting",
]
__version__ = "0.2.0"
