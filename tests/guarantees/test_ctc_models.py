"""Models of sequences that are longer than their labels: CTC."""

from __future__ import annotations

import keras
from keras import layers
import numpy as np
import pytest
import tensorflow as tf
import training

import keras_fisher
from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher.likelihoods import Categorical

_BATCH, _FRAMES, _CLASSES, _ALPHA = 8, 6, 4, 0.3
_RANDOM = np.random.default_rng(0)
_X = _RANDOM.normal(size=(_BATCH, _FRAMES, 3)).astype("float32")
# Class 0 is blank, and pads.
_Y = _RANDOM.integers(1, _CLASSES, (_BATCH, 2)).astype("int32")
_Y[2:4, 1] = 0


class _Endpoint(layers.Layer):
    """Takes the labels as an input, and adds the loss."""

    def call(self, y, logits):
        counts = keras.ops.sum(keras.ops.cast(y != 0, "int32"), axis=1)
        frames = keras.ops.full_like(counts, _FRAMES)
        losses = keras.ops.ctc_loss(y, logits, counts, frames)
        self.add_loss(keras.ops.mean(losses))
        return logits


def _network(adds_loss=False):
    keras.utils.set_random_seed(1)
    x = keras.Input((_FRAMES, 3))
    hidden = layers.Dense(5, activation="tanh")(x)
    logits = layers.Dense(_CLASSES)(hidden)
    if not adds_loss:
        return keras.Model(x, logits)
    y = keras.Input((2,), dtype="int32")
    return keras.Model([x, y], _Endpoint()(y, logits))


def _compiled(model, adds_loss=False, **kwargs):
    loss = None if adds_loss else keras.losses.CTC()
    return training.compiled(
        model, loss, keras.optimizers.SGD(0.1), metrics=None, **kwargs
    )


def _fit(model, adds_loss=False):
    data = dict(x=[_X, _Y]) if adds_loss else dict(x=_X, y=_Y)
    return model.fit(
        **data, batch_size=_BATCH, epochs=3, shuffle=False, verbose=0
    ).history


_BOTH = pytest.mark.parametrize("adds_loss", [False, True])


@pytest.mark.few(1)
@pytest.mark.parametrize("jit_compile", [False, True])
@_BOTH
def test_they_train_as_plain_keras_does(adds_loss, jit_compile):
    plain = _compiled(_network(adds_loss), adds_loss, jit_compile=jit_compile)
    model = FisherModel(
        _network(adds_loss), trace_every=1, likelihood=Categorical()
    )
    _compiled(model, adds_loss, jit_compile=jit_compile)
    expected, logs = (_fit(each, adds_loss) for each in (plain, model))
    np.testing.assert_allclose(logs["loss"], expected["loss"], rtol=1e-5)
    assert min(logs["fisher_trace"]) > 0
    for a, b in zip(model.model.get_weights(), plain.get_weights()):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


class _Likeliest(Categorical):
    """Draws what the outputs say."""

    def sample(self, outputs, seed):
        return tf.argmax(outputs, axis=-1, output_type=tf.int32)


