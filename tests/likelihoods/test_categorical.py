"""One of several classes."""

import math

import cases
import distributions
import keras
import numpy as np
import pytest
from scipy import stats
import tensorflow as tf

from keras_fisher import likelihoods
from keras_fisher._common import random_draws
from keras_fisher.likelihoods import Categorical

_ENCODINGS = {
    "sparse": lambda index: index,
    "column": lambda index: index[..., None],
    "one_hot": lambda index: np.eye(distributions.CLASSES)[index],
    "soft": lambda index: distributions.rng(4).dirichlet(
        np.ones(distributions.CLASSES), index.shape
    ),
}


def _tolerance(dtype):
    # The outputs are given; all that follows is in single precision or better.
    return dict(rtol=1e-12) if dtype == "float64" else dict(rtol=2e-6)


@pytest.mark.parametrize("encoding", _ENCODINGS)
@pytest.mark.parametrize(
    "positions", distributions.POSITIONS.values(), ids=distributions.POSITIONS
)
@pytest.mark.parametrize("dtype", distributions.DTYPES)
@pytest.mark.parametrize("from_logits", [True, False])
def test_categorical_nll_is_that_of_a_loop(
    from_logits, dtype, positions, encoding
):
    outputs = distributions.categorical_outputs(positions, from_logits, dtype)
    y = _ENCODINGS[encoding](distributions.indices(positions))
    nll = Categorical(from_logits).negative_log_likelihood(
        tf.constant(y), outputs
    )
    assert nll.shape == positions[:1], nll.shape
    np.testing.assert_allclose(
        nll,
        distributions.categorical_loop(
            y, distributions.double(outputs), from_logits
        ),
        **_tolerance(dtype),
    )


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "float32"])
def test_class_indices_may_have_any_dtype(dtype):
    outputs = distributions.categorical_outputs((4, 3), True, "float64")
    index = distributions.indices((4, 3))
    for y in (index, index[..., None]):
        np.testing.assert_allclose(
            Categorical().negative_log_likelihood(
                tf.constant(y.astype(dtype)), outputs
            ),
            distributions.categorical_loop(index, outputs.numpy(), True),
            rtol=1e-12,
        )


def test_column_of_labels_of_a_single_class_is_no_probability():
    nll = Categorical(from_logits=False).negative_log_likelihood(
        tf.constant([[0], [0]]), tf.constant([[1.0], [0.25]])
    )
    np.testing.assert_allclose(nll, [0, math.log(4)], rtol=1e-6)


@pytest.mark.parametrize("encoding", _ENCODINGS)
@pytest.mark.parametrize(
    "positions", distributions.POSITIONS.values(), ids=distributions.POSITIONS
)
@pytest.mark.parametrize("from_logits", [True, False])
def test_categorical_nll_adds_up_keras_losses(from_logits, positions, encoding):
    outputs = distributions.categorical_outputs(
        positions, from_logits, "float32"
    )
    y = tf.constant(_ENCODINGS[encoding](distributions.indices(positions)))
    loss = (
        keras.losses.CategoricalCrossentropy
        if encoding in ("one_hot", "soft")
        else keras.losses.SparseCategoricalCrossentropy
    )(from_logits=from_logits, reduction="none")
    expected = loss(y, outputs).numpy()
    assert expected.shape == positions, expected.shape
    nll = likelihoods.get(loss).negative_log_likelihood(y, outputs)
    np.testing.assert_allclose(
        nll, expected.reshape(positions[0], -1).sum(axis=1), rtol=1e-5
    )


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize(
    "positions", distributions.POSITIONS.values(), ids=distributions.POSITIONS
)
@pytest.mark.parametrize("encoding", ["sparse", "one_hot", "soft"])
def test_categorical_gradient_is_p_minus_the_label(encoding, positions, mode):
    logits = distributions.categorical_outputs(positions, True, "float64")
    index = distributions.indices(positions)
    y = _ENCODINGS[encoding](index)
    gradient = cases.compiled(
        lambda logits: distributions.gradient(
            lambda z: Categorical().negative_log_likelihood(tf.constant(y), z),
            logits,
        ),
        mode,
    )(logits)
    exponentials = np.exp(logits.numpy())
    p = exponentials / exponentials.sum(axis=-1, keepdims=True)
    dense = y if encoding == "soft" else np.eye(distributions.CLASSES)[index]
    np.testing.assert_allclose(gradient, p - dense, atol=1e-12)


