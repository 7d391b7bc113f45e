"""What a `FisherModel` refuses, or warns of, before and after it trains."""

from __future__ import annotations

from typing import Any
import warnings

import keras
import tensorflow as tf

from keras_fisher._common import keras_3
from keras_fisher._common import keras_layers
from keras_fisher._common import structures
from keras_fisher._training.first_look import FirstLook
from keras_fisher.likelihoods import output_checks
from keras_fisher.likelihoods.base import Likelihood
from keras_fisher.likelihoods.categorical import Categorical
from keras_fisher.penalties.base import Penalty

# What Keras or a user calls of a `FisherModel`, and it does without the wrapped
# model's own; `predict_step` and `test_step` are called.
_OURS = (
    "fit",
    "evaluate",
    "predict",
    "train_step",
    "train_on_batch",
    "test_on_batch",
    "predict_on_batch",
    "compute_loss",
    "compute_metrics",
    "make_train_function",
    "make_test_function",
    "make_predict_function",
)


def check_wrappable(model: Any) -> None:
    """Raises a `ValueError` unless a step of ours can train it."""
    keras_3.check_layer(model)
    if not isinstance(model, keras.Model):
        raise ValueError(
            "`FisherModel` wraps a `keras.Model`. Received: "
            f"{model!r} of type {type(model).__name__}. Put layers into a "
            "`keras.Sequential` first."
        )
    own = [name for name in _OURS if _is_overridden(type(model), name)]
    if own:
        raise ValueError(
            "`FisherModel` trains, evaluates and predicts by itself, so that "
            f"the `{'` and `'.join(own)}` of {type(model).__name__} would have "
            "no effect. Wrap the network inside of it, or use "
            "`keras_fisher.layers.FisherRegularization`, which works in a "
            "training step that calls the model with `training=True` and adds "
            "`self.losses` to the loss."
        )


def check_heeds(cls: type, own: type) -> None:
    """Raises a `ValueError` for what a subclass would override in vain.

    Args:
        cls: The class of a model that measures or penalizes.
        own: `FisherModel`.
    """
    names = [
        name
        for name in ("train_step", "call")
        if getattr(cls, name) is not getattr(own, name)
    ]
    if names:
        raise ValueError(
            "Where Tr(F) is measured or penalized, `fit` takes steps of its "
            f"own on the wrapped model. Received: {cls.__name__}, whose "
            f"`{'` and `'.join(names)}` would have no effect. Override "
            "`compute_loss` or `compute_metrics`, change the model that is "
            "wrapped, or use `keras_fisher.layers.FisherRegularization` in a "
            "`keras.Model` with steps of your own."
        )


def _is_overridden(cls: type, name: str) -> bool:
    """Whether a method is one that `FisherModel` does not heed."""
    # It maps its preprocessing over the data, and so does `FisherModel`.
    maps_data = "preprocess_samples" in _owner(cls, name).__dict__
    return is_own(cls, name) and not maps_data


def is_own(cls: type, name: str) -> bool:
    """Whether a method of a model is another than that of Keras."""
    return _owner(cls, name).__module__.partition(".")[0] != "keras"


def _owner(cls: type, name: str) -> type:
    return next(base for base in cls.__mro__ if name in base.__dict__)


def check_compiled(network: keras.Model) -> None:
    """Raises a `ValueError` unless a `test_step` of its own can be called."""
    if not network.compiled:
        name = type(network).__name__
        raise ValueError(
            f"The `test_step` of {name} evaluates it, by the loss and the "
            f"metrics that {name} is compiled with. Received: one that is not "
            f"compiled, and has a `compile` of its own, for which "
            "`FisherModel.compile` knows no arguments. Call it first: "
            "`fisher_model.model.compile(...)`."
        )


def check_trainable(network: keras.Model) -> None:
    """Raises a `ValueError` if there is nothing to measure or penalize."""
    keras_layers.check_trainable(
        network,
        "its Fisher information is empty",
        "Unfreeze a layer before `compile()`, or pass `penalty=None, "
        "trace_every=None`.",
    )