@pytest.mark.few(1)
@_BOTH
def test_the_penalty_is_that_of_the_classes_of_frames(adds_loss):
    network = _network(adds_loss)
    model = FisherModel(
        network,
        FisherPenalty(_ALPHA, bound=None),
        likelihood=_Likeliest(from_logits=True),
    )
    inputs = [_X, _Y] if adds_loss else _X
    expected = []
    _compiled(model, adds_loss)
    reference = _network(adds_loss)
    variables = reference.trainable_variables
    for _ in range(3):
        with tf.GradientTape(persistent=True) as outer:
            with tf.GradientTape() as tape:
                logits = reference(inputs)
                likeliest = tf.one_hot(np.argmax(logits, -1), _CLASSES)
                log_p = tf.reduce_sum(likeliest * tf.nn.log_softmax(logits))
                mean = -log_p / _BATCH
            gradients = tape.gradient(mean, variables)
            penalty = _ALPHA * sum(tf.reduce_sum(g**2) for g in gradients)
            losses = tf.nn.ctc_loss(
                _Y,
                tf.transpose(logits, [1, 0, 2]),
                np.sum(_Y != 0, axis=1),
                np.full(_BATCH, _FRAMES),
                blank_index=0,
            )
            loss = tf.reduce_mean(losses)
        expected.append(float(penalty))
        for variable, a, b in zip(
            variables,
            outer.gradient(penalty, variables),
            outer.gradient(loss, variables),
        ):
            variable.assign_sub(0.1 * (a + b))
    logs = _fit(model, adds_loss)
    np.testing.assert_allclose(logs["fisher_penalty"], expected, rtol=1e-4)
    for a, b in zip(network.get_weights(), reference.get_weights()):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_errors_say_which_likelihood_is_needed():
    needed = r"Categorical\(from_logits=True\)"
    with pytest.raises(ValueError, match=f"With CTC most people.*{needed}"):
        _compiled(FisherModel(_network()))
    with pytest.raises(ValueError, match=f"each frame, for CTC.*{needed}"):
        _compiled(FisherModel(_network(True)), adds_loss=True)


def _padded(y):
    """To as many labels as frames: they look like the labels of frames."""
    return np.pad(y, [(0, 0), (0, _FRAMES - y.shape[1])])


@pytest.mark.parametrize("loss", [keras.losses.CTC(), "ctc"])
@pytest.mark.parametrize("name", ["gradient", "input_gradient"])
def test_transcripts_are_not_taken_for_labels_of_frames(name, loss):
    model = FisherModel(_network(), name, likelihood=Categorical())
    with pytest.raises(ValueError, match="transcripts, which label no frame"):
        training.compiled(model, loss, metrics=None)
    # Which does not matter to a penalty with labels of its own.
    model.penalty = "fisher"
    training.compiled(model, loss, metrics=None)
    assert model.fit(_X, _padded(_Y), verbose=0).history["fisher_penalty"][0]


def test_labels_that_do_not_fit_the_positions_are_refused():
    network, likelihood = _network(), Categorical()
    message = r"\(8, 6, 4\) go with labels of shape \(8, 6\).*\(8, 2\)"
    with pytest.raises(ValueError, match=message):
        likelihood.log_probability(tf.constant(_Y), network(_X))
    with pytest.raises(ValueError, match="Transcripts, as of CTC"):
        keras_fisher.fisher_trace(
            network, _X, _Y, likelihood=likelihood, estimator="empirical"
        )
    assert keras_fisher.fisher_trace(network, _X, likelihood=likelihood) > 0


@pytest.mark.slow
@_BOTH
def test_the_curvature_is_that_of_differences(adds_loss):
    """TensorFlow has no second derivative of the loss."""
    model = _compiled(_network(adds_loss), adds_loss)
    inputs, labels = ([_X, _Y], None) if adds_loss else (_X, _Y)

    def gradient():
        with tf.GradientTape() as tape:
            outputs = model(inputs)
            loss = model.compute_loss(inputs, labels, outputs)
        return tape.gradient(loss, model.trainable_variables)

    expected, step = 0.0, 1e-2
    for k, variable in enumerate(model.trainable_variables):
        start = variable.numpy()
        for at in np.ndindex(start.shape):
            for sign in (1, -1):
                moved = start.copy()
                moved[at] += sign * step
                variable.assign(moved)
                expected += sign * gradient()[k].numpy()[at] / (2 * step)
        variable.assign(start)
    found = keras_fisher.hessian_trace(
        model, inputs, labels, num_probes=200, seed=0
    )
    error = abs(float(found) - expected)
    assert error < 4 * found.standard_error, (found, expected)
    assert found.standard_error < 0.1 * expected
