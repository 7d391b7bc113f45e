"""Convolutions whose derivatives, of any order, are convolutions.

TensorFlow's own CPU kernels (Eigen's) for the gradients of a convolution are
up to 30 times slower than its convolution at the same arithmetic. With stride
1 both gradients are convolutions themselves: for y = x * w and δ above y,

    the gradient at x is δ * w', with w' turned around and its channels swapped,
    the gradient at w is x' * δ', with the batch in the place of channels,

and so are theirs. GPUs, XLA and oneDNN have kernels for all of them that are
as fast; `second_derivatives` decides.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from keras_fisher._derivatives import custom_gradients

_PADDINGS = ("SAME", "VALID")
_DTYPES = (tf.float32, tf.float64)
_tensorflows_own = tf.nn.convolution


class _Axis(NamedTuple):
    """Zeros before and after, along one axis."""

    before: int
    after: int


def convolution(
    input,
    filters,
    strides=None,
    padding="VALID",
    data_format=None,
    dilations=None,
    name=None,
):
    """`tf.nn.convolution`, with other derivatives where they are faster."""
    x, w = tf.convert_to_tensor(input), tf.convert_to_tensor(filters)
    if not (
        x.shape.rank in (3, 4)
        and x.dtype in _DTYPES
        and _all_ones(strides)
        and _all_ones(dilations)
        and padding in _PADDINGS
        and data_format in (None, "NWC", "NHWC")
        and w.shape.is_fully_defined()
        and x.shape[-1] == w.shape[-2]
    ):
        return _tensorflows_own(
            input, filters, strides, padding, data_format, dilations, name
        )
    paddings = [_padding(padding, size) for size in w.shape[:-2]]
    if x.shape.rank == 4:
        return _convolve(x, w, paddings)
    y = _convolve(x[:, None], w[None], [_Axis(0, 0), *paddings])
    return tf.squeeze(y, axis=1)


def _all_ones(sizes) -> bool:
    if sizes is None or isinstance(sizes, int):
        return sizes in (None, 1)
    return all(size == 1 for size in sizes)


def _padding(name: str, size: int) -> _Axis:
    total = size - 1 if name == "SAME" else 0
    return _Axis(total // 2, total - total // 2)


def _padded_convolution(x, w, paddings: list[_Axis]):
    return tf.nn.conv2d(x, w, 1, [_Axis(0, 0), *paddings, _Axis(0, 0)])


def _convolve(x: tf.Tensor, w: tf.Tensor, paddings: list[_Axis]) -> tf.Tensor:
    """The convolution of both, of shape `(batch, height, width, channels)`."""

    @custom_gradients.custom_gradient
    def convolved(x, w):
        def backward(above):
            return (
                _convolve(above, _turned(w), _opposite(paddings, w)),
                _correlate(x, above, w.shape, paddings),
            )

        return _padded_convolution(x, w, paddings), backward

    return convolved(x, w)


def _correlate(x, above, shape, paddings: list[_Axis]) -> tf.Tensor:
    """The gradient of ⟨above, x * w⟩ at w, which has this shape."""

    @custom_gradients.custom_gradient
    def correlated(x, above):
        def backward(direction):
            return (
                _convolve(
                    above, _turned(direction), _opposite(paddings, direction)
                ),
                _convolve(x, direction, paddings),
            )

        product = _padded_convolution(
            tf.transpose(x, [3, 1, 2, 0]),
            tf.transpose(above, [1, 2, 0, 3]),
            paddings,
        )
        result = tf.transpose(product, [1, 2, 0, 3])
        return tf.ensure_shape(result, shape), backward

    return correlated(x, above)


def _turned(w: tf.Tensor) -> tf.Tensor:
    return tf.transpose(tf.reverse(w, axis=[0, 1]), [0, 1, 3, 2])


def _opposite(paddings: list[_Axis], w: tf.Tensor) -> list[_Axis]:
    return [
        _Axis(size - 1 - before, size - 1 - after)
        for size, (before, after) in zip(w.shape, paddings)
    ]
