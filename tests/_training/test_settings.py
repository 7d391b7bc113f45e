"""Assignments to a model take effect as a whole, or not at all."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import training

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import likelihoods
from keras_fisher.callbacks import EarlyPhase

_X = np.random.default_rng(0).normal(size=(24, 4)).astype("float32")


def _hinged(**kwargs):
    """Of a loss that has no likelihood."""
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model = FisherModel(network, trace_every=None, **kwargs)
    model.compile("sgd", "hinge")
    return model


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("trace_every", 10, "No likelihood is known"),
        ("penalty", 0.1, "No likelihood is known"),
        ("penalty", "fischer", "penalty"),
        ("likelihood", "typo", "likelihood"),
    ],
)
def test_what_is_refused_changes_nothing(name, value, error):
    likelihood = likelihoods.Gaussian() if name == "likelihood" else "auto"
    model = _hinged(likelihood=likelihood)
    before, config = getattr(model, name), model.get_config()
    with pytest.raises(ValueError, match=error):
        setattr(model, name, value)
    assert getattr(model, name) is before
    assert model.get_config() == config
    model.fit(_X, np.ones([24, 1]), verbose=0)


def test_a_callback_that_assigns_hides_nothing_from_those_behind_it():
    class Denser(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 0:
                self.model.trace_every = 2

    model = training.compiled(FisherModel(training.network(), trace_every=4))
    early = EarlyPhase()
    training.fit(model, epochs=1, callbacks=[Denser(), early])
    assert early.steps == [0, 2, 4, 6]


def test_another_optimizer_begins_with_a_bound_of_its_own():
    model = FisherModel(training.network(), FisherPenalty(0.1))

    def begin():
        optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
        training.compiled(model, optimizer=optimizer)

    def kept():
        kinds = "accumulated_loss", "accumulated_penalty"
        sums = [
            float(tf.reduce_max(tf.abs(v)))
            for kind in kinds
            for v in model.state.gradients(model.model, kind)
        ]
        return max(sums), float(model.state.loss_norm)

    begin()
    training.fit(model, epochs=1)  # of seven batches: one waits for another
    largest, mean = kept()
    assert largest > 0 and mean > 0
    optimizer = model.optimizer
    training.compiled(model, optimizer=optimizer)
    assert kept() == (largest, mean), "goes on"
    begin()
    assert kept()[0] == 0 and kept()[1] < 0


@pytest.mark.parametrize("trace_every", [1, None])
def test_noisy_accuracies_know_the_loss_without_any_trace(trace_every):
    """One logit is on the side of 1 above 0, and not above a half."""
    network = keras.Sequential(
        [keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")]
    )
    model = FisherModel(network, trace_every=trace_every)
    model.compile(
        keras.optimizers.SGD(0.0),
        keras.losses.BinaryCrossentropy(from_logits=True),
    )
    x = np.float32([[0.2], [-0.2], [3.0], [0.3]])
    y = {
        "label": np.array([1, 0, 1, 0]),
        "is_noisy": np.array([False, False, False, True]),
        "true_label": np.array([1, 0, 1, 1]),
    }
    logs = model.fit(x, y, verbose=0).history
    assert logs["clean_accuracy"] == [1.0]
    assert logs["recovered_accuracy"] == [1.0]
    model.penalty = model.trace_every = None
    model.compile("sgd", "mse")
    assert isinstance(model.likelihood, likelihoods.Gaussian)


def test_a_likelihood_that_is_to_be_found_is_not_the_one_before():
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model = FisherModel(network, likelihood=likelihoods.Gaussian())
    model.likelihood = "auto"
    assert model.likelihood is None
    model.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
    assert isinstance(model.likelihood, likelihoods.Bernoulli)


def test_a_regularizer_of_the_wrapper_is_refused():
    with pytest.raises(ValueError, match=r"activity_regularizer.*wrapped"):
        FisherModel(training.network(), activity_regularizer="l2")


def test_a_compile_that_fails_leaves_the_model_uncompiled():
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model = FisherModel(network)
    with pytest.raises(ValueError, match="No likelihood is known"):
        model.compile("sgd", "hinge")
    assert not model.compiled
    with pytest.raises(ValueError, match="compile"):
        model.fit(_X, np.ones([24, 1]), verbose=0)
    model.compile("sgd", "mse")
    model.fit(_X, np.ones([24, 1]), verbose=0)


def test_another_penalty_begins_with_logs_of_its_own():
    model = training.compiled(FisherModel(training.network(), 0.1))
    logs = training.fit(model, epochs=1).history
    assert logs["fisher_penalty"][-1] > 0 and logs["fisher_ratio"][-1] > 0
    model.penalty = FisherPenalty(0.5, start=1000)
    logs = training.fit(model, epochs=1).history
    assert logs["fisher_penalty"] == [0.0]
    assert np.isnan(logs["fisher_ratio"]).all()
