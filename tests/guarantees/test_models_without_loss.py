"""Models whose losses are their own: `add_loss` alone."""

from __future__ import annotations

import keras
from keras import layers
import numpy as np
import pytest
import tensorflow as tf
import training

import keras_fisher
from keras_fisher import FisherModel
from keras_fisher.likelihoods import Categorical

_X, _Y = training.X[:, :4].astype("float64"), training.Y


class _Endpoint(layers.Layer):
    """Takes the labels as an input, as CTC layers do."""

    def call(self, y, logits):
        losses = keras.ops.sparse_categorical_crossentropy(
            y, logits, from_logits=True
        )
        self.add_loss(keras.ops.mean(losses))
        return logits


def _network():
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(1)
    x, y = keras.Input((4,)), keras.Input((), dtype="int32")
    logits = layers.Dense(3)(layers.Dense(5, activation="tanh")(x))
    return keras.Model([x, y], _Endpoint()(y, logits))


def _compiled(model, **kwargs):
    return training.compiled(model, None, metrics=None, **kwargs)


def _without_labels():
    return FisherModel(
        _network(), trace_every=1, likelihood=Categorical(), seed=2
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_they_train_as_plain_keras_does(jit_compile):
    plain = _compiled(_network(), jit_compile=jit_compile)
    model = _compiled(_without_labels(), jit_compile=jit_compile)
    for each in (plain, model):
        logs = each.fit([_X, _Y], shuffle=False, verbose=0).history
    assert logs["fisher_trace"][0] > 0
    for a, b in zip(model.get_weights()[:4], plain.get_weights()):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_the_penalty_is_that_of_the_likelihood():
    network = _network()
    model = FisherModel(network, "gradient", likelihood=Categorical())
    with tf.GradientTape() as tape:
        logits = network([_X, _Y])
        log_p = tf.nn.log_softmax(logits)
        loss = -tf.reduce_mean(tf.gather(log_p, _Y, batch_dims=1))
    gradients = tape.gradient(loss, network.trainable_variables)
    expected = sum(float(tf.reduce_sum(g**2)) for g in gradients)
    logs = _compiled(model).fit([_X, _Y], _Y, batch_size=50, verbose=0).history
    np.testing.assert_allclose(logs["fisher_penalty"], expected, rtol=1e-6)


def test_they_are_measured():
    network = _compiled(_network())
    model = _compiled(_without_labels())
    x = [_X, _Y]
    traces = [
        keras_fisher.fisher_trace(network, x, likelihood="categorical", seed=3),
        keras_fisher.fisher_trace(model, x, seed=3),
    ]
    assert traces[0] == traces[1]
    hessians = [
        keras_fisher.hessian_trace(network, x, num_probes=8, seed=3),
        keras_fisher.hessian_trace(model, x, num_probes=8, seed=3),
    ]
    np.testing.assert_allclose(*hessians, rtol=1e-9)
    assert hessians[0] != 0


def test_one_error_says_that_a_likelihood_is_needed():
    with pytest.raises(ValueError, match="compiled without a loss") as error:
        _compiled(FisherModel(_network()))
    assert "Categorical(from_logits=True)" in str(error.value)
    with pytest.raises(ValueError, match="compiled without a loss"):
        keras_fisher.fisher_trace(_compiled(_network()), [_X, _Y])
    with pytest.raises(ValueError, match="is not compiled"):
        keras_fisher.fisher_trace(_network(), [_X, _Y])


def test_nothing_is_needed_where_nothing_is_measured():
    model = FisherModel(_network(), penalty=None, trace_every=None)
    _compiled(model).fit([_X, _Y], verbose=0)
