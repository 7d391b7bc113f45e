"""Targets that flag which of their labels are noisy.

They have the form

    {"label": given, "is_noisy": bool, "true_label": y}

as `keras_fisher.datasets.add_label_noise` makes them; `"true_label"` may be
missing.
"""

from __future__ import annotations

from typing import Any

LABEL, IS_NOISY, TRUE_LABEL = "label", "is_noisy", "true_label"


def has_noise_flags(y: Any) -> bool:
    """Whether targets say which of their labels are noisy."""
    return (
        isinstance(y, dict)
        and {LABEL, IS_NOISY} <= y.keys()
        and y.keys() <= {LABEL, IS_NOISY, TRUE_LABEL}
    )


def label_of(y: Any) -> Any:
    """The labels that the model is trained on, with flags or without."""
    return y[LABEL] if has_noise_flags(y) else y


def weight_of(sample_weight: Any) -> Any:
    """The weights of the labels.

    Keras copies one array of sample weights to each of the targets.
    """
    return label_of(sample_weight)
