"""The private names of Keras and TensorFlow that we go by are still there.

Each is in the table of docs/architecture.md. If one of these fails, Keras has
moved it: look for public API first.
"""

from __future__ import annotations

import ast
import inspect
import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import ops
from tensorflow.python.ops import control_flow_util
from tensorflow.python.util import _pywrap_util_port
import training

_ROOT = pathlib.Path(__file__).parents[1]
_TABLE = (_ROOT / "docs" / "architecture.md").read_text("utf-8")


def test_the_loss_tracker_is_the_loss_in_the_logs():
    model = training.compiled(training.network(), metrics=None)
    assert model.metrics[0] is model._loss_tracker
    model._loss_tracker.update_state(3.0, sample_weight=2)
    model._loss_tracker.update_state(6.0, sample_weight=1)
    assert float(model.get_metrics_result()["loss"]) == 4


def test_steps_of_keras_update_it_by_the_size_of_the_batch():
    source = inspect.getsource(keras.Model.train_step)
    assert re.search(r"self\._loss_tracker\.update_state\(", source)
    assert "optimizer.scale_loss(loss)" in source
    model = training.compiled(training.network())
    logs = model.fit(training.X, training.Y, 32, verbose=0).history
    assert logs["loss"] == [float(model._loss_tracker.result())]
    assert float(model._loss_tracker.count) == len(training.X)


def test_fit_begins_at_an_epoch_that_a_callback_leaves():
    model = training.compiled(training.network())
    assert model._initial_epoch is None
    model._initial_epoch = 2
    assert training.fit(model, epochs=3).epoch == [2]


def test_an_epoch_ends_with_what_metrics_say_now():
    method = "_get_metrics_result_or_logs"
    model = training.compiled(training.network())
    logs = training.fit(model, epochs=1).history
    assert getattr(model, method)({"loss": 7.0}).keys() == {"loss"}
    assert getattr(model, method)(dict.fromkeys(logs, 7.0)) == {
        name: values[-1] for name, values in logs.items()
    }
    trainer = inspect.getsource(inspect.getmodule(keras.Model.fit))
    assert trainer.count(f"{method}(logs)") == 2


def test_variables_of_a_traced_first_call_have_no_value():
    assert keras.Variable(1.0)._value is not None
    with keras.StatelessScope():
        assert keras.Variable(lambda *args, **_: 1.0, ())._value is None


def test_metrics_of_a_model_are_its_attributes_alone():
    class Network(keras.Sequential):
        def __init__(self):
            super().__init__([keras.layers.Dense(3)])
            self.mine = keras.metrics.Mean()

    network = training.compiled(Network())
    training.fit(network, epochs=1)
    assert list(network._metrics) == [network.mine]
    assert network.mine in network.metrics
    assert len(network.metrics) > 1


def test_the_trainer_still_builds_where_it_is_overridden():
    assert callable(keras.Model._symbolic_build)
    assert callable(keras.Model._maybe_symbolic_build)
    assert "_maybe_symbolic_build" in inspect.getsource(keras.Model.fit)


def test_tensorboard_writes_through_its_writers(tmp_path):
    board = keras.callbacks.TensorBoard(tmp_path)
    board.set_model(training.compiled(training.network()))
    board.on_train_begin()
    for name in ("_train_writer", "_val_writer"):
        assert isinstance(getattr(type(board), name), property)
        assert isinstance(getattr(board, name), tf.summary.SummaryWriter)
    source = inspect.getsource(keras.callbacks.TensorBoard)
    assert source.count("self._train_writer") > 2
    assert "self._val_writer" in source


def test_layers_leave_masks_on_their_outputs():
    embedded = keras.layers.Embedding(3, 2, mask_zero=True)(np.array([[1, 0]]))
    np.testing.assert_array_equal(embedded._keras_mask, [[True, False]])
    # And look for them there.
    last = keras.layers.GRU(2)
    hidden = last(embedded)
    embedded._keras_mask = tf.constant([[True, True]])
    assert not np.allclose(hidden, last(embedded))


@pytest.mark.parametrize(
    "loss",
    [
        keras.losses.SparseCategoricalCrossentropy,
        keras.losses.CategoricalCrossentropy,
    ],
)
def test_losses_keep_their_axis(loss):
    assert loss(axis=1)._fn_kwargs["axis"] == 1
    assert loss()._fn_kwargs["axis"] == -1


def test_operations_are_called_as_we_know_them():
    x = keras.Input((2,))
    expected = {
        "Add": x + x,
        "Subtract": x - x,
        "Multiply": x * x,
        "Negative": -x,
        "Relu": keras.ops.relu(x),
        "Tanh": keras.ops.tanh(x),
    }
    for name, result in expected.items():
        operation = keras.Model(x, result).operations[-1]
        assert type(operation).__name__ == name
        assert type(operation).__module__.split(".")[0] == "keras"


def test_tensorflow_tells_what_it_compiles_for_and_runs_on():
    told = []

    @tf.function(jit_compile=True)
    def compiled():
        graph = tf.compat.v1.get_default_graph()
        told.append(control_flow_util.GraphOrParentsInXlaContext(graph))
        return tf.constant(0)

    compiled()
    assert told and all(told)
    graph = tf.Graph()
    assert not control_flow_util.GraphOrParentsInXlaContext(graph)
    assert isinstance(_pywrap_util_port.IsMklEnabled(), bool)


def test_graphs_know_the_functions_that_they_call():
    @tf.function(autograph=False)
    def outer(x):
        return tf.map_fn(tf.sin, x)

    graph = outer.get_concrete_function(tf.zeros([3])).graph
    names = [
        op.get_attr("body").name
        for op in graph.get_operations()
        if op.type.endswith("While")
    ]
    body = graph._get_function(names[0]).graph
    assert "Sin" in [op.type for op in body.get_operations()]
    assert len(body.inputs) == len(body.outputs)
    assert graph._get_function("another") is None


def test_no_other_private_name_is_used():
    """Attributes with an underscore that nothing of ours has defined."""
    # Those of named tuples are public.
    used, own = set(), {"_asdict", "_fields"}
    for path in (_ROOT / "keras_fisher").rglob("*.py"):
        own.add(path.stem)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute):
                is_read = isinstance(node.ctx, ast.Load)
                (used if is_read else own).add(node.attr)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
    private = {n for n in used - own if n[0] == "_" and n[:2] != "__"}
    assert private, "they are what this test is about"
    unknown = {name for name in private if name not in _TABLE}
    assert not unknown, unknown


def test_layers_know_the_layers_in_them():
    inner = keras.layers.Dense(2)
    outer = keras.layers.TimeDistributed(inner)
    assert inner in outer._flatten_layers(include_self=True, recursive=True)


def test_gradients_are_looked_up_in_a_registry_of_a_class():
    registry = ops.gradient_registry
    lookups = []
    with pytest.MonkeyPatch.context() as patch:
        own = type(registry).lookup
        patch.setattr(
            type(registry),
            "lookup",
            lambda self, name: lookups.append(name) or own(self, name),
        )
        with tf.GradientTape() as tape:
            x = tf.constant(2.0)
            tape.watch(x)
            y = tf.sin(x)
        tape.gradient(y, x)
    assert lookups == ["Sin"]
    assert registry.lookup("ResizeBilinearGrad") is None
