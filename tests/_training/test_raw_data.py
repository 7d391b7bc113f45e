"""A wrapped model that preprocesses its data is given what it takes itself."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import training

from keras_fisher import FisherModel
from keras_fisher import fisher_trace
from keras_fisher import hessian_trace

_X, _Y = training.X[:24], training.Y[:24]
_WEIGHTS = np.linspace(0.5, 2.0, 24).astype("float32")


class Pipeline(keras.Model):
    """Maps its preprocessing over data, as tasks of KerasHub do."""

    def preprocess_samples(self, x, y=None, sample_weight=None):
        # Of other shapes than the network's inputs.
        x = tf.concat([x, tf.square(x)], axis=-1) / 4
        y = None if y is None else (y + 1) % 3
        return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)

    def fit(self, x, y=None, batch_size=None, sample_weight=None, **kwargs):
        data = x
        if y is not None:
            data = tf.data.Dataset.from_tensor_slices(
                keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
            ).batch(batch_size or 32)
        return super().fit(data.map(self.preprocess_samples), **kwargs)

    def evaluate(self, x, y=None, **kwargs):
        return super().evaluate(*self.preprocess_samples(x, y), **kwargs)

    def predict(self, x, **kwargs):
        return super().predict(self.preprocess_samples(x), **kwargs)


def _task():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((12,))
    hidden = keras.layers.Dense(5, activation="tanh")(inputs)
    return Pipeline(inputs, keras.layers.Dense(3)(hidden))


def _data(kind):
    if kind == "arrays":
        return {"x": _X, "y": _Y, "batch_size": 8}
    if kind == "weighted":
        return {
            "x": _X,
            "y": _Y,
            "batch_size": 8,
            "sample_weight": _WEIGHTS,
        }
    return {"x": tf.data.Dataset.from_tensor_slices((_X, _Y)).batch(8)}


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["arrays", "weighted", "dataset"])
@pytest.mark.parametrize("trace_every", [None, 1])
def test_training_is_that_of_the_model_itself(kind, trace_every):
    task, wrapped = _task(), _task()
    model = training.compiled(FisherModel(wrapped, trace_every=trace_every))
    training.compiled(task)
    history = model.fit(**_data(kind), epochs=2, verbose=0).history
    expected = task.fit(**_data(kind), epochs=2, verbose=0).history
    training.assert_equal(wrapped.get_weights(), task.get_weights())
    assert history["loss"] == expected["loss"]
    assert model.evaluate(_X, _Y, verbose=0) == task.evaluate(_X, _Y, verbose=0)
    outputs = task.predict(_X, verbose=0)
    np.testing.assert_array_equal(model.predict(_X, verbose=0), outputs)
    np.testing.assert_allclose(model.predict_on_batch(_X), outputs, 1e-6)
    np.testing.assert_allclose(
        model.predict(tf.data.Dataset.from_tensor_slices(_X).batch(5)),
        outputs,
        1e-6,
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("validation", ["split", "arrays", "dataset"])
def test_validation_data_are_preprocessed_once(validation):
    task = _task()
    model = training.compiled(FisherModel(task))
    arguments = {
        "split": {"validation_split": 0.25},
        "arrays": {"validation_data": (_X[18:], _Y[18:])},
        "dataset": {
            "validation_data": tf.data.Dataset.from_tensors((_X[18:], _Y[18:]))
        },
    }[validation]
    count = 24 if validation != "split" else 18
    x, y = (_X, _Y) if validation == "split" else (_X[:count], _Y[:count])
    history = model.fit(x, y, epochs=2, verbose=0, **arguments).history
    loss, accuracy = model.evaluate(_X[18:], _Y[18:], verbose=0)
    np.testing.assert_allclose(history["val_loss"][-1], loss, 1e-6)
    assert history["val_accuracy"][-1] == accuracy
    expected = training.compiled(_task())
    expected.fit(_X[:count], _Y[:count], epochs=2, verbose=0)
    training.assert_equal(task.get_weights(), expected.get_weights())


def test_single_batches_are_preprocessed():
    task, expected = _task(), training.compiled(_task())
    model = training.compiled(FisherModel(task))
    logs = model.train_on_batch(_X, _Y, _WEIGHTS, return_dict=True)
    x, y = expected.preprocess_samples(_X, _Y)
    other = expected.train_on_batch(x, y, _WEIGHTS, return_dict=True)
    np.testing.assert_allclose(logs["loss"], other["loss"], 1e-6)
    training.assert_equal(task.get_weights(), expected.get_weights())
    np.testing.assert_allclose(
        model.test_on_batch(_X, _Y), expected.test_on_batch(x, y), 1e-6
    )


def test_data_that_cannot_be_preprocessed_are_refused():
    model = training.compiled(FisherModel(_task()))
    batches = ((_X[:8], _Y[:8]) for _ in range(3))
    with pytest.raises(
        ValueError, match="preprocesses its data, which takes arrays"
    ):
        model.fit(batches, verbose=0)


@pytest.mark.few(1)
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", ["arrays", "dataset"])
def test_what_is_measured_is_preprocessed(kind, wrapped):
    task = _task()
    x, y = task.preprocess_samples(_X, _Y)
    network = keras.Model(task.inputs, task.outputs)
    model = training.compiled(FisherModel(task) if wrapped else task)
    data = _data(kind)
    np.testing.assert_allclose(
        fisher_trace(model, **data, likelihood="categorical", seed=0),
        fisher_trace(network, x, likelihood="categorical", seed=0),
        1e-5,
    )
    np.testing.assert_allclose(
        hessian_trace(model, **data, seed=0),
        hessian_trace(network, x, y, batch_size=8, loss=training.LOSS, seed=0),
        1e-4,
    )


@keras.saving.register_keras_serializable("test_raw_data")
class Compiled(keras.Sequential):
    """Compiles itself in its own way, as tasks of KerasHub do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.compile("sgd", "mse")

    def compile(self, *args, **kwargs):
        super().compile(*args, **kwargs)


