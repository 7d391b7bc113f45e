"""What is exported predicts as the model does, in the formats of Keras."""

from __future__ import annotations

import cases
import keras
from keras import layers
import numpy as np
import pytest
import tensorflow as tf
import training

import keras_fisher

_X = training.X
_COUNTS = np.arange(len(_X) * 8).reshape(-1, 8) % 3


def _functional():
    a = keras.Input((6,), name="a")
    b = keras.Input((8,), name="b", dtype="int32")
    hidden = layers.Dense(8)(a) + keras.ops.cast(b, "float32")
    outputs = {name: layers.Dense(3, name=name)(hidden) for name in ("p", "q")}
    return keras.Model({"a": a, "b": b}, outputs)


def _several():
    x = keras.Input((6,))
    return keras.Model(x, [layers.Dense(3)(x), layers.Dense(3)(x)])


@keras.saving.register_keras_serializable("test_export")
class Exported(training.Subclassed):
    pass


_CASES = {
    "sequential": (training.network, _X, training.Y),
    "dicts": (
        _functional,
        {"a": _X, "b": _COUNTS.astype("int32")},
        {"p": training.Y, "q": training.Y},
    ),
    "several": (_several, _X, [training.Y, training.Y]),
    "subclassed": (Exported, _X, training.Y),
}


def _trained(make, x, y):
    model = keras_fisher.FisherModel(make(), 0.1)
    loss = keras.tree.map_structure(lambda _: training.LOSS, y)
    training.compiled(model, loss, metrics=None)
    model.fit(x, y, verbose=0)
    return model


def _assert_served_as_predicted(model, x, folder):
    model.export(str(folder), verbose=False)
    # Which owns the variables.
    archive = tf.saved_model.load(str(folder))
    served = archive.serve(keras.tree.map_structure(tf.constant, x))
    predicted = model.predict(x, batch_size=len(_X), verbose=0)
    keras.tree.assert_same_structure(served, predicted)
    keras.tree.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        served,
        predicted,
    )


@pytest.mark.few(2)
@pytest.mark.parametrize("name", _CASES)
def test_saved_models_serve_what_is_predicted(name, tmp_path):
    make, x, y = _CASES[name]
    model = _trained(make, x, y)
    _assert_served_as_predicted(model, x, tmp_path / "trained")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    _assert_served_as_predicted(loaded, x, tmp_path / "loaded")


def test_saved_models_of_a_strategy(tmp_path):
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = _trained(training.network, _X, training.Y)
    _assert_served_as_predicted(model, _X, tmp_path / "replicas")


@cases.since_keras("3.13")
def test_lite_models(tmp_path):
    model = _trained(training.network, _X, training.Y)
    path = str(tmp_path / "model.tflite")
    model.export(path, format="litert", verbose=False)
    run = tf.lite.Interpreter(path).get_signature_runner()
    (name,) = run.get_input_details()
    (found,) = run(**{name: _X[:1]}).values()
    np.testing.assert_allclose(
        found, model.predict(_X[:1], verbose=0), rtol=1e-4, atol=1e-5
    )


def test_onnx_models(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx")
    model = _trained(training.network, _X, training.Y)
    path = tmp_path / "model.onnx"
    model.export(path, format="onnx", verbose=False)
    session = runtime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: _X})
    np.testing.assert_allclose(
        found, model.predict(_X, verbose=0), rtol=1e-4, atol=1e-5
    )


def test_what_was_never_built_says_so(tmp_path):
    model = keras_fisher.FisherModel(Exported())
    with pytest.raises(ValueError, match="built"):
        model.export(tmp_path / "nothing")


@keras.saving.register_keras_serializable("test_export")
class Words(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = layers.Embedding(3, 4)
        self.out = layers.Dense(3)

    def call(self, x):
        return self.out(keras.ops.mean(self.embedding(x), axis=1))


def test_a_signature_says_what_shapes_do_not(tmp_path):
    model = _trained(Words, _COUNTS, training.Y)
    signature = [keras.InputSpec(shape=(None, 8), dtype="int64")]
    model.export(str(tmp_path), input_signature=signature, verbose=False)
    archive = tf.saved_model.load(str(tmp_path))
    np.testing.assert_allclose(
        archive.serve(_COUNTS), model.predict(_COUNTS, verbose=0), rtol=1e-5
    )
