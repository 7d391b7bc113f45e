"""Wrong second derivatives of layers are found, and right ones are not."""

from __future__ import annotations

import foreign
import keras
from keras import layers
import numpy as np
import pytest
import tensorflow as tf
import training

from keras_fisher._derivatives import catalogue
from keras_fisher._derivatives import derivative_check
from keras_fisher.layers import Rematerialization

_IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3))


_WRONG = {
    "in-x": foreign.wrong_in_x,
    "by-half": foreign.wrong_by_half,
    "in-the-cotangent": foreign.wrong_in_the_cotangent,
    "stopped": lambda x: (x + tf.stop_gradient(tf.sin(x))) ** 2,
}
_RIGHT = {
    "custom": foreign.right,
    "relu": tf.nn.relu,
    "abs": tf.abs,
    "linear": lambda x: 3 * x,
    "square": tf.square,
    "softmax": tf.nn.softmax,
    "sorted": lambda x: tf.sort(x, axis=-1),
    "largest": lambda x: tf.reduce_max(x, axis=-1, keepdims=True) * x,
    "pooled": lambda x: tf.nn.avg_pool2d(x, 2, 1, "SAME"),
    "steps": lambda x: x * tf.floor(x),
}


class Block(layers.Layer):
    """Convolution, normalization, activation and dropout in one."""

    def __init__(self, activation, **kwargs):
        super().__init__(**kwargs)
        self.convolution = layers.Conv2D(6, 3, padding="same")
        self.normalization = layers.BatchNormalization()
        self.dropout = layers.Dropout(0.3)
        self.activation = activation

    def build(self, shape):
        self.convolution.build(shape)
        self.normalization.build((*shape[:-1], 6))

    def call(self, x, training=None):
        x = self.normalization(self.convolution(x), training=training)
        return self.dropout(self.activation(x), training=training)


def _network(*middle, seed=0, activation="relu"):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            # Leaves zeros, where what comes next may have a kink.
            layers.Conv2D(6, 3, activation=activation),
            *middle,
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def _verdicts(model, x=_IMAGES, **kwargs):
    x = tf.constant(x, model.compute_dtype)
    chosen = catalogue.unknown(model)
    return {
        each.path.rpartition("/")[2]: each.verdict
        for each in derivative_check.check(model, x, chosen, **kwargs)
    }


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("name", _WRONG)
def test_what_is_wrong_is_found(name, activation, dtype, seed):
    keras.config.set_dtype_policy(dtype)
    wrong = foreign.Applied(_WRONG[name], name="wrong")
    right = foreign.Applied(foreign.right, name="right")
    model = _network(wrong, right, seed=seed, activation=activation)
    assert _verdicts(model) == {"wrong": "differs", "right": "exact"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", _RIGHT)
def test_what_is_right_is_left_alone(name, dtype, seed):
    keras.config.set_dtype_policy(dtype)
    model = _network(foreign.Applied(_RIGHT[name], name="right"), seed=seed)
    assert _verdicts(model) == {"right": "exact"}


@pytest.mark.few(1)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_blocks_with_statistics_kinks_and_random_draws(dtype, seed):
    keras.config.set_dtype_policy(dtype)
    model = _network(
        Block(tf.nn.relu, name="kinks"),
        Block(foreign.right, name="smooth"),
        Block(foreign.wrong_in_x, name="wrong"),
        seed=seed,
    )
    assert _verdicts(model) == {
        "kinks": "exact",
        "smooth": "exact",
        "wrong": "differs",
    }


def test_the_figures_are_the_two_derivatives():
    keras.config.set_dtype_policy("float64")
    model = _network(
        foreign.Applied(foreign.wrong_by_half, name="wrong"), activation="tanh"
    )
    (found,) = derivative_check.check(
        model, tf.constant(_IMAGES), catalogue.unknown(model)
    )
    assert found.exact / found.difference == pytest.approx(0.5, rel=1e-3)
    assert f"{found.difference:.3g}" in str(found)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_sixteen_bits_are_too_rough_to_tell(policy):
    keras.config.set_dtype_policy(policy)
    model = _network(foreign.Applied(foreign.wrong_in_x, name="wrong"))
    assert _verdicts(model) == {"wrong": "undecided"}


def _quantized(x):
    return tf.quantization.fake_quant_with_min_max_args(x, -2.0, 2.0)


def _bicubic(x):
    return tf.raw_ops.ResizeBicubic(images=x, size=[5, 5])


@pytest.mark.parametrize("function", [_quantized, _bicubic])
def test_what_is_not_there_is_missing(function):
    model = _network(foreign.Applied(function, name="none"))
    assert _verdicts(model) == {"none": "missing"}


def test_what_no_variable_comes_before_does_not_matter():
    augmented = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.RandomRotation(0.3),
            foreign.Applied(foreign.wrong_in_x),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    assert _verdicts(augmented) == {}


def test_what_gives_integers_does_not_matter():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3)(inputs)
    largest = foreign.Applied(lambda x: tf.argmax(x, axis=-1), name="largest")(
        x
    )
    x = layers.Multiply()([x, layers.Embedding(6, 6)(largest)])
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))
    assert _verdicts(model) == {}


