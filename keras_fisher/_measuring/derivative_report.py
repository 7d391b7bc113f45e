"""Which second derivatives of a model agree with differences."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
from typing import Any

import keras

from keras_fisher._common import keras_3
from keras_fisher._common import keras_layers
from keras_fisher._derivatives import catalogue
from keras_fisher._derivatives import derivative_check
from keras_fisher._derivatives.derivative_check import LayerDerivatives
from keras_fisher._measuring import batches as batches_lib

_EXAMPLES = 8


@dataclasses.dataclass(frozen=True)
class DerivativeReport:
    """The second derivatives of a model, layer by layer.

    Attributes:
        layers: One `LayerDerivatives` for each layer, and each operation of a
            functional model, through which a gradient flows: its `path`; its
            `verdict`, which is `"exact"`, `"differs"`, `"missing"` or
            `"undecided"`; and, for those that differ, the two figures.

    Example:
    ```python
    report = keras_fisher.check_derivatives(model, x)
    print(report.is_exact, report.layers)
    ```
    """

    layers: tuple[LayerDerivatives, ...]

    @property
    def is_exact(self) -> bool:
        """Whether each layer was found exact, and none is undecided."""
        return all(each.verdict == "exact" for each in self.layers)

    def __iter__(self) -> Iterator[LayerDerivatives]:
        return iter(self.layers)

    def __str__(self) -> str:
        return "\n".join(map(str, self.layers))


def check_derivatives(
    model: keras.Model, x: Any, y: Any = None, *, training: bool = True
) -> DerivativeReport:
    """Compares the second derivatives of a model's layers with differences.

    The gradient of a penalty on gradients, and Tr(H), are derivatives of
    gradients. For a layer with inputs and weights θ, a cotangent u and
    G(θ, u) = ∇_θ ⟨u, f(θ)⟩, both ∂G/∂θ and ∂G/∂u have to be right: the former
    is compared with central differences of G, the latter with G itself, which
    is linear in u. Layers of Keras are in the library's catalogue; what others
    have written, with a `tf.custom_gradient` above all, is worth a look.

    A `FisherModel` with `method="exact"` does the same by itself at its first
    penalty, for layers that are not in the catalogue.

    Each layer runs forward and backward about eight times for each of its
    inputs and weights, in a graph where it can: seconds for a small network,
    minutes for one of a hundred layers.

    Args:
        model: A Keras model or layer. Nothing in it changes.
        x: Inputs; the first 8 examples are used, or all, where the model
            takes no other number. With values as in training,
            since a layer may be wrong for some alone.
        y: Not used; so that `check_derivatives(model, *batch)` works.
        training: The mode of the call.

    Returns:
        A `DerivativeReport`. `print` it.

    Raises:
        ValueError: If there is no example, or no trainable variable.

    Example:
    ```python
    report = keras_fisher.check_derivatives(model, x)
    print(report)
    assert report.is_exact
    ```
    """
    del y
    keras_3.check_layer(model)
    batches = batches_lib.Batches(x, verbose=0, model=model)
    x = batches.first[0]
    keras_layers.build_by_call(model, x)
    keras_layers.check_trainable(model, "it has no derivatives")
    keras_layers.check_calls_are_traced_anew(model)
    chosen = [
        operation
        for operation in keras_layers.operations_in(model)
        if not catalogue.only_contains(operation)
    ]
    return DerivativeReport(
        tuple(derivative_check.check(model, x, chosen, training, _EXAMPLES))
    )
