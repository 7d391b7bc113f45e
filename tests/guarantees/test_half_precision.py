"""In 16 bits, what is measured and penalized is that of single precision."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import training

import keras_fisher
from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher.layers import FisherRegularization

_RANDOM = np.random.default_rng(0)
_X = _RANDOM.normal(size=[128, 32]).astype("float32")
# As pictures are before anybody divides them by 255.
_PIXELS = _RANDOM.integers(0, 256, size=[128, 32]).astype("float32")
_Y = _RANDOM.integers(0, 10, 128)
_LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _network(policy: str, stddev=0.2) -> keras.Model:
    keras.utils.set_random_seed(1)
    keras.config.set_dtype_policy(policy)
    return keras.Sequential(
        [
            keras.Input([32]),
            keras.layers.Dense(
                64,
                "tanh",
                kernel_initializer=keras.initializers.RandomNormal(
                    stddev=stddev
                ),
            ),
            keras.layers.Dense(10, dtype="float32"),
        ]
    )


def _flat(tensors) -> np.ndarray:
    return np.concatenate([np.ravel(t) for t in tensors]).astype("float64")


def _of_layer(policy: str, penalty) -> tuple[float, np.ndarray]:
    """The value of a layer's loss, and its gradient."""
    layer = FisherRegularization(_network(policy), penalty)
    with tf.GradientTape() as tape:
        layer(_X, training=True)
        (value,) = layer.losses
    return float(value), _flat(tape.gradient(value, layer.trainable_variables))


@pytest.mark.parametrize(
    "options",
    [
        dict(alpha=0.1, bound=None),
        dict(alpha=1e-3, bound=None),
        dict(alpha=0.1, bound=0.5, warmup_steps=0),
        dict(alpha=0.01, bound=None, micro_batch_size=48),
        dict(alpha=0.01, bound=None, fraction=0.5),
    ],
    ids=str,
)
def test_the_gradient_of_a_layer_does_not_vanish(options):
    single, expected = _of_layer("float32", training.LikeliestLabels(**options))
    value, found = _of_layer(
        "mixed_float16", training.LikeliestLabels(**options)
    )
    assert abs(value / single - 1) < 0.003
    off = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert off < 0.003, f"gradient off by {off:.2%}"


def _trained(last: keras.layers.Layer, initial_scale: float):
    """The optimizer of a layer in 16 bits and `last`, after three steps."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input([32])
    hidden = keras.layers.Dense(16, "tanh")(inputs)
    model = keras.Model(inputs, last(hidden))
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.1), initial_scale=initial_scale
    )
    model.compile(optimizer, _LOSS)
    model.fit(_X[:96], _Y[:96], batch_size=32, epochs=1, verbose=0)
    return optimizer


@pytest.mark.parametrize("penalizes", [False, True])
def test_a_layer_takes_as_large_a_loss_scale_as_keras(penalizes):
    """Larger than any number in 16 bits, and steps are taken."""
    last = keras.layers.Dense(10)
    optimizer = _trained(
        FisherRegularization(last, 0.1) if penalizes else last, 2.0**17
    )
    assert int(optimizer.inner_optimizer.iterations) == 3
    assert float(optimizer.dynamic_scale) == 2.0**17


def _of_pixels(policy: str, quantity: str) -> float:
    model = _network(policy, stddev=0.002)
    if quantity == "hessian":
        return keras_fisher.hessian_trace(
            model, _PIXELS, _Y, loss=_LOSS, num_probes=8, seed=0
        )
    if quantity == "layer":
        penalty = training.LikeliestLabels(0.1, bound=None)
        layer = FisherRegularization(model, penalty)
        layer(_PIXELS, training=True)
        return float(layer.losses[0])
    return keras_fisher.fisher_trace(
        model, _PIXELS, likelihood="categorical", estimator=quantity, seed=0
    )


@pytest.mark.parametrize(
    "quantity", ["batch", "monte_carlo", "layer", "hessian"]
)
def test_sums_over_large_inputs_do_not_overflow(quantity):
    single, half = (
        float(_of_pixels(policy, quantity))
        for policy in ("float32", "mixed_float16")
    )
    assert abs(half / single - 1) < 0.02, (half, single)


def test_what_is_excluded_may_overflow():
    """An infinite kernel's gradient leaves that of the biases alone."""
    network = _network("mixed_float16", stddev=1e-4)
    penalty = training.LikeliestLabels(0.1, bound=None, exclude="kernel")
    likelihood = keras_fisher.likelihoods.Categorical()

    def found(x, network):
        with tf.GradientTape() as tape:
            forward = penalty.forward(network, x)
            # Of an optimizer, which knows no gradients.
            term = penalty(forward, likelihood, loss_scale=2.0**14)
            value = 2.0**14 * term.value
        return term, tape.gradient(value, network.trainable_variables)

    term, derivatives = found(30.0 * _PIXELS, network)
    assert not np.isfinite(term.traces[0]), "nothing is left out"
    assert np.isfinite(float(term.value)) and float(term.value) > 0
    bias = network.layers[0].bias
    index = [id(v) for v in network.trainable_variables].index(id(bias))
    assert np.isfinite(derivatives[index]).all()


def test_a_model_trains_on_pixels():
    network = _network("mixed_float16", stddev=0.002)
    model = FisherModel(network, FisherPenalty(0.1), trace_every=1, seed=0)
    model.compile(keras.optimizers.SGD(1e-6), _LOSS)
    logs = model.fit(_PIXELS, _Y, epochs=8, verbose=0).history
    assert np.isfinite(logs["loss"]).all()
    assert np.isfinite(logs["fisher_trace"][-1])
