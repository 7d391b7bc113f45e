"""hessian_trace against the whole Hessian, written down entry by entry."""

from __future__ import annotations

import warnings

import hessians
import keras
from keras import layers
import networks
import numpy as np
import pytest
import tensorflow as tf

import keras_fisher
from keras_fisher._measuring import hessian_trace

_LOSS, _Y = hessians.LOSS, hessians.Y


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "name, jit_compile",
    [
        ("dense", True),
        ("max_pooling_2d", True),
        ("batch_norm", False),
        ("shared", False),
        pytest.param("dense", False, marks=pytest.mark.slow),
        pytest.param("max_pooling_2d", False, marks=pytest.mark.slow),
        pytest.param("conv2d", False, marks=pytest.mark.slow),
        pytest.param("conv2d", True, marks=pytest.mark.slow),
        pytest.param("batch_norm", True, marks=pytest.mark.slow),
        pytest.param("layer_norm", False, marks=pytest.mark.slow),
        pytest.param("layer_norm", True, marks=pytest.mark.slow),
        pytest.param("shared", True, marks=pytest.mark.slow),
    ],
)
def test_probes_see_the_whole_hessian(name, jit_compile):
    model, x = networks.build(name)
    model.compile("sgd", _LOSS, jit_compile=jit_compile)
    matrix = hessians.whole(model, lambda: _LOSS(_Y, model(x)))
    trace = keras_fisher.hessian_trace(
        model, x, _Y, num_probes=8, tolerance=None, seed=5
    )
    forms = hessians.quadratic_forms(model, matrix, seed=5, count=8)
    assert trace == pytest.approx(forms.mean(), rel=1e-6)
    error = forms.std(ddof=1) / np.sqrt(8)
    assert trace.standard_error == pytest.approx(error, rel=1e-5)


def _by_variable(model, matrix, seed, count) -> np.ndarray:
    """v_j (H v)_j for the probes, added up in the block of each variable."""
    values = [tf.constant(v.numpy()) for v in model.trainable_variables]
    ends = np.cumsum([np.size(value) for value in values])[:-1]
    found = []
    for k in range(count):
        probe = hessian_trace._signs(
            values, tf.constant([seed, 0], tf.int64), tf.constant(k)
        )
        v = np.concatenate([np.ravel(p) for p in probe])
        found.append([part.sum() for part in np.split(v * (matrix @ v), ends)])
    return np.array(found)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "name, jit_compile", [("dense", False), ("dense", True), ("shared", False)]
)
def test_by_layer_and_variable_from_the_same_probes(name, jit_compile):
    model, x = networks.build(name)
    model.compile("sgd", _LOSS, jit_compile=jit_compile)
    matrix = hessians.whole(model, lambda: _LOSS(_Y, model(x)))
    terms = _by_variable(model, matrix, seed=5, count=8)

    def measure(by):
        return keras_fisher.hessian_trace(
            model, x, _Y, by=by, num_probes=8, tolerance=None, seed=5
        )

    variables = measure("variable")
    assert list(variables) == [v.path for v in model.trainable_variables]
    for found, expected in zip(variables.values(), terms.T, strict=True):
        assert found == pytest.approx(expected.mean(), rel=1e-6, abs=1e-9)
        error = expected.std(ddof=1) / np.sqrt(8)
        assert found.standard_error == pytest.approx(error, rel=1e-4, abs=1e-9)

    layers_of = [v.path.rpartition("/")[0] for v in model.trainable_variables]
    by_layer = measure("layer")
    assert list(by_layer) == list(dict.fromkeys(layers_of))
    for layer, found in by_layer.items():
        own = terms[:, [each == layer for each in layers_of]].sum(axis=1)
        assert found == pytest.approx(own.mean(), rel=1e-6)
        error = own.std(ddof=1) / np.sqrt(8)
        assert found.standard_error == pytest.approx(error, rel=1e-5)
    assert sum(by_layer.values()) == pytest.approx(measure("total"), rel=1e-9)


def test_many_probes_find_the_diagonal_blocks():
    model, x = networks.build("dense")
    model.compile("sgd", _LOSS)
    matrix = hessians.whole(model, lambda: _LOSS(_Y, model(x)))
    sizes = [v.shape.num_elements() for v in model.trainable_variables]
    blocks = np.split(np.diag(matrix), np.cumsum(sizes)[:-1])
    found = keras_fisher.hessian_trace(
        model, x, _Y, by="variable", num_probes=400, tolerance=None, seed=1
    )
    for trace, block in zip(found.values(), blocks, strict=True):
        assert abs(trace - block.sum()) <= 4 * trace.standard_error + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "embedding"])
