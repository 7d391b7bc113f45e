"""Predictive distributions p(y|x): what outputs say of labels."""

from keras_fisher.likelihoods import draws
from keras_fisher.likelihoods.base import Likelihood
from keras_fisher.likelihoods.bernoulli import Bernoulli
from keras_fisher.likelihoods.categorical import Categorical
from keras_fisher.likelihoods.gaussian import Gaussian
from keras_fisher.likelihoods.joint import Joint
from keras_fisher.likelihoods.laplace import Laplace
from keras_fisher.likelihoods.lookup import get
from keras_fisher.likelihoods.lookup import is_auto
from keras_fisher.likelihoods.lookup import of_model
from keras_fisher.likelihoods.poisson import Poisson

__all__ = [
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Joint",
    "Laplace",
    "Likelihood",
    "Poisson",
    "draws",
    "get",
    "is_auto",
    "of_model",
]
