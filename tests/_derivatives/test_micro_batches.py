"""Micro-batches of a penalty, by themselves or not, against brute force."""

from __future__ import annotations

import math

import cases
import evaluation
import keras
import networks
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import GradientPenalty
from keras_fisher import likelihoods


@pytest.mark.few(2)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize(
    "name, size",
    [
        ("dense", 1),
        ("dense", 4),
        ("batch_norm", 1),
        ("batch_norm", 4),
        ("shared", 2),
        ("embedding", 2),
        ("gru", 4),
    ],
)
def test_micro_batches_equal_brute_force(name, mode, size):
    rows = np.arange(networks.BATCH)
    groups = np.split(rows, rows[size::size])
    evaluation.check_against_brute_force(
        FisherPenalty(0.7, micro_batch_size=size), name, mode, groups
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.parametrize(
    "name",
    ["dense", "batch_norm", pytest.param("gru", marks=pytest.mark.slow)],
)
def test_micro_batches_of_an_unknown_batch_size(name, mode):
    penalty = FisherPenalty(0.7, micro_batch_size=4)
    model, x = networks.build(name)
    expected = evaluation.run("eager", penalty, model, x)
    value, _, gradients = evaluation.run(
        mode, penalty, model, x, unknown_batch_size=True
    )
    np.testing.assert_allclose(value, expected[0], rtol=1e-9)
    assert evaluation.relative(gradients, expected[2]) < 1e-9


class Halves(keras.layers.Layer):
    """Asks for the size of its inputs, and goes by it."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1] // 2, 3))

    def call(self, x):
        count = x.shape[-1]
        if count is None:
            return x[:, : self.kernel.shape[0]] @ self.kernel
        return x[:, : count // 2] @ self.kernel / count


_ASKING = {
    "own": ((6,), Halves),
    "groups": ((4, 4, 4), lambda: keras.layers.GroupNormalization(2)),
    "pooling": ((4, 4, 4), lambda: keras.layers.AdaptiveAveragePooling2D(2)),
    "distributed": (
        (3, 4, 4, 1),
        lambda: keras.layers.TimeDistributed(keras.layers.Conv2D(2, 2)),
    ),
    "integers": (
        (2,),
        lambda: keras.layers.IntegerLookup(
            vocabulary=[0, 1, 2], output_mode="multi_hot"
        ),
    ),
    "words": (
        (),
        lambda: keras.layers.TextVectorization(
            vocabulary=["a", "b"], output_mode="count"
        ),
    ),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("bound", [None, 1.0])
@pytest.mark.parametrize(
    "name, jit",
    [
        *((name, False) for name in _ASKING),
        ("own", True),
        # With tables, XLA has not the others.
        *(
            pytest.param(name, True, marks=pytest.mark.slow)
            for name in ("groups", "pooling", "distributed")
        ),
    ],
)
def test_micro_batches_of_odd_batches_know_their_shapes(name, jit, bound):
    """Ten examples in fours: the number of a batch's is not known."""
    shape, first = _ASKING[name]
    random = np.random.default_rng(0)
    x = random.integers(0, 5, [10, *shape])
    dtype = "int64"
    if name == "words":
        x, dtype = np.array([*"abcdeabcde"], object)[:, None], "string"
        shape = (1,)
    elif name != "integers":
        x, dtype = random.normal(size=x.shape).astype("float32"), "float32"

    def weights(**compiled):
        keras.utils.set_random_seed(0)
        network = keras.Sequential(
            [
                keras.Input(shape, dtype=dtype),
                first(),
                keras.layers.Flatten(),
                keras.layers.Dense(3),
            ]
        )
        penalty = GradientPenalty(
            0.1, micro_batch_size=2, bound=bound, warmup_steps=0
        )
        model = FisherModel(network, penalty, seed=0)
        model.compile(
            keras.optimizers.SGD(0.1),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            **compiled,
        )
        inputs = tf.constant(x) if name == "words" else x
        model.fit(inputs, np.arange(10) % 3, 4, shuffle=False, verbose=0)
        return np.concatenate([np.ravel(w) for w in model.get_weights()])

    np.testing.assert_allclose(
        weights(jit_compile=jit),
        weights(run_eagerly=True, jit_compile=False),
        rtol=1e-5,
        atol=2e-6,
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("size, examples", [(1, 12), (5, 12), (9, 6)])
def test_many_micro_batches_equal_brute_force(
    size, examples, unknown, mode, method
):
    model, x = networks.build("dense", "float64")
    x = tf.concat([x, 0.5 * x[::-1]], axis=0)[:examples]
    y = tf.constant(np.arange(examples) % networks.CLASSES)
    penalty = GradientPenalty(0.7, micro_batch_size=size, method=method)

    def evaluate(x, y):
        return evaluation.evaluated(penalty, model, x, y)

    if mode != "eager":
        rows = None if unknown else examples
        evaluate = tf.function(
            evaluate,
            jit_compile=mode == "xla",
            input_signature=[
                tf.TensorSpec([rows, *t.shape[1:]], t.dtype) for t in (x, y)
            ],
        )
    value, _, gradients = evaluate(x, y)
    rows = np.arange(examples)
    groups = np.split(rows, rows[size::size])

    def expected():
        trace = networks.brute_force_trace(
            model, x, evaluation.CATEGORICAL, y, groups
        )
        return penalty.alpha * trace / examples

    np.testing.assert_allclose(value, expected(), rtol=1e-9)
    evaluation.check_slope(expected, model, gradients)


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_micro_batches_leave_out_positions_without_a_label(mode):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4, 5)), keras.layers.Dense(3)])
    x = tf.random.stateless_normal([5, 4, 5], [0, 1])
    y = tf.constant(np.random.default_rng(0).integers(0, 3, (5, 4)))
    likelihood = likelihoods.Categorical(from_logits=True, ignore_class=0)

    def evaluate(size, rows):
        penalty = GradientPenalty(0.7, micro_batch_size=size)

        def run():
            return evaluation.evaluated(
                penalty, model, x[rows], y[rows], likelihood
            )

        return (tf.function(run) if mode == "graph" else run)()

    value, _, gradients = evaluate(2, slice(0, 5))
    parts = [slice(0, 2), slice(2, 4), slice(4, 5)]
    alone = [evaluate(None, rows) for rows in parts]
    weights = np.array([4, 4, 1]) / 25
    expected = sum(w * value for w, (value, _, _) in zip(weights, alone))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    expected = [
        sum(w * g for w, g in zip(weights, of_parts))
        for of_parts in zip(*(gradients for _, _, gradients in alone))
    ]
    assert evaluation.relative(gradients, expected) < 1e-5


