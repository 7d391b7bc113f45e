"""Norms per example are those of a loop over examples, for any layer."""

from __future__ import annotations

import keras
from keras import layers
import networks
import numpy as np
import pytest
import tensorflow as tf

import keras_fisher
from keras_fisher import likelihoods
from keras_fisher._measuring import norms
from keras_fisher._measuring import per_example

_LIKELIHOOD = likelihoods.Categorical()


class _ClassToken(layers.Layer):
    """Repeats a variable for each example, as vision transformers do."""

    def build(self, shape):
        self.token = self.add_weight(shape=(1, 1, shape[-1]), name="token")
        self.position = self.add_weight(
            shape=(shape[1] + 1, shape[-1]), name="position"
        )

    def call(self, x):
        shape = (keras.ops.shape(x)[0], 1, x.shape[-1])
        token = keras.ops.broadcast_to(self.token, shape)
        return keras.ops.concatenate([token, x], axis=1) + self.position


class _Arithmetic(layers.Layer):
    """Variables that are transformed before they meet the examples."""

    def build(self, shape):
        self.v = self.add_weight(shape=(shape[-1],), name="v")
        self.u = self.add_weight(shape=(1,), name="u")

    def call(self, x):
        ops = keras.ops
        x = ops.maximum(x, ops.softplus(self.v)) * ops.exp(self.u)
        return (x - self.v) / (1.5 + ops.square(self.v))


class _Pick(layers.Layer):
    """Takes some positions, one of them twice."""

    def call(self, x):
        return keras.ops.take(x, [2, 0, 2], axis=1)


class _PickOnFirstAxis(layers.Layer):
    """Looks positions up along the first axis."""

    def call(self, x):
        x = keras.ops.transpose(x, (1, 0, 2))
        x = keras.ops.take(x, [2, 0, 2], axis=0)
        return keras.ops.transpose(x, (1, 0, 2))


class _WeightNormalized(layers.Layer):
    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 4), name="w")

    def call(self, x):
        norm = keras.ops.norm(self.w, axis=0, keepdims=True)
        return keras.ops.matmul(x, self.w / norm)


