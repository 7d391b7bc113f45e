"""Random numbers for a likelihood: the same eagerly, in a graph and under XLA.

All take the `seed` that `Likelihood.sample` and `Likelihood.uniform` get.
"""

from keras_fisher._common.random_draws import gumbel
from keras_fisher._common.random_draws import integers
from keras_fisher._common.random_draws import normal
from keras_fisher._common.random_draws import uniform

__all__ = ["gumbel", "integers", "normal", "uniform"]
