"""Runs that are saved, loaded and resumed."""

from __future__ import annotations

import cases
import keras
import numpy as np
import pytest
import training

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import GradientPenalty
from keras_fisher import InputGradientPenalty
from keras_fisher import UniformLabelPenalty
from keras_fisher import likelihoods

_SAVED_PENALTIES = [
    GradientPenalty(0.3, every=3),
    *cases.slow(
        [
            None,
            FisherPenalty(0.3, fraction=0.5, micro_batch_size=2, start=3),
            FisherPenalty(0.3),
            FisherPenalty(0.3, every=10),
            FisherPenalty(0.3, method="finite_difference", exclude=["bias"]),
            UniformLabelPenalty(0.3),
            InputGradientPenalty(0.3),
        ]
    ),
]


@pytest.mark.parametrize("penalty", _SAVED_PENALTIES, ids=str)
def test_two_and_two_epochs_through_a_file_equal_four(penalty, tmp_path):
    def fresh():
        keras.utils.clear_session()
        return training.compiled(
            FisherModel(training.network(), penalty, seed=2)
        )

    whole = fresh()
    expected = training.fit(whole, epochs=4).history
    half = fresh()
    first = training.fit(half, epochs=2).history
    path = tmp_path / "model.keras"
    half.save(path)
    loaded = keras.models.load_model(path)
    assert repr(loaded.penalty) == repr(penalty)
    assert int(loaded.optimizer.iterations) == 14
    second = training.fit(loaded, epochs=2).history
    for name in expected:
        np.testing.assert_array_equal(
            first[name] + second[name], expected[name], err_msg=name
        )
    training.assert_equal(loaded.get_weights(), whole.get_weights())


