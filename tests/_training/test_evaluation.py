"""A wrapped model with a `test_step` of its own evaluates as by itself."""

from __future__ import annotations

import clusters
import keras
import numpy as np
import pytest
import training

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty

_X, _Y = training.X, training.Y
_WEIGHTS = np.linspace(0.0, 2.0, len(_X)).astype("float32")
_MODES = {
    "eager": dict(run_eagerly=True),
    "graph": dict(jit_compile=False),
    "xla": dict(jit_compile=True),
    "several": dict(steps_per_execution=3),
    "several under xla": dict(steps_per_execution=3, jit_compile=True),
}


@keras.saving.register_keras_serializable("test_evaluation")
class Augmented(keras.Sequential):
    """Tested on the mean of two views, with a metric of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.spread = keras.metrics.Mean(name="spread")

    def test_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        views = [self(each, training=False) for each in (x, -x)]
        outputs = (views[0] + views[1]) / 2
        loss = self.compute_loss(x, y, outputs, sample_weight, training=False)
        self.spread.update_state(keras.ops.abs(views[0] - views[1]))
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=keras.ops.shape(y)[0])
        return self.compute_metrics(x, y, outputs, sample_weight)


class Shifted(keras.Sequential):
    """Keras's own step, on other data."""

    def test_step(self, data):
        x, *others = data
        return super().test_step((x + 1, *others))


class AsInTheGuide(keras.Sequential):
    """All metrics by hand, and no weights."""

    def test_step(self, data):
        x, y, *_ = data
        outputs = self(x, training=False)
        loss = self.compute_loss(y=y, y_pred=outputs)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, outputs)
        return {metric.name: metric.result() for metric in self.metrics}


class Bare(keras.Sequential):
    """What it returns is no metric."""

    def test_step(self, data):
        largest = keras.ops.max(keras.ops.abs(self(data[0], training=False)))
        return {"largest": largest, "accuracy": largest / 2}


