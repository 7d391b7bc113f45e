"""What the graph says of variables: uses, ways to them, axes of examples."""

from __future__ import annotations

import keras
from keras import layers
import numpy as np
import tensorflow as tf

from keras_fisher._measuring import per_example
from keras_fisher._measuring import variable_uses
from keras_fisher._measuring.variable_uses import Axis


def _read(function, shape=(6, 4), weight_shape=(4, 3)):
    """Uses of a weight in the graph of `function(x, weight)`."""
    found = {}

    def trace(batch):
        @tf.function(autograph=False)
        def traced(x, weight):
            weight, x = tf.identity(weight), tf.identity(x)
            outputs = function(x, weight)
            return x, weight, outputs

        graph = traced.get_concrete_function(
            tf.TensorSpec([batch, *shape[1:]]), tf.TensorSpec(weight_shape)
        ).graph
        return graph, graph.structured_outputs

    other, _ = trace(shape[0] + 1)
    shapes = variable_uses.shapes_by_operation(other)
    graph, (x, weight, outputs) = trace(shape[0])
    x, weight, outputs = (t.op.inputs[0] for t in (x, weight, outputs))
    layout = variable_uses.Layout(shape[0], shapes)
    varying = variable_uses.dependent_on([x], graph.get_operations())
    found["uses"] = variable_uses.find(
        weight, variable_uses.ancestors(outputs), varying, layout
    )
    found["axis"] = layout.axis(outputs)
    return found


def test_the_first_operation_with_examples_is_the_use():
    found = _read(lambda x, w: tf.nn.relu(tf.matmul(x, w)))
    (use,) = found["uses"]
    assert use.kind == "MatMul"
    assert use.operand == 1
    assert not use.scaled
    assert use.path == ()
    assert found["axis"] == Axis(0, 1)


def test_a_use_behind_casts_and_shapes_is_the_same():
    def function(x, w):
        w = tf.cast(tf.expand_dims(w, 0), tf.float64)
        return tf.matmul(tf.cast(x, tf.float64), tf.reshape(w, [4, 3]))

    (use,) = _read(function)["uses"]
    assert use.kind == "MatMul"
    assert not use.scaled
    assert use.parameter.dtype == tf.float64


def test_arithmetic_on_the_way_scales_and_a_transpose_is_remembered():
    (use,) = _read(lambda x, w: tf.matmul(x, 2.0 * w))["uses"]
    assert use.scaled
    (use,) = _read(
        lambda x, w: tf.matmul(x, tf.transpose(w)), weight_shape=(3, 4)
    )["uses"]
    assert use.path == (((3, 4), (1, 0)),)


def test_a_way_that_mixes_entries_is_not_understood():
    assert _read(lambda x, w: tf.matmul(x, tf.nn.softmax(w)))["uses"] is None
    assert _read(lambda x, w: tf.matmul(x, w + w[:1]))["uses"] is None


def test_each_use_is_found_and_dead_ends_are_not():
    def function(x, w):
        tf.reduce_sum(tf.matmul(x, w))  # nothing comes of it
        return tf.matmul(x, w) + tf.matmul(tf.tanh(x), w)

    assert [use.kind for use in _read(function)["uses"]] == ["MatMul"] * 2
    assert _read(lambda x, w: x)["uses"] == []


def test_repeats_and_position_of_the_axis_of_examples():
    merged = _read(lambda x, w: tf.reshape(x, [-1, 2]) @ w, weight_shape=(2, 3))
    assert merged["axis"] == Axis(0, 2)
    turned = _read(lambda x, w: tf.transpose(tf.matmul(x, w)))
    assert turned["axis"] == Axis(1, 1)
    # No axis, and two of them.
    assert _read(lambda x, w: w * tf.reduce_sum(x))["axis"] is None
    both = _read(lambda x, w: tf.matmul(x, x, transpose_b=True) * w[0, 0])
    assert both["axis"] is None


def test_a_copy_for_each_example_is_a_use():
    found = _read(
        lambda x, w: tf.broadcast_to(w, [x.shape[0], 4, 3]) * x[:, :, None]
    )
    assert [use.kind for use in found["uses"]] == ["BroadcastTo"]


def test_grouped_convolutions_are_found_inside_their_functions():
    model = keras.Sequential(
        [keras.Input((7, 7, 4)), layers.Conv2D(4, 3, groups=2, strides=2)]
    )
    x = tf.constant(np.ones([2, 7, 7, 4], "float32"))
    layout = per_example.layout_for(model, x, False)
    kinds = []

    @tf.function(autograph=False)
    def traced(x):
        recording = per_example.Recording(model, x, layout)
        for uses in recording._uses:
            kinds.extend((u.kind, u.attribute("strides")) for u in uses[:1])
            break
        return recording.outputs

    traced(x)
    assert kinds == [("Convolution", [1, 2, 2, 1])]
