"""The examples of a curve of little noise: the same ones again and again."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_fisher._common import checks


class Probe:
    """Fixed examples on which Tr(F) is measured while a model trains.

    The labels ŷ are drawn from the same random numbers each time, so that the
    curve shows the change of the network and not of the draw.

    Args:
        data: Examples `x`, or a tuple `(x, y)`; `x` is an array, a structure
            of arrays or a `tf.data.Dataset`, as `fisher_trace` takes them.
        every: `"epoch"`, or a number of optimizer steps.
        estimator: As of `fisher_trace`; `"empirical"` needs `y`.
        seed: Seed of the labels.

    Raises:
        ValueError: If there is no example, or an argument is not as described.
    """

    def __init__(
        self,
        data: Any,
        every: str | int = "epoch",
        estimator: str = "monte_carlo",
        seed: int = 0,
    ):
        if every != "epoch":
            every = checks.integer(
                "probe_every", every, 1, 'of at least 1, or "epoch"'
            )
        self.x: Any
        self.y: Any
        given = data if isinstance(data, tuple) else (data, None)
        if len(given) != 2:
            raise ValueError(
                "`probe` takes inputs, or `(inputs, labels)`. Received: a "
                f"tuple of {len(given)}. Leave out weights; several inputs "
                "are a list."
            )
        self.x, self.y = given
        self.every = every
        self.estimator = estimator
        self.seed = seed
        for leaf in self._leaves():
            if np.shape(leaf)[:1] in ((), (0,)):
                raise ValueError(
                    "`probe` must hold at least one example. Received: an "
                    f"array of shape {np.shape(leaf)}. Pass some rows of the "
                    "data, for example `probe=x_train[:256]`."
                )

    def _leaves(self) -> list:
        if isinstance(self.x, tf.data.Dataset):
            return []
        return keras.tree.flatten(self.x)

    def check(self, network: keras.Model) -> None:
        """Raises a `ValueError` if the network takes other inputs."""
        expected = getattr(network, "input_shape", None)
        leaves = self._leaves()
        if not isinstance(expected, tuple) or len(leaves) != 1:
            return
        shape = np.shape(leaves[0])
        if len(shape) != len(expected) or any(
            wanted not in (None, size)
            for size, wanted in zip(shape[1:], expected[1:])
        ):
            raise ValueError(
                "`probe` must have the shape of the model's inputs, "
                f"{expected}. Received: an array of shape {shape}."
            )

    def is_due(self, before: int, after: int) -> bool:
        """Whether a multiple of `every` lies in `(before, after]`."""
        if self.every == "epoch":
            return False
        return after // self.every > before // self.every
