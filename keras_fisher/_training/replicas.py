"""Several workers: who writes, and what Keras lacks to train by them.

Under `tf.distribute.MultiWorkerMirroredStrategy` Keras 3 fails in two places,
before and after a step: it takes the mean of the first batch over replicas,
where it only needs shapes, and a mean of scalar logs over their first axis.
The former also fails for replicas of one process with unequal parts.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf


def are_several(strategy: tf.distribute.Strategy) -> bool:
    """Whether a strategy spreads a step over several processes."""
    return isinstance(
        strategy, tf.distribute.MultiWorkerMirroredStrategy
    ) and strategy.num_replicas_in_sync > len(strategy.extended.worker_devices)


def writes(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process writes for all: it is alone, or the chief."""
    return strategy.extended.should_save_summary


def mean(strategy: tf.distribute.Strategy, value: float) -> float:
    """The mean of a number over workers; all of them have to ask for it."""
    if not are_several(strategy):
        return value
    values = strategy.run(lambda: tf.constant(value, tf.float64))
    return float(strategy.reduce("MEAN", values, axis=None))


def first_batch(strategy: tf.distribute.Strategy, iterator) -> Any:
    """What one replica of this worker gets of the next batch."""
    for _, _, batches in iterator:
        return keras.tree.map_structure(
            lambda x: strategy.experimental_local_results(x)[0], next(batches)
        )
    return None


def with_axis(strategy: tf.distribute.Strategy, logs: dict) -> dict:
    """Gives logs the axis over which Keras reduces them."""
    if not are_several(strategy):
        return logs
    return {name: tf.expand_dims(value, 0) for name, value in logs.items()}


def on_all_replicas(condition: tf.Tensor) -> tf.Tensor:
    """Whether a condition holds on all replicas, asked by each of them."""
    replica = tf.distribute.get_replica_context()
    if replica.num_replicas_in_sync == 1:
        return condition
    failures = replica.all_reduce("SUM", tf.cast(~condition, tf.float32))
    return failures == 0