def test_recurrent_layers_and_repeated_rows(name):
    model, x = networks.build(name)
    model.compile("sgd", _LOSS)
    matrix = hessians.whole(model, lambda: _LOSS(_Y, model(x)))
    trace = keras_fisher.hessian_trace(
        model, x, _Y, num_probes=8, tolerance=None, seed=5
    )
    forms = hessians.quadratic_forms(model, matrix, seed=5, count=8)
    assert trace == pytest.approx(forms.mean(), rel=1e-5)


def _resized(x):
    # This operation has a gradient whose own gradient is missing.
    return tf.raw_ops.ResizeBicubic(
        images=x, size=[4, 4], half_pixel_centers=True
    )


def _without_second_derivative(activation, dtype="float32"):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((2, 2, 1)),
            layers.Conv2D(2, 1, activation=activation, dtype=dtype),
            layers.Lambda(_resized, dtype="float32"),
            layers.Flatten(),
            layers.Dense(3, dtype=dtype),
        ]
    )
    model.compile("sgd", _LOSS)
    random = np.random.default_rng(0)
    x = random.normal(size=(4, 2, 2, 1)).astype("float32")
    return model, x, np.arange(4) % 3


def test_without_second_derivatives_differences_are_taken():
    model, x, y = _without_second_derivative("tanh")

    # The same resizing as a product with a fixed matrix.
    resized = _resized(np.eye(4, dtype="float32").reshape(4, 2, 2, 1))
    matrix = tf.reshape(resized, [4, 16])
    kernel, bias, kernel2, bias2 = (v.value for v in model.trainable_variables)

    def reference():
        h = tf.tanh(tf.reshape(x, [4, 4, 1]) @ kernel[0, 0] + bias)
        h = tf.einsum("bpc,pq->bqc", h, matrix)
        return _LOSS(y, tf.reshape(h, [4, 32]) @ kernel2 + bias2)

    variables = [kernel, bias, kernel2, bias2]
    with tf.GradientTape(persistent=True) as outer:
        with tf.GradientTape() as inner:
            value = reference()
        gradients = inner.gradient(value, variables)
    expected = []
    for k in range(8):
        probe = hessian_trace._signs(
            variables, tf.constant([5, 0], tf.int64), tf.constant(k)
        )
        products = outer.gradient(gradients, variables, probe)
        expected.append(sum(np.sum(v * hv) for v, hv in zip(probe, products)))
    trace = keras_fisher.hessian_trace(
        model, x, y, num_probes=8, tolerance=None, seed=5
    )
    assert trace == pytest.approx(np.mean(expected), rel=2e-3)


@pytest.mark.parametrize(
    ("activation", "kinks"), [("relu", "those of Relu"), ("tanh", None)]
)
def test_differences_over_kinks_are_told_of(activation, kinks):
    model, x, y = _without_second_derivative(activation)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        keras_fisher.hessian_trace(model, x, y, num_probes=1)
    said = [str(each.message) for each in found if "kinks" in str(each.message)]
    assert len(said) == (kinks is not None)
    assert all(kinks in each for each in said)


def test_differences_are_as_long_as_the_lowest_precision_asks():
    model, x, y = _without_second_derivative("tanh")
    half, _, _ = _without_second_derivative("tanh", "mixed_bfloat16")
    half.set_weights(model.get_weights())
    expected, found = np.array(
        [
            [
                keras_fisher.hessian_trace(each, x, y, num_probes=1, seed=seed)
                for seed in range(24)
            ]
            for each in (model, half)
        ]
    )
    error = np.sqrt(np.mean((found - expected) ** 2)) / expected.std()
    # Of steps for single precision it is 0.28.
    assert error < 0.12, f"{error:.3f} of the spread of probes"


def test_standard_error_is_that_of_other_seeds():
    model, x = networks.build("dense")
    model.compile("sgd", _LOSS)
    exact = np.trace(hessians.whole(model, lambda: _LOSS(_Y, model(x))))
    traces = [
        keras_fisher.hessian_trace(
            model, x, _Y, num_probes=24, tolerance=None, seed=seed
        )
        for seed in range(100)
    ]
    empirical = np.std(traces, ddof=1)
    stated = np.sqrt(np.mean([t.standard_error**2 for t in traces]))
    assert 0.75 < stated / empirical < 1.25, (stated, empirical)
    z = (np.mean(traces) - exact) / (empirical / 10)
    assert abs(z) < 4, f"{z:.1f} standard errors"


