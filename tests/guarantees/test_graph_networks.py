"""Examples are the rows of the outputs: molecules, where inputs are atoms."""

from __future__ import annotations

import cases
import evaluation
import keras
from keras import layers
import networks
import numpy as np
import pytest
import tensorflow as tf

import keras_fisher
from keras_fisher import FisherPenalty
from keras_fisher import GradientPenalty

_RANDOM = np.random.default_rng(0)
_MOLECULES = 4
_Y = np.arange(_MOLECULES) % networks.CLASSES
_PENALTIES = [
    GradientPenalty(0.7),
    GradientPenalty(0.7, micro_batch_size=3),
    GradientPenalty(0.7, fraction=0.5),
    GradientPenalty(0.7, method="finite_difference"),
]


class _Network(keras.Model):
    """Sums what it makes of the atoms of each molecule.

    Args:
        molecules: How many there are; None if it is seen from the data.
    """

    def __init__(self, molecules=_MOLECULES, dtype="float64", **kwargs):
        super().__init__(dtype=dtype, name="network", **kwargs)
        self.molecules = molecules
        self.hidden = layers.Dense(5, activation="tanh", dtype=dtype)
        self.head = layers.Dense(networks.CLASSES, dtype=dtype)

    def build(self, shapes):
        self.hidden.build((None, 3))
        self.head.build((None, 5))

    def call(self, x):
        h = self.hidden(x["atoms"])
        if self.molecules is None:
            return self.head(tf.math.segment_sum(h, x["molecule"]))
        return self.head(
            tf.math.unsorted_segment_sum(h, x["molecule"], self.molecules)
        )

    def compute_output_shape(self, shapes):
        return (self.molecules, networks.CLASSES)


def _atoms(count=20, molecules=_MOLECULES, dtype="float64"):
    return {
        "atoms": tf.constant(_RANDOM.normal(size=(count, 3)), dtype),
        "molecule": tf.sort(tf.range(count) % molecules),
    }


def _built(**kwargs):
    keras.utils.set_random_seed(1)
    model, x = _Network(**kwargs), _atoms()
    x["atoms"] = tf.cast(x["atoms"], model.compute_dtype)
    model(x)
    return model, x


def _traces(model, x) -> np.ndarray:
    """E_ŷ ‖g(x_i, ŷ)‖² of each molecule, one label after the other."""
    probabilities = tf.nn.softmax(model(x)).numpy()
    found = np.zeros(probabilities.shape)
    for i, y in np.ndindex(*found.shape):
        with tf.GradientTape() as tape:
            loss = -tf.nn.log_softmax(model(x))[i, y]
        gradients = tape.gradient(loss, model.trainable_variables)
        found[i, y] = sum(np.sum(np.square(g)) for g in gradients)
    return np.sum(probabilities * found, axis=1)


@pytest.mark.few(1)
@pytest.mark.parametrize("molecules", [_MOLECULES, None])
def test_the_trace_of_batches_counts_rows_of_outputs(molecules):
    model, x = _built(molecules=molecules)
    found = keras_fisher.fisher_trace(
        *(model, x),
        estimator="batch",
        num_samples=2000,
        likelihood=evaluation.CATEGORICAL,
        seed=0,
    )
    expected = _traces(model, x).mean()
    assert found.standard_error < 0.1 * expected
    assert abs(found - expected) < 4 * found.standard_error


@pytest.mark.slow
def test_batches_weigh_by_their_rows_of_outputs():
    model, _ = _built(molecules=None)
    batches = [_atoms(20, 4), _atoms(21, 7), _atoms(3, 1), _atoms(20, 2)]
    data = tf.data.Dataset.from_generator(
        lambda: iter(batches),
        output_signature={
            "atoms": tf.TensorSpec([None, 3], tf.float64),
            "molecule": tf.TensorSpec([None], tf.int32),
        },
    )
    found = keras_fisher.fisher_trace(
        *(model, data),
        estimator="batch",
        num_samples=2000,
        likelihood=evaluation.CATEGORICAL,
        seed=0,
    )
    expected = np.concatenate([_traces(model, x) for x in batches]).mean()
    assert found.standard_error < 0.1 * expected
    assert abs(found - expected) < 4 * found.standard_error


