"""Tests of `keras_fisher.likelihoods`."""

import json
import math
import re

import keras
import numpy as np
import pytest
from scipy import stats
import tensorflow as tf

from keras_fisher import likelihoods
from keras_fisher._common import dtypes
from keras_fisher._common import random_draws
from keras_fisher.likelihoods import Bernoulli
from keras_fisher.likelihoods import Categorical
from keras_fisher.likelihoods import Gaussian

_MODES = ["eager", "graph", "xla"]
_DTYPES = ["float16", "bfloat16", "float32", "float64"]
# The shape of the parts of a batch of examples.
_PARTS = {"batch": (6,), "tokens": (4, 3), "pixels": (3, 2, 2)}
_CLASSES = 5
_STDDEVS = [0.5, 1.0, 3.0]


def _compiled(function, mode, signature=None):
    if mode == "eager":
        return function
    return tf.function(
        function, input_signature=signature, jit_compile=mode == "xla"
    )


def _double(tensor):
    return tf.cast(tensor, tf.float64).numpy()


def _rng(*entropy):
    return np.random.default_rng([2021, *entropy])


def _categorical_outputs(parts, from_logits, dtype, classes=_CLASSES):
    logits = 2 * _rng(1).normal(size=(*parts, classes))
    outputs = logits if from_logits else tf.nn.softmax(logits)
    return tf.cast(outputs, dtype)


def _bernoulli_outputs(shape, from_logits, dtype):
    logits = 2 * _rng(2).normal(size=shape)
    return tf.cast(logits if from_logits else tf.sigmoid(logits), dtype)


def _indices(parts, classes=_CLASSES):
    return _rng(3).integers(0, classes, size=parts)


_ENCODINGS = {
    "sparse": lambda index: index,
    "column": lambda index: index[..., None],
    "one_hot": lambda index: np.eye(_CLASSES)[index],
    "soft": lambda index: _rng(4).dirichlet(np.ones(_CLASSES), index.shape),
}


def _tolerance(dtype):
    # The outputs are given; all that follows is in single precision or better.
    return dict(rtol=1e-12) if dtype == "float64" else dict(rtol=2e-6)


# --- reference values, in loops -----------------------------------------


def _loop_over_parts(parts, of_part, mask=None):
    """Returns the sum of `of_part(index)` for each example."""
    sums = [0.0] * parts[0]
    for index in np.ndindex(*parts):
        if mask is None or mask[index[: mask.ndim]]:
            sums[index[0]] += of_part(index)
    return np.array(sums)


def _categorical_loop(y, outputs, from_logits, mask=None):
    def of_part(index):
        row = [float(output) for output in outputs[index]]
        if from_logits:
            normalizer = math.log(math.fsum(math.exp(z) for z in row))
            row = [z - normalizer for z in row]
        else:
            row = [math.log(p) for p in row]
        if y.shape == outputs.shape:
            return -math.fsum(t * z for t, z in zip(y[index], row))
        label = y[index] if y.ndim == outputs.ndim - 1 else y[index][0]
        return -row[int(label)]

    return _loop_over_parts(outputs.shape[:-1], of_part, mask)


def _bernoulli_loop(y, outputs, from_logits, mask=None):
    y = np.reshape(y, outputs.shape)

    def of_part(index):
        p = float(outputs[index])
        if from_logits:
            p = 1 / (1 + math.exp(-p))
        return -(y[index] * math.log(p) + (1 - y[index]) * math.log1p(-p))

    return _loop_over_parts(outputs.shape, of_part, mask)


def _gaussian_loop(y, outputs, stddev, mask=None):
    y = np.reshape(y, outputs.shape)

    def of_part(index):
        return -stats.norm.logpdf(y[index], outputs[index], stddev)

    return _loop_over_parts(outputs.shape, of_part, mask)


# --- negative log-likelihood --------------------------------------------


@pytest.mark.parametrize("encoding", _ENCODINGS)
@pytest.mark.parametrize("parts", _PARTS.values(), ids=_PARTS)
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("from_logits", [True, False])
def test_categorical_nll_is_that_of_a_loop(from_logits, dtype, parts, encoding):
    outputs = _categorical_outputs(parts, from_logits, dtype)
    y = _ENCODINGS[encoding](_indices(parts))
    nll = Categorical(from_logits).negative_log_likelihood(
        tf.constant(y), outputs
    )
    assert nll.shape == parts[:1], nll.shape
    np.testing.assert_allclose(
        nll,
        _categorical_loop(y, _double(outputs), from_logits),
        **_tolerance(dtype),
    )


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "float32"])
def test_class_indices_may_have_any_dtype(dtype):
    outputs = _categorical_outputs((4, 3), True, "float64")
    index = _indices((4, 3))
    for y in (index, index[..., None]):
        np.testing.assert_allclose(
            Categorical().negative_log_likelihood(
                tf.constant(y.astype(dtype)), outputs
            ),
            _categorical_loop(index, outputs.numpy(), True),
            rtol=1e-12,
        )


def test_column_of_labels_of_a_single_class_is_no_probability():
    nll = Categorical(from_logits=False).negative_log_likelihood(
        tf.constant([[0], [0]]), tf.constant([[1.0], [0.25]])
    )
    np.testing.assert_allclose(nll, [0, math.log(4)], rtol=1e-6)


@pytest.mark.parametrize("encoding", _ENCODINGS)
@pytest.mark.parametrize("parts", _PARTS.values(), ids=_PARTS)
@pytest.mark.parametrize("from_logits", [True, False])
def test_categorical_nll_adds_up_keras_losses(from_logits, parts, encoding):
    outputs = _categorical_outputs(parts, from_logits, "float32")
    y = tf.constant(_ENCODINGS[encoding](_indices(parts)))
    loss = (
        keras.losses.CategoricalCrossentropy
        if encoding in ("one_hot", "soft")
        else keras.losses.SparseCategoricalCrossentropy
    )(from_logits=from_logits, reduction="none")
    expected = loss(y, outputs).numpy()
    assert expected.shape == parts, expected.shape
    nll = likelihoods.get(loss).negative_log_likelihood(y, outputs)
    np.testing.assert_allclose(
        nll, expected.reshape(parts[0], -1).sum(axis=1), rtol=1e-5
    )