def test_weights_without_entries_are_left_out():
    class Empty(foreign.Applied):
        def build(self, shape):
            self.nothing = self.add_weight((0, *shape[1:]), "zeros")

        def call(self, x):
            return super().call(x) + tf.reduce_sum(self.nothing, axis=0)

    model = _network(
        Empty(foreign.wrong_in_x, name="wrong"),
        Empty(foreign.right, name="ok"),
    )
    assert _verdicts(model) == {"wrong": "differs", "ok": "exact"}


def test_an_error_of_a_layer_leaves_it_undecided():
    model = _network(
        foreign.Applied(foreign.broken, name="broken"),
        foreign.Applied(foreign.wrong_in_x),
    )
    (broken, wrong) = derivative_check.check(
        model, tf.constant(_IMAGES, "float32"), catalogue.unknown(model)
    )
    assert broken.verdict == "undecided"
    assert "no way back from there" in broken.reason
    assert wrong.verdict == "differs"


def test_rows_that_repeat_in_a_gradient():
    class Words(layers.Layer):
        def __init__(self):
            super().__init__(name="words")
            self.embedding = layers.Embedding(5, 4)

        def call(self, x):
            return tf.square(self.embedding(x))

    model = keras.Sequential(
        [keras.Input((6,), dtype="int32"), Words(), layers.Flatten()]
    )
    (words,) = derivative_check.check(
        model, np.arange(24).reshape(4, 6) % 3, [model.layers[0]]
    )
    assert words.verdict == "exact"


def test_operations_of_functional_models_and_shared_layers():
    x = keras.Input((8, 8, 3))
    shared = foreign.Applied(foreign.wrong_in_x, name="shared")
    y = shared(layers.Conv2D(3, 1)(shared(x)))
    y = keras.ops.image.affine_transform(
        y, np.array([[1.0, 0.2, 0.1, 0.1, 0.8, 0.3, 0.0, 0.0]], "float32")
    )
    model = keras.Model(x, layers.Dense(3)(layers.Flatten()(y)))
    verdicts = _verdicts(model)
    assert verdicts.pop("shared") == "differs"
    assert list(verdicts.values()) == ["differs"]


class _Weighted(layers.Layer):
    """Gives a weight to a layer in it, and one back."""

    def __init__(self, function):
        super().__init__()
        self.inner = foreign.Applied(function, name="inner")

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3), name="kernel")

    def call(self, x):
        return x @ self.inner(self.kernel)


