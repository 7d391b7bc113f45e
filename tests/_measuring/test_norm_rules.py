"""Each kind of use has the norms of a loop, or is left to a loop."""

from __future__ import annotations

from keras import layers
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher._measuring import per_example

_BATCH = 5


class Called(layers.Layer):
    """A function of the inputs and of one weight."""

    def __init__(self, function, weight_shape, activation, dtype):
        super().__init__(dtype=dtype)
        self._activation = activation
        self._function, self._weight_shape = function, weight_shape

    def build(self, shape):
        self.weight = self.add_weight(shape=self._weight_shape)

    def call(self, x):
        outputs = self._function(x, tf.identity(self.weight.value))
        return tf.reshape(self._activation(outputs), [x.shape[0], -1])


def _without(shape, x):
    """What TensorFlow knows no more of than that shape."""
    return tf.raw_ops.PlaceholderWithDefault(
        input=x, shape=tf.TensorShape(shape)
    )


def _einsum(equation):
    return lambda x, w: tf.raw_ops.Einsum(inputs=[x, w], equation=equation)


def _convolution(strides=1, padding="VALID"):
    return lambda x, w: tf.nn.conv2d(x, w, strides, padding)


def _channels_first(x, w):
    x = tf.transpose(x, [0, 3, 1, 2])
    return tf.nn.conv2d(x, w, 2, "SAME", data_format="NCHW")


def _in_one(function):
    """As Keras has grouped convolutions on CPUs."""
    return tf.function(function, autograph=False)


def _transposed(x, w):
    return tf.nn.conv2d_transpose(x, w, [x.shape[0], 7, 5, 2], 2, "SAME")


def _in_pieces(x, function, block=(2, 2)):
    """As dilated convolutions are computed."""
    nothing = [[0, 0], [0, 0]]
    x = function(tf.space_to_batch(x, block, nothing))
    return tf.batch_to_space(x, block, nothing)


def _dilated(x, w, block=(2, 2)):
    return _in_pieces(x, lambda x: _convolution()(x, w), block)


def _normalization(x, w):
    nothing = tf.zeros(2)
    return tf.cast(
        tf.raw_ops.FusedBatchNormV3(
            x=tf.cast(x, tf.float32),
            scale=tf.cast(w, tf.float32),
            offset=nothing,
            mean=nothing,
            variance=nothing + 1.0,
            is_training=False,
        ).y,
        tf.float64,
    )


def _other_for_more(x, w, name="product"):
    """Another graph for more examples, with an operation of the same name."""
    if x.shape[0] > _BATCH:
        x = tf.matmul(x, tf.ones([4, 6], x.dtype), name="product")
        return x[:, :3] + w[0]
    return tf.matmul(x, w, name=name)


