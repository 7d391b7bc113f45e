"""Models whose derivatives would be missed are refused by all that measure."""

from __future__ import annotations

import keras
from keras import layers
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