class _TimeMajor(layers.Layer):
    """Multiplies with the examples behind the time steps."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4, activation="tanh")

    def call(self, x):
        x = keras.ops.transpose(x, (1, 0, 2))
        return keras.ops.transpose(self.dense(x), (1, 0, 2))


class _MixExamples(layers.Layer):
    def call(self, x):
        return x - keras.ops.mean(x, axis=0, keepdims=True)


class Tied(keras.Model):
    """An embedding that is also the output layer."""

    def __init__(self):
        super().__init__()
        self.embed = layers.Embedding(5, 4)
        self.hidden = layers.Dense(4, activation="tanh")

    def call(self, x):
        h = self.hidden(self.embed(x))
        return keras.ops.matmul(h, keras.ops.transpose(self.embed.embeddings))


def _two_sequences():
    a, b = (keras.Input(s, dtype=_dtype()) for s in ((5, 6), (4, 6)))
    h = layers.MultiHeadAttention(2, 3)(a, b)
    h = layers.GroupQueryAttention(3, 4, 2)(h, b)
    h = layers.GlobalAveragePooling1D()(h)
    return keras.Model([a, b], layers.Dense(3)(h))


def _dtype():
    return keras.config.dtype_policy().compute_dtype


def _stack(shape, *make):
    """A network of layers that are made when it is built."""

    def build():
        body = [layer() for layer in make]
        head = [layers.Flatten(), layers.Dense(networks.CLASSES)]
        return keras.Sequential(
            [keras.Input(shape, dtype=_dtype()), *body, *head]
        )

    return build


def _layer(cls, *args, **kwargs):
    return lambda: cls(*args, **kwargs)


def _tanh(cls, *args, **kwargs):
    return _layer(cls, *args, activation="tanh", **kwargs)


_ACTIVE = _layer(layers.Activation, "tanh")
_DENSE = _layer(layers.Dense, 5)

# All of their variables are done without a loop over examples.
FAST = {
    "conv1d_causal_dilated": _stack(
        (12, 2),
        _tanh(layers.Conv1D, 4, 3, dilation_rate=2, padding="causal"),
    ),
    "conv2d_dilated_same": _stack(
        (7, 6, 2),
        _tanh(layers.Conv2D, 4, (3, 2), dilation_rate=(2, 1), padding="same"),
    ),
    "conv2d_strided_same": _stack(
        (7, 6, 2),
        _tanh(layers.Conv2D, 4, (3, 2), strides=(2, 3), padding="same"),
    ),
    "conv3d_strided_same": _stack(
        (4, 5, 3, 2),
        _tanh(layers.Conv3D, 3, (2, 3, 2), strides=(1, 2, 1), padding="same"),
    ),
    "conv1d_groups": _stack(
        (9, 4), _tanh(layers.Conv1D, 4, 3, groups=2, dilation_rate=2)
    ),
    "conv2d_groups_strided": _stack(
        (7, 7, 4),
        _tanh(layers.Conv2D, 8, 3, groups=4, strides=2, padding="same"),
    ),
    "conv2d_groups_dilated": _stack(
        (7, 7, 4),
        _tanh(layers.Conv2D, 4, 3, groups=2, dilation_rate=2, padding="same"),
    ),
    "conv3d_groups": _stack((4, 4, 4, 4), _tanh(layers.Conv3D, 4, 2, groups=2)),
    "depthwise1d": _stack(
        (9, 3),
        _tanh(layers.DepthwiseConv1D, 3, depth_multiplier=2, strides=2),
    ),
    "depthwise2d_multiplied": _stack(
        (7, 6, 3),
        _tanh(
            layers.DepthwiseConv2D,
            3,
            depth_multiplier=2,
            strides=2,
            padding="same",
        ),
    ),
    "depthwise2d_dilated": _stack(
        (7, 7, 3),
        _tanh(layers.DepthwiseConv2D, 3, dilation_rate=2, padding="same"),
    ),
    "separable1d": _stack(
        (9, 3), _tanh(layers.SeparableConv1D, 4, 3, padding="same")
    ),
    "transposed1d_same": _stack(
        (5, 3),
        _tanh(layers.Conv1DTranspose, 4, 3, strides=2, padding="same"),
    ),
    "transposed2d_padded": _stack(
        (4, 5, 3),
        _tanh(
            layers.Conv2DTranspose,
            4,
            3,
            strides=2,
            padding="same",
            output_padding=1,
        ),
    ),
    "transposed3d": _stack(
        (3, 3, 3, 2), _tanh(layers.Conv3DTranspose, 2, 2, strides=2)
    ),
    "dense_on_images": _stack((2, 4, 3), _tanh(layers.Dense, 5)),
    "einsum_heads": _stack(
        (4, 6),
        _tanh(layers.EinsumDense, "abc,cde->abde", (4, 2, 3), bias_axes="de"),
    ),
    "einsum_by_position": _stack(
        (4, 6),
        _tanh(layers.EinsumDense, "abc,bcd->abd", (4, 3), bias_axes="bd"),
    ),
    "einsum_over_time": _stack(
        (4, 6), _tanh(layers.EinsumDense, "abc,bd->adc", (5, 6))
    ),
    "attention_of_two": _two_sequences,
    "time_distributed": _stack(
        (4, 3, 2),
        lambda: layers.TimeDistributed(layers.Conv1D(3, 2, activation="tanh")),
    ),
    "prelu": _stack((4, 6), _DENSE, _layer(layers.PReLU)),
    "prelu_shared": _stack(
        (4, 6), _DENSE, _layer(layers.PReLU, shared_axes=[1])
    ),
    "rms_norm": _stack((4, 6), _DENSE, _layer(layers.RMSNormalization)),
    "layer_norm_axes": _stack(
        (4, 3),
        _DENSE,
        _layer(layers.LayerNormalization, axis=(1, 2)),
        _ACTIVE,
    ),
    "group_norm_axis": _stack(
        (4, 4, 4), _layer(layers.GroupNormalization, 2, axis=1), _ACTIVE
    ),
    "batch_norm_axis": _stack(
        (4, 3), _DENSE, _layer(layers.BatchNormalization, axis=1), _ACTIVE
    ),
    "batch_norm_no_scale": _stack(
        (4,), _DENSE, _layer(layers.BatchNormalization, scale=False), _ACTIVE
    ),
    "spectral_norm": _stack(
        (4,),
        lambda: layers.SpectralNormalization(layers.Dense(4)),
        _ACTIVE,
    ),
    "class_token": _stack((3, 4), _ClassToken, _tanh(layers.Dense, 3)),
    "arithmetic": _stack((4,), _DENSE, _Arithmetic),
    "picked": _stack((4, 3), _DENSE, _Pick, _ACTIVE),
    "picked_first": _stack((4, 3), _DENSE, _PickOnFirstAxis, _ACTIVE),
    "unrolled_lstm": _stack((4, 3), _layer(layers.LSTM, 3, unroll=True)),
}
# Some of their variables need the loop.
SLOW = {
    "weight_normalized": _stack((4,), _WeightNormalized, _ACTIVE),
    "unrolled_gru": _stack((3, 2), _layer(layers.GRU, 2, unroll=True)),
    "rnn": _stack((3, 2), _layer(layers.SimpleRNN, 2)),
    "tied": Tied,
    "time_major": _stack((4, 3), _TimeMajor),
}


def _build(make, dtype="float64"):
    """A network with large weights and odd statistics, and a batch for it."""
    keras.config.set_dtype_policy(dtype)
    model = make()
    random = np.random.default_rng(7)
    if isinstance(model, Tied):
        x = tf.constant(random.integers(0, 5, (networks.BATCH, 4)))
    else:
        x = [
            tf.constant(
                random.normal(size=(networks.BATCH, *i.shape[1:])), _dtype()
            )
            for i in model.inputs
        ]
        x = x if len(x) > 1 else x[0]
    model(x)
    for variable in model.trainable_variables:
        variable.assign(0.5 * random.normal(size=variable.shape))
    for variable in model.non_trainable_variables:
        if "moving" in variable.path:
            variable.assign(0.5 + random.uniform(size=variable.shape))
    return model, x


def _labels(model, x):
    outputs = model(x, training=False)
    return _LIKELIHOOD.sample(outputs, tf.constant([3, 4], tf.int64))


def _measured(model, x, y, by, **kwargs):
    return keras_fisher.fisher_trace(
        model,
        x,
        y,
        estimator="empirical",
        likelihood=_LIKELIHOOD,
        by=by,
        **kwargs,
    )


class _Spy(per_example.Recording):
    """Remembers which variables the last recording did in a loop."""

    slow_paths: list[str]

    def __init__(self, layer, *args, **kwargs):
        super().__init__(layer, *args, **kwargs)
        paths = [variable.path for variable in layer.trainable_variables]
        _Spy.slow_paths = [paths[i] for i in self.slow]


@pytest.fixture(autouse=True)
def _spy(monkeypatch):
    monkeypatch.setattr(per_example, "Recording", _Spy)


def _assert_as_in_a_loop(model, x, tolerance) -> list[str]:
    """Compares with a loop over examples.

    Returns:
        Paths of the variables that were done example by example.
    """
    y = _labels(model, x)
    state = networks.state_of(model)
    expected = networks.squared_norms(model, x, _LIKELIHOOD, y)
    by_variable = _measured(model, x, y, "variable")
    by_example = _measured(model, x, y, "example")
    total = expected.mean(axis=0).sum()
    np.testing.assert_allclose(
        list(by_variable.values()),
        expected.mean(axis=0),
        rtol=tolerance,
        # A key's bias in attention has no gradient but rounding errors.
        atol=1e-3 * tolerance * total,
        err_msg=str(list(by_variable)),
    )
    np.testing.assert_allclose(by_example, expected.sum(axis=1), rtol=tolerance)
    for variable, value in state:
        np.testing.assert_array_equal(variable, value)
    return _Spy.slow_paths


def _recording(model, x, passes=1, **kwargs):
    """What a recording says in a graph: `then(recording)`, run."""

    def run(then):
        layout = per_example.layout_for(model, x, False)

        @tf.function(autograph=False)
        def traced(x):
            return then(
                per_example.Recording(model, x, layout, passes=passes, **kwargs)
            )

        return traced(x)

    return run


def _some_slow(names, slow):
    """Marks those whose compilation takes long."""
    return [
        pytest.param(name, marks=pytest.mark.slow) if name in slow else name
        for name in names
    ]


_RECURRENT = ("lstm", "gru", "two_inputs")


@pytest.mark.parametrize(
    "name", _some_slow(networks.NETWORKS, ("gru", "two_inputs"))
)
def test_common_layers_in_double_precision(name):
    model, x = networks.build(name)
    slow = _assert_as_in_a_loop(model, x, 1e-9)
    assert bool(slow) == (name in _RECURRENT)


@pytest.mark.parametrize(
    "name",
    _some_slow(
        FAST, ("conv2d_groups_strided", "conv3d_groups", "attention_of_two")
    ),
)
def test_fast_norms_in_double_precision(name):
    model, x = _build(FAST[name])
    assert _assert_as_in_a_loop(model, x, 1e-9) == []


@pytest.mark.parametrize("name", _some_slow(SLOW, ("unrolled_gru", "rnn")))
def test_slow_norms_in_double_precision(name):
    model, x = _build(SLOW[name])
    slow = _assert_as_in_a_loop(model, x, 1e-9)
    assert 0 < len(slow) <= len(model.trainable_variables)


@pytest.mark.parametrize(
    "name", ["conv2d_dilated_same", "einsum_heads", "class_token", "arithmetic"]
)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_single_precision(name, jit_compile):
    model, x = _build(FAST[name], "float32")
    model.jit_compile = jit_compile
    _assert_as_in_a_loop(model, x, 1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "depthwise",
        "transposed",
        "batch_norm",
        pytest.param("conv2d_groups", marks=pytest.mark.slow),
        pytest.param("attention", marks=pytest.mark.slow),
    ],
)
def test_xla_in_double_precision(name):
    model, x = networks.build(name)
    model.jit_compile = True
    _assert_as_in_a_loop(model, x, 1e-9)


def test_xla_runs_the_loop_as_well():
    model, x = _build(SLOW["weight_normalized"])
    model.jit_compile = True
    _assert_as_in_a_loop(model, x, 1e-9)


@pytest.mark.parametrize(
    "policy",
    [
        "mixed_float16",
        pytest.param("mixed_bfloat16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", ["conv2d", "layer_norm", "embedding"])
def test_16_bits_are_near_32(name, policy):
    model, x = networks.build(name, "float32")
    weights = model.get_weights()
    y = _labels(model, x)
    expected = _measured(model, x, y, "total")
    model, x = networks.build(name, policy)
    model.set_weights(weights)
    for variable in model.trainable_variables:
        assert variable.dtype == "float32"
    assert _measured(model, x, y, "total") == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_16_bits_hold_small_and_large_derivatives(scale):
    model, x = networks.build("dense", "mixed_float16")
    shape = (networks.BATCH, networks.CLASSES)
    cotangent = np.random.default_rng(0).normal(size=shape).astype("float32")

    def norms(factor):
        return _recording(model, x)(
            lambda recording: recording.squared_norms(
                tf.constant(factor * cotangent)
            )
        )

    ratio = np.sum(norms(scale)) / np.sum(norms(1.0)) / scale**2
    assert ratio == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize(
    "name",
    ["conv1d", "conv2d", "depthwise", "transposed", "shared", "embedding"],
)
@pytest.mark.parametrize(
    "passes", [pytest.param(2, marks=pytest.mark.slow), 50]
)
def test_several_passes_at_once_are_the_passes_alone(name, passes):
    """Also with the products that are kept for many passes."""
    model, x = networks.build(name)
    shape = (2, networks.BATCH, networks.CLASSES)
    cotangents = tf.constant(np.random.default_rng(0).normal(size=shape))
    together = _recording(model, x, passes=passes)(
        lambda recording: recording.squared_norms(*tf.unstack(cotangents))
    )
    for k in range(2):
        alone = _recording(model, x)(
            lambda recording, k=k: recording.squared_norms(cotangents[k])
        )
        np.testing.assert_allclose(together[k], alone[0], rtol=1e-12)


@pytest.mark.parametrize("rows, columns", [(2, 30), (30, 2)])
def test_gram_and_explicit_form(rows, columns):
    """The first shape is cheaper by Gram matrices, the second without."""
    model, x = _build(_stack((rows, columns), _tanh(layers.Dense, columns)))
    _assert_as_in_a_loop(model, x, 1e-9)
    forms = []
    _recording(model, x)(
        lambda recording: forms.append(recording._rules[0]._by_gram)
    )
    assert forms == [rows < columns]


def test_memory_does_not_grow_as_batch_times_parameters():
    """No tensor of the graph holds a gradient of each example."""
    keras.config.set_dtype_policy("float32")
    model = keras.Sequential(
        [
            keras.Input((300,)),
            layers.Dense(200, activation="tanh"),
            layers.Reshape((8, 5, 5)),
            layers.Conv2D(150, 3, activation="tanh"),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    batch = 64
    x = tf.zeros([batch, 300])
    sizes = []

    def largest(recording):
        recording.squared_norms(tf.ones([batch, 3]))
        for operation in recording.outputs.graph.get_operations():
            for output in operation.outputs:
                if output.shape.is_fully_defined():
                    sizes.append(output.shape.num_elements())

    _recording(model, x)(largest)
    kernel = 300 * 200
    assert max(sizes) < batch * kernel / 10, f"{max(sizes)} entries"


@pytest.mark.parametrize("name", ["dropout", "lstm"])
def test_training_mode_keeps_the_random_numbers(name):
    """Dropout's mask is that of one call on the whole batch."""
    model, x = networks.build(name)
    if name == "lstm":
        model = keras.Sequential(
            [*model.layers[:1], layers.Dropout(0.4), *model.layers[1:]]
        )
        model(x)
    y = _labels(model, x)
    measured = _measured(model, x, y, "total", training=True)
    each = [np.array([i]) for i in range(networks.BATCH)]
    expected = networks.brute_force_trace(model, x, _LIKELIHOOD, y, each)
    assert measured == pytest.approx(expected, rel=1e-9)