# Function, shapes of an example and of the weight.
_PRODUCTS = {
    "rows": (tf.matmul, (4,), (4, 3)),
    "columns": (
        lambda x, w: tf.transpose(tf.matmul(w, x, transpose_b=True)),
        (4,),
        (3, 4),
    ),
    "rows of several": (
        lambda x, w: tf.matmul(tf.reshape(x, [-1, 2]), w),
        (3, 2),
        (2, 4),
    ),
    "few long rows": (tf.matmul, (2, 30), (30, 20)),
    "a batch of rows": (tf.matmul, (2, 4), (4, 3)),
    "a batch of columns": (
        lambda x, w: tf.matmul(x, w, transpose_a=True, transpose_b=True),
        (4, 2),
        (3, 4),
    ),
    "heads": (_einsum("bti,ihd->bthd"), (2, 4), (4, 2, 3)),
    "a weight for each head": (
        _einsum("bthi,hio->btho"),
        (2, 3, 4),
        (3, 4, 2),
    ),
    "a convolution": (_convolution(), (5, 4, 2), (3, 2, 2, 3)),
    "zeros around it": (_convolution(2, "SAME"), (5, 4, 2), (3, 2, 2, 3)),
    "zeros by hand": (
        _convolution(2, [[0, 0], [2, 1], [0, 1], [0, 0]]),
        (5, 4, 2),
        (3, 2, 2, 3),
    ),
    "a transposed convolution": (_transposed, (4, 3, 2), (3, 2, 2, 2)),
    "a dilated convolution": (_dilated, (8, 8, 2), (3, 3, 2, 4)),
    "a convolution in a function": (
        _in_one(_convolution(2)),
        (6, 6, 2),
        (3, 3, 2, 4),
    ),
    "a dilated one in a function": (
        _in_one(_dilated),
        (8, 8, 2),
        (3, 3, 2, 4),
    ),
}
_OTHERS = {
    "a scale": (lambda x, w: x * w, (2, 3), (3,)),
    "a column": (lambda x, w: x / (2.0 + w), (2, 3), (2, 1)),
    "examples behind": (
        lambda x, w: tf.transpose(tf.transpose(x) * w),
        (3,),
        (3, 1),
    ),
    "a scale of several": (
        lambda x, w: tf.reshape(tf.reshape(x, [-1, 3]) * w, [-1, 2, 3]),
        (2, 3),
        (3,),
    ),
    "a scaled offset": (lambda x, w: x - tf.exp(w), (2, 3), (3,)),
    "an offset": (tf.nn.bias_add, (4, 3), (3,)),
    "an offset of pieces": (
        lambda x, w: _in_pieces(x, lambda x: tf.tanh(x + w)),
        (4, 4, 3),
        (3,),
    ),
    "a token": (
        lambda x, w: tf.concat([tf.tile(w, [x.shape[0], 1, 1]), x], 1),
        (2, 3),
        (1, 1, 3),
    ),
    "tokens": (
        lambda x, w: x * tf.reshape(tf.tile(w, [2 * x.shape[0], 1]), x.shape),
        (2, 3),
        (1, 3),
    ),
    "the same for all": (
        lambda x, w: x * tf.broadcast_to(w, x.shape),
        (2, 3),
        (3,),
    ),
    "rows by number": (
        lambda x, w: tf.gather(w, tf.cast(abs(x), tf.int32) % 4),
        (12,),
        (4, 2),
    ),
}
# None of them is read off the graph.
_LOOPS = {
    "an ellipsis": (_einsum("...i,ij->...j"), (2, 4), (4, 3)),
    "a diagonal": (_einsum("btt,tj->bj"), (3, 3), (3, 2)),
    "a sum of the weight": (_einsum("bi,ijk->bj"), (4,), (4, 3, 2)),
    "a batch of weights": (tf.matmul, (2, 3, 4), (2, 4, 3)),
    "a scaled product": (lambda x, w: tf.matmul(x, 2.0 * w), (4,), (4, 3)),
    "a product and a scale": (
        lambda x, w: tf.matmul(x, w) * w[:, :3] + tf.matmul(x, w) * w,
        (1,),
        (1, 3),
    ),
    "products of two shapes": (
        lambda x, w: tf.concat(
            [
                tf.matmul(x, tf.reshape(w, [4, 3])),
                tf.matmul(x[:, :2], tf.reshape(w, [2, 6])),
            ],
            axis=1,
        ),
        (4,),
        (12,),
    ),
    "numbers of columns": (
        lambda x, w: tf.transpose(
            tf.gather(w, tf.cast(abs(x), tf.int32) % 4, axis=1), [1, 0, 2]
        ),
        (3,),
        (2, 4),
    ),
    "several of a kind": (
        lambda x, w: tf.tile(w, [x.shape[0], 1]) * tf.reshape(x, [-1, 1]),
        (4,),
        (4, 3),
    ),
    "a normalization": (_normalization, (3, 3, 2), (2,)),
    "examples behind": (
        lambda x, w: tf.transpose(
            tf.nn.conv1d(tf.transpose(x, [1, 0, 2]), w, 1, "VALID"), [1, 0, 2]
        ),
        (3, 4),
        (1, 4, 2),
    ),
    "a product of no shape": (
        lambda x, w: tf.matmul(_without(None, x), w),
        (4,),
        (4, 3),
    ),
    "a product of no columns": (
        lambda x, w: tf.matmul(_without([x.shape[0], None], x), w),
        (4,),
        (4, 3),
    ),
    "a convolution of no shape": (
        lambda x, w: _convolution()(_without(None, x), w),
        (5, 4, 2),
        (3, 2, 2, 3),
    ),
    "a convolution of no channels": (
        lambda x, w: _convolution()(_without([*x.shape[:3], None], x), w),
        (5, 4, 2),
        (3, 2, 2, 3),
    ),
    "a scale of no shape": (lambda x, w: _without(None, x) * w, (2, 3), (3,)),
    "copies of no shape": (
        lambda x, w: tf.broadcast_to(w, tf.shape(_without(None, x))) * x,
        (2, 3),
        (3,),
    ),
    "rows by numbers of no shape": (
        lambda x, w: tf.gather(w, tf.cast(abs(_without(None, x)), tf.int32)),
        (3,),
        (9, 2),
    ),
    "a function of three": (
        lambda x, w: _in_one(lambda x, w, z: _convolution()(x, w))(x, w, x),
        (5, 4, 2),
        (3, 2, 2, 3),
    ),
    "a function of two convolutions": (
        _in_one(lambda x, w: _convolution()(_convolution()(x, w), w)),
        (5, 4, 2),
        (2, 2, 2, 2),
    ),
    "a function that makes the kernel": (
        _in_one(lambda x, w: _convolution()(x, tf.reshape(w, [3, 2, 2, 3]))),
        (5, 4, 2),
        (36,),
    ),
    "a dilation that is computed": (
        _in_one(lambda x, w: _dilated(x, w, tf.identity([2, 2]))),
        (8, 8, 2),
        (3, 3, 2, 4),
    ),
    "a row too many": (
        lambda x, w: (tf.concat([x, tf.ones([1, 3], x.dtype)], 0) * w)[:-1],
        (3,),
        (3,),
    ),
    "another graph for more": (_other_for_more, (4,), (4, 3)),
    "another operation for more": (
        lambda x, w: _other_for_more(x, w, "own"),
        (4,),
        (4, 3),
    ),
}