def check_excluded(penalty: Penalty | None, network: keras.Model) -> None:
    """Raises a `ValueError` if a penalty leaves all variables out.

    Args:
        penalty: The penalty, or None.
        network: A built model or layer.
    """
    if penalty is None or not penalty.exclude or not penalty.is_of_parameters:
        return
    variables = network.trainable_variables
    if not any(map(penalty.selects, variables)):
        paths = [variable.path for variable in variables]
        raise ValueError(
            "`exclude` leaves all trainable variables out of the penalty, "
            f"which has no effect then. Received: exclude={penalty.exclude}, "
            f"and variables of the paths {paths}. Leave out fewer."
        )


def check_transcripts(
    penalty: Penalty | None, loss: Any, likelihood: Likelihood | None
) -> None:
    """Raises a `ValueError` if a penalty would take CTC's labels for classes.

    They are of a sequence of another length than the frames, but may be padded
    to as many.
    """
    ctc = getattr(keras.losses, "CTC", ()), getattr(keras.losses, "ctc", None)
    has_ctc = any(
        isinstance(each, ctc[0])
        or (each is not None and each is ctc[1])
        or (isinstance(each, str) and each.lower() == "ctc")
        for each in keras.tree.flatten(loss)
    )
    if (
        has_ctc
        and isinstance(likelihood, Categorical)
        and penalty is not None
        and penalty.needs_labels
    ):
        raise ValueError(
            f"{type(penalty).__name__} takes the labels of the data, and those "
            "of CTC are transcripts, which label no frame, while the "
            "likelihood is of frames. Received: the loss CTC. Use "
            "`FisherPenalty` or `UniformLabelPenalty`, which draw a label for "
            "each frame."
        )


def check_labels(
    network: keras.Model, likelihood: Likelihood | None, y: Any
) -> None:
    """Raises a `ValueError` for labels that XLA would take without a word.

    Args:
        network: The wrapped model.
        likelihood: Of its outputs, if known.
        y: Labels as `fit` got them, or None.
    """
    outputs = structures.symbolic_outputs(network)
    if y is not None and likelihood is not None and outputs is not None:
        classes = structures.apply(lambda t: t.shape[-1], outputs)
        likelihood.check_labels(y, classes)


def output_look(
    network: keras.layers.Layer, likelihood: Likelihood
) -> FirstLook:
    """Looks whether outputs are what the likelihood expects."""
    return FirstLook(
        lambda x: _check_outputs(network, likelihood, x),
        lambda: likelihood.constrains_outputs,
    )


def _check_outputs(
    network: keras.layers.Layer, likelihood: Likelihood, x: Any
) -> None:
    try:
        outputs = keras_layers.outputs_of(network, x)
    except Exception:  # The step says it, in its own words.
        return
    likelihood.check(outputs)


def operation_look(
    network: keras.layers.Layer, likelihood: Likelihood
) -> FirstLook:
    """Looks by which operations outputs are computed, where no graph tells."""
    return FirstLook(
        lambda x: output_checks.check(likelihood, network, x),
        lambda: likelihood.constrains_operations,
    )


def warn_of_lost_weights(network: keras.Model, stacklevel: int) -> None:
    """Warns of what no log says: a last step that overflows."""
    lost = [
        variable.path
        for variable in network.weights
        if keras.backend.is_float_dtype(variable.dtype)
        and not tf.reduce_all(tf.math.is_finite(variable.value))
    ]
    if lost:
        warnings.warn(
            "Training has ended with weights that are NaN or infinite. "
            f"Received: {len(lost)} such variables of "
            f"{len(network.weights)}, first {lost[0]!r}. Go back to "
            "weights saved earlier, look for what overflows "
            "(`tf.debugging.enable_check_numerics()` says where), and "
            "have `keras.callbacks.TerminateOnNaN` end the training at "
            "the first loss that is NaN.",
            RuntimeWarning,
            stacklevel=stacklevel + 1,
        )
