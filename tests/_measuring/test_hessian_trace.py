"""hessian_trace against the whole Hessian, written down entry by entry."""

from __future__ import annotations

import warnings

import cases
import keras
from keras import layers
import networks
import numpy as np
import pytest
import tensorflow as tf

import keras_fisher
from keras_fisher._measuring import hessian_trace

# Keras's losses compute in float32 unless told otherwise.
_LOSS = keras.losses.SparseCategoricalCrossentropy(
    from_logits=True, dtype="float64"
)
_Y = np.arange(networks.BATCH) % networks.CLASSES


def _whole_hessian(model, loss) -> np.ndarray:
    """By central differences of the gradient along each axis, in float64."""
    variables = [v.value for v in model.trainable_variables]

    def gradient():
        with tf.GradientTape() as tape:
            value = loss()
        gradients = tape.gradient(
            value,
            variables,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return np.concatenate(
            [np.ravel(tf.convert_to_tensor(g)) for g in gradients]
        )

    columns = []
    for variable in model.trainable_variables:
        start = variable.numpy()
        for i in range(start.size):
            moved = []
            for step in (1e-5, -1e-5):
                value = start.copy()
                value.flat[i] += step
                variable.assign(value)
                moved.append(gradient())
            columns.append((moved[0] - moved[1]) / 2e-5)
        variable.assign(start)
    return np.array(columns)


def _quadratic_forms(model, matrix, seed, count) -> np.ndarray:
    """vᵀ H v for the probes that hessian_trace draws."""
    values = [tf.constant(v.numpy()) for v in model.trainable_variables]
    forms = []
    for k in range(count):
        probe = hessian_trace._signs(
            values, tf.constant([seed, 0], tf.int64), tf.constant(k)
        )
        v = np.concatenate([np.ravel(p) for p in probe])
        assert set(v) == {-1.0, 1.0}
        forms.append(v @ matrix @ v)
    return np.array(forms)


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
    matrix = _whole_hessian(model, lambda: _LOSS(_Y, model(x)))
    trace = keras_fisher.hessian_trace(
        model, x, _Y, num_probes=8, tolerance=None, seed=5
    )
    forms = _quadratic_forms(model, matrix, seed=5, count=8)
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
    matrix = _whole_hessian(model, lambda: _LOSS(_Y, model(x)))
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
    matrix = _whole_hessian(model, lambda: _LOSS(_Y, model(x)))
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
    matrix = _whole_hessian(model, lambda: _LOSS(_Y, model(x)))
    trace = keras_fisher.hessian_trace(
        model, x, _Y, num_probes=8, tolerance=None, seed=5
    )
    forms = _quadratic_forms(model, matrix, seed=5, count=8)
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
    exact = np.trace(_whole_hessian(model, lambda: _LOSS(_Y, model(x))))
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
    exact = np.trace(_whole_hessian(model, lambda: _LOSS(_Y, model(x))))
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


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "loss, y",
    [
        ("mse", np.ones([networks.BATCH, networks.CLASSES])),
        (
            keras.losses.MeanSquaredError(dtype="float64"),
            np.ones([networks.BATCH, 3]),
        ),
        (lambda y, p: tf.reduce_mean((p - y) ** 2, -1), np.ones([6, 3])),
        (_LOSS, _Y),
    ],
    ids=["name", "instance", "function", "sparse"],
)
def test_any_loss(loss, y):
    model, x = networks.build("dense")

    def value():
        mean = (
            loss
            if loss != "mse"
            else keras.losses.MeanSquaredError(dtype="float64")
        )
        return tf.reduce_mean(mean(y, model(x)))

    matrix = _whole_hessian(model, value)
    trace = keras_fisher.hessian_trace(
        model, x, y, loss=loss, num_probes=4, tolerance=None, seed=5
    )
    forms = _quadratic_forms(model, matrix, seed=5, count=4)
    assert trace == pytest.approx(forms.mean(), rel=1e-6)