def _norms(
    function,
    shape,
    weight_shape,
    jit_compile=False,
    passes=1,
    activation=tf.tanh,
    dtype="float64",
):
    """Norms of two passes by the graph, and in loops; and if it was read."""
    random = np.random.default_rng(3)

    def numbers(*shape):
        # Of few bits.
        return np.round(8.0 * random.normal(size=shape)) / 8.0

    layer = Called(function, weight_shape, activation, dtype)
    x = tf.constant(2.0 * numbers(_BATCH, *shape), layer.compute_dtype)
    layer.build(x.shape)
    layer.weight.assign(numbers(*weight_shape))
    layout = per_example.layout_for(layer, x, False)
    slow = []

    @tf.function(autograph=False, jit_compile=jit_compile)
    def norms(x, *cotangents):
        recording = per_example.Recording(layer, x, layout, passes=passes)
        slow.append(recording.slow)
        return recording.squared_norms(*cotangents)[:, :, 0]

    @tf.function(autograph=False, jit_compile=jit_compile)
    def one(x, cotangent, i):
        with tf.GradientTape() as tape:
            outputs = tf.cast(layer(x)[i], cotangent.dtype)
            loss = tf.reduce_sum(cotangent[i] * outputs)
        gradient = tape.gradient(loss, layer.weight.value)
        gradient = tf.cast(tf.convert_to_tensor(gradient), tf.float64)
        return tf.reduce_sum(gradient**2)

    called = tf.function(layer, autograph=False, jit_compile=jit_compile)
    cotangents = numbers(2, *called(x).shape)
    cotangents = tf.constant(cotangents, layer.variable_dtype)
    expected = [
        [one(x, cotangent, tf.constant(i)) for i in range(_BATCH)]
        for cotangent in cotangents
    ]
    return norms(x, *cotangents), expected, slow == [[]]


@pytest.mark.parametrize("name", [*_PRODUCTS, *_OTHERS])
def test_is_read_off_the_graph(name):
    found, expected, is_read = _norms(*{**_PRODUCTS, **_OTHERS}[name])
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert is_read


@pytest.mark.parametrize("name", _PRODUCTS)
def test_what_many_passes_share_is_the_same(name):
    found, expected, is_read = _norms(*_PRODUCTS[name], passes=50)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert is_read


_NOT_OF_FEW_BITS = ("a column", "a scaled offset", "an offset of pieces")


@pytest.mark.parametrize(
    "name", [n for n in (*_PRODUCTS, *_OTHERS) if n not in _NOT_OF_FEW_BITS]
)
def test_sums_are_not_of_16_bits(name):
    """But exact, where what is summed has few bits."""
    use = {**_PRODUCTS, **_OTHERS}[name]
    found, *_ = _norms(*use, activation=tf.identity, dtype="mixed_float16")
    expected, *_ = _norms(*use, activation=tf.identity)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", _LOOPS)
def test_is_left_to_a_loop(name):
    found, expected, is_read = _norms(*_LOOPS[name])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not is_read


@pytest.mark.parametrize(
    "function, weight_shape",
    [
        (_channels_first, (3, 2, 2, 3)),
        (lambda x, w: tf.nn.bias_add(x, w, data_format="NCHW"), (5,)),
    ],
    ids=["convolution", "bias"],
)
def test_channels_first(function, weight_shape):
    """Under XLA: TensorFlow has no such convolution on CPUs."""
    found, expected, is_read = _norms(function, (5, 4, 2), weight_shape, True)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert is_read
