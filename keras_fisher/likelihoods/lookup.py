"""Which likelihood a loss, a name or a model stands for."""

from __future__ import annotations

from typing import Any

import keras

from keras_fisher._common import structures
from keras_fisher.likelihoods.base import Likelihood
from keras_fisher.likelihoods.joint import Joint
from keras_fisher.likelihoods.losses import likelihood_of


def is_auto(identifier: Any) -> bool:
    """Whether the likelihood is to be found from the compiled loss.

    Args:
        identifier: What was given as `likelihood`.

    Example:
    >>> keras_fisher.likelihoods.is_auto("mse")
    False
    """
    return isinstance(identifier, str) and identifier == "auto"


def get(identifier: Any) -> Likelihood:
    """Finds the likelihood that a loss, a name or a config stands for.

    Args:
        identifier: A `Likelihood` (instance, class or serialized config);
            `"categorical"`, `"bernoulli"`, `"gaussian"`, `"laplace"` or
            `"poisson"`; or a Keras loss (instance, class, function, name or
            config) out of (sparse) categorical crossentropy and binary
            crossentropy, whose `from_logits` and `ignore_class` are taken
            over, mean squared and mean absolute error and Poisson. A list or
            a dict with one of these counts as that one, with several as
            their `Joint`.

    Returns:
        A `Likelihood`.

    Raises:
        ValueError: If nothing above fits.

    Example:
    >>> keras_fisher.likelihoods.get("mse")
    Gaussian(stddev=1.0)
    """
    is_list = isinstance(identifier, (list, tuple))
    if (is_list or _is_by_name(identifier)) and len(identifier) > 1:
        return Joint(identifier)
    return likelihood_of(identifier)


def of_model(identifier: Any, model: keras.layers.Layer) -> Likelihood:
    """As `get`, for the outputs of a model.

    If it is known to have several outputs, one identifier counts for all of
    them, and a dict goes by their names, as with losses of Keras. Outputs that
    have none are no part of the likelihood.

    Args:
        identifier: What `get` takes, or `"auto"` for the likelihood that a
            `FisherModel` has, or else that of the compiled loss.
        model: A model or layer.

    Raises:
        ValueError: If `get` raises it, if there are names that no output has,
            or with `"auto"`, if the model is not compiled, or without a loss.

    Example:
    >>> keras_fisher.likelihoods.of_model("gaussian", model)
    Gaussian(stddev=1.0)
    """
    if is_auto(identifier):
        identifier = _own(model)
    if identifier is None:
        raise _no_loss(
            "compiled without a loss (what `add_loss` or a layer adds says "
            "nothing of labels)"
        )
    outputs = structures.symbolic_outputs(model)
    if outputs is None and _is_by_name(identifier):
        return Joint(identifier)
    if not isinstance(outputs, (list, tuple, dict)):
        return get(identifier)
    names = list(model.output_names)
    if isinstance(outputs, dict):
        # In the order in which Keras takes a list of losses.
        names = keras.tree.flatten({name: name for name in outputs})
    if isinstance(identifier, Joint):
        identifier = (
            identifier.likelihoods
            if identifier.names is None
            else dict(zip(identifier.names, identifier.likelihoods))
        )
    if _is_by_name(identifier):
        unknown = set(identifier) - set(names)
        if unknown:
            raise ValueError(
                f"The outputs of the model are called {names}. Received a "
                f"loss or likelihood for {sorted(unknown)}. Give one for each "
                "by these names, or None."
            )
        return Joint([identifier.get(name) for name in names], names)
    if isinstance(identifier, (list, tuple)):
        if len(identifier) != len(names):
            raise ValueError(
                f"The model has {len(names)} outputs, {names}. Received "
                f"{len(identifier)} losses or likelihoods. Give one for each, "
                "or None."
            )
        return Joint(identifier, names)
    found = get(identifier)
    if isinstance(found, Joint):
        return of_model(found, model)
    return Joint([found] * len(names), names)


def _is_by_name(identifier: Any) -> bool:
    return isinstance(identifier, dict) and "class_name" not in identifier


def _own(model: Any) -> Any:
    """The likelihood that a model has, or its loss."""
    own = getattr(model, "likelihood", None)
    if isinstance(own, Likelihood):
        return own
    if not getattr(model, "compiled", False):
        raise _no_loss("not compiled")
    return model.loss


def _no_loss(state: str) -> ValueError:
    return ValueError(
        f"The model is {state}, so that no loss tells what its outputs mean. "
        "Pass what they are as `likelihood=`, to `FisherModel` or "
        "`fisher_trace`: for the logits of classes (also of each frame, for "
        "CTC) `keras_fisher.likelihoods.Categorical(from_logits=True)`, for "
        "numbers `keras_fisher.likelihoods.Gaussian()`; or, if nothing shall "
        "be measured, `FisherModel(..., penalty=None, trace_every=None)`."
    )