@pytest.mark.parametrize(
    "function, verdict",
    [
        (tf.tanh, "exact"),
        (foreign.wrong_in_x, "differs"),
        (lambda w: w, "exact"),
    ],
    ids=["right", "wrong", "itself"],
)
def test_layers_may_be_called_on_weights(function, verdict):
    layer = _Weighted(lambda w: function(1.0 * w))
    model = keras.Sequential([keras.Input((4,)), layer])
    x = np.random.default_rng(0).normal(size=(5, 4))
    found = _verdicts(model, x)
    assert found.pop("inner") == verdict
    assert [*found.values()] == [verdict]


def test_layers_may_return_a_weight():
    layer = _Weighted(lambda w: w)
    layer.inner.call = lambda w: w
    model = keras.Sequential([keras.Input((4,)), layer])
    assert _verdicts(model, np.ones([5, 4]))["inner"] == "exact"


def test_nothing_in_the_model_changes():
    model = _network(Block(tf.nn.relu))
    layer = catalogue.unknown(model)[0]
    before = [v.numpy() for v in model.variables], dict(vars(layer))
    derivative_check.check(model, tf.constant(_IMAGES), [layer])
    training.assert_equal([v.numpy() for v in model.variables], before[0])
    assert vars(layer) == before[1]


def test_a_call_that_a_user_has_set_comes_back():
    layer = foreign.Applied(tf.square)
    layer.call = own = lambda x: 2 * x
    model = _network(layer)
    derivative_check.check(model, tf.constant(_IMAGES), [layer])
    assert layer.call is own


