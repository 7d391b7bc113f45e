"""The Fisher Penalty, those the paper compares it with, and their names."""

from __future__ import annotations

import inspect
import numbers
from typing import Any

import keras
from keras.optimizers.schedules import LearningRateSchedule
import tensorflow as tf

from keras_fisher._common import examples
from keras_fisher._common import random_draws
from keras_fisher._derivatives import forward as forward_lib
from keras_fisher._derivatives.gradient_norms import InputNorm
from keras_fisher.penalties.base import Penalty


@keras.saving.register_keras_serializable(package="keras_fisher")
class FisherPenalty(Penalty):
    """The Fisher Penalty: α ‖(1/B) Σ_i ∇_θ -log p_θ(ŷ_i|x_i)‖², ŷ_i ~ p_θ.

    In expectation α Tr(F) / B: it keeps the trace of the Fisher Information
    Matrix small. Source: Jastrzebski et al., *Catastrophic Fisher Explosion*,
    ICML 2021, section 4.


    Example:
    ```python
    penalty = keras_fisher.FisherPenalty(alpha=0.3, every=10, bound=None)
    model = keras_fisher.FisherModel(network, penalty=penalty)
    ```
    """

    name = "fisher"
    measures_trace = True

    def labels(self, likelihood, outputs, y, seed):
        return likelihood.sample(outputs, random_draws.draw(seed))


@keras.saving.register_keras_serializable(package="keras_fisher")
class GradientPenalty(Penalty):
    """GP: α ‖(1/B) Σ_i ∇_θ -log p_θ(y_i|x_i)‖², with the data set's labels.

    It shrinks the gradient of the loss that is being minimized. Source:
    Jastrzebski et al., ICML 2021, section 4.


    Example:
    ```python
    penalty = keras_fisher.GradientPenalty(alpha=0.1)
    model = keras_fisher.FisherModel(network, penalty=penalty)
    ```
    """

    name = "gradient"
    needs_labels = True

    def labels(self, likelihood, outputs, y, seed):
        return _labels_given(self, y)


@keras.saving.register_keras_serializable(package="keras_fisher")
class UniformLabelPenalty(Penalty):
    """GP_r: α ‖(1/B) Σ_i ∇_θ -log p_θ(ŷ_i|x_i)‖², ŷ_i uniform.

    As the Fisher Penalty, with labels that say nothing of the model. Source:
    Jastrzebski et al., ICML 2021, section 4.


    Example:
    ```python
    penalty = keras_fisher.UniformLabelPenalty(alpha=0.1)
    model = keras_fisher.FisherModel(network, penalty=penalty)
    ```
    """

    name = "uniform_label"

    def labels(self, likelihood, outputs, y, seed):
        return likelihood.uniform(outputs, random_draws.draw(seed))


@keras.saving.register_keras_serializable(package="keras_fisher")
class InputGradientPenalty(Penalty):
    """GP_x: α (1/B) Σ_i ‖∇_{x_i} Σ_j -log p_θ(y_j|x_j)‖².

    The squared norm of the gradient with respect to the input, the mean over
    examples (only y_i depends on x_i, but for batch normalization), with the
    data set's labels. Source: Jastrzebski et al., ICML 2021, section 4; Drucker
    & LeCun, *Improving generalization performance using double
    backpropagation*, 1992.

    `exclude` has no effect, since the norm is not over variables.


    Example:
    ```python
    penalty = keras_fisher.InputGradientPenalty(alpha=0.01)
    model = keras_fisher.FisherModel(network, penalty=penalty)
    ```
    """

    name = "input_gradient"
    needs_labels = True

    def labels(self, likelihood, outputs, y, seed):
        return _labels_given(self, y)

    @property
    def norm(self):
        return InputNorm()

    def forward(self, layer, x, *, seed=0, watch_inputs=False):
        x = examples.apply(
            lambda leaf: (
                leaf if tf.is_tensor(leaf) else tf.convert_to_tensor(leaf)
            ),
            x,
        )
        found = examples.tensors(x)
        if not any(map(forward_lib.is_differentiable, found)):
            raise ValueError(
                "`InputGradientPenalty` differentiates the inputs, which "
                "have to be dense and of floating point. Received inputs of "
                f"{[leaf.dtype.name for leaf in found]}. Use `FisherPenalty`, "
                "or put the penalty behind the embedding with "
                "`FisherRegularization`."
            )
        return super().forward(layer, x, seed=seed, watch_inputs=watch_inputs)


_BY_NAME = {
    cls.name: cls
    for cls in (
        FisherPenalty,
        GradientPenalty,
        UniformLabelPenalty,
        InputGradientPenalty,
    )
}

# One text for the arguments that all of them share, cleaned of its
# indentation, which Python 3.13 takes away by itself.
_ARGUMENTS = "".join(
    inspect.cleandoc(Penalty.__doc__ or "").partition("Args:")[1:]
)
for _penalty in _BY_NAME.values():
    _own = inspect.cleandoc(_penalty.__doc__ or "")
    _penalty.__doc__ = f"{_own}\n\n{_ARGUMENTS}"


def get(identifier: Any) -> Penalty | None:
    """Finds the penalty that a number, a name or a config stands for.

    Args:
        identifier: None; α of a `FisherPenalty`, a number or what else it
            takes; `"fisher"`, `"gradient"`,
            `"uniform_label"` or `"input_gradient"`; a `Penalty` instance,
            class or serialized config.

    Returns:
        A `Penalty`, or None for None.

    Raises:
        ValueError: If nothing above fits.

    Example:
    >>> keras_fisher.penalties.get(0.3).alpha
    0.3
    """
    if identifier is None or isinstance(identifier, Penalty):
        return identifier
    is_number = isinstance(identifier, numbers.Real)
    if (is_number and not isinstance(identifier, bool)) or isinstance(
        identifier, (LearningRateSchedule, keras.Variable)
    ):
        return FisherPenalty(identifier)
    if isinstance(identifier, str) and identifier in _BY_NAME:
        return _BY_NAME[identifier]()
    if isinstance(identifier, dict):
        return get(keras.saving.deserialize_keras_object(identifier))
    if isinstance(identifier, type) and issubclass(identifier, Penalty):
        return identifier()
    raise ValueError(
        "A penalty is None, a number (the alpha of `FisherPenalty`), one of "
        f"the names {sorted(_BY_NAME)}, or a `keras_fisher` penalty. "
        f"Received: {identifier!r}"
    )


def _labels_given(penalty: Penalty, y: tf.Tensor | None) -> tf.Tensor:
    if y is None:
        raise ValueError(
            f"`{type(penalty).__name__}` takes the gradient with the labels "
            "of the data set, but no `y` was given. Pass `y`, or use "
            "`FisherPenalty`, which draws its labels from the model."
        )
    return y
