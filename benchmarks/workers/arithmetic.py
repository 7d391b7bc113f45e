"""Counts the multiplications of a training step in its graph.

Only those of matrix products and convolutions, which grow fastest with the
size of a network; an embedding has none. TensorFlow's own profiler does not
know `Einsum` and batched products.
"""

from __future__ import annotations

import math
import re

import keras
import tensorflow as tf


def operations_of_step(model: keras.Model, batch: tuple) -> int | None:
    """Multiplications of one step of a compiled model.

    Args:
        model: A compiled `keras.Model`.
        batch: Tensors `(x, y)`.

    Returns:
        Their number. None if not all steps are alike.
    """
    model(batch[0])
    model.optimizer.build(model.trainable_variables)
    step = tf.function(model.train_step, autograph=False)
    graph = step.get_concrete_function(batch).graph
    live = _live(graph)
    if any(operation.type in ("If", "Case", "While") for operation in live):
        return None
    return sum(map(_multiplications, live))


def _live(graph: tf.Graph) -> list[tf.Operation]:
    """What has to run for the outputs and for what changes variables."""
    waiting = [tensor.op for tensor in graph.outputs] + graph.control_outputs
    seen = {}
    while waiting:
        operation = waiting.pop()
        if operation.name not in seen:
            seen[operation.name] = operation
            waiting += [tensor.op for tensor in operation.inputs]
            waiting += operation.control_inputs
    return list(seen.values())


def _multiplications(operation: tf.Operation) -> int:
    count = _COUNTS.get(operation.type)
    return count(operation) if count else 0


def _size(shape) -> int:
    return math.prod(shape.as_list())


def _product(operation):
    left, result = operation.inputs[0].shape, operation.outputs[0].shape
    name = "transpose_a" if operation.type == "MatMul" else "adj_x"
    contracted = left[-2 if operation.get_attr(name) else -1]
    return _size(result) * contracted


def _einsum(operation):
    equation = operation.get_attr("equation").decode()
    sizes = {}
    terms = re.split(",", equation.split("->")[0])
    for term, tensor in zip(terms, operation.inputs):
        # Axes that an ellipsis stands for come first here.
        letters = term.replace("...", "")
        shape = tensor.shape.as_list()
        leading = shape[: len(shape) - len(letters)]
        sizes.update({f"{k}...": size for k, size in enumerate(leading)})
        sizes.update(zip(letters, shape[len(leading) :]))
    return math.prod(sizes.values())


def _convolution(operation):
    kernel, result = operation.inputs[1].shape, operation.outputs[0].shape
    return _size(kernel) // kernel[-1] * _size(result)


def _convolution_by_input(operation):
    kernel, above = operation.inputs[1].shape, operation.inputs[2].shape
    return _size(kernel) // kernel[-1] * _size(above)


def _convolution_by_kernel(operation):
    kernel, above = operation.outputs[0].shape, operation.inputs[2].shape
    return _size(kernel) // kernel[-1] * _size(above)


_COUNTS = {
    "MatMul": _product,
    "BatchMatMulV2": _product,
    "Einsum": _einsum,
    "Conv2D": _convolution,
    "Conv2DBackpropInput": _convolution_by_input,
    "Conv2DBackpropFilter": _convolution_by_kernel,
}
