"""Models whose derivatives would be missed are refused by all that measure."""

from __future__ import annotations

import keras
from keras import layers
import numpy as np
import pytest
import tensorflow as tf
import training

import keras_fisher


class Traced(layers.Layer):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    @tf.function
    def call(self, x):
        return self.dense(x)


class TracedModel(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    @tf.function
    def call(self, x, training=False):
        return self.dense(x)


@pytest.mark.parametrize(
    "measure",
    [
        lambda m: keras_fisher.fisher_trace(m, training.X),
        lambda m: keras_fisher.fisher_trace(
            m, training.X, training.Y, estimator="batch"
        ),
        lambda m: keras_fisher.hessian_trace(m, training.X, training.Y),
        lambda m: keras_fisher.check_derivatives(m, training.X, training.Y),
    ],
    ids=["trace", "of a batch", "curvature", "report"],
)
@pytest.mark.parametrize("whole", [False, True])
def test_a_call_that_keeps_its_trace_is_refused(measure, whole):
    model = (
        TracedModel()
        if whole
        else keras.Sequential([layers.Dense(4), Traced()])
    )
    training.compiled(model)
    with pytest.raises(ValueError, match=r"Remove `@tf\.function`") as error:
        measure(model)
    assert "traced" in str(error.value).rpartition("Received")[2]


def _mixing():
    keras.utils.set_random_seed(2)
    return keras.Sequential(
        [
            keras.Input((training.X.shape[1],)),
            layers.Dense(6, activation="tanh"),
            layers.Lambda(lambda t: t - tf.reduce_mean(t, 0, keepdims=True)),
            layers.Dense(3),
        ]
    )


@pytest.mark.parametrize("estimator", ["exact", "monte_carlo", "empirical"])
@pytest.mark.parametrize("sizes", [[2], [3], [4], [8], [1, 7], [2, 6], [40]])
def test_models_that_mix_examples_are_refused(sizes, estimator):
    model = training.compiled(_mixing())

    def batches():
        begin = 0
        for size in sizes:
            part = slice(begin, begin + size)
            yield training.X[part], training.Y[part]
            begin += size

    with pytest.raises(ValueError, match="depend on the other examples"):
        keras_fisher.fisher_trace(
            model, batches(), steps=len(sizes), estimator=estimator
        )


@pytest.mark.parametrize("size", [1, 2, 8])
def test_models_that_draw_in_inference_are_not_taken_for_those(size):
    class Always(layers.Dropout):
        def call(self, inputs):
            return super().call(inputs, training=True)

    model = keras.Sequential([layers.Dense(16), Always(0.5), layers.Dense(3)])
    training.compiled(model)
    x = training.X[:size]
    assert keras_fisher.fisher_trace(model, x, seed=0) > 0


@pytest.mark.few(1)
@pytest.mark.parametrize("quiet", [0, 3, 5])
def test_recordings_that_louder_ones_drown_are_found_in_any_batch(quiet):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((1024,)),
            keras.layers.MelSpectrogram(
                fft_length=256, sequence_stride=128, num_mel_bins=8
            ),
            keras.layers.Rescaling(1 / 40),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )
    x = np.random.default_rng(0).normal(size=(12, 1024)).astype("float32")

    def trace(x, batch_size):
        return keras_fisher.fisher_trace(
            model,
            x,
            likelihood="categorical",
            estimator="exact",
            batch_size=batch_size,
        )

    # All as loud as each other.
    assert trace(x, 6) == pytest.approx(trace(x, 1), rel=1e-4)
    x[6 + quiet] *= 1e-5
    assert trace(x, 1) > 0
    with pytest.raises(ValueError, match="depend on the other examples"):
        trace(x, 6)
