"""Accuracy on clean and on noisy examples: what is learned, what memorized.

Data with label noise has targets of the form

    {"label": given, "is_noisy": bool, "true_label": y}

as `keras_fisher.datasets.add_label_noise` makes them; `"true_label"` may be
missing.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_fisher.likelihoods.base import Likelihood

_LABEL, _IS_NOISY, _TRUE_LABEL = "label", "is_noisy", "true_label"


def has_noise_mask(y: Any) -> bool:
    """Whether targets say which of their labels are noisy."""
    return (
        isinstance(y, dict)
        and {_LABEL, _IS_NOISY} <= y.keys()
        and y.keys() <= {_LABEL, _IS_NOISY, _TRUE_LABEL}
    )


def label_of(y: Any) -> Any:
    """The labels that the model is trained on, with or without a mask."""
    return y[_LABEL] if has_noise_mask(y) else y


def weight_of(sample_weight: Any) -> Any:
    """The weights of the labels.

    Keras copies one array of sample weights to each of the targets.
    """
    return label_of(sample_weight)


class MemorizationAccuracy:
    """Accuracies over the clean and the noisy examples of an epoch.

    * `clean_accuracy`: over clean examples.
    * `noisy_accuracy`: over noisy examples, on the labels given.
    * `recovered_accuracy`: over noisy examples, on their true labels.

    Unweighted, like metrics that Keras gets as `metrics=`. A group without an
    example has accuracy 0, as a `keras.metrics.Mean` of nothing.
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
            y: Targets with a noise mask.
            outputs: Model outputs, of shape `(batch, ..., classes)`, or of the
                shape of binary labels.
            likelihood: What the outputs mean; None for what Keras assumes of
                outputs of this shape.

        Returns:
            Scalars by name; `recovered_accuracy` only where true labels are
            given.

        Raises:
            ValueError: If there are several outputs.
        """
        if not tf.is_tensor(outputs):
            raise ValueError(
                "Targets with a noise mask are for models with one output. "
                f"Received outputs of the structure: {outputs}. Give each "
                "output its labels, and count what is memorized by metrics."
            )
        is_correct = (likelihood or Likelihood()).is_correct
        given = is_correct(y[_LABEL], outputs)
        noisy = _like(tf.cast(y[_IS_NOISY], given.dtype), given)
        updates = {
            "clean_accuracy": (given, 1 - noisy),
            "noisy_accuracy": (given, noisy),
        }
        if _TRUE_LABEL in y:
            recovered = is_correct(y[_TRUE_LABEL], outputs)
            updates["recovered_accuracy"] = (recovered, noisy)
        for name, (correct, weight) in updates.items():
            self._means[name].update_state(correct, sample_weight=weight)
        return {name: self._means[name].result() for name in updates}

    def reset_state(self) -> None:
        for mean in self._means.values():
            mean.reset_state()


def _like(mask: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """A mask of examples, or of their first parts, for each of `values`."""
    while mask.shape.rank > values.shape.rank:
        mask = tf.squeeze(mask, axis=-1)
    while mask.shape.rank < values.shape.rank:
        mask = tf.expand_dims(mask, axis=-1)
    return tf.broadcast_to(mask, tf.shape(values))
