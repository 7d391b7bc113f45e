"""`Rematerialization` changes no number."""

from __future__ import annotations

import cases
import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
import training

import keras_fisher
from keras_fisher import FisherPenalty
from keras_fisher import GradientPenalty
from keras_fisher import InputGradientPenalty
from keras_fisher import likelihoods
from keras_fisher._common import keras_layers
from keras_fisher._derivatives.independence import are_known_to_be_independent
from keras_fisher.layers import FisherRegularization
from keras_fisher.layers import Rematerialization

_SEED = 11
_MODES = ("eager", "graph", "xla")
_CATEGORICAL = likelihoods.Categorical(from_logits=True)
_Y = np.arange(networks.BATCH) % networks.CLASSES


def _dense_gradients(tape, value, model):
    gradients = tape.gradient(
        value,
        [v.value for v in model.trainable_variables],
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
    return [tf.convert_to_tensor(g) for g in gradients]


def _step(penalty, model, x):
    """Outputs, penalty, and the gradients of the loss and of the penalty."""
    with tf.GradientTape(persistent=True) as tape:
        recorded = penalty.forward(model, x, seed=_SEED)
        term = penalty(recorded, _CATEGORICAL, _Y, seed=_SEED)
        loss = tf.reduce_mean(
            _CATEGORICAL.negative_log_likelihood(
                tf.constant(_Y), recorded.outputs
            )
        )
    return [
        recorded.outputs,
        term.value,
        *_dense_gradients(tape, loss, model),
        *_dense_gradients(tape, term.value, model),
    ]


def _pair(name, dtype):
    """The same network twice, once of blocks that are rematerialized."""
    for wrap in (False, True):
        keras.utils.set_random_seed(0)
        model, x = networks.build(name, dtype)
        if wrap:
            model = Rematerialization(model)
        yield model, x


def _check_equal(actual, expected, tolerance):
    assert len(actual) == len(expected)
    # Of the largest: a bias before a normalization has a gradient of zero.
    scale = max(np.abs(e).max() for e in expected)
    for a, e in zip(actual, expected):
        assert a.dtype == e.dtype
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * scale)


def _check_network(name, mode, dtype, penalty):
    results = []
    for model, x in _pair(name, dtype):
        step = cases.compiled(lambda x, m=model: _step(penalty, m, x), mode)
        result = [np.asarray(t) for t in step(x)]
        state = [v.numpy() for v in model.non_trainable_variables]
        results.append((result, state))
    (plain, state), (rematerialized, its_state) = results
    tight = dtype == "float64" and penalty.method == "exact"
    tolerance = 1e-12 if tight else 2e-3 if dtype == "float32" else 1e-6
    if penalty.method == "exact" and dtype == "float32":
        tolerance = 1e-5
    _check_equal(rematerialized, plain, tolerance)
    # Statistics and seeds have moved, once.
    for one, other in zip(its_state, state):
        np.testing.assert_allclose(one, other, rtol=1e-6)


_FAST = [
    ("dense", "eager"),
    ("conv2d", "eager"),
    ("batch_norm", "eager"),
    ("dropout", "eager"),
    ("layer_norm", "eager"),
    ("attention", "eager"),
    ("embedding", "eager"),
    ("two_inputs", "eager"),
    ("batch_norm", "graph"),
    ("dropout", "graph"),
    ("embedding", "graph"),
    ("max_pooling_2d", "graph"),
    ("dropout", "xla"),
]
_SETTINGS = [*((mode, "float64") for mode in _MODES), ("xla", "float32")]


@pytest.mark.few(5)
@pytest.mark.parametrize("name, mode", _FAST)
def test_numbers_are_those_of_the_layer(name, mode):
    _check_network(name, mode, "float64", FisherPenalty(0.3))


@pytest.mark.slow
@pytest.mark.parametrize("mode, dtype", _SETTINGS)
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_numbers_are_those_of_any_layer(name, mode, dtype):
    _check_network(name, mode, dtype, FisherPenalty(0.3))


@pytest.mark.parametrize(
    "penalty",
    [
        FisherPenalty(0.3, method="finite_difference"),
        FisherPenalty(0.3, micro_batch_size=4),
        FisherPenalty(0.3, fraction=0.5),
        GradientPenalty(0.3),
        InputGradientPenalty(0.3),
    ],
    ids=["differences", "micro_batches", "fraction", "gradient", "input"],
)
@pytest.mark.parametrize(
    "mode", ["eager", pytest.param("xla", marks=pytest.mark.slow)]
)
def test_works_with_every_penalty(penalty, mode):
    _check_network("dropout", mode, "float64", penalty)


