"""Functions that are computed again keep nothing in memory."""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
import weakref

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher import FisherPenalty
from keras_fisher import likelihoods
from keras_fisher._derivatives import checkpoint
from keras_fisher.layers import Rematerialization

_MODES = ("eager", "graph", "xla")
_CATEGORICAL = likelihoods.Categorical(from_logits=True)


def _cubic(tensors):
    x, w = tensors
    return [tf.sin(w * x**3), tf.exp(w)], "told"


@pytest.mark.parametrize("mode", _MODES)
def test_any_order_of_derivative(mode):
    def third(x, w, recompute):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as middle:
                middle.watch([x, w])
                with tf.GradientTape() as inner:
                    inner.watch([x, w])
                    if recompute:
                        outputs, told = checkpoint.checkpoint(_cubic, [x, w])
                        assert told == "told"
                    else:
                        outputs, _ = _cubic([x, w])
                    y = tf.reduce_sum(outputs[0] * outputs[1])
                a, b = inner.gradient(y, [x, w])
                z = tf.reduce_sum(a * b)
            c, d = middle.gradient(z, [x, w])
            v = tf.reduce_sum(c) * tf.reduce_sum(d)
        return [y, a, b, c, d, outer.gradient(v, x)]

    x = tf.constant([0.3, -0.7], "float64")
    w = tf.constant(0.9, "float64")
    function = cases.compiled(third, mode)
    results = [function(x, w, recompute) for recompute in (False, True)]
    for one, other in zip(*results):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_gradients_of_the_graph():
    @tf.function
    def second(x, w, recompute):
        f = checkpoint.checkpoint if recompute else lambda f, a: f(a)
        outputs, _ = f(_cubic, [x, w])
        (first,) = tf.gradients(outputs, x)
        return first, *tf.gradients(first, [x, w])

    x, w = tf.constant([0.3, -0.7]), tf.constant(0.9)
    for one, other in zip(second(x, w, True), second(x, w, False)):
        np.testing.assert_allclose(one, other, rtol=1e-5)


class _Watched(keras.layers.Layer):
    """Tells how often it ran, and which of its activations are alive."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def call(self, x):
        y = tf.tanh(x)
        self.seen.append(weakref.ref(y))
        # Differentiating this needs y.
        return tf.tanh(y) ** 2

    def alive(self):
        gc.collect()
        return sum(reference() is not None for reference in self.seen)


@pytest.mark.parametrize("wrap", [False, True])
def test_activations_do_not_outlive_a_pass(wrap):
    watched = _Watched()
    dense = keras.layers.Dense(3)
    block = keras.Sequential([keras.layers.Dense(3), watched, dense])
    layer = Rematerialization(block) if wrap else block
    x = tf.ones([2, 3])
    layer(x)
    watched.seen.clear()
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            y = layer(x) ** 2
        # What was kept for the backward pass ...
        assert watched.alive() == (0 if wrap else 1)
        gradients = inner.gradient(y, block.trainable_variables)
        del inner
        norm = sum(tf.reduce_sum(g**2) for g in gradients)
    # ... and what for the one behind it.
    assert watched.alive() == (0 if wrap else 1)
    assert len(watched.seen) == (2 if wrap else 1)
    second = outer.gradient(norm, block.trainable_variables)
    # Through the gradient, and from there through the outputs.
    assert len(watched.seen) == (4 if wrap else 1)
    assert all(g is not None for g in second[:3])


def _tanh_blocks(wrap, blocks=3, width=4):
    x = inputs = keras.Input((width,))
    for _ in range(blocks):
        block = keras.Sequential(
            [keras.layers.Dense(width, activation="tanh") for _ in range(4)]
        )
        x = (Rematerialization(block) if wrap else block)(x)
    return keras.Model(inputs, keras.layers.Dense(3)(x))


def _penalty_gradient(model, x):
    with tf.GradientTape() as tape:
        recorded = FisherPenalty(0.1).forward(model, x)
        term = FisherPenalty(0.1)(recorded, _CATEGORICAL)
    return tape.gradient(term.value, model.trainable_variables)


@pytest.mark.parametrize("wrap", [False, True])
def test_backward_passes_read_no_activations_in_a_graph(wrap):
    model = _tanh_blocks(wrap)
    counts = []

    @tf.function(autograph=False)
    def step(x):
        graph = tf.compat.v1.get_default_graph()
        with tf.GradientTape() as tape:
            recorded = FisherPenalty(0.1).forward(model, x)
            forward_pass = {op.name for op in graph.get_operations()}
            term = FisherPenalty(0.1)(recorded, _CATEGORICAL)
        gradients = tape.gradient(term.value, model.trainable_variables)
        counts.append(
            sum(
                tensor.op.type == "Tanh" and tensor.op.name in forward_pass
                for op in graph.get_operations()
                if op.name not in forward_pass
                for tensor in op.inputs
            )
        )
        return gradients

    step.get_concrete_function(tf.TensorSpec([6, 4]))
    assert counts[-1] == 0 if wrap else counts[-1] > 12


def test_xla_does_not_undo_it():
    tanhs = []
    for wrap in (False, True):
        model = _tanh_blocks(wrap, blocks=2)
        step = tf.function(
            functools.partial(_penalty_gradient, model),
            jit_compile=True,
            autograph=False,
        )
        code = step.experimental_get_compiler_ir(tf.ones([6, 4]))
        tanhs.append(code(stage="optimized_hlo").count(" tanh("))
    # Of each block: forward, for the gradient, and twice for that of its norm.
    assert tanhs[1] == 4 * tanhs[0]


_MEASURE = """
import sys
sys.path[:0] = {path!r}
import tensorflow as tf, keras, keras_fisher
import test_checkpoint as tests

def peak():
    # Not `ru_maxrss`, which begins with that of the process that forked.
    with open("/proc/self/status") as file:
        return next(int(l.split()[1]) for l in file if l.startswith("VmHWM"))

model = tests._tanh_blocks({wrap}, blocks=8, width=256)
model = keras_fisher.FisherModel(model, 0.1, trace_every=None)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile("sgd", loss, jit_compile=False)
x, y = tf.ones([4096, 256]), tf.zeros([4096], tf.int32)
before = peak()
model.fit(x, y, batch_size=4096, epochs=2, verbose=0)
print("grown", peak() - before)
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="needs Linux's /proc"
)
@pytest.mark.slow
def test_a_penalized_step_takes_less_memory():
    grown = []
    for wrap in (False, True):
        code = _MEASURE.format(path=sys.path, wrap=wrap)
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
        )
        grown.append(int(result.stdout.split("grown ")[1]))
    assert grown[1] < 0.6 * grown[0]