@pytest.mark.parametrize("estimator", ["monte_carlo", "exact", "empirical"])
@pytest.mark.parametrize("molecules", [_MOLECULES, None])
def test_estimators_by_example_point_to_that_of_batches(estimator, molecules):
    model, x = _built(molecules=molecules)
    data = tf.data.Dataset.from_tensors((x, _Y))
    message = r'have 4 rows, .* 20, .* Use `estimator="batch"`'
    with pytest.raises(ValueError, match=message):
        keras_fisher.fisher_trace(
            *(model, data),
            estimator=estimator,
            likelihood=evaluation.CATEGORICAL,
        )


def _expected(penalty, model, x, rows):
    """α T / B by brute force."""
    size = penalty.micro_batch_size or len(rows)
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    trace = networks.brute_force_trace(
        model, x, evaluation.CATEGORICAL, tf.gather(_Y, rows), groups
    )
    return penalty.alpha * trace / _MOLECULES


@pytest.mark.parametrize("molecules", [_MOLECULES, None])
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize(
    "penalty",
    _PENALTIES,
    ids=lambda p: f"{p.fraction}{p.micro_batch_size}{p.method[0]}",
)
@pytest.mark.impossible("XLA needs shapes", mode="xla", molecules=None)
def test_penalties_equal_brute_force(penalty, mode, molecules):
    model, x = _built(molecules=molecules)
    forward = penalty.forward(model, x, seed=evaluation.SEED)
    assert int(forward.batch_size) == _MOLECULES
    rows = forward.subset.of(tf.range(_MOLECULES)).numpy()
    evaluate = cases.compiled(
        lambda x: evaluation.evaluated(penalty, model, x, _Y), mode
    )
    value, _, gradients = evaluate(x)

    def expected():
        return _expected(penalty, model, x, rows)

    np.testing.assert_allclose(value, expected(), rtol=1e-9)
    direction = [_RANDOM.normal(size=g.shape) for g in gradients]
    slope = networks.directional_difference(
        expected, model.trainable_variables, direction
    )
    along = sum(np.sum(np.multiply(g, d)) for g, d in zip(gradients, direction))
    np.testing.assert_allclose(along, slope, rtol=1e-5)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("molecules", [_MOLECULES, None])
@pytest.mark.impossible("XLA needs shapes", mode="xla", molecules=None)
def test_training_counts_rows_of_outputs(mode, molecules):
    model, x = _built(dtype="float32", molecules=molecules)
    penalty = GradientPenalty(0.7, bound=None)
    _, _, gradients = evaluation.evaluated(penalty, model, x, _Y)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with tf.GradientTape() as tape:
        value = loss(_Y, model(x))
    expected = [
        variable.numpy() - 0.1 * (a + b)
        for variable, a, b in zip(
            model.trainable_variables,
            tape.gradient(value, model.trainable_variables),
            gradients,
        )
    ]
    fisher = keras_fisher.FisherModel(model, penalty=penalty, trace_every=1)
    fisher.compile(
        keras.optimizers.SGD(0.1),
        loss,
        run_eagerly=mode == "eager",
        jit_compile=mode == "xla",
    )
    data = tf.data.Dataset.from_tensors((x, _Y))
    logs = fisher.fit(data, verbose=0).history
    for variable, value in zip(model.trainable_variables, expected):
        np.testing.assert_allclose(variable.numpy(), value, atol=1e-6)
    assert logs["fisher_trace"][0] > 0


def test_the_layer_counts_rows_of_outputs():
    model, x = _built(dtype="float32")
    penalty = FisherPenalty(0.7, bound=None)
    layer = keras_fisher.layers.FisherRegularization(model, penalty, seed=1)
    layer.build({name: tuple(t.shape) for name, t in x.items()})
    layer(x, training=True)
    np.testing.assert_allclose(
        layer.state.fisher_penalty.numpy(),
        penalty.alpha * layer.state.fisher_trace.numpy() / _MOLECULES,
        rtol=1e-6,
    )


def test_outputs_of_different_rows_are_refused():
    model, x = _built()

    class Both(keras.Model):
        def call(self, x):
            return [model.hidden(x["atoms"]), model(x)]

    with pytest.raises(ValueError, match=r"\(20, 5\), \(4, 3\)"):
        GradientPenalty(0.7).forward(Both(dtype="float64"), x)
