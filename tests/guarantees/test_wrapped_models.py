"""What a wrapped model brings, and what is asked of it later, counts."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import training

import keras_fisher
from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher.callbacks import FisherTensorBoard


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    "penalty", [FisherPenalty(0.1, fraction=0.5), "input_gradient"], ids=str
)
def test_single_batches_of_arrays_train(penalty, eager):
    model = FisherModel(training.network(), penalty, seed=0)
    model.compile("sgd", training.LOSS, run_eagerly=eager)
    logs = model.train_on_batch(
        training.X[:8], training.Y[:8], return_dict=True
    )
    assert logs["fisher_penalty"] > 0


class Scaled(keras.Model):
    """Has a metric of its own, of what its `call` has seen."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3)
        self.scale = keras.metrics.Mean(name="scale")

    def call(self, x):
        z = self.dense(x)
        self.scale.update_state(keras.ops.mean(keras.ops.abs(z)))
        return z


@pytest.mark.parametrize("trace_every", [None, 3])
def test_metrics_of_the_wrapped_model_are_in_the_logs(trace_every):
    found = []
    for wrap in (
        lambda m: m,
        lambda m: FisherModel(m, trace_every=trace_every),
    ):
        keras.utils.set_random_seed(1)
        network = Scaled()
        model = training.compiled(wrap(network))
        history = training.fit(model, epochs=2).history["scale"]
        evaluated = model.evaluate(
            training.X, training.Y, verbose=0, return_dict=True
        )["scale"]
        found.append([*history, evaluated, float(network.scale.count)])
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("is_built", [False, True])
def test_what_observes_nothing_may_later(is_built, tmp_path):
    network = keras.Sequential([keras.layers.Dense(3)])
    if is_built:
        network.build((None, training.X.shape[1]))
    model = FisherModel(network, trace_every=None, seed=0)
    training.compiled(model)
    board = FisherTensorBoard(tmp_path, probe=training.X[:8])
    logs = training.fit(model, epochs=1, callbacks=[board]).history
    assert not [name for name in logs if "fisher" in name]
    frame = keras_fisher.logs.read(tmp_path)
    assert (frame["tag"] == "fisher/probe_trace").any()
    model.penalty = 0.1
    logs = training.fit(model, epochs=1).history
    assert logs["fisher_penalty"][0] > 0


def test_a_probe_of_a_loss_without_likelihood_is_refused(tmp_path):
    model = FisherModel(training.network(), trace_every=None)
    model.compile("sgd", "cosine_similarity")
    board = FisherTensorBoard(tmp_path, probe=training.X[:8])
    with pytest.raises(ValueError, match="cosine_similarity"):
        model.fit(training.X, np.ones([len(training.X), 3]), callbacks=[board])


def test_without_an_optimizer_it_evaluates():
    model = FisherModel(training.network(), 0.1)
    model.compile(None, training.LOSS)
    plain = training.network()
    plain.compile(None, training.LOSS)
    plain.set_weights(model.model.get_weights())
    losses = [
        each.evaluate(training.X, training.Y, verbose=0)
        for each in (plain, model)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("is_built", [False, True])
def test_a_penalty_that_leaves_all_out_is_refused(is_built):
    def train(exclude):
        network = keras.Sequential([keras.layers.Dense(3, name="out")])
        if is_built:
            network.build((None, training.X.shape[1]))
        model = FisherModel(network, FisherPenalty(exclude=exclude))
        training.fit(training.compiled(model), epochs=1)

    with pytest.raises(ValueError, match="leaves all trainable"):
        train(["kernel", "bias"])
    train("kernel")