@pytest.mark.parametrize("mode", cases.MODES)
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

    gradient = cases.compiled(lambda z: distributions.gradient(nll, z), mode)(
        logits
    )
    exponentials = np.exp(row)
    p = exponentials / exponentials.sum()
    np.testing.assert_allclose(gradient, p - np.eye(3), atol=1e-6)
    assert abs(p[2] / 10**exponent - 0.8) < 0.05, "the class is improbable"
    np.testing.assert_allclose(nll(logits), -np.log(p), rtol=1e-6)


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


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", distributions.DTYPES)
@pytest.mark.parametrize("from_logits", [True, False])
def test_classes_are_drawn_with_their_probabilities(from_logits, dtype, seed):
    # Softmax does not see the constant.
    outputs = tf.cast(
        np.log(distributions.P) + 3 if from_logits else distributions.P, dtype
    )
    p = (
        np.exp(distributions.double(outputs))
        if from_logits
        else distributions.double(outputs)
    )
    p = p / p.sum()
    drawn = Categorical(from_logits).sample(
        distributions.tiled(outputs), random_draws.draw(seed)
    )
    assert drawn.shape == (distributions.DRAWS,), drawn.shape
    assert drawn.dtype.is_integer, drawn.dtype
    distributions.assert_mean(np.eye(4)[drawn], p, "frequency")
    test = stats.chisquare(
        np.bincount(drawn, minlength=4), p * distributions.DRAWS
    )
    assert test.pvalue > 1e-3, f"chi-squared p-value {test.pvalue:.2g}"


@pytest.mark.parametrize("dtype", distributions.DTYPES)
@pytest.mark.parametrize("from_logits", [True, False])
def test_uniform_classes_do_not_depend_on_the_outputs(from_logits, dtype):
    outputs = tf.cast(
        np.log(distributions.P) if from_logits else distributions.P, dtype
    )
    drawn = Categorical(from_logits).uniform(
        distributions.tiled(outputs), random_draws.draw(1)
    )
    assert (drawn.shape, drawn.dtype) == ((distributions.DRAWS,), tf.int64), (
        drawn
    )
    counts = np.bincount(drawn, minlength=4)
    assert len(counts) == 4, counts
    test = stats.chisquare(counts)
    assert test.pvalue > 1e-3, f"chi-squared p-value {test.pvalue:.2g}"


def test_uniform_labels_have_the_shape_of_the_positions():
    for positions in distributions.POSITIONS.values():
        outputs = distributions.categorical_outputs(positions, True, "float32")
        y = Categorical().uniform(outputs, random_draws.draw(0))
        assert y.shape == positions, y.shape


@pytest.mark.parametrize(
    "positions", distributions.POSITIONS.values(), ids=distributions.POSITIONS
)
def test_check_finds_a_single_wrong_position(positions):
    outputs = distributions.categorical_outputs(
        positions, False, "float64"
    ).numpy()
    outputs[(-1,) * len(positions)] *= 1.1
    with pytest.raises(ValueError, match="expects probabilities"):
        Categorical(from_logits=False).check(outputs)


@pytest.mark.parametrize("ignore_class", [-1, 1, 255])
def test_an_ignored_class_stands_where_there_is_no_label(ignore_class):
    likelihood = Categorical(ignore_class=ignore_class)
    outputs = tf.zeros([2, 2, 3])
    y = np.array([[0, ignore_class], [ignore_class, 2]])
    expected = [[True, False], [False, True]]
    for labels in (y, y[..., None], y.astype("float32")):
        found = likelihood.has_label(tf.constant(labels), outputs)
        np.testing.assert_array_equal(found, expected)
    likelihood.check_labels(y, 3)
    likelihood.check_labels(np.full([2, 2], ignore_class), 3)
    with pytest.raises(ValueError, match="from 0 to 3"):
        likelihood.check_labels(np.where(y == 2, 3, y), 3)


def test_one_hot_labels_are_all_there():
    likelihood = Categorical(ignore_class=0)
    y = tf.eye(3)[None]
    assert likelihood.has_label(y, tf.zeros([1, 3, 3])) is None
    assert likelihood.visible(y, tf.zeros([1, 3, 3])) is None


@pytest.mark.parametrize("ignore_class", [0.5, True, "pad"])
def test_an_ignored_class_is_an_integer(ignore_class):
    with pytest.raises(ValueError, match="`ignore_class` must be an integer"):
        Categorical(ignore_class=ignore_class)