@pytest.mark.parametrize(
    "shape", [(6,), (6, 1), (6, 4), (4, 3, 1), (3, 2, 2, 2)], ids=str
)
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("from_logits", [True, False])
def test_bernoulli_nll_is_that_of_a_loop(from_logits, dtype, shape):
    outputs = _bernoulli_outputs(shape, from_logits, dtype)
    soft = _rng(5).random(shape)
    for y in (soft, soft < 0.5, (soft < 0.5).astype("int64")):
        nll = Bernoulli(from_logits).negative_log_likelihood(
            tf.constant(y), outputs
        )
        assert nll.shape == shape[:1], nll.shape
        # Single precision knows 1 - p only to 6e-8.
        np.testing.assert_allclose(
            nll,
            _bernoulli_loop(y.astype("float64"), _double(outputs), from_logits),
            rtol=1e-12 if dtype == "float64" else 1e-5,
            err_msg=f"with {y.dtype} labels",
        )


@pytest.mark.parametrize("shape", [(6, 1), (6, 4), (4, 3, 2)], ids=str)
@pytest.mark.parametrize("from_logits", [True, False])
def test_bernoulli_nll_adds_up_keras_losses(from_logits, shape):
    outputs = _bernoulli_outputs(shape, from_logits, "float32")
    y = tf.constant(_rng(6).integers(0, 2, shape))
    loss = keras.losses.BinaryCrossentropy(from_logits, reduction="none")
    # Keras takes the mean over the last axis.
    expected = shape[-1] * loss(y, outputs).numpy()
    nll = likelihoods.get(loss).negative_log_likelihood(y, outputs)
    np.testing.assert_allclose(
        nll, expected.reshape(shape[0], -1).sum(axis=1), rtol=1e-5
    )


@pytest.mark.parametrize("from_logits", [True, False])
def test_binary_labels_may_lack_the_last_axis(from_logits):
    outputs = _bernoulli_outputs((6, 1), from_logits, "float64")
    y = _rng(7).integers(0, 2, 6)
    likelihood = Bernoulli(from_logits)
    np.testing.assert_array_equal(
        likelihood.negative_log_likelihood(tf.constant(y), outputs),
        likelihood.negative_log_likelihood(tf.constant(y[:, None]), outputs),
    )


