"""Replicas and workers: shares of a batch, who writes, what Keras lacks.

Under `tf.distribute.MultiWorkerMirroredStrategy` Keras 3 fails in two places,
before and after a step: it takes the mean of the first batch over replicas,
where it only needs shapes, and a mean of scalar logs over their first axis.
The former also fails for replicas of one process with unequal shares.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_fisher._common import dtypes
from keras_fisher._common import examples as examples_lib
from keras_fisher._training import optimizers


class Division(NamedTuple):
    """How replicas divide a batch among them.

    Attributes:
        examples: Number of examples of all of them, an `int64` scalar.
        copies: How many of them have the same ones: all of a process if
            `train_on_batch` got the batch, as in Keras; 1 of a data set.
    """

    examples: tf.Tensor
    copies: int


@dataclasses.dataclass(frozen=True)
class Share:
    """What the batch of one replica is of an optimizer step.

    Attributes:
        replicas: Number of replicas.
        batch_size: Number of examples in the batch, an `int64` scalar.
        batches: How many batches like it make up the step.
        weight: B_r / (B / replicas), which makes a mean over replicas one
            over examples; 1.0 where all replicas have as many.
    """

    replicas: int
    batch_size: tf.Tensor
    batches: int | tf.Tensor
    weight: float | tf.Tensor

    @classmethod
    def of(
        cls,
        x: Any,
        division: Division | None,
        optimizer: keras.optimizers.Optimizer,
        strategy: tf.distribute.Strategy,
    ) -> Share:
        """The share of a batch.

        Args:
            x: Its inputs.
            division: What there is of all replicas; None if each has as many
                examples as this one, and others.
            optimizer: Which may accumulate the gradients of several batches.
            strategy: Which spreads the step over replicas.
        """
        replicas = strategy.num_replicas_in_sync
        accumulated = optimizers.accumulation_steps(optimizer)
        size = local_size(x)
        if division is None:
            return cls(replicas, size, replicas * accumulated, 1.0)
        examples, copies = division
        return cls(
            replicas,
            size,
            batches=accumulated * examples / tf.maximum(size, 1),
            weight=size * replicas / tf.maximum(copies * examples, 1),
        )

    def weighted(self, values: tf.Tensor) -> tf.Tensor:
        """What this replica has measured, for a mean over replicas."""
        return dtypes.times(values, self.weight)

    def in_loss(self, penalty: tf.Tensor, loss: tf.Tensor) -> tf.Tensor:
        """What is added to the loss of this replica, in its dtype.

        Keras has put a factor of 1 / replicas into that.
        """
        return tf.cast(dtypes.times(penalty, 1 / self.replicas), loss.dtype)

    def of_all(self, loss: tf.Tensor) -> tf.Tensor:
        """The loss without that factor."""
        return dtypes.times(loss, self.replicas)


def copies(strategy: tf.distribute.Strategy, data: Any) -> int:
    """How many replicas have the same batch, as one of them gets it."""
    if any(
        isinstance(leaf, tf.distribute.DistributedValues)
        for leaf in keras.tree.flatten(data)
    ):
        return 1
    return len(strategy.extended.worker_devices)


def local_size(x: Any) -> tf.Tensor:
    """How many examples this replica has of a batch, an `int64` scalar."""
    return tf.cast(examples_lib.number(x), tf.int64)


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


def number() -> int:
    """Number of replicas, asked for by one of them."""
    return tf.distribute.get_replica_context().num_replicas_in_sync


def sums(tensors: list) -> list:
    """Sums over replicas, asked for by each of them; None stays."""
    replica = tf.distribute.get_replica_context()
    if replica.num_replicas_in_sync == 1:
        return tensors
    known = [t for t in tensors if t is not None]
    found = iter(replica.all_reduce("SUM", known))
    return [None if t is None else next(found) for t in tensors]