def test_batches_are_the_mean_over_examples():
    """Of sizes 4 and 2, each with its own probes."""
    model, x = networks.build("dense")
    model.compile("sgd", _LOSS)
    exact = np.trace(hessians.whole(model, lambda: _LOSS(_Y, model(x))))
    dataset = tf.data.Dataset.from_tensor_slices((x, _Y)).batch(4)
    arguments = dict(num_probes=400, tolerance=None, seed=1)
    trace = keras_fisher.hessian_trace(model, dataset, **arguments)
    assert abs(trace - exact) < 4 * trace.standard_error, (trace, exact)
    arrays = keras_fisher.hessian_trace(model, x, _Y, batch_size=4, **arguments)
    assert arrays == pytest.approx(trace, rel=1e-12)


def test_stops_at_the_tolerance(monkeypatch):
    model, x = networks.build("dense")
    model.compile("sgd", _LOSS)
    counts = []
    correct = hessian_trace._Curvature.__call__

    def counted(self, *arguments):
        counts.append(arguments[-1])
        return correct(self, *arguments)

    monkeypatch.setattr(hessian_trace._Curvature, "__call__", counted)
    trace = keras_fisher.hessian_trace(
        model, x, _Y, num_probes=10_000, tolerance=0.1, seed=0
    )
    assert trace.standard_error <= 0.1 * trace
    assert 8 <= sum(counts) < 2000
    counts.clear()
    keras_fisher.hessian_trace(
        model, x, _Y, num_probes=11, tolerance=1e-9, seed=0
    )
    assert sum(counts) == 11


def test_half_precision_is_near():
    traces = []
    for policy in ("float32", "mixed_float16"):
        model, x = networks.build("dense", policy)
        model.compile("sgd", _LOSS)
        traces.append(
            keras_fisher.hessian_trace(
                model,
                tf.cast(x, "float32"),
                _Y,
                num_probes=50,
                tolerance=None,
                seed=0,
            )
        )
    assert traces[1] == pytest.approx(traces[0], rel=0.03)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_probes=0), "`num_probes` must be an integer of at least 1"),
        (dict(by="example"), "`by` must be"),
        (dict(tolerance=0.0), "`tolerance` must be a positive"),
        (dict(tolerance=float("nan")), "`tolerance` must be a positive"),
        (dict(loss=None), "not compiled"),
    ],
)
def test_bad_arguments(arguments, message):
    model, x = networks.build("dense")
    with pytest.raises(ValueError, match=message):
        keras_fisher.hessian_trace(model, x, _Y, **{"loss": _LOSS, **arguments})


def test_labels_out_of_range_and_frozen_models():
    model, x = networks.build("dense")
    with pytest.raises(ValueError, match="labels have to be from 0 to 2"):
        keras_fisher.hessian_trace(model, x, _Y + 1, loss=_LOSS)
    with pytest.raises(ValueError, match="No labels"):
        keras_fisher.hessian_trace(model, x, loss=_LOSS)
    model.trainable = False
    with pytest.raises(ValueError, match="its Hessian is empty"):
        keras_fisher.hessian_trace(model, x, _Y, loss=_LOSS)


def test_each_batch_has_probes_of_its_own():
    """Of the same ones, two equal batches would tell no more than one."""
    model, x = networks.build("dense")
    traces = [
        keras_fisher.hessian_trace(
            model,
            np.concatenate([x] * count),
            np.concatenate([_Y] * count),
            loss=_LOSS,
            batch_size=networks.BATCH,
            num_probes=1,
            seed=0,
        )
        for count in (1, 2)
    ]
    assert float(traces[0]) != pytest.approx(float(traces[1]), rel=1e-6)


def test_each_probe_and_each_variable_has_signs_of_its_own():
    seed = tf.constant([0, 0], tf.int64)
    found = [
        np.concatenate(hessian_trace._signs([tf.zeros([64])] * 2, seed, k))
        for k in (0, 1)
    ]
    rows = {row.tobytes() for row in np.reshape(found, [4, 64])}
    assert len(rows) == 4