@pytest.mark.slow
@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_half_precision(mode, method):
    results = []
    for model, x in _pair("batch_norm", "mixed_float16"):
        penalty = FisherPenalty(0.3, method=method)
        step = cases.compiled(
            lambda x, m=model, p=penalty: _step(p, m, x), mode
        )
        results.append([np.asarray(t) for t in step(x)])
    assert results[1][0].dtype == np.float16
    _check_equal(results[1], results[0], 0.03)


def _blocks(wrap, penalty_inside=False):
    keras.utils.set_random_seed(3)
    x = inputs = networks._input((6, 6, 2))
    for seed in (1, 2):
        block = keras.Sequential(
            [
                keras.layers.Conv2D(3, 3, padding="same"),
                keras.layers.BatchNormalization(),
                keras.layers.ReLU(),
                keras.layers.Dropout(0.2, seed=seed),
            ]
        )
        x = (Rematerialization(block) if wrap else block)(x)
    x = keras.layers.Flatten()(x)
    model = keras.Model(inputs, keras.layers.Dense(networks.CLASSES)(x))
    if penalty_inside:
        return keras.Sequential([FisherRegularization(model, seed=1)])
    return model


def _images():
    random = np.random.default_rng(0)
    return random.normal(size=(24, 6, 6, 2)), np.arange(24) % networks.CLASSES


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "kind, jit_compile",
    [
        ("fisher", False),
        ("keras", False),
        pytest.param("fisher", True, marks=pytest.mark.slow),
        pytest.param("keras", True, marks=pytest.mark.slow),
        pytest.param("layer", False, marks=pytest.mark.slow),
        pytest.param("layer", True, marks=pytest.mark.slow),
    ],
)
def test_fit_ends_at_the_same_weights(kind, jit_compile):
    # Keras cannot add losses of double precision to its own.
    dtype = "float32" if kind == "layer" else "float64"
    keras.config.set_dtype_policy(dtype)
    tolerance = 1e-4 if kind == "layer" else 1e-9
    ends = []
    for wrap in (False, True):
        model = _blocks(wrap, penalty_inside=kind == "layer")
        trained = model
        if kind == "fisher":
            trained = keras_fisher.FisherModel(
                model, 0.1, trace_every=None, seed=5
            )
        trained.compile(
            keras.optimizers.SGD(0.1, momentum=0.9),
            training.LOSS,
            jit_compile=jit_compile,
        )
        trained.fit(
            *_images(), batch_size=8, epochs=2, shuffle=False, verbose=0
        )
        ends.append(model.get_weights())
    assert len(ends[0]) == len(ends[1])
    for one, other in zip(*ends):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def test_saved_and_loaded(tmp_path):
    model = _blocks(True)
    x, _ = _images()
    expected = model(x)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again(x), expected, rtol=1e-6)
    inside = [v for v in again.layers if isinstance(v, Rematerialization)]
    assert len(inside) == 2
    plain = _blocks(False)
    assert [v.shape for v in again.weights] == [v.shape for v in plain.weights]
    again.summary(print_fn=lambda *args, **kwargs: None)


def test_frozen_layers_keep_their_weights():
    results = []
    for wrap in (False, True):
        model = _blocks(wrap)
        model.layers[1].trainable = False
        model.compile("sgd", training.LOSS)
        before = model.layers[1].get_weights()
        model.fit(*_images(), batch_size=8, shuffle=False, verbose=0)
        for one, other in zip(before, model.layers[1].get_weights()):
            np.testing.assert_array_equal(one, other)
        results.append(model.get_weights())
    for one, other in zip(*results):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_several_arguments():
    attend = keras.layers.MultiHeadAttention(2, 3)
    wrapped = Rematerialization(attend)
    random = np.random.default_rng(0)
    query = tf.constant(random.normal(size=(2, 4, 5)), "float32")
    value = tf.constant(random.normal(size=(2, 3, 5)), "float32")
    mask = tf.constant(random.normal(size=(2, 4, 3)) > 0)
    got = wrapped(query, value, attention_mask=mask)
    np.testing.assert_allclose(
        got, attend(query, value, attention_mask=mask), rtol=1e-6
    )
    got = wrapped(query, query, use_causal_mask=True)
    np.testing.assert_allclose(
        got, attend(query, query, use_causal_mask=True), rtol=1e-6
    )
    a, b = keras.Input((4, 5)), keras.Input((3, 5))
    model = keras.Model([a, b], wrapped(a, b))
    np.testing.assert_allclose(
        model([query, value]), attend(query, value), rtol=1e-6
    )


def test_several_outputs():
    x = inputs = keras.Input((4,))
    a = keras.layers.Dense(3)(x)
    block = keras.Model(inputs, {"a": a, "b": [keras.ops.tanh(a), a > 0]})
    x = tf.random.normal([2, 4])
    got, expected = Rematerialization(block)(x), block(x)
    keras.tree.map_structure(np.testing.assert_allclose, got, expected)