def test_a_function_of_one_output_does_not_mix_examples():
    keras.config.set_dtype_policy("float64")
    model = keras.Sequential(
        [keras.Input((2,), dtype="float64"), layers.Dense(1)]
    )
    x, y = np.random.default_rng(0).normal(size=(5, 2)), np.arange(5.0)
    trace = keras_fisher.hessian_trace(
        model, x, y, loss="mse", num_probes=2000, tolerance=None, seed=0
    )
    # 2 (mean of x xᵀ, 1), whatever the labels.
    expected = 2 * (np.mean(np.sum(x**2, axis=1)) + 1)
    assert abs(trace - expected) < 4 * trace.standard_error


def test_the_compiled_loss_with_its_regularization_and_no_penalty():
    base = keras.Sequential(
        [
            keras.Input((2,)),
            layers.Dense(3, kernel_regularizer=keras.regularizers.L2(0.5)),
        ]
    )
    x, y = np.zeros([4, 2], "float32"), np.arange(4) % 3
    base.layers[0].bias.assign([100.0, 0.0, 0.0])  # no curvature but L2's
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    base.compile("sgd", loss)
    model = keras_fisher.FisherModel(base, penalty=1.0)
    model.compile("sgd", loss)
    for compiled in (base, model):
        trace = keras_fisher.hessian_trace(compiled, x, y, num_probes=8)
        assert trace == pytest.approx(2 * 0.5 * 6, rel=1e-6)


def test_sample_weights_of_a_data_set():
    model, x = networks.build("dense")
    model.compile("sgd", _LOSS)
    weight = np.array([0.0, 1.0, 2.0, 3.0, 0.5, 1.0])
    matrix = _whole_hessian(
        model, lambda: _LOSS(_Y, model(x), sample_weight=weight)
    )
    dataset = tf.data.Dataset.from_tensors((x, _Y, weight))
    trace = keras_fisher.hessian_trace(
        model, dataset, num_probes=4, tolerance=None, seed=5
    )
    forms = _quadratic_forms(model, matrix, seed=5, count=4)
    assert trace == pytest.approx(forms.mean(), rel=1e-6)


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


@pytest.mark.parametrize("reduction", ["sum", "none", None])
@pytest.mark.parametrize("batch_size", [2, None])
def test_a_loss_is_the_mean_over_examples_however_it_is_reduced(
    reduction, batch_size
):
    model, x = networks.build("dense")
    mean, other = (
        keras_fisher.hessian_trace(
            model,
            x,
            _Y,
            loss=keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, dtype="float64", reduction=r
            ),
            batch_size=batch_size,
            num_probes=4,
            seed=0,
        )
        for r in ("sum_over_batch_size", reduction)
    )
    assert float(other) == pytest.approx(float(mean), rel=1e-9)


def test_the_reduction_of_a_loss_stays_as_it_was():
    model, x = networks.build("dense")
    loss = keras.losses.MeanSquaredError(reduction="sum")
    y = np.zeros([networks.BATCH, networks.CLASSES])
    keras_fisher.hessian_trace(model, x, y, loss=loss, num_probes=1)
    assert loss.reduction == "sum"


def test_losses_that_layers_add_count():
    """Of an activity regularizer λ Σ a² / B, with a = w x and no other loss."""
    keras.config.set_dtype_policy("float64")
    x = np.array([[1.0], [3.0]])
    layer = keras.layers.Dense(
        1, use_bias=False, activity_regularizer=keras.regularizers.L2(0.5)
    )
    model = keras.Sequential([keras.Input((1,)), layer])
    model.compile("sgd")
    found = keras_fisher.hessian_trace(model, x, num_probes=2, seed=0)
    # Older versions do not divide by B.
    size = len(x) if cases.has_keras("3.14") else 1
    np.testing.assert_allclose(float(found), 2 * 0.5 * np.sum(x**2) / size)


def test_labels_with_noise_flags_are_those_that_were_given():
    model, x = networks.build("dense")
    model.compile(loss=_LOSS)
    flags = {
        "label": _Y,
        "is_noisy": np.zeros(len(_Y), bool),
        "true_label": (_Y + 1) % networks.CLASSES,
    }
    found, expected = (
        keras_fisher.hessian_trace(model, x, y, num_probes=4, seed=0, verbose=0)
        for y in (flags, _Y)
    )
    assert found == expected