@pytest.mark.parametrize("stddev", _STDDEVS)
@pytest.mark.parametrize("shape", [(6,), (6, 1), (4, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", _DTYPES)
def test_gaussian_nll_is_minus_the_log_density(dtype, shape, stddev):
    outputs = tf.cast(_rng(8).normal(size=shape), dtype)
    y = _rng(9).normal(size=shape)
    nll = Gaussian(stddev).negative_log_likelihood(tf.constant(y), outputs)
    assert nll.shape == shape[:1], nll.shape
    np.testing.assert_allclose(
        nll,
        _gaussian_loop(y, _double(outputs), stddev),
        rtol=1e-12 if dtype == "float64" else 1e-5,
    )


@pytest.mark.parametrize("stddev", _STDDEVS)
@pytest.mark.parametrize("shape", [(6, 1), (4, 3, 2)], ids=str)
def test_gaussian_nll_is_half_the_squared_error_and_a_constant(shape, stddev):
    outputs = tf.constant(_rng(8).normal(size=shape))
    y = tf.constant(_rng(9).normal(size=shape))
    squares = keras.losses.MeanSquaredError(reduction="none", dtype="float64")
    errors = shape[-1] * squares(y, outputs).numpy()
    errors = errors.reshape(shape[0], -1).sum(axis=1)
    constant = np.log(stddev * np.sqrt(2 * np.pi)) * np.prod(shape[1:])
    np.testing.assert_allclose(
        Gaussian(stddev).negative_log_likelihood(y, outputs),
        errors / (2 * stddev**2) + constant,
        rtol=1e-12,
    )


_CASES = {
    "categorical": (Categorical(), (4, 3, _CLASSES)),
    "categorical_p": (Categorical(from_logits=False), (4, 3, _CLASSES)),
    "bernoulli": (Bernoulli(), (4, 3, 2)),
    "bernoulli_p": (Bernoulli(from_logits=False), (4, 3, 2)),
    "gaussian": (Gaussian(0.7), (4, 3, 2)),
}


def _case(name, dtype="float32", shape=None):
    """Returns a likelihood, outputs that it takes, and labels."""
    likelihood, default = _CASES[name]
    shape = shape or default
    if isinstance(likelihood, Categorical):
        outputs = _categorical_outputs(
            shape[:-1], likelihood.from_logits, dtype, shape[-1]
        )
        return likelihood, outputs, tf.constant(_indices(shape[:-1]))
    if isinstance(likelihood, Bernoulli):
        outputs = _bernoulli_outputs(shape, likelihood.from_logits, dtype)
        return likelihood, outputs, tf.constant(_indices(shape, 2))
    outputs = tf.cast(_rng(8).normal(size=shape), dtype)
    return likelihood, outputs, tf.constant(_rng(9).normal(size=shape))


@pytest.mark.parametrize("name", _CASES)
@pytest.mark.parametrize("dtype", _DTYPES)
def test_nll_is_in_single_precision_or_better(name, dtype):
    likelihood, outputs, y = _case(name, dtype)
    nll = likelihood.negative_log_likelihood(y, outputs)
    expected = "float64" if dtype == "float64" else "float32"
    assert nll.dtype.name == expected, f"{nll.dtype.name} from {dtype}"
    assert dtypes.at_least_single(dtype).name == expected


@pytest.mark.parametrize("name", _CASES)
def test_parts_of_an_example_add_up(name):
    likelihood, outputs, y = _case(name)
    whole = likelihood.negative_log_likelihood(y, outputs)
    parts = likelihood.log_probability(y, outputs)
    assert parts.shape[:2] == (4, 3), parts.shape
    by_token = [
        likelihood.negative_log_likelihood(y[:, t], outputs[:, t])
        for t in range(3)
    ]
    np.testing.assert_allclose(whole, np.sum(by_token, axis=0), rtol=1e-5)
    np.testing.assert_allclose(
        whole, -np.sum(parts, axis=tuple(range(1, parts.ndim))), rtol=1e-5
    )


@pytest.mark.parametrize("name", _CASES)
def test_examples_do_not_see_each_other(name):
    likelihood, outputs, y = _case(name)
    whole = likelihood.negative_log_likelihood(y, outputs)
    one_by_one = [
        likelihood.negative_log_likelihood(y[i : i + 1], outputs[i : i + 1])
        for i in range(4)
    ]
    np.testing.assert_allclose(whole, np.concatenate(one_by_one), rtol=1e-6)


@pytest.mark.parametrize("name", _CASES)
@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_nll_does_not_depend_on_compilation(name, mode):
    likelihood, outputs, y = _case(name)
    mask = tf.constant(_rng(10).random((4, 3)) < 0.5)
    signature = [
        tf.TensorSpec([None, *x.shape[1:]], x.dtype) for x in (y, outputs, mask)
    ]
    compiled = _compiled(likelihood.negative_log_likelihood, mode, signature)
    for size in (4, 2):
        arguments = (y[:size], outputs[:size], mask[:size])
        np.testing.assert_allclose(
            compiled(*arguments),
            likelihood.negative_log_likelihood(*arguments),
            rtol=1e-5,
        )


# --- masks --------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bool", "float32", "int32"])
@pytest.mark.parametrize("name", _CASES)
def test_hidden_tokens_add_nothing(name, dtype):
    likelihood, outputs, y = _case(name, "float64")
    mask = np.array([[1, 1, 0], [0, 1, 0], [1, 1, 1], [0, 0, 0]])
    nll = likelihood.negative_log_likelihood(
        y, outputs, tf.constant(mask.astype(dtype))
    )
    loop, argument = {
        Categorical: (_categorical_loop, "from_logits"),
        Bernoulli: (_bernoulli_loop, "from_logits"),
        Gaussian: (_gaussian_loop, "stddev"),
    }[type(likelihood)]
    expected = loop(
        y.numpy(), outputs.numpy(), getattr(likelihood, argument), mask
    )
    assert expected[3] == 0
    np.testing.assert_allclose(nll, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("parts", "mask_shape"),
    [((6,), (6,)), ((3, 2, 2), (3, 2, 2)), ((3, 2, 2), (3, 2)), ((4, 3), (4,))],
    ids=str,
)
def test_mask_may_have_fewer_axes_than_the_parts(parts, mask_shape):
    outputs = _categorical_outputs(parts, True, "float64")
    y = _indices(parts)
    mask = _rng(11).random(mask_shape) < 0.5
    assert 0 < mask.sum() < mask.size
    np.testing.assert_allclose(
        Categorical().negative_log_likelihood(
            tf.constant(y), outputs, tf.constant(mask)
        ),
        _categorical_loop(y, outputs.numpy(), True, mask),
        rtol=1e-12,
    )


@pytest.mark.parametrize("name", _CASES)
def test_hidden_tokens_get_no_gradient(name):
    likelihood, outputs, y = _case(name)
    mask = np.array([[1, 1, 0], [0, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        nll = likelihood.negative_log_likelihood(y, outputs, tf.constant(mask))
    gradient = tape.gradient(nll, outputs).numpy()
    assert np.all(gradient[~mask] == 0), gradient[~mask]
    assert np.all(np.any(gradient[mask] != 0, axis=-1)), gradient[mask]


def test_labels_of_hidden_tokens_do_not_matter():
    outputs = _categorical_outputs((4, 3), True, "float32")
    mask = np.array([[1, 1, 0], [0, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
    y = _indices((4, 3))
    padded = np.where(mask, y, -1)
    results = [
        Categorical().negative_log_likelihood(
            tf.constant(labels), outputs, tf.constant(mask)
        )
        for labels in (y, padded)
    ]
    np.testing.assert_array_equal(*results)


# --- gradients ----------------------------------------------------------


def _gradient(function, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    return tape.gradient(value, x)


def _finite_difference(function, x, step=1e-6):
    """Returns the gradient of the sum of a function, one entry at a time."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        values = []
        for sign in (1, -1):
            moved = x.copy()
            moved[index] += sign * step
            values.append(np.sum(function(tf.constant(moved))))
        gradient[index] = (values[0] - values[1]) / (2 * step)
    return gradient


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("parts", _PARTS.values(), ids=_PARTS)
@pytest.mark.parametrize("encoding", ["sparse", "one_hot", "soft"])
def test_categorical_gradient_is_p_minus_the_label(encoding, parts, mode):
    logits = _categorical_outputs(parts, True, "float64")
    index = _indices(parts)
    y = _ENCODINGS[encoding](index)
    gradient = _compiled(
        lambda logits: _gradient(
            lambda z: Categorical().negative_log_likelihood(tf.constant(y), z),
            logits,
        ),
        mode,
    )(logits)
    exponentials = np.exp(logits.numpy())
    p = exponentials / exponentials.sum(axis=-1, keepdims=True)
    dense = y if encoding == "soft" else np.eye(_CLASSES)[index]
    np.testing.assert_allclose(gradient, p - dense, atol=1e-12)


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("mode", _MODES)
def test_bernoulli_gradient_is_p_minus_the_label(from_logits, mode):
    logits = tf.constant(2 * _rng(2).normal(size=(4, 3)))
    y = _rng(5).random((4, 3))
    link = tf.identity if from_logits else tf.sigmoid
    gradient = _compiled(
        lambda logits: _gradient(
            lambda z: Bernoulli(from_logits).negative_log_likelihood(
                tf.constant(y), link(z)
            ),
            logits,
        ),
        mode,
    )(logits)
    p = 1 / (1 + np.exp(-logits.numpy()))
    np.testing.assert_allclose(gradient, p - y, atol=1e-12)


@pytest.mark.parametrize("stddev", _STDDEVS)
def test_gaussian_gradient_is_the_scaled_error(stddev):
    outputs, y = _rng(8).normal(size=(4, 3)), _rng(9).normal(size=(4, 3))
    gradient = _gradient(
        lambda f: Gaussian(stddev).negative_log_likelihood(tf.constant(y), f),
        tf.constant(outputs),
    )
    np.testing.assert_allclose(gradient, (outputs - y) / stddev**2, rtol=1e-12)


@pytest.mark.parametrize("name", _CASES)
def test_gradient_is_that_of_finite_differences(name):
    likelihood, outputs, y = _case(name, "float64")

    def nll(outputs):
        return likelihood.negative_log_likelihood(y, outputs)

    np.testing.assert_allclose(
        _gradient(nll, outputs),
        _finite_difference(nll, outputs.numpy()),
        rtol=1e-6,
        atol=1e-7,
    )


@pytest.mark.parametrize("name", _CASES)
def test_second_derivative_is_that_of_finite_differences(name):
    likelihood, outputs, y = _case(name, "float64")
    weights = tf.constant(_rng(12).normal(size=outputs.shape))

    def along_weights(outputs):
        gradient = _gradient(
            lambda z: likelihood.negative_log_likelihood(y, z), outputs
        )
        return tf.reduce_sum(gradient * weights)

    np.testing.assert_allclose(
        _gradient(along_weights, outputs),
        _finite_difference(along_weights, outputs.numpy()),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("exponent", [-12, -30, -36])
def test_gradient_reaches_an_improbable_label_through_a_softmax(
    exponent, dtype, mode
):
    # p of the last class is 10**exponent, and each class is the label once.
    row = [0.0, -1.5, exponent * math.log(10)]
    logits = tf.constant([row] * 3, dtype)
    likelihood = Categorical(from_logits=False)

    def nll(logits):
        return likelihood.negative_log_likelihood(
            tf.range(3), tf.nn.softmax(logits)
        )

    gradient = _compiled(lambda z: _gradient(nll, z), mode)(logits)
    exponentials = np.exp(row)
    p = exponentials / exponentials.sum()
    np.testing.assert_allclose(gradient, p - np.eye(3), atol=1e-6)
    assert abs(p[2] / 10**exponent - 0.8) < 0.05, "the class is improbable"
    np.testing.assert_allclose(nll(logits), -np.log(p), rtol=1e-6)


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("exponent", [-12, -30, -36])
def test_gradient_reaches_an_improbable_yes_through_a_sigmoid(
    exponent, dtype, mode
):
    logit = exponent * math.log(10)
    likelihood = Bernoulli(from_logits=False)

    def nll(logits):
        return likelihood.negative_log_likelihood(
            tf.constant([1.0, 0.0]), tf.sigmoid(logits)
        )

    logits = tf.constant([logit] * 2, dtype)
    gradient = _compiled(lambda z: _gradient(nll, z), mode)(logits)
    p = 1 / (1 + math.exp(-logit))
    np.testing.assert_allclose(gradient, [p - 1, p], atol=1e-6)
    np.testing.assert_allclose(nll(logits)[0], -math.log(p), rtol=1e-6)


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("name", ["categorical_p", "bernoulli_p"])
def test_probabilities_of_zero_and_one_stay_finite(name, dtype, mode):
    likelihood, _ = _CASES[name]
    outputs = tf.constant([[1.0, 0.0], [0.0, 1.0]], dtype)
    for y in (tf.constant([[1, 0], [0, 1]]), tf.constant([[0, 1], [1, 0]])):
        nll, gradient = _compiled(
            lambda p, y=y: (
                likelihood.negative_log_likelihood(y, p),
                _gradient(
                    lambda p: likelihood.negative_log_likelihood(y, p), p
                ),
            ),
            mode,
        )(outputs)
        assert np.isfinite(nll).all(), nll
        assert np.isfinite(_double(gradient)).all(), gradient
        agrees = y[0, 0] == 1
        expected = nll < 1e-6 if agrees else nll > 80
        assert np.all(expected), f"{nll} for labels {y}"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["categorical", "bernoulli"])
def test_large_logits_stay_exact(name, dtype):
    likelihood, _ = _CASES[name]
    outputs = tf.constant([[1000.0, -1000.0], [-1000.0, 1000.0]], dtype)
    y = tf.constant([[0.0, 1.0], [0.0, 1.0]])
    # Both are wrong at first, and both right afterwards.
    expected = [2000, 0]
    nll = likelihood.negative_log_likelihood(y, outputs)
    np.testing.assert_allclose(nll, expected, atol=1e-6)
    gradient = _gradient(
        lambda z: likelihood.negative_log_likelihood(y, z), outputs
    )
    np.testing.assert_allclose(gradient, [[1.0, -1.0], [0.0, 0.0]], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_class_ruled_out_by_the_model_leaves_the_others_as_in_keras(dtype):
    # What masking with -1e9 comes to in float16.
    logits = tf.constant([[1.0, 2.0, -np.inf]], dtype)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    y = tf.constant([0])
    expected = loss(y, logits)
    assert np.isfinite(expected)
    np.testing.assert_allclose(
        Categorical().negative_log_likelihood(y, logits), [expected], rtol=1e-6
    )


# --- drawing from the model ---------------------------------------------

_DRAWS = 20_000


def _tiled(outputs, count=_DRAWS):
    """Returns a batch of `count` examples with the same outputs."""
    return tf.tile(outputs[None], [count] + [1] * outputs.shape.rank)


def _assert_mean(values, expected, what, errors=4.0):
    """Compares a mean over the first axis within its standard error."""
    mean = values.mean(axis=0)
    error = values.std(axis=0) / np.sqrt(len(values))
    z = np.abs(mean - expected) / np.maximum(error, 1e-12)
    assert np.all(z < errors), (
        f"{what} is {mean}, expected {expected}: off by {np.max(z):.1f} "
        f"standard errors of {error}"
    )


_P = np.array([0.02, 0.5, 0.13, 0.35])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("from_logits", [True, False])
def test_classes_are_drawn_with_their_probabilities(from_logits, dtype, seed):
    # Softmax does not see the constant.
    outputs = tf.cast(np.log(_P) + 3 if from_logits else _P, dtype)
    p = np.exp(_double(outputs)) if from_logits else _double(outputs)
    p = p / p.sum()
    drawn = Categorical(from_logits).sample(
        _tiled(outputs), random_draws.draw(seed)
    )
    assert drawn.shape == (_DRAWS,), drawn.shape
    assert drawn.dtype.is_integer, drawn.dtype
    _assert_mean(np.eye(4)[drawn], p, "frequency")
    test = stats.chisquare(np.bincount(drawn, minlength=4), p * _DRAWS)
    assert test.pvalue > 1e-3, f"chi-squared p-value {test.pvalue:.2g}"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("from_logits", [True, False])
def test_yes_is_drawn_with_its_probability(from_logits, dtype, seed):
    outputs = np.log(_P / (1 - _P)) if from_logits else _P
    outputs = tf.cast(outputs, dtype)
    p = _double(outputs)
    if from_logits:
        p = 1 / (1 + np.exp(-p))
    drawn = Bernoulli(from_logits).sample(
        _tiled(outputs), random_draws.draw(seed)
    )
    assert drawn.shape == (_DRAWS, 4), drawn.shape
    assert set(np.unique(drawn)) == {0, 1}, np.unique(drawn)
    _assert_mean(_double(drawn), p, "frequency")
    # The outputs of one example are independent of each other.
    products = _double(drawn[:, :3] * drawn[:, 1:])
    _assert_mean(products, p[:3] * p[1:], "frequency of two")


@pytest.mark.parametrize("stddev", _STDDEVS)
@pytest.mark.parametrize("dtype", _DTYPES)
def test_gaussian_draws_are_normal_around_the_outputs(dtype, stddev):
    outputs = tf.constant([-2.0, 0.5], dtype)
    drawn = Gaussian(stddev).sample(_tiled(outputs), random_draws.draw(3))
    assert drawn.shape == (_DRAWS, 2), drawn.shape
    for column, mean in enumerate([-2.0, 0.5]):
        test = stats.kstest(_double(drawn[:, column]), "norm", (mean, stddev))
        assert test.pvalue > 1e-3, f"p-value {test.pvalue:.2g}"
    correlation = np.corrcoef(_double(drawn).T)[0, 1]
    assert abs(correlation) < 4 / np.sqrt(_DRAWS), f"{correlation:.3f}"


@pytest.mark.parametrize("parts", [(2,), (2, 2)], ids=["tokens", "pixels"])
def test_parts_of_an_example_are_drawn_independently(parts):
    p = _rng(13).dirichlet(np.ones(3), size=parts)
    drawn = Categorical(from_logits=False).sample(
        _tiled(tf.constant(p)), random_draws.draw(4)
    )
    assert drawn.shape == (_DRAWS, *parts), drawn.shape
    one_hot = np.eye(3)[drawn].reshape(_DRAWS, -1, 3)
    p = p.reshape(-1, 3)
    for part in range(len(p)):
        _assert_mean(one_hot[:, part], p[part], f"frequency in {part}")
    pairs = np.einsum("na,nb->nab", one_hot[:, 0], one_hot[:, -1])
    _assert_mean(pairs, np.outer(p[0], p[-1]), "frequency of two")


def test_consecutive_examples_are_drawn_independently():
    drawn = Categorical(from_logits=False).sample(
        _tiled(tf.constant(_P)), random_draws.draw(5)
    )
    one_hot = np.eye(4)[drawn]
    pairs = np.einsum("na,nb->nab", one_hot[:-1], one_hot[1:])
    _assert_mean(pairs, np.outer(_P, _P), "frequency of two")


@pytest.mark.parametrize("name", ["categorical_p", "bernoulli_p"])
def test_sure_labels_are_always_drawn(name):
    likelihood, _ = _CASES[name]
    outputs = tf.constant([[1.0, 0.0], [0.0, 1.0]] * 5000)
    drawn = likelihood.sample(outputs, random_draws.draw(6)).numpy()
    expected = outputs.numpy()
    if isinstance(likelihood, Categorical):
        expected = expected.argmax(axis=-1)
    np.testing.assert_array_equal(drawn, expected)


@pytest.mark.parametrize(
    "name",
    ["categorical_p", "bernoulli_p"],
)
def test_sure_labels_are_drawn_whatever_the_draw(monkeypatch, name):
    # The first and the last number that `random_draws.uniform` returns.
    first, last = 0.0, 1 - 2.0**-24
    draws = tf.constant(
        [[first, first], [first, last], [last, first], [last, last]], tf.float64
    )
    monkeypatch.setattr(
        random_draws,
        "uniform",
        lambda shape, seed, dtype=tf.float32: tf.cast(draws, dtype),
    )
    likelihood, _ = _CASES[name]
    for sure in (0, 1):
        outputs = tf.one_hot([sure] * 4, 2)
        expected = outputs.numpy()
        if isinstance(likelihood, Categorical):
            expected = expected.argmax(axis=-1)
        drawn = likelihood.sample(outputs, random_draws.draw(0)).numpy()
        np.testing.assert_array_equal(drawn, expected, f"{sure} is sure")


# How labels are drawn; a likelihood without uniform labels is not in the list.
_METHODS = [(name, "sample") for name in _CASES]
_METHODS += [(name, "uniform") for name in _CASES if name != "gaussian"]


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.parametrize(("name", "method"), _METHODS)
def test_draws_do_not_depend_on_compilation(name, method, mode, dtype):
    likelihood, outputs, _ = _case(name, dtype, (64, 3, 4))
    function = getattr(likelihood, method)
    signature = [
        tf.TensorSpec([None, 3, 4], dtype),
        tf.TensorSpec([2], tf.int64),
    ]
    compiled = _compiled(function, mode, signature)
    for seed in (7, 8):
        actual = compiled(outputs, random_draws.draw(seed))
        expected = function(outputs, random_draws.draw(seed))
        assert actual.dtype == expected.dtype
        np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.parametrize(("name", "method"), _METHODS)
def test_draws_behind_a_layer_do_not_depend_on_compilation(name, method, mode):
    likelihood, _ = _CASES[name]
    activation = {
        "categorical_p": "softmax",
        "bernoulli_p": "sigmoid",
    }.get(name)
    keras.utils.set_random_seed(14)
    layer = keras.layers.Dense(4, activation=activation)
    layer.build((None, 5))

    def draw(x, seed):
        return getattr(likelihood, method)(layer(x), seed)

    signature = [tf.TensorSpec([None, 5]), tf.TensorSpec([2], tf.int64)]
    compiled = _compiled(draw, mode, signature)
    x = tf.constant(_rng(15).normal(size=(64, 5)), tf.float32)
    for size in (64, 10):
        np.testing.assert_allclose(
            compiled(x[:size], random_draws.draw(9)),
            draw(x[:size], random_draws.draw(9)),
            atol=1e-5,
        )


@pytest.mark.parametrize(("name", "method"), _METHODS)
def test_same_seed_same_labels_and_another_seed_others(name, method):
    likelihood, outputs, _ = _case(name, shape=(64, 3, 4))
    draws = [
        getattr(likelihood, method)(outputs, random_draws.draw(seed)).numpy()
        for seed in (1, 1, 2, 3)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    for other in draws[2:]:
        share = np.mean(draws[0] == other)
        assert share < 0.9, f"{share:.0%} of the labels are the same"


@pytest.mark.parametrize(("name", "method"), _METHODS)
def test_likelihood_takes_the_labels_it_draws(name, method):
    likelihood, outputs, _ = _case(name)
    y = getattr(likelihood, method)(outputs, random_draws.draw(0))
    nll = likelihood.negative_log_likelihood(y, outputs)
    assert nll.shape == outputs.shape[:1], nll.shape
    assert np.isfinite(nll).all(), nll


@pytest.mark.parametrize(("name", "method"), _METHODS)
def test_no_gradient_flows_through_the_draw(name, method):
    likelihood, outputs, _ = _case(name)
    draw = getattr(likelihood, method)
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        drawn = tf.cast(draw(outputs, random_draws.draw(0)), tf.float32)
    assert tape.gradient(drawn, outputs) is None
    # The labels count as constants where outputs occur in both places.
    drawn = draw(outputs, random_draws.draw(0))
    np.testing.assert_array_equal(
        _gradient(
            lambda z: likelihood.negative_log_likelihood(
                draw(z, random_draws.draw(0)), z
            ),
            outputs,
        ),
        _gradient(
            lambda z: likelihood.negative_log_likelihood(drawn, z), outputs
        ),
    )


# --- the score and the Fisher of the outputs ----------------------------


def _categorical_fisher(z):
    p = np.exp(z) / np.exp(z).sum()
    return np.diag(p) - np.outer(p, p)


def _bernoulli_fisher(z):
    p = 1 / (1 + np.exp(-z))
    return np.diag(p * (1 - p))


_FISHER = {
    "categorical": (Categorical(), tf.identity, _categorical_fisher),
    "categorical_p": (Categorical(False), tf.nn.softmax, _categorical_fisher),
    "bernoulli": (Bernoulli(), tf.identity, _bernoulli_fisher),
    "bernoulli_p": (Bernoulli(False), tf.sigmoid, _bernoulli_fisher),
    "gaussian": (
        Gaussian(0.7),
        tf.identity,
        lambda z: np.eye(len(z)) / 0.7**2,
    ),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mode", ["eager", "xla"])
@pytest.mark.parametrize("name", _FISHER)
def test_score_of_sampled_labels_has_mean_zero_and_the_fisher_as_covariance(
    name, mode, seed
):
    likelihood, link, fisher = _FISHER[name]
    z = np.array([0.3, -1.2, 1.4])
    logits = _tiled(tf.constant(z))
    y = likelihood.sample(link(logits), random_draws.draw(seed))
    score = _compiled(
        lambda logits: _gradient(
            lambda z: likelihood.negative_log_likelihood(y, link(z)), logits
        ),
        mode,
    )(logits).numpy()
    _assert_mean(score, 0, "mean score")
    squares = np.einsum("ni,nj->nij", score, score)
    _assert_mean(squares, fisher(z), "E[score score^T]")


def test_uniform_labels_give_another_second_moment_than_the_fisher():
    # The test above can tell: its labels come from the model.
    z = np.array([0.3, -1.2, 1.4])
    logits = _tiled(tf.constant(z))
    y = Categorical().uniform(logits, random_draws.draw(0))
    score = _gradient(
        lambda z: Categorical().negative_log_likelihood(y, z), logits
    ).numpy()
    squares = np.einsum("ni,nj->nij", score, score)
    with pytest.raises(AssertionError):
        _assert_mean(squares, _categorical_fisher(z), "E[score score^T]")
    p = np.exp(z) / np.exp(z).sum()
    _assert_mean(score, p - 1 / 3, "mean score")


@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.parametrize("name", _FISHER)
def test_fisher_factors_are_roots_of_the_fisher_information(name, mode):
    """At the logits, through the link, also of two parts of an example."""
    likelihood, link, fisher = _FISHER[name]
    z = np.array([[0.3, -1.2, 1.4], [-2.0, 0.0, 3.0]])

    def factors(logits):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(logits)
            outputs = link(logits)
        count, factor = likelihood.fisher_factors(outputs)
        return tf.stack(
            [
                tape.gradient(outputs, logits, output_gradients=factor(k))
                for k in range(count)
            ]
        )

    found = _compiled(factors, mode)(tf.constant(z[None])).numpy()
    per_part = 2 if "categorical" in name else 3
    assert len(found) == 2 * per_part
    found = found.reshape(len(found), 6)
    expected = np.zeros([6, 6])
    expected[:3, :3], expected[3:, 3:] = fisher(z[0]), fisher(z[1])
    np.testing.assert_allclose(found.T @ found, expected, atol=1e-12)


@pytest.mark.parametrize("from_logits", [True, False])
def test_factors_of_certain_answers_are_finite(from_logits):
    outputs = tf.constant([[200.0, -200.0, -200.0], [-200.0, -200.0, 200.0]])
    if not from_logits:
        outputs = tf.nn.softmax(outputs)
    for likelihood in (Categorical(from_logits), Bernoulli(from_logits)):
        count, factor = likelihood.fisher_factors(outputs)
        for k in range(count):
            assert np.isfinite(factor(k)).all(), (likelihood, k)


def test_factors_of_masked_parts_are_zero():
    outputs = tf.ones([1, 2, 3])
    mask = tf.constant([[True, False]])
    count, factor = Categorical().fisher_factors(outputs, mask)
    factors = np.stack([factor(k) for k in range(count)])
    assert np.abs(factors[:, :, 0]).max() > 0
    assert np.abs(factors[:, :, 1]).max() == 0


def test_a_likelihood_of_ones_own_says_that_it_has_no_factors():
    class Own(likelihoods.Likelihood):
        pass

    with pytest.raises(NotImplementedError, match="monte_carlo"):
        Own().fisher_factors(tf.ones([1, 2]))


@pytest.mark.parametrize("name", _FISHER)
def test_score_is_the_derivative_of_weighted_examples(name):
    likelihood, link, _ = _FISHER[name]
    outputs = link(tf.constant([[0.3, -1.2, 1.4], [0.1, 0.2, 0.3]]))
    y = likelihood.sample(outputs, random_draws.draw(1))
    weights = tf.constant([2.0, 0.5])
    expected = _gradient(
        lambda o: weights * likelihood.negative_log_likelihood(y, o), outputs
    )
    score = likelihood.score(y, outputs, weights=weights)
    np.testing.assert_allclose(score, expected, rtol=1e-6)


# --- uniform labels -----------------------------------------------------


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("from_logits", [True, False])
def test_uniform_classes_do_not_depend_on_the_outputs(from_logits, dtype):
    outputs = tf.cast(np.log(_P) if from_logits else _P, dtype)
    drawn = Categorical(from_logits).uniform(
        _tiled(outputs), random_draws.draw(1)
    )
    assert (drawn.shape, drawn.dtype) == ((_DRAWS,), tf.int64), drawn
    counts = np.bincount(drawn, minlength=4)
    assert len(counts) == 4, counts
    test = stats.chisquare(counts)
    assert test.pvalue > 1e-3, f"chi-squared p-value {test.pvalue:.2g}"


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("from_logits", [True, False])
def test_uniform_answers_do_not_depend_on_the_outputs(from_logits, dtype):
    outputs = tf.cast(np.log(_P / (1 - _P)) if from_logits else _P, dtype)
    drawn = Bernoulli(from_logits).uniform(
        _tiled(outputs), random_draws.draw(1)
    )
    assert drawn.shape == (_DRAWS, 4), drawn.shape
    assert set(np.unique(drawn)) == {0, 1}, np.unique(drawn)
    _assert_mean(_double(drawn), 0.5, "frequency")
    _assert_mean(_double(drawn[:, 1:] * drawn[:, :-1]), 0.25, "of two")


def test_uniform_labels_have_the_shape_of_the_parts():
    for parts in _PARTS.values():
        outputs = _categorical_outputs(parts, True, "float32")
        y = Categorical().uniform(outputs, random_draws.draw(0))
        assert y.shape == parts, y.shape


def test_gaussian_has_no_uniform_labels():
    with pytest.raises(ValueError, match="no uniform labels"):
        Gaussian().uniform(tf.zeros([3, 1]), random_draws.draw(0))


# --- check --------------------------------------------------------------


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("name", _CASES)
def test_check_passes_what_the_likelihood_expects(name, dtype):
    for parts in _PARTS.values():
        for classes in (2, 100):
            likelihood, outputs, _ = _case(name, dtype, (*parts, classes))
            assert likelihood.check(outputs) is None


@pytest.mark.parametrize("name", ["categorical_p", "bernoulli_p"])
def test_check_passes_an_empty_batch_and_an_array(name):
    likelihood, _ = _CASES[name]
    assert likelihood.check(tf.zeros([0, 3])) is None
    assert likelihood.check(np.array([[0.25, 0.75]])) is None


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize(
    ("likelihood", "outputs", "received"),
    [
        (Categorical(False), [[1.5, -0.5]], ["-0.5 to 1.5", "sum to 1 "]),
        (Categorical(False), [[0.5, 0.25]], ["0.25 to 0.5", "sum to 0.75"]),
        (Categorical(False), [[0.0, 0.0]], ["0 to 0", "sum to 0"]),
        (Categorical(False), [[2.0, 3.0]], ["2 to 3", "sum to 5"]),
        (Bernoulli(False), [[0.5], [1.5]], ["0.5 to 1.5"]),
        (Bernoulli(False), [[0.5], [-2.0]], ["-2 to 0.5"]),
    ],
    ids=str,
)
def test_check_names_what_is_no_probability(
    likelihood, outputs, received, dtype
):
    with pytest.raises(ValueError) as error:
        likelihood.check(tf.constant(outputs, dtype))
    message = str(error.value)
    activation = "softmax" if isinstance(likelihood, Categorical) else "sigmoid"
    for part in [*received, "from_logits=True", activation]:
        assert part in message, f"{part!r} is not in {message!r}"


@pytest.mark.parametrize("parts", _PARTS.values(), ids=_PARTS)
def test_check_finds_a_single_wrong_part(parts):
    outputs = _categorical_outputs(parts, False, "float64").numpy()
    outputs[(-1,) * len(parts)] *= 1.1
    with pytest.raises(ValueError, match="expects probabilities"):
        Categorical(from_logits=False).check(outputs)


@pytest.mark.parametrize(
    "likelihood", [Categorical(), Bernoulli(), Gaussian()], ids=str
)
def test_logits_and_means_may_be_anything(likelihood):
    assert likelihood.check(tf.constant([[-100.0, 3.0], [0.0, 7.0]])) is None


# --- get ----------------------------------------------------------------


class _OwnBinaryCrossentropy(keras.losses.BinaryCrossentropy):
    def __init__(self):
        super().__init__(from_logits=True, name="own")


class _Poisson(likelihoods.Likelihood):
    def log_probability(self, y, outputs):
        y = tf.cast(y, outputs.dtype)
        return y * outputs - tf.exp(outputs) - tf.math.lgamma(y + 1)


_SPARSE = keras.losses.SparseCategoricalCrossentropy
_DENSE = keras.losses.CategoricalCrossentropy
_BINARY = keras.losses.BinaryCrossentropy
_SQUARED = keras.losses.MeanSquaredError

_IDENTIFIERS = [
    # Likelihoods.
    (Categorical(False), Categorical(False)),
    (Gaussian(2.0), Gaussian(2.0)),
    (Categorical, Categorical(True)),
    (Bernoulli, Bernoulli(True)),
    (Gaussian, Gaussian(1.0)),
    ("categorical", Categorical(True)),
    ("Bernoulli", Bernoulli(True)),
    ("GAUSSIAN", Gaussian(1.0)),
    (keras.saving.serialize_keras_object(Gaussian(3.0)), Gaussian(3.0)),
    (
        keras.saving.serialize_keras_object(Bernoulli(False)),
        Bernoulli(False),
    ),
    # Instances of losses.
    (_SPARSE(), Categorical(False)),
    (_SPARSE(from_logits=True), Categorical(True)),
    (_DENSE(), Categorical(False)),
    (_DENSE(from_logits=True, label_smoothing=0.1), Categorical(True)),
    (_BINARY(), Bernoulli(False)),
    (_BINARY(from_logits=True), Bernoulli(True)),
    (_SQUARED(), Gaussian(1.0)),
    (_OwnBinaryCrossentropy(), Bernoulli(True)),
    # Their classes.
    (_SPARSE, Categorical(False)),
    (_DENSE, Categorical(False)),
    (_BINARY, Bernoulli(False)),
    (_SQUARED, Gaussian(1.0)),
    (_OwnBinaryCrossentropy, Bernoulli(True)),
    # Functions.
    (keras.losses.sparse_categorical_crossentropy, Categorical(False)),
    (keras.losses.categorical_crossentropy, Categorical(False)),
    (keras.losses.binary_crossentropy, Bernoulli(False)),
    (keras.losses.mean_squared_error, Gaussian(1.0)),
    # Names.
    ("SparseCategoricalCrossentropy", Categorical(False)),
    ("sparse_categorical_crossentropy", Categorical(False)),
    ("CategoricalCrossentropy", Categorical(False)),
    ("categorical_crossentropy", Categorical(False)),
    ("BinaryCrossentropy", Bernoulli(False)),
    ("binary_crossentropy", Bernoulli(False)),
    ("MeanSquaredError", Gaussian(1.0)),
    ("mean_squared_error", Gaussian(1.0)),
    ("mse", Gaussian(1.0)),
    # Configs.
    (keras.losses.serialize(_SPARSE(from_logits=True)), Categorical(True)),
    (keras.losses.serialize(_DENSE()), Categorical(False)),
    (keras.losses.serialize(_BINARY(from_logits=True)), Bernoulli(True)),
    (keras.losses.serialize(_SQUARED()), Gaussian(1.0)),
    (
        keras.losses.serialize(keras.losses.binary_crossentropy),
        Bernoulli(False),
    ),
]
# One output, compiled by position or by name.
_IDENTIFIERS += [
    ([_BINARY(from_logits=True)], Bernoulli(True)),
    (["mse"], Gaussian(1.0)),
    (("categorical",), Categorical(True)),
    ({"head": _SPARSE(from_logits=True)}, Categorical(True)),
    ({"head": "binary_crossentropy"}, Bernoulli(False)),
    ({"head": [_DENSE]}, Categorical(False)),
]


@pytest.mark.parametrize(
    ("identifier", "expected"),
    _IDENTIFIERS,
    ids=[f"{n}-{expected}" for n, (_, expected) in enumerate(_IDENTIFIERS)],
)
def test_get_finds_the_likelihood(identifier, expected):
    found = likelihoods.get(identifier)
    what = f"{found} for {identifier!r}, expected {expected}"
    assert type(found) is type(expected), what
    assert found.get_config() == expected.get_config(), what


def test_get_returns_instances_as_they_are():
    for likelihood in (Categorical(False), Gaussian(0.1), _Poisson()):
        assert likelihoods.get(likelihood) is likelihood
        assert likelihoods.get([likelihood]) is likelihood


def _own_loss(y_true, y_pred):
    return keras.ops.mean(y_pred)


@pytest.mark.parametrize(
    ("identifier", "received"),
    [
        ("hinge", "hinge"),
        ("no_such_loss", "'no_such_loss'"),
        ("", "''"),
        (keras.losses.Hinge(), "hinge"),
        (keras.losses.Hinge, "hinge"),
        (keras.losses.hinge, "hinge"),
        (keras.losses.serialize(keras.losses.Hinge()), "hinge"),
        (_own_loss, "_own_loss"),
        (object(), "object object at"),
        (None, "None"),
        (3, "3"),
        ([], "[]"),
        ({}, "{}"),
        ({"head": "hinge"}, "hinge"),
        (keras.metrics.MeanSquaredError(), "MeanSquaredError"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_get_names_what_it_does_not_know(identifier, received):
    with pytest.raises(ValueError, match="No likelihood is known") as error:
        likelihoods.get(identifier)
    message = str(error.value)
    got = re.search(r"Received: (.*)\. Known are", message, re.DOTALL)
    assert got, message
    assert received in got[1], f"{received!r} is not in {got[1]!r}"
    for known in ["Crossentropy", "MeanSquaredError", "likelihood="]:
        assert known in message, f"{known!r} is not in {message!r}"


@pytest.mark.parametrize("axis", [1, 2, 0])
@pytest.mark.parametrize(
    "loss",
    [_SPARSE, _DENSE, _BINARY],
    ids=lambda loss: loss.__name__,
)
def test_get_refuses_another_axis(loss, axis):
    with pytest.raises(ValueError, match=f"Received: axis={axis}"):
        likelihoods.get(loss(axis=axis))


@pytest.mark.parametrize(
    "identifier",
    [
        {"class_name": "NoSuchLikelihood", "config": {}},
        {"class_name": "NoSuchLikelihood"},
    ],
    ids=["without_class", "without_config"],
)
def test_get_names_a_config_it_cannot_read(identifier):
    with pytest.raises(ValueError, match="NoSuchLikelihood"):
        likelihoods.get(identifier)


# --- configuration ------------------------------------------------------

_INSTANCES = [
    Categorical(True),
    Categorical(False),
    Bernoulli(True),
    Bernoulli(False),
    Gaussian(1.0),
    Gaussian(0.25),
]


@pytest.mark.parametrize("likelihood", _INSTANCES, ids=str)
@pytest.mark.parametrize(
    "copy",
    [
        lambda x: type(x).from_config(x.get_config()),
        lambda x: keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(x)
        ),
        lambda x: likelihoods.get(keras.saving.serialize_keras_object(x)),
        lambda x: likelihoods.get(
            json.loads(json.dumps(keras.saving.serialize_keras_object(x)))
        ),
    ],
    ids=["config", "keras", "get", "json"],
)
def test_configuration_round_trips(likelihood, copy):
    restored = copy(likelihood)
    assert restored is not likelihood
    assert type(restored) is type(likelihood)
    assert vars(restored) == vars(likelihood), f"{restored} from {likelihood}"


@pytest.mark.parametrize("likelihood", _INSTANCES, ids=str)
def test_registered_name_belongs_to_the_package(likelihood):
    config = keras.saving.serialize_keras_object(likelihood)
    name = f"keras_fisher>{type(likelihood).__name__}"
    assert config["registered_name"] == name, config
    assert config["config"] == likelihood.get_config(), config


def test_defaults_are_logits_and_unit_deviation():
    assert Categorical().get_config() == {"from_logits": True}
    assert Bernoulli().get_config() == {"from_logits": True}
    assert Gaussian().get_config() == {"stddev": 1.0}


@pytest.mark.parametrize(
    ("likelihood", "expected"),
    [
        (Categorical(False), "Categorical(from_logits=False)"),
        (Gaussian(0.25), "Gaussian(stddev=0.25)"),
        (_Poisson(), "_Poisson()"),
    ],
)
def test_representation_tells_the_arguments(likelihood, expected):
    assert repr(likelihood) == expected


@pytest.mark.parametrize("stddev", [0, -1.0, math.inf, -math.inf, math.nan])
def test_gaussian_names_an_impossible_deviation(stddev):
    with pytest.raises(ValueError, match=f"Received: stddev={stddev}"):
        Gaussian(stddev)


# --- likelihoods of one's own -------------------------------------------


def test_subclass_needs_a_log_probability_only():
    outputs = _rng(16).normal(size=(4, 3))
    y = _rng(17).poisson(2.0, size=(4, 3))
    mask = np.array([[1, 1, 0], [0, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
    expected = stats.poisson.logpmf(y, np.exp(outputs))
    arguments = (tf.constant(y), tf.constant(outputs))
    np.testing.assert_allclose(
        _Poisson().negative_log_likelihood(*arguments),
        -expected.sum(axis=1),
        rtol=1e-10,
    )
    np.testing.assert_allclose(
        _Poisson().negative_log_likelihood(*arguments, tf.constant(mask)),
        -(expected * mask).sum(axis=1),
        rtol=1e-10,
    )
    assert _Poisson().check(tf.constant(outputs)) is None


@pytest.mark.parametrize("method", ["sample", "uniform", "log_probability"])
def test_base_class_leaves_its_methods_to_subclasses(method):
    with pytest.raises(NotImplementedError):
        getattr(likelihoods.Likelihood(), method)(
            tf.zeros([2, 2]), random_draws.draw(0)
        )