def test_masks_pass_in_and_out():
    tokens = np.array([[3, 2, 0, 0], [1, 2, 3, 0]])
    results = []
    for wrap in (lambda layer: layer, Rematerialization):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                wrap(keras.layers.Embedding(5, 3, mask_zero=True)),
                wrap(keras.layers.Dropout(0.0)),
                wrap(keras.layers.LSTM(3)),
            ]
        )
        results.append(model(tokens))
    np.testing.assert_allclose(*results, rtol=1e-6)
    embedding = Rematerialization(keras.layers.Embedding(5, 3, mask_zero=True))
    mask = keras_layers.mask_of(embedding(tokens))
    np.testing.assert_array_equal(mask, tokens != 0)


class _Adding(keras.layers.Layer):
    def call(self, x):
        self.add_loss(0.3 * keras.ops.sum(x**3))
        return 2 * x


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_losses_of_the_layer_count(mode):
    results = []
    for wrap in (lambda layer: layer, Rematerialization):
        keras.utils.set_random_seed(1)
        block = keras.Sequential(
            [
                keras.layers.Dense(
                    3, kernel_regularizer="l2", activity_regularizer="l2"
                ),
                _Adding(),
            ]
        )
        model = keras.Sequential([keras.Input((4,)), wrap(block)])

        def step(x, model=model):
            with tf.GradientTape() as tape:
                total = tf.reduce_sum(model(x)) + sum(model.losses)
            return [total, *_dense_gradients(tape, total, model)]

        x = tf.ones([2, 4])
        results.append([np.asarray(t) for t in cases.compiled(step, mode)(x)])
        assert len(model.losses) == 3
    _check_equal(*results, 1e-6)


@pytest.mark.parametrize("estimator", ["monte_carlo", "exact", "batch"])
@pytest.mark.parametrize("by", ["variable", "example"])
def test_traces_are_those_of_the_layer(estimator, by):
    if (estimator, by) == ("batch", "example"):
        pytest.skip("a batch has no norms of single examples")
    traces = []
    for wrap in (lambda layer: layer, Rematerialization):
        keras.utils.set_random_seed(1)
        block = keras.Sequential([keras.layers.Dense(4, activation="tanh")])
        model = keras.Sequential(
            [keras.Input((3,)), wrap(block), keras.layers.Dense(3)]
        )
        x = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
        trace = keras_fisher.fisher_trace(
            model,
            x,
            likelihood=_CATEGORICAL,
            estimator=estimator,
            by=by,
            seed=3,
        )
        traces.append(
            [*trace.values()] if isinstance(trace, dict) else [*trace]
        )
    np.testing.assert_allclose(*traces, rtol=1e-5)


@pytest.mark.slow
def test_hessian_traces_are_those_of_the_layer():
    traces = []
    for wrap in (False, True):
        model = _blocks(wrap)
        x, y = _images()
        traces.append(
            keras_fisher.hessian_trace(
                model, x, y, loss=training.LOSS, num_probes=4, seed=1
            )
        )
    first, second = (getattr(t, "value", t) for t in traces)
    np.testing.assert_allclose(first, second, rtol=1e-4)


@pytest.mark.parametrize(
    "layer, expected",
    [
        (keras.layers.Dense(2), True),
        (keras.layers.BatchNormalization(), False),
        (_Adding(), False),
    ],
)
def test_whether_examples_are_independent_is_seen_through_it(layer, expected):
    wrapped = Rematerialization(layer)
    assert are_known_to_be_independent(wrapped) is expected


def test_dtype_of_computation_is_seen_through_it():
    dense = keras.layers.Dense(2, dtype="mixed_float16")
    assert keras_layers.compute_dtype(dense) == "float16"
    assert keras_layers.compute_dtype(Rematerialization(dense)) == "float16"


class _Noise(keras.layers.Layer):
    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x))


def test_random_numbers_from_elsewhere_are_an_error():
    layer = Rematerialization(_Noise())
    with pytest.raises(ValueError, match="SeedGenerator"):
        layer(tf.ones([2, 3]))


class _Unused(keras.layers.Layer):
    def build(self, shape):
        self.used = self.add_weight(shape=(), name="used")
        self.unused = self.add_weight(shape=(), name="unused")

    def call(self, x):
        return self.used * x


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_variable_without_gradient_still_has_none(mode):
    layer = Rematerialization(_Unused())
    x = tf.ones([2, 3])
    layer(x)

    def step():
        with tf.GradientTape() as tape:
            y = layer(x)
        gradients = tape.gradient(y, layer.trainable_variables)
        assert gradients[1] is None
        return gradients[0]

    assert cases.compiled(step, mode)() == 6.0
