"""Tr(F) in a step where no penalty measures it in passing."""

from __future__ import annotations

from keras_fisher._derivatives import forward as forward_lib
from keras_fisher.penalties.kinds import FisherPenalty


class TraceMeasurement(FisherPenalty):
    """Measures Tr(F) as the Fisher Penalty does, and penalizes nothing.

    Its forward pass is the same to the last bit as without it.
    """

    def __init__(self):
        super().__init__(alpha=0.0)

    def alpha_at(self, step):
        return 0.0  # not a variable, as what may be changed

    def forward(self, layer, x, *, seed=0, watch_inputs=False):
        return forward_lib.run(layer, x, differentiable=False)
