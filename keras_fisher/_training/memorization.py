"""Accuracy on clean and noisy examples: what is learned, what memorized."""

from __future__ import annotations

import keras
import tensorflow as tf

from keras_fisher._common import keras_layers
from keras_fisher._common import noisy_targets
from keras_fisher.likelihoods.base import Likelihood


class MemorizationAccuracy:
    """Accuracies over the clean and the noisy examples of an epoch.

    * `clean_accuracy`: over clean examples.
    * `noisy_accuracy`: over noisy examples, on the labels given.
    * `recovered_accuracy`: over noisy examples, on their true labels.

    Unweighted, like metrics that Keras gets as `metrics=`. A group without an
    example has accuracy 0, as a `keras.metrics.Mean` of nothing. Positions that
    have no label, or that a Keras mask hides, do not count.
    """

    def __init__(self):
        self._means = {
            name: keras.metrics.Mean(name=name)
            for name in (
                "clean_accuracy",
                "noisy_accuracy",
                "recovered_accuracy",
            )
        }

    def update_state(
        self, y: dict, outputs: tf.Tensor, likelihood: Likelihood | None
    ) -> dict[str, tf.Tensor]:
        """Counts a batch in and returns the accuracies so far.

        Args:
            y: Targets with noise flags.
            outputs: Model outputs, of shape `(batch, ..., classes)`, or of the
                shape of binary labels.
            likelihood: What the outputs mean; None for what Keras assumes of
                outputs of this shape.

        Returns:
            Scalars by name; `recovered_accuracy` only where true labels are
            given.

        Raises:
            ValueError: If there are several outputs that have labels.
        """
        labelled = (likelihood or Likelihood()).parts(outputs)
        _, likelihood, outputs = labelled[0]
        if len(labelled) > 1 or not tf.is_tensor(outputs):
            raise ValueError(
                "Targets with noise flags are for models with one output that "
                "has a loss. Received outputs of the structure: "
                f"{[output for _, _, output in labelled]}. Give each output "
                "its labels, and count what is memorized by metrics."
            )
        given, counts = _correct(likelihood, y[noisy_targets.LABEL], outputs)
        noisy = _like(tf.cast(y[noisy_targets.IS_NOISY], given.dtype), given)
        updates = {
            "clean_accuracy": (given, counts * (1 - noisy)),
            "noisy_accuracy": (given, counts * noisy),
        }
        if noisy_targets.TRUE_LABEL in y:
            recovered, counts = _correct(
                likelihood, y[noisy_targets.TRUE_LABEL], outputs
            )
            updates["recovered_accuracy"] = (recovered, counts * noisy)
        for name, (correct, weight) in updates.items():
            self._means[name].update_state(correct, sample_weight=weight)
        return {name: self._means[name].result() for name in updates}

    def result(self) -> dict[str, tf.Tensor]:
        """All accuracies so far, by name."""
        return {name: mean.result() for name, mean in self._means.items()}

    def reset_state(self) -> None:
        for mean in self._means.values():
            mean.reset_state()


def _correct(
    likelihood: Likelihood, y: tf.Tensor, outputs: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Whether labels are those predicted, and whether they count: 0 or 1."""
    correct = likelihood.is_correct(y, outputs)
    mask = likelihood.visible(y, outputs, keras_layers.mask_of(outputs))
    if mask is None:
        return correct, tf.ones_like(correct)
    return correct, _like(tf.cast(mask, correct.dtype), correct)


def _like(flags: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """Flags of examples, or of their positions, for each of `values`."""
    while flags.shape.rank > values.shape.rank:
        flags = tf.squeeze(flags, axis=-1)
    while flags.shape.rank < values.shape.rank:
        flags = tf.expand_dims(flags, axis=-1)
    return tf.broadcast_to(flags, tf.shape(values))