class ItsOwnMetrics(AsInTheGuide):
    """Says itself what its metrics are, and how they are reset."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.own = [keras.metrics.Mean(name="loss")]
        self.resets = 0

    @property
    def metrics(self):
        return self.own

    def reset_metrics(self):
        self.resets += 1
        super().reset_metrics()


_CLASSES = [Augmented, Shifted, AsInTheGuide, Bare, ItsOwnMetrics]


def _network(cls=Augmented):
    return cls(training.network().layers)


def _pair(cls=Augmented, penalty=None, **options):
    """A model by itself, and another like it that is wrapped."""
    options = {"metrics": ["accuracy"], **options}
    plain = training.compiled(_network(cls), **options)
    model = FisherModel(_network(cls), penalty, seed=1)
    return plain, training.compiled(model, **options)


def _data(**weights):
    return dict(x=_X, y=_Y, batch_size=8, verbose=0, **weights)


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("cls", _CLASSES)
def test_numbers_are_those_of_the_model_itself(cls, mode):
    plain, model = _pair(cls, **_MODES[mode])
    if cls is Bare:
        plain.fit(**_data())  # By itself it fails before, for its metrics.
        training.fit(model)
        model.model.set_weights(plain.get_weights())
    for weights in ({}, {"sample_weight": _WEIGHTS}):
        expected = plain.evaluate(**_data(**weights))
        assert model.evaluate(**_data(**weights)) == expected
    by_name = plain.evaluate(**_data(), return_dict=True)
    # Twice: what the first has counted is forgotten.
    for _ in range(2):
        assert model.evaluate(**_data(), return_dict=True) == by_name
    # In Keras 3.12 batches add up.
    for each in plain, model.model:
        each.reset_metrics()
    batch = _X[:8], _Y[:8], _WEIGHTS[:8]
    assert model.test_on_batch(*batch) == plain.test_on_batch(*batch)
    # Which Keras's own step would not have found.
    other = training.compiled(keras.Sequential(model.model.layers))
    assert other.evaluate(**_data(), return_dict=True) != by_name


def _of_validation(logs):
    return {key: logs[key] for key in logs if key.startswith("val_")}


@pytest.mark.few(1)
@pytest.mark.parametrize("cls", _CLASSES)
def test_validation_in_fit_is_that_of_the_model_itself(cls):
    plain, model = _pair(cls)
    data = dict(validation_data=(_X[:20], _Y[:20]), epochs=3)
    expected = training.fit(plain, **data).history
    logs = training.fit(model, **data).history
    assert _of_validation(logs) == _of_validation(expected) != {}
    assert logs["accuracy"] == expected.get("accuracy", logs["accuracy"])
    assert logs["fisher_trace"][0] > 0
    training.assert_equal(model.model.get_weights(), plain.get_weights())


def test_metrics_that_are_objects_count_each_phase_by_itself():
    """One object in the metrics of both models."""
    histories = []
    for wrap in (lambda model: model, FisherModel):
        metrics = [keras.metrics.SparseCategoricalAccuracy(name="right")]
        model = training.compiled(wrap(_network()), metrics=metrics)
        data = dict(validation_data=(_X[:20], _Y[:20]), epochs=3)
        histories.append(training.fit(model, **data).history)
    plain, logs = histories
    for key in ("loss", "right", "val_loss", "val_right", "val_spread"):
        assert logs[key] == plain[key], key


class _Evaluates(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 3:
            found = self.model.evaluate(**_data(), return_dict=True)
            self.found = found


class _Resets(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 3:
            self.model.reset_metrics()


def test_evaluation_within_an_epoch_resets_its_metrics():
    """As in Keras, but without adding what it has counted."""
    plain, model = _pair()
    callbacks = [_Evaluates(), _Evaluates()]
    training.fit(plain, callbacks=callbacks[:1])
    logs = training.fit(model, callbacks=callbacks[1:]).history
    assert callbacks[1].found == callbacks[0].found
    _, expected = _pair()
    assert logs == training.fit(expected, callbacks=[_Resets()]).history


def test_own_resets_are_called():
    _, model = _pair(ItsOwnMetrics)
    model.evaluate(**_data())
    assert model.model.resets == 1


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("cls", [Augmented, Bare])
def test_flags_are_split_off_and_counted(cls, mode):
    metrics = ["accuracy"] if cls is Augmented else None
    plain, model = _pair(cls, metrics=metrics, **_MODES[mode])
    is_noisy = np.arange(len(_Y)) % 3 == 0
    true = (_Y + is_noisy) % 3
    y = {"label": _Y, "is_noisy": is_noisy, "true_label": true}
    for weights in ({}, {"sample_weight": _WEIGHTS}):
        logs = model.evaluate(**{**_data(**weights), "y": y}, return_dict=True)
        expected = plain.evaluate(**_data(**weights), return_dict=True)
        assert {key: logs[key] for key in expected} == expected
        right = np.argmax(plain(_X), axis=-1)
        accuracies = {
            "clean_accuracy": (right == _Y)[~is_noisy],
            "noisy_accuracy": (right == _Y)[is_noisy],
            "recovered_accuracy": (right == true)[is_noisy],
        }
        assert logs.keys() == expected.keys() | accuracies.keys()
        for key, each in accuracies.items():
            np.testing.assert_allclose(logs[key], np.mean(each), 1e-6)


def on_replicas(with_flags):
    """Numbers of a model by itself, and of another like it that is wrapped."""
    plain, model = _pair()
    y = {"label": _Y, "is_noisy": _Y == 0} if with_flags else _Y
    found = [
        plain.evaluate(**_data(), return_dict=True),
        model.evaluate(**{**_data(), "y": y}, return_dict=True),
    ]
    for each, labels in ((plain, _Y), (model, y)):
        data = dict(validation_data=(_X, labels), validation_batch_size=8)
        each.fit(**{**_data(), "y": labels}, **data)
        found.append(each.evaluate(**_data(), return_dict=True))
    # Some versions of Keras give NumPy's numbers, which JSON does not take.
    return [{name: float(v) for name, v in logs.items()} for logs in found]


@pytest.mark.slow
def test_replicas_evaluate_as_those_of_the_model_itself():
    calls = [("on_replicas", with_flags) for with_flags in (False, True)]
    [[without, flagged]] = clusters.results(
        "test_evaluation", "replicas", 2, *calls
    )
    assert without[1] == without[0] and without[3] == without[2]
    assert without[2]["loss"] != without[0]["loss"]
    assert flagged[1].keys() - flagged[0].keys() == {
        "clean_accuracy",
        "noisy_accuracy",
    }


def test_it_goes_by_the_loss_that_was_compiled_last():
    network = training.compiled(_network(), "mse", metrics=["mae"])
    model = FisherModel(network, likelihood="categorical")
    for loss in ("sparse_categorical_crossentropy", training.LOSS):
        training.compiled(model, loss)
        plain = training.compiled(_network(), loss)
        expected = plain.evaluate(**_data())
        assert model.evaluate(**_data()) == expected


def test_saved_models_evaluate_and_go_on_as_before(tmp_path):
    model = FisherModel(_network(), FisherPenalty(), seed=3)
    training.compiled(model, optimizer="adam")
    training.fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.evaluate(**_data()) == model.evaluate(**_data())
    logs = [training.fit(each).history for each in (model, loaded)]
    assert logs[0] == logs[1]
    training.assert_equal(loaded.get_weights(), model.get_weights())


@pytest.mark.parametrize("cls", [Shifted, ItsOwnMetrics])
def test_a_step_that_is_compiled_again_is_traced_again(cls):
    plain, model = _pair(cls)
    traced = [model.evaluate(**_data()) and model.test_function]
    summed = keras.losses.SparseCategoricalCrossentropy(True, reduction="sum")
    for loss in (training.LOSS, summed, summed):
        for each in (plain, model.model):
            each.compile("sgd", loss)
        assert model.evaluate(**_data()) == plain.evaluate(**_data())
        traced.append(model.test_function)
        model.evaluate(**_data())
        assert model.test_function is traced[-1]
    assert len(set(map(id, traced))) == len(traced)


@keras.saving.register_keras_serializable("test_evaluation")
class Distilled(keras.Sequential):
    """Is compiled with what Keras knows nothing of."""

    def compile(self, temperature):
        super().compile(loss=training.LOSS, metrics=["accuracy"])
        self.temperature = temperature

    def test_step(self, data):
        x, y = data
        outputs = self(x, training=False) / self.temperature
        loss = self.compute_loss(x, y, outputs)
        self.metrics[0].update_state(loss)
        return self.compute_metrics(x, y, outputs)


def test_a_model_with_its_own_compile_is_compiled_by_its_user():
    model = training.compiled(FisherModel(_network(Distilled)))
    message = "not compiled, and has a `compile` of its own"
    with pytest.raises(ValueError, match=message):
        model.evaluate(**_data())
    before = training.weights(model)
    for validation in (
        dict(validation_data=(_X, _Y)),
        dict(validation_split=0.5),
    ):
        with pytest.raises(ValueError, match=message):
            training.fit(model, **validation)
        with pytest.raises(ValueError, match=message):
            model.fit(
                x=_X,
                y=_Y,
                batch_size=8,
                epochs=1,
                verbose=0,
                callbacks=[],
                **validation,
            )
    training.assert_equal(training.weights(model), before)
    training.fit(model)  # It needs no test step.
    plain = _network(Distilled)
    plain.set_weights(model.model.get_weights())
    for temperature in (2.0, 0.5):
        for each in (plain, model.model):
            each.compile(temperature=temperature)
        expected = plain.evaluate(**_data())
        assert model.evaluate(**_data()) == expected


def test_what_a_loaded_one_needs_is_said(tmp_path):
    model = training.compiled(FisherModel(_network(Distilled)))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"fisher_model\.model\.compile"):
        loaded.evaluate(**_data())


def test_both_steps_of_its_own_are_refused():
    class Both(Augmented):
        def train_step(self, data):
            return {}

    with pytest.raises(ValueError, match="`train_step` of Both"):
        FisherModel(_network(Both))


def test_compile_takes_its_arguments_by_position():
    def made():
        keras.utils.set_random_seed(0)
        return Augmented([keras.Input(_X.shape[1:]), keras.layers.Dense(3)])

    model, plain = FisherModel(made()), made()
    for each in (model, plain):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        each.compile("sgd", loss, None, ["accuracy"], None, False)
    found, expected = (
        each.evaluate(_X, _Y, verbose=0) for each in (model, plain)
    )
    assert found == expected
