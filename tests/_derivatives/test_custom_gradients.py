"""What is differentiated in our way may stand in loops and branches."""

from __future__ import annotations

from cases import MODES
from cases import compiled
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher._derivatives import checkpoint
from keras_fisher._derivatives import convolutions
from keras_fisher._derivatives import linear_maps
from keras_fisher._derivatives import max_pooling
from keras_fisher._derivatives import second_derivatives

_KERNEL = tf.constant(
    np.random.default_rng(0).normal(size=(2, 2, 1, 1)), tf.float32
)
_resize = linear_maps.resize(tf.image.resize)
# Of images of 4x4 pixels, to the same.
_FUNCTIONS = {
    "convolution": lambda x: convolutions.convolution(
        x, _KERNEL, padding="SAME"
    ),
    "resize": lambda x: _resize(_resize(x, (7, 5)), (4, 4)),
    "slice": lambda x: tf.concat(
        [linear_maps.slices(tf.slice)(x, [0, 1, 0, 0], [2, 3, 4, 1])] * 2, 1
    )[:, :4],
    "max pooling": lambda x: max_pooling.exact_for_xla(tf.nn.max_pool)(
        x, 2, 1, "SAME"
    ),
    "checkpoint": lambda x: checkpoint.checkpoint(
        lambda each: ([tf.tanh(each[0]) ** 2], None), [x]
    )[0][0],
}
_SURROUNDINGS = {
    "loop": lambda f, x: tf.while_loop(
        lambda *_: True, lambda x: [f(x)], [x], maximum_iterations=1
    )[0],
    "branch": lambda f, x: tf.cond(
        tf.reduce_sum(x) < 1e9, lambda: f(x), lambda: x
    ),
    "function": lambda f, x: tf.function(lambda: f(x), autograph=False)(),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("surroundings", _SURROUNDINGS)
@pytest.mark.parametrize("name", _FUNCTIONS)
def test_second_derivatives_are_the_same_in_it(name, surroundings, mode):
    random = np.random.default_rng(1)
    x = tf.constant(random.normal(size=(2, 4, 4, 1)), tf.float32)
    v = tf.constant(random.normal(size=(4, 4, 1)), tf.float32)

    def derivatives(within):
        def of(x, v):
            with tf.GradientTape(persistent=True) as outer:
                outer.watch(v)
                with tf.GradientTape() as inner:
                    inner.watch(v)
                    # An outer tensor, of which the inner graph takes hold.
                    y = within(_FUNCTIONS[name], x * tf.tanh(v))
                    curved = tf.reduce_sum(y**3)
                gradient = inner.gradient(curved, v)
                square = tf.reduce_sum(gradient**2)
            return gradient, outer.gradient(square, v)

        return of

    expected = derivatives(lambda f, x: f(x))(x, v)
    found = compiled(derivatives(_SURROUNDINGS[surroundings]), mode)(x, v)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            a, b, rtol=1e-4, atol=1e-5 * abs(b.numpy()).max()
        )


@pytest.mark.slow
def test_convolutions_in_recurrent_layers_are_penalized(monkeypatch):
    # As on CPUs without oneDNN, whichever this one is.
    monkeypatch.setattr(second_derivatives, "_runs_on_eigen", lambda: True)
    random = np.random.default_rng(0)
    x = random.normal(size=(4, 2, 3, 3, 1))
    found = []
    for unroll in (False, True):
        keras.utils.set_random_seed(0)
        network = keras.Sequential(
            [
                keras.Input((2, 3, 3, 1)),
                keras.layers.ConvLSTM2D(2, 2, unroll=unroll),
                keras.layers.Flatten(),
                keras.layers.Dense(3),
            ]
        )
        model = FisherModel(network, FisherPenalty(1.0, bound=None), seed=0)
        model.compile(
            "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
        history = model.fit(x, np.array([0, 1, 2, 0]), verbose=0).history
        found.append((history["fisher_penalty"], model.get_weights()))
    (penalty, weights), (unrolled, expected) = found
    assert penalty == pytest.approx(unrolled, rel=1e-5)
    for a, b in zip(weights, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
