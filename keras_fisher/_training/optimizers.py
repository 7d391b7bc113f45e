"""What a step has to know of a Keras optimizer."""

from __future__ import annotations

import keras
import tensorflow as tf


def skips_steps(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether it skips steps with gradients that are not finite."""
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer)


def accumulation_steps(optimizer: keras.optimizers.Optimizer) -> int:
    """Number of batches whose gradients make up an update."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return optimizer.gradient_accumulation_steps or 1


def check_accumulation(optimizer: keras.optimizers.Optimizer) -> None:
    """Raises a `ValueError` for accumulation that nobody counts."""
    several = getattr(optimizer, "inner_optimizer", optimizer)
    found = [
        each.gradient_accumulation_steps
        for each in getattr(several, "optimizers", ())
    ]
    if any(found):
        raise ValueError(
            "A `MultiOptimizer` does not tell which batches make up an update "
            "if its optimizers accumulate gradients, and a penalty is divided "
            "among these. Received: optimizers with "
            f"gradient_accumulation_steps={found}. Leave it out of them, and "
            "train with larger batches, which the `micro_batch_size` of a "
            "penalty helps to fit into memory."
        )


def ends_step(optimizer: keras.optimizers.Optimizer) -> tf.Tensor:
    """Whether the next gradients are the last of those that one update takes.

    Of an optimizer that accumulates them: its `iterations` counts updates.
    """
    return (_batches(optimizer) + 1) % accumulation_steps(optimizer) == 0


def is_amid_step(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether an update waits for more batches; waits for those under way."""
    accumulated = accumulation_steps(optimizer)
    return accumulated > 1 and int(_batches(optimizer)) % accumulated != 0


def _batches(optimizer: keras.optimizers.Optimizer) -> tf.Tensor:
    """How many there were, by the optimizer's own variable."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    (batches,) = [v for v in optimizer.variables if v.name == "iteration"]
    return tf.convert_to_tensor(batches)


def step_of(model: keras.Model) -> int:
    """Number of updates that a model has seen; waits for those under way."""
    return int(tf.convert_to_tensor(model.optimizer.iterations))