@pytest.mark.parametrize(
    "likelihood",
    [
        likelihoods.Categorical(from_logits=True),
        likelihoods.Bernoulli(from_logits=True),
        likelihoods.Gaussian(2.0),
        "auto",
    ],
    ids=str,
)
def test_likelihoods_survive_a_file(likelihood, tmp_path):
    model = FisherModel(training.network(), 0.1, likelihood=likelihood)
    training.compiled(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert repr(loaded.likelihood) == repr(model.likelihood)
    assert isinstance(loaded.likelihood, likelihoods.Likelihood)
    assert loaded.jit_compile == model.jit_compile
    assert loaded.trace_every == 10


def test_subclassed_models_survive_a_file(tmp_path):
    model = training.compiled(FisherModel(training.Subclassed(), 0.1, seed=2))
    training.fit(model, epochs=1)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(
        tmp_path / "model.keras",
        custom_objects={"Subclassed": training.Subclassed},
    )
    np.testing.assert_array_equal(
        loaded.predict(training.X, verbose=0),
        model.predict(training.X, verbose=0),
    )
    training.fit(loaded, epochs=1)


def test_weights_resume_in_a_new_model(tmp_path):
    penalty = FisherPenalty(0.3, every=10)
    whole = training.compiled(FisherModel(training.network(), penalty, seed=2))
    expected = training.fit(whole, epochs=2).history
    half = training.compiled(FisherModel(training.network(), penalty, seed=2))
    training.fit(half, epochs=1)
    half.save_weights(tmp_path / "half.weights.h5")
    again = training.compiled(FisherModel(training.network(), penalty, seed=7))
    again.optimizer.build(again.trainable_variables)
    again.load_weights(tmp_path / "half.weights.h5")
    second = training.fit(again, epochs=1).history
    assert second["loss"] == expected["loss"][1:]
    training.assert_equal(
        training.weights(again.model), training.weights(whole.model)
    )


@pytest.mark.parametrize(
    "penalty",
    [
        FisherPenalty(1.0, every=4, warmup_steps=0),
        *cases.slow([FisherPenalty(1.0, warmup_steps=0), None]),
    ],
    ids=str,
)
def test_what_is_built_after_it_was_compiled_resumes(penalty, tmp_path):
    def compiled():
        keras.utils.set_random_seed(3)
        network = keras.Sequential([keras.layers.Dense(3)])
        return training.compiled(FisherModel(network, penalty, seed=2))

    whole = compiled()
    training.fit(whole, epochs=4)
    half = compiled()
    training.fit(half, epochs=2)
    path = tmp_path / "half.weights.h5"
    half.save_weights(path)
    again = compiled()
    again(training.X[:1])
    again.optimizer.build(again.trainable_variables)
    again.load_weights(path)
    training.fit(again, epochs=2)
    training.assert_equal(again.get_weights(), whole.get_weights())


class _Unfinished(likelihoods.Categorical):
    def sample(self, outputs, seed):
        raise NotImplementedError("to be written")


@pytest.mark.parametrize("every", [1, 4])
def test_a_fit_that_failed_can_be_tried_again(every):
    network = keras.Sequential([keras.layers.Dense(3)])
    model = FisherModel(
        network, FisherPenalty(every=every), likelihood=_Unfinished()
    )
    training.compiled(model)
    with pytest.raises(NotImplementedError, match="to be written"):
        training.fit(model, epochs=1)
    model.likelihood = "categorical"
    history = training.fit(model, epochs=1).history
    assert np.isfinite(history["fisher_ratio"]).all()


def test_another_penalty_takes_nothing_from_a_file(tmp_path):
    path = tmp_path / "one.weights.h5"
    one = training.compiled(
        FisherModel(training.network(), FisherPenalty(1.0, every=4), seed=2)
    )
    training.fit(one, epochs=1)
    one.save_weights(path)
    other = training.compiled(FisherModel(training.network(), seed=2))
    other.optimizer.build(other.trainable_variables)
    other.load_weights(path)
    other.penalty = FisherPenalty(1.0, every=4)
    other(training.X[:1])
    for stored in other.state.gradients(other.model):
        assert not np.any(stored)


def _with_lora(network):
    network.layers[0].enable_lora(2)


def _with_another_head(network):
    network.pop()
    network.add(keras.layers.Dense(4))


def _with_a_layer_in_front_of_the_head(network):
    head = network.layers[-1]
    network.pop()
    network.add(keras.layers.Dense(8))  # of the shapes that moved up
    network.add(head)


@pytest.mark.few(1)
@pytest.mark.parametrize("every_kind", [False, True])
@pytest.mark.parametrize(
    "change",
    [_with_lora, _with_another_head, _with_a_layer_in_front_of_the_head],
)
def test_stored_gradients_stay_with_their_variables(change, every_kind):
    network = training.dense_network(6, (8, 8))
    penalty = FisherPenalty(0.3, every=20, bound=1.0 if every_kind else None)
    accumulated = {"gradient_accumulation_steps": 4} if every_kind else {}
    optimizer = keras.optimizers.SGD(0.1, **accumulated)
    model = training.compiled(
        FisherModel(network, penalty, seed=2), optimizer=optimizer
    )
    training.fit(model, epochs=1)
    kinds = ["gradient"]
    if every_kind:
        kinds += ["accumulated_loss", "accumulated_penalty"]

    def stored(kind):
        variables = model.model.trainable_variables
        gradients = model.state.gradients(model.model, kind)
        return {
            id(v): np.array(g)
            for v, g in zip(variables, gradients, strict=True)
        }

    before = {kind: stored(kind) for kind in kinds}
    change(network)
    training.compiled(model, optimizer=keras.optimizers.SGD(0.1, **accumulated))
    for kind in kinds:
        assert any(g.any() for g in before[kind].values())
        for variable in network.trainable_variables:
            found = stored(kind)[id(variable)]
            expected = before[kind].get(id(variable), np.zeros(variable.shape))
            np.testing.assert_array_equal(found, expected)
    names = [v.name for v in model.state.weights]
    assert len(names) == len({*names}), "what is replaced is not saved"
    training.fit(model, epochs=1)


def test_weights_load_into_a_model_with_another_penalty(tmp_path):
    plain = training.compiled(FisherModel(training.network(), None))
    training.fit(plain)
    plain.save_weights(tmp_path / "plain.weights.h5")
    other = training.compiled(
        FisherModel(training.network(), FisherPenalty(0.1, every=10))
    )
    other.load_weights(tmp_path / "plain.weights.h5")
    training.assert_equal(
        training.weights(other.model), training.weights(plain.model)
    )
    training.fit(other)


def test_backup_and_restore_resumes(tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    penalty = FisherPenalty(0.3, every=10)
    whole = training.compiled(FisherModel(training.network(), penalty, seed=2))
    training.fit(whole, epochs=4)

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    killed = training.compiled(FisherModel(training.network(), penalty, seed=2))
    with pytest.raises(KeyboardInterrupt):
        training.fit(killed, epochs=4, callbacks=[backup(), Interrupt()])
    again = training.compiled(FisherModel(training.network(), penalty, seed=99))
    history = training.fit(again, epochs=4, callbacks=[backup()])
    assert len(history.history["loss"]) == 2
    training.assert_equal(again.get_weights(), whole.get_weights())


@pytest.mark.few(1)
@pytest.mark.parametrize("first", [None, FisherPenalty(0.1)])
def test_early_stopping_restores_what_was_before_an_assigned_penalty(first):
    class Assign(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                self.best = self.model.model.get_weights()
                self.model.penalty = FisherPenalty(0.1, every=2)

    model = training.compiled(FisherModel(training.network(), first, seed=0))
    stop = keras.callbacks.EarlyStopping(
        "loss", mode="max", baseline=0.0, patience=2, restore_best_weights=True
    )
    # The first is the best, since the loss falls.
    history = training.fit(
        model, epochs=3, callbacks=[assign := Assign(), stop]
    )
    losses = history.history["loss"]
    assert max(losses) == losses[0], losses
    training.assert_equal(model.model.get_weights(), assign.best)


def test_weights_of_another_network_are_refused():
    model = FisherModel(training.network(), FisherPenalty(0.1), seed=0)
    with pytest.raises(ValueError, match="weight list of length"):
        model.set_weights(model.get_weights()[:2])


def test_a_quantized_model_is_trained_on():
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    network = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(3)]
    )
    penalty = FisherPenalty(0.1, every=2)
    model = FisherModel(network, penalty, seed=0)
    for kind in (None, "int8"):
        if kind is not None:
            model.quantize(kind)
        model.compile("sgd", "mse")
        before = network.layers[0].bias.numpy()
        history = model.fit(x, x[:, :3], batch_size=4, verbose=0).history
        assert np.isfinite(history["fisher_penalty"]).all(), history
        assert (network.layers[0].bias.numpy() != before).all()
