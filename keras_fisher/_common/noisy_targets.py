"""Targets that flag which of their labels are noisy.

They have the form

    {"label": given, "is_noisy": bool, "true_label": y}

as `keras_fisher.datasets.add_label_noise` makes them; `"true_label"` may be
missing.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

LABEL, IS_NOISY, TRUE_LABEL = "label", "is_noisy", "true_label"


def has_noise_flags(y: Any, output_names: Collection[str] = ()) -> bool:
    """Whether targets say which of their labels are noisy.

    Args:
        y: Targets.
        output_names: Names of the outputs, as far as they are known. Where
            outputs are called so, these are their labels, and no flags.
    """
    return (
        isinstance(y, dict)
        and {LABEL, IS_NOISY} <= y.keys()
        and y.keys() <= {LABEL, IS_NOISY, TRUE_LABEL}
        and not {LABEL, IS_NOISY} <= set(output_names)
    )


def label_of(y: Any, output_names: Collection[str] = ()) -> Any:
    """The labels that the model is trained on, with flags or without."""
    return y[LABEL] if has_noise_flags(y, output_names) else y


def weight_of(sample_weight: Any, output_names: Collection[str] = ()) -> Any:
    """The weights of the labels.

    Keras copies one array of sample weights to each of the targets.
    """
    return label_of(sample_weight, output_names)