def test_a_model_that_compiles_itself_is_loaded_without_a_warning(tmp_path):
    network = Compiled(training.dense_network(6).layers)
    model = training.compiled(FisherModel(network))
    model.save(tmp_path / "model.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        loaded.predict(_X, verbose=0), model.predict(_X, verbose=0)
    )


class Halves(keras.Sequential):
    def predict_step(self, data):
        return super().predict_step(data) / 2


def test_predict_step_of_the_model_is_called():
    network = Halves(training.dense_network(6).layers)
    model = training.compiled(FisherModel(network))
    np.testing.assert_allclose(
        model.predict(_X, verbose=0), network(_X) / 2, 1e-5, 1e-6
    )


@pytest.mark.parametrize(
    "name",
    [
        "fit",
        "evaluate",
        "predict",
        "train_step",
        "train_on_batch",
        "test_on_batch",
        "predict_on_batch",
        "compute_loss",
        "compute_metrics",
        "make_train_function",
        "make_test_function",
        "make_predict_function",
    ],
)
def test_other_methods_of_its_own_are_refused_by_name(name):
    cls = type("Own", (keras.Sequential,), {name: lambda *_, **__: None})
    with pytest.raises(ValueError, match=f"`{name}` of Own would have no"):
        FisherModel(cls([keras.layers.Dense(3)]))


@pytest.mark.parametrize("share", [0.999, 1.0])
def test_a_split_leaves_examples_on_both_sides(share):
    model = training.compiled(FisherModel(_task()))
    with pytest.raises(ValueError, match=r"validation_split=.* of 24"):
        model.fit(_X, _Y, validation_split=share, verbose=0)


def test_only_arrays_are_split():
    model = training.compiled(FisherModel(_task()))
    words = ["one"] * 24
    with pytest.raises(ValueError, match="Received: leaves of type str"):
        model.fit(words, _Y, validation_split=0.5, verbose=0)


def test_validation_data_are_not_kept():
    model = training.compiled(FisherModel(_task()))
    before = set(vars(model))
    model.fit(_X, _Y, validation_split=0.25, verbose=0)
    assert not [
        name
        for name, value in vars(model).items()
        if name not in before and isinstance(value, tf.data.Dataset)
    ]
    assert model._prepared is None