def test_batch_normalization_in_training_mode_is_refused():
    model, x = networks.build("batch_norm")
    y = _labels(model, x)
    with pytest.raises(ValueError, match='estimator="batch"') as error:
        _measured(model, x, y, "total", training=True)
    assert "moving_mean" in str(error.value)
    # Frozen, it is like any other layer.
    model.layers[1].trainable = False
    _measured(model, x, y, "total", training=True)


def test_a_layer_that_mixes_examples_is_refused():
    model, x = _build(_stack((4,), _DENSE, _MixExamples, _ACTIVE))
    with pytest.raises(ValueError, match="depend on the other examples"):
        _measured(model, x, _labels(model, x), "total")


def test_a_variable_without_effect_has_no_gradient():
    class Idle(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(3,), name="w")

        def call(self, x):
            return x

    model, x = _build(_stack((4,), Idle))
    by_variable = _measured(model, x, _labels(model, x), "variable")
    values = {path.rpartition("/")[2]: v for path, v in by_variable.items()}
    assert values["w"] == 0 < values["kernel"]


def test_a_wrong_rule_is_found_and_not_used(monkeypatch):
    """What the graph is read as is checked against backpropagation."""
    model, x = networks.build("dense")
    correct = norms.Products._gram

    monkeypatch.setattr(
        norms.Products,
        "_gram",
        lambda *arguments: 1.01 * correct(*arguments),
    )
    assert len(_assert_as_in_a_loop(model, x, 1e-9)) == 2