class Named(layers.Layer):
    """As layers of other people's, whose configuration lacks a function."""

    def __init__(self, factor, function=foreign.right, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor
        self.function = function

    def call(self, x):
        return self.function(self.factor * x)

    def get_config(self):
        return {**super().get_config(), "factor": self.factor}


def test_what_repeats_is_compared_once_if_wanted():
    own_call = Named(1.0, name="own-call")
    own_call.call = lambda x: foreign.wrong_in_x(x)
    middle = [
        Named(1.0, name="first"),
        Named(1.0, name="again"),
        Named(2.0, name="of-another-factor"),
        Named(1.0, foreign.wrong_in_x, name="of-another-function"),
        own_call,
        layers.Flatten(),
        Named(1.0, name="of-another-shape"),
        foreign.Applied(foreign.right, name="without-a-configuration"),
        foreign.Applied(foreign.wrong_in_x, name="nor-this"),
    ]
    found = _verdicts(_network(*middle, activation="tanh"), repeats=False)
    assert found == {
        "first": "exact",
        "of-another-factor": "exact",
        "of-another-function": "differs",
        "own-call": "differs",
        "of-another-shape": "exact",
        "without-a-configuration": "exact",
        "nor-this": "differs",
    }


class Counting(layers.Layer):
    """Says how often its Python has run."""

    calls = 0

    def build(self, shape):
        self.kernel = self.add_weight(shape=shape[-1:], name="kernel")

    def call(self, x):
        type(self).calls += 1
        return tf.tanh(self.kernel * x)


class OnTheHost(Counting):
    """Cannot be traced."""

    calls = 0

    def call(self, x):
        assert np.asarray(x).size
        return super().call(x)


@pytest.mark.parametrize("layer, most", [(Counting, 12), (OnTheHost, 60)])
def test_layers_run_in_a_graph_and_no_more_often_than_needed(layer, most):
    model = _network(layer(name="counting"), activation="tanh")
    layer.calls = 0
    # Two tensors, of which the first four probes of seven are right.
    assert _verdicts(model) == {"counting": "exact"}
    assert layer.calls <= most, layer.calls


def test_the_way_back_from_a_layer_ends_at_the_one_before(monkeypatch):
    sources = []
    gradient = tf.GradientTape.gradient

    def noted(tape, target, at, **kwargs):
        sources.append(len(at))
        return gradient(tape, target, at, **kwargs)

    blocks = [
        foreign.Applied(foreign.right, name=f"block-{k}") for k in range(3)
    ]
    model = _network(*blocks, activation="tanh")
    monkeypatch.setattr(tf.GradientTape, "gradient", noted)
    assert set(_verdicts(model).values()) == {"exact"}
    variables = len(model.trainable_variables)
    assert sources[:3] == [variables, variables + 1, variables + 2]


class _Network(keras.Model):
    """As KerasHub makes functional models of its classes."""

    def __init__(self, activation, **kwargs):
        x = keras.Input((4,))
        y = layers.Dense(3)(foreign.Applied(activation, name="in-it")(x))
        super().__init__(inputs=x, outputs=y, **kwargs)


class _Stack(keras.Sequential):
    pass


class _Calling(_Network):
    def call(self, inputs):
        return super().call(inputs) ** 2


def test_what_is_computed_again_is_looked_at():
    # A layer within it gets inputs that no tape knows.
    wrong = Rematerialization(foreign.Applied(foreign.wrong_in_x), name="again")
    assert _verdicts(_network(wrong, activation="tanh")) == {"again": "differs"}


def test_models_that_only_contain_layers_are_known():
    network = _Network(foreign.right)
    assert [each.name for each in catalogue.unknown(network)] == ["in-it"]
    stack = _Stack([keras.Input((4,)), layers.Dense(3)])
    assert catalogue.unknown(stack) == []
    calling = _Calling(foreign.right)
    assert catalogue.unknown(calling)[0] is calling
    network.call = lambda inputs: inputs
    assert catalogue.unknown(network)[0] is network


class Two(layers.Layer):
    def call(self, x, y):
        return tf.tanh(x) * y**2


def test_a_tensor_that_is_given_twice_counts_twice():
    x = keras.Input((8, 8, 3))
    y = layers.Conv2D(3, 3, activation="tanh")(x)
    y = layers.Flatten()(Two(name="two")(y, y))
    assert _verdicts(keras.Model(x, layers.Dense(3)(y))) == {"two": "exact"}


class Switch(layers.Layer):
    """Jumps at two thresholds, one at which it is, as a router may be."""

    def build(self, shape):
        self.choice = self.add_weight((1,), "zeros")

    def call(self, x):
        # Over both, a difference is 4/2, and of a quarter of the way 1/0.5.
        far = 0.3 * {"float32": 3e-3, "float64": 1e-5}[self.compute_dtype]
        near, far = (tf.cast(self.choice > at, x.dtype) for at in (1e-7, far))
        return x**2 + (near + 3 * far) * x


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_jumps_are_no_slope(dtype):
    keras.config.set_dtype_policy(dtype)
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(6),
            Switch(name="switch"),
            layers.Dense(3),
        ]
    )
    x = np.random.default_rng(0).normal(size=(4, 5))
    assert _verdicts(model, x) == {"switch": "exact"}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_masks_have_put_in_is_no_measure_of_steps(dtype):
    keras.config.set_dtype_policy(dtype)
    mask = np.where(np.arange(6) < 3, 0.0, -1e9).astype(dtype)
    masked = layers.Lambda(lambda y: y + mask, name="masked")
    softmax = foreign.Applied(tf.nn.softmax, name="softmax")
    found = _verdicts(_network(masked, softmax, activation="tanh"))
    assert found == {"masked": "exact", "softmax": "exact"}


def test_half_precision_within_single_is_too_rough_to_tell():
    def rough(x):
        return tf.cast(tf.tanh(tf.cast(x, tf.bfloat16)), x.dtype)

    found = _verdicts(_network(foreign.Applied(rough, name="rough")))
    assert found == {"rough": "undecided"}


class OfAUser(layers.EinsumDense):
    """A layer that is not in the catalogue."""


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_first_layers_in_half_precision_are_too_rough_to_tell(policy):
    """Their gradients do not depend on weights, but are rounded, too."""
    keras.config.set_dtype_policy(policy)
    first = OfAUser("abc,cd->abd", (None, 4), bias_axes="d")
    model = keras.Sequential([keras.Input((500, 5)), first])
    x = np.random.default_rng(0).normal(size=(8, 500, 5))
    assert _verdicts(model, x) == {first.name: "undecided"}