def test_a_trace_measured_beside_micro_batches_is_of_the_whole_batch():
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    traces = []
    for size in (None, 2):
        keras.utils.set_random_seed(0)
        model = FisherModel(
            keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]),
            GradientPenalty(0.1, micro_batch_size=size),
            trace_every=1,
            seed=0,
        )
        model.compile("sgd", "mse")
        history = model.fit(x, x[:, :3], batch_size=8, verbose=0).history
        traces += history["fisher_trace"]
    assert traces[0] > 0
    assert traces[1] == pytest.approx(traces[0], rel=1e-5)


def test_micro_batches_cost_what_one_pass_costs():
    model, x = networks.build("dense", "float32")
    x = tf.tile(x, [8, 1])

    def cost(penalty):
        function = tf.function(
            lambda: evaluation.evaluated(penalty, model, x, None)[2],
            autograph=False,
        )
        graph = function.get_concrete_function().graph
        return sum(
            2 * math.prod(o.outputs[0].shape) * _inner(o)
            for o in graph.get_operations()
            if o.type == "MatMul"
        )

    whole, parts = (
        cost(FisherPenalty()),
        cost(FisherPenalty(micro_batch_size=8)),
    )
    # One more pass forward.
    assert whole < parts < 1.6 * whole, (whole, parts)


def _inner(operation):
    """The length of the sums in a product."""
    shape = operation.inputs[0].shape
    return shape[0] if operation.get_attr("transpose_a") else shape[1]
