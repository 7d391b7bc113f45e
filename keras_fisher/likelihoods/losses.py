"""Which likelihood the loss of an output stands for."""

from __future__ import annotations

from typing import Any

import keras

from keras_fisher.likelihoods.base import Likelihood
from keras_fisher.likelihoods.bernoulli import Bernoulli
from keras_fisher.likelihoods.categorical import Categorical
from keras_fisher.likelihoods.gaussian import Gaussian
from keras_fisher.likelihoods.laplace import Laplace
from keras_fisher.likelihoods.poisson import Poisson


def _no_options(loss: keras.losses.Loss) -> dict:
    return {}


def _from_logits(loss: keras.losses.Loss) -> dict:
    config = loss.get_config()
    # The sparse loss leaves its axis out of the configuration, and Keras has
    # no public name for it.
    axis = getattr(loss, "_fn_kwargs", config).get("axis", -1)
    if axis != -1:
        raise ValueError(
            "Only losses over the last axis have a likelihood here. "
            f"Received: axis={axis}. Move the classes to the last "
            "axis, or pass `likelihood=` yourself."
        )
    return {"from_logits": config.get("from_logits", False)}


def _of_sparse(loss: keras.losses.Loss) -> dict:
    ignore_class = loss.get_config().get("ignore_class")
    return {**_from_logits(loss), "ignore_class": ignore_class}


# A loss, the function Keras also accepts in its place, and what it assumes.
_BY_LOSS = (
    (
        keras.losses.SparseCategoricalCrossentropy,
        keras.losses.sparse_categorical_crossentropy,
        Categorical,
        _of_sparse,
    ),
    (
        keras.losses.CategoricalCrossentropy,
        keras.losses.categorical_crossentropy,
        Categorical,
        _from_logits,
    ),
    (
        keras.losses.BinaryCrossentropy,
        keras.losses.binary_crossentropy,
        Bernoulli,
        _from_logits,
    ),
    (
        keras.losses.MeanSquaredError,
        keras.losses.mean_squared_error,
        Gaussian,
        _no_options,
    ),
    (
        keras.losses.MeanAbsoluteError,
        keras.losses.mean_absolute_error,
        Laplace,
        _no_options,
    ),
    (keras.losses.Poisson, keras.losses.poisson, Poisson, _no_options),
)
# Losses that are no likelihood of what they predict, the functions, and the
# likelihood of such outputs that most people want, if there is one.
_NO_LIKELIHOODS = (
    # A margin or a probability, between two classes.
    ("Hinge", "hinge", "Bernoulli(from_logits=True)"),
    ("SquaredHinge", "squared_hinge", "Bernoulli(from_logits=True)"),
    (
        "BinaryFocalCrossentropy",
        "binary_focal_crossentropy",
        "Bernoulli(from_logits={from_logits})",
    ),
    ("Dice", "dice", "Bernoulli(from_logits=False)"),
    ("Tversky", "tversky", "Bernoulli(from_logits=False)"),
    # Among several classes, of which CTC has one for each frame.
    ("CategoricalHinge", "categorical_hinge", "Categorical(from_logits=True)"),
    (
        "CategoricalFocalCrossentropy",
        "categorical_focal_crossentropy",
        "Categorical(from_logits={from_logits})",
    ),
    (
        "CategoricalGeneralizedCrossEntropy",
        "categorical_generalized_cross_entropy",
        "Categorical(from_logits=False)",
    ),
    ("KLDivergence", "kl_divergence", "Categorical(from_logits=False)"),
    ("CTC", "ctc", "Categorical(from_logits=True)"),
    # Numbers.
    ("Huber", "huber", "Gaussian()"),
    ("LogCosh", "log_cosh", "Gaussian()"),
    (
        "MeanSquaredLogarithmicError",
        "mean_squared_logarithmic_error",
        "Gaussian()",
    ),
    (
        "MeanAbsolutePercentageError",
        "mean_absolute_percentage_error",
        "Laplace()",
    ),
    # Places in space.
    ("CosineSimilarity", "cosine_similarity", None),
    ("Circle", "circle", None),
)
_BY_NAME = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "laplace": Laplace,
    "poisson": Poisson,
}


def likelihood_of(identifier: Any) -> Likelihood:
    """The likelihood of one output.

    Args:
        identifier: As for `likelihoods.get`, but for several in a list or
            dict.

    Raises:
        ValueError: If none is known.
    """
    if isinstance(identifier, Likelihood):
        return identifier
    if isinstance(identifier, dict) and "class_name" in identifier:
        return likelihood_of(_deserialized(identifier))
    if isinstance(identifier, (list, tuple)) and len(identifier) == 1:
        return likelihood_of(identifier[0])
    if isinstance(identifier, dict) and len(identifier) == 1:
        return likelihood_of(next(iter(identifier.values())))
    if isinstance(identifier, str):
        if identifier.lower() in _BY_NAME:
            return _BY_NAME[identifier.lower()]()
        return likelihood_of(_loss_named(identifier))
    if isinstance(identifier, type) and issubclass(
        identifier, (Likelihood, keras.losses.Loss)
    ):
        return likelihood_of(identifier())
    for loss, function, likelihood, options in _BY_LOSS:
        if isinstance(identifier, loss):
            return likelihood(**options(identifier))
        if identifier is function:
            return likelihood(**options(loss()))
    raise _unknown(identifier)


def _deserialized(config: dict):
    try:
        found = keras.saving.deserialize_keras_object(config)
    except (TypeError, ValueError):
        raise _unknown(config) from None
    if isinstance(found, dict):
        raise _unknown(config)
    return found


def _loss_named(name: str):
    try:
        return keras.losses.get(name)
    except ValueError:
        raise _unknown(name) from None


def _unknown(identifier: Any) -> ValueError:
    return ValueError(
        "No likelihood is known for this loss, so labels cannot be sampled "
        f"from the model. Received: {identifier!r}. Known are "
        "(Sparse)CategoricalCrossentropy, BinaryCrossentropy, "
        "MeanSquaredError, MeanAbsoluteError and Poisson, the names "
        f"{', '.join(map(repr, _BY_NAME))}, and instances of "
        f"`keras_fisher.likelihoods.Likelihood`. {_advice(identifier)}"
    )


def _advice(identifier: Any) -> str:
    """What to pass with a loss that is no likelihood."""
    for name, function, likelihood in _NO_LIKELIHOODS:
        loss = getattr(keras.losses, name, ())  # Not all in older versions.
        if isinstance(identifier, loss):
            from_logits = identifier.get_config().get("from_logits", False)
        elif identifier and identifier is getattr(keras.losses, function, None):
            from_logits = False
        else:
            continue
        if likelihood is None:
            return (
                f"There is none to pass with {name}: it compares directions "
                "in space, not labels. Measure a model whose outputs predict "
                "labels, or write a `Likelihood` of your own."
            )
        code = likelihood.format(from_logits=from_logits)
        return (
            f"With {name} most people want "
            f"`likelihood=keras_fisher.likelihoods.{code}`; the loss itself "
            "can stay."
        )
    return "Pass one of these as `likelihood=`; the loss itself can stay."
