"""A penalty that a user's training step does not use is told."""

from __future__ import annotations

import warnings

import keras
from keras import layers
import numpy as np
import pytest
import tensorflow as tf
import training

from keras_fisher import likelihoods
from keras_fisher.layers import FisherRegularization

_MODES = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "xla": {"jit_compile": True},
    "several": {"steps_per_execution": 3},
}


class Stepping(keras.Sequential):
    """With a training step as users write them."""

    calls_in_training = True
    adds_losses = True

    def loss_of(self, x, y):
        outputs = self(x, training=self.calls_in_training)
        loss = training.LOSS(y, outputs)
        return loss + sum(self.losses) if self.adds_losses else loss

    def logs_of(self, loss):
        for metric in self.metrics:
            metric.update_state(loss)
        return {metric.name: metric.result() for metric in self.metrics}

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.loss_of(x, y)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return self.logs_of(loss)


class WithoutLosses(Stepping):
    adds_losses = False


class WithoutTraining(Stepping):
    calls_in_training = False


class SharpnessAware(Stepping):
    """A first step up, a second one down, from the gradient up there."""

    def train_step(self, data):
        x, y = data
        variables = self.trainable_variables
        with tf.GradientTape() as tape:
            loss = training.LOSS(y, self(x, training=True))
        up = [0.01 * g for g in tape.gradient(loss, variables)]
        for variable, step in zip(variables, up):
            variable.assign_add(step)
        with tf.GradientTape() as tape:
            loss = self.loss_of(x, y)
        gradients = tape.gradient(loss, variables)
        for variable, step in zip(variables, up):
            variable.assign_sub(step)
        self.optimizer.apply(gradients, variables)
        return self.logs_of(loss)


class Distilled(Stepping):
    """Learns from another network, and forgets the losses of its layers."""

    def train_step(self, data):
        x, _ = data
        teacher = tf.nn.softmax(x[:, :3])
        with tf.GradientTape() as tape:
            outputs = tf.nn.log_softmax(self(x, training=True))
            loss = -tf.reduce_mean(tf.reduce_sum(teacher * outputs, axis=1))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def _model(kind=keras.Sequential, **kwargs):
    keras.utils.set_random_seed(1)
    layer = FisherRegularization(
        keras.Sequential([layers.Dense(8, "tanh"), layers.Dense(3)]),
        0.1,
        likelihood=likelihoods.Categorical(from_logits=True),
        name="penalized",
    )
    model = kind([keras.Input((6,)), layers.Dense(6), layer])
    return training.compiled(model, metrics=None, **kwargs)


def _told(function) -> list[str]:
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        function()
    return [
        str(each.message)
        for each in recorded
        if "has no effect" in str(each.message)
    ]


@pytest.mark.few(2)
@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize(
    "kind, reason",
    [
        (WithoutLosses, "nothing has differentiated"),
        (WithoutTraining, "never called with `training=True`"),
        (Distilled, "nothing has differentiated"),
    ],
)
def test_what_has_no_effect_is_told_once(kind, reason, mode):
    if kind is Distilled and mode == "several":
        pytest.skip("the same as graph")
    model = _model(kind, **_MODES[mode])
    (message,) = _told(lambda: training.fit(model, epochs=1))
    assert "penalized" in message and reason in message
    assert not _told(lambda: training.fit(model, epochs=2))


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("kind", [keras.Sequential, Stepping, SharpnessAware])
def test_what_has_one_is_not(kind, mode):
    model = _model(kind, **_MODES[mode])
    assert not _told(lambda: training.fit(model, epochs=2))


@pytest.mark.parametrize(
    "act",
    [
        lambda model: [
            model.evaluate(training.X, training.Y, verbose=0) for _ in range(2)
        ],
        lambda model: model.predict(training.X, verbose=0),
        lambda model: [model(training.X, training=True) for _ in range(4)],
        lambda model: (
            model.evaluate(training.X, training.Y, verbose=0),
            model.set_weights([2 * w for w in model.get_weights()]),
            model.evaluate(training.X, training.Y, verbose=0),
        ),
    ],
    ids=["evaluate", "predict", "draws", "other weights"],
)
def test_what_does_not_train_is_not(act):
    def epoch(act):
        model = _model(WithoutLosses)
        # As an epoch of `fit` does: it is told at the end.
        model.reset_metrics()
        act(model)
        model.get_metrics_result()

    assert not _told(lambda: epoch(act))
    data = tf.constant(training.X[:8]), tf.constant(training.Y[:8])
    assert _told(lambda: epoch(lambda model: model.train_step(data)))


def test_what_is_built_as_it_is_evaluated_is_not():
    keras.utils.set_random_seed(0)
    layer = FisherRegularization(layers.Dense(3, name="penalized"), 0.1)
    model = WithoutLosses([layer])
    training.compiled(model, metrics=None)
    assert not _told(lambda: model.evaluate(training.X, training.Y, verbose=0))
    assert len(_told(lambda: training.fit(model))) == 1


def test_a_frozen_layer_and_a_rate_of_zero_are_not():
    model = _model(WithoutLosses, optimizer=keras.optimizers.SGD(0.0))
    assert not _told(lambda: training.fit(model))
    model = _model(WithoutLosses)
    model.layers[-1].trainable = False
    training.compiled(model, metrics=None)
    assert not _told(lambda: training.fit(model))


def test_under_a_strategy_of_one():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    for kind, count in ((WithoutLosses, 1), (Stepping, 0)):
        with strategy.scope():
            model = _model(kind)
        assert len(_told(lambda m=model: training.fit(m))) == count


def test_it_changes_no_weights():
    found = []
    for kind in (keras.Sequential, Stepping):
        model = _model(kind)
        training.fit(model)
        found.append([np.array(w) for w in training.weights(model)])
    for a, b in zip(*found):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
