"""What all distributions have in common."""

import json

import cases
import distributions
import keras
import numpy as np
import pytest
from scipy import stats
import tensorflow as tf
import training

import keras_fisher
from keras_fisher import likelihoods
from keras_fisher._common import dtypes
from keras_fisher._common import random_draws
from keras_fisher.likelihoods import Bernoulli
from keras_fisher.likelihoods import Categorical
from keras_fisher.likelihoods import Gaussian


@pytest.mark.parametrize("name", distributions.CASES)
@pytest.mark.parametrize("dtype", distributions.DTYPES)
def test_nll_is_in_single_precision_or_better(name, dtype):
    likelihood, outputs, y = distributions.case(name, dtype)
    nll = likelihood.negative_log_likelihood(y, outputs)
    expected = "float64" if dtype == "float64" else "float32"
    assert nll.dtype.name == expected, f"{nll.dtype.name} from {dtype}"
    assert dtypes.at_least_single(dtype).name == expected


@pytest.mark.parametrize("name", distributions.CASES)
def test_positions_of_an_example_add_up(name):
    likelihood, outputs, y = distributions.case(name)
    whole = likelihood.negative_log_likelihood(y, outputs)
    positions = likelihood.log_probability(y, outputs)
    assert positions.shape[:2] == (4, 3), positions.shape
    by_token = [
        likelihood.negative_log_likelihood(y[:, t], outputs[:, t])
        for t in range(3)
    ]
    np.testing.assert_allclose(whole, np.sum(by_token, axis=0), rtol=1e-5)
    np.testing.assert_allclose(
        whole,
        -np.sum(positions, axis=tuple(range(1, positions.ndim))),
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", distributions.CASES)
def test_examples_do_not_see_each_other(name):
    likelihood, outputs, y = distributions.case(name)
    whole = likelihood.negative_log_likelihood(y, outputs)
    one_by_one = [
        likelihood.negative_log_likelihood(y[i : i + 1], outputs[i : i + 1])
        for i in range(4)
    ]
    np.testing.assert_allclose(whole, np.concatenate(one_by_one), rtol=1e-6)


@pytest.mark.parametrize("name", distributions.CASES)
@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_nll_does_not_depend_on_compilation(name, mode):
    likelihood, outputs, y = distributions.case(name)
    mask = tf.constant(distributions.rng(10).random((4, 3)) < 0.5)
    signature = [
        tf.TensorSpec([None, *x.shape[1:]], x.dtype) for x in (y, outputs, mask)
    ]
    compiled = cases.compiled(
        likelihood.negative_log_likelihood, mode, signature
    )
    for size in (4, 2):
        arguments = (y[:size], outputs[:size], mask[:size])
        np.testing.assert_allclose(
            compiled(*arguments),
            likelihood.negative_log_likelihood(*arguments),
            rtol=1e-5,
        )


@pytest.mark.parametrize("dtype", ["bool", "float32", "int32"])
@pytest.mark.parametrize("name", distributions.CASES)
def test_hidden_tokens_add_nothing(name, dtype):
    likelihood, outputs, y = distributions.case(name, "float64")
    mask = np.array([[1, 1, 0], [0, 1, 0], [1, 1, 1], [0, 0, 0]])
    nll = likelihood.negative_log_likelihood(
        y, outputs, tf.constant(mask.astype(dtype))
    )
    loop = distributions.CASES[name].loop
    expected = loop(y.numpy(), outputs.numpy(), mask)
    assert expected[3] == 0
    np.testing.assert_allclose(nll, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("positions", "mask_shape"),
    [((6,), (6,)), ((3, 2, 2), (3, 2, 2)), ((3, 2, 2), (3, 2)), ((4, 3), (4,))],
    ids=str,
)
def test_mask_may_have_fewer_axes_than_the_positions(positions, mask_shape):
    outputs = distributions.categorical_outputs(positions, True, "float64")
    y = distributions.indices(positions)
    mask = distributions.rng(11).random(mask_shape) < 0.5
    assert 0 < mask.sum() < mask.size
    np.testing.assert_allclose(
        Categorical().negative_log_likelihood(
            tf.constant(y), outputs, tf.constant(mask)
        ),
        distributions.categorical_loop(y, outputs.numpy(), True, mask),
        rtol=1e-12,
    )


@pytest.mark.parametrize("name", distributions.CASES)
def test_hidden_tokens_get_no_gradient(name):
    likelihood, outputs, y = distributions.case(name)
    mask = np.array([[1, 1, 0], [0, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        nll = likelihood.negative_log_likelihood(y, outputs, tf.constant(mask))
    gradient = tape.gradient(nll, outputs).numpy()
    assert np.all(gradient[~mask] == 0), gradient[~mask]
    assert np.all(np.any(gradient[mask] != 0, axis=-1)), gradient[mask]


def test_labels_of_hidden_tokens_do_not_matter():
    outputs = distributions.categorical_outputs((4, 3), True, "float32")
    mask = np.array([[1, 1, 0], [0, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
    y = distributions.indices((4, 3))
    padded = np.where(mask, y, -1)
    results = [
        Categorical().negative_log_likelihood(
            tf.constant(labels), outputs, tf.constant(mask)
        )
        for labels in (y, padded)
    ]
    np.testing.assert_array_equal(*results)


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


@pytest.mark.parametrize("name", distributions.CASES)
def test_gradient_is_that_of_finite_differences(name):
    likelihood, outputs, y = distributions.case(name, "float64")

    def nll(outputs):
        return likelihood.negative_log_likelihood(y, outputs)

    np.testing.assert_allclose(
        distributions.gradient(nll, outputs),
        _finite_difference(nll, outputs.numpy()),
        rtol=1e-6,
        atol=1e-7,
    )


@pytest.mark.parametrize("name", distributions.CASES)
def test_second_derivative_is_that_of_finite_differences(name):
    likelihood, outputs, y = distributions.case(name, "float64")
    weights = tf.constant(distributions.rng(12).normal(size=outputs.shape))

    def along_weights(outputs):
        gradient = distributions.gradient(
            lambda z: likelihood.negative_log_likelihood(y, z), outputs
        )
        return tf.reduce_sum(gradient * weights)

    np.testing.assert_allclose(
        distributions.gradient(along_weights, outputs),
        _finite_difference(along_weights, outputs.numpy()),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("dtype", distributions.DTYPES)
@pytest.mark.parametrize("name", ["categorical_p", "bernoulli_p"])
def test_probabilities_of_zero_and_one_stay_finite(name, dtype, mode):
    likelihood = distributions.CASES[name].likelihood
    outputs = tf.constant([[1.0, 0.0], [0.0, 1.0]], dtype)
    for y in (tf.constant([[1, 0], [0, 1]]), tf.constant([[0, 1], [1, 0]])):
        nll, gradient = cases.compiled(
            lambda p, y=y: (
                likelihood.negative_log_likelihood(y, p),
                distributions.gradient(
                    lambda p: likelihood.negative_log_likelihood(y, p), p
                ),
            ),
            mode,
        )(outputs)
        assert np.isfinite(nll).all(), nll
        assert np.isfinite(distributions.double(gradient)).all(), gradient
        agrees = y[0, 0] == 1
        expected = nll < 1e-6 if agrees else nll > 80
        assert np.all(expected), f"{nll} for labels {y}"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["categorical", "bernoulli"])
def test_large_logits_stay_exact(name, dtype):
    likelihood = distributions.CASES[name].likelihood
    outputs = tf.constant([[1000.0, -1000.0], [-1000.0, 1000.0]], dtype)
    y = tf.constant([[0.0, 1.0], [0.0, 1.0]])
    # Both are wrong at first, and both right afterwards.
    expected = [2000, 0]
    nll = likelihood.negative_log_likelihood(y, outputs)
    np.testing.assert_allclose(nll, expected, atol=1e-6)
    gradient = distributions.gradient(
        lambda z: likelihood.negative_log_likelihood(y, z), outputs
    )
    np.testing.assert_allclose(gradient, [[1.0, -1.0], [0.0, 0.0]], atol=1e-6)


@pytest.mark.parametrize("dtype", distributions.DTYPES)
@pytest.mark.parametrize("name", distributions.CASES)
def test_check_passes_what_the_likelihood_expects(name, dtype):
    for positions in distributions.POSITIONS.values():
        for classes in (2, 100):
            likelihood, outputs, _ = distributions.case(
                name, dtype, (*positions, classes)
            )
            assert likelihood.check(outputs) is None


@pytest.mark.parametrize("name", ["categorical_p", "bernoulli_p"])
def test_check_passes_an_empty_batch_and_an_array(name):
    likelihood = distributions.CASES[name].likelihood
    assert likelihood.check(tf.zeros([0, 3])) is None
    assert likelihood.check(np.array([[0.25, 0.75]])) is None


@pytest.mark.parametrize("dtype", distributions.DTYPES)
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


@pytest.mark.parametrize(
    "likelihood", [Categorical(), Bernoulli(), Gaussian()], ids=str
)
def test_logits_and_means_may_be_anything(likelihood):
    assert likelihood.check(tf.constant([[-100.0, 3.0], [0.0, 7.0]])) is None


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
    assert Categorical().get_config() == {
        "from_logits": True,
        "ignore_class": None,
    }
    assert Bernoulli().get_config() == {"from_logits": True}
    assert Gaussian().get_config() == {"stddev": 1.0}


@pytest.mark.parametrize(
    ("likelihood", "expected"),
    [
        (
            Categorical(False),
            "Categorical(from_logits=False, ignore_class=None)",
        ),
        (Gaussian(0.25), "Gaussian(stddev=0.25)"),
        (distributions.LogPoisson(), "LogPoisson()"),
    ],
)
def test_representation_tells_the_arguments(likelihood, expected):
    assert repr(likelihood) == expected


def test_subclass_needs_a_log_probability_only():
    outputs = distributions.rng(16).normal(size=(4, 3))
    y = distributions.rng(17).poisson(2.0, size=(4, 3))
    mask = np.array([[1, 1, 0], [0, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
    expected = stats.poisson.logpmf(y, np.exp(outputs))
    arguments = (tf.constant(y), tf.constant(outputs))
    np.testing.assert_allclose(
        distributions.LogPoisson().negative_log_likelihood(*arguments),
        -expected.sum(axis=1),
        rtol=1e-10,
    )
    np.testing.assert_allclose(
        distributions.LogPoisson().negative_log_likelihood(
            *arguments, tf.constant(mask)
        ),
        -(expected * mask).sum(axis=1),
        rtol=1e-10,
    )
    assert distributions.LogPoisson().check(tf.constant(outputs)) is None


@pytest.mark.parametrize("method", ["sample", "uniform", "log_probability"])
def test_base_class_leaves_its_methods_to_subclasses(method):
    with pytest.raises(NotImplementedError):
        getattr(likelihoods.Likelihood(), method)(
            tf.zeros([2, 2]), random_draws.draw(0)
        )


@keras.saving.register_keras_serializable("tests")
class _Exponential(likelihoods.Likelihood):
    """The example of the class docstring: waiting times."""

    def sample(self, outputs, seed):
        u = likelihoods.draws.uniform(tf.shape(outputs), seed, outputs.dtype)
        return -tf.exp(tf.stop_gradient(outputs)) * tf.math.log1p(-u)

    def log_probability(self, y, outputs):
        return -outputs - tf.cast(y, outputs.dtype) * tf.exp(-outputs)


@pytest.mark.parametrize(
    "jit", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_a_likelihood_of_ones_own_is_measured_penalized_and_saved(
    jit, tmp_path
):
    """The information of log-scale waiting times is 1 at each output."""
    network = training.dense_network(6, outputs=2)
    model = keras_fisher.FisherModel(
        network, 0.1, likelihood=_Exponential(), seed=0
    )
    y = np.exp(training.X[:, :2])
    model.compile("sgd", "mse", jit_compile=jit)
    logs = model.fit(training.X, y, batch_size=8, verbose=0).history
    assert logs["fisher_penalty"][0] > 0
    trace = keras_fisher.fisher_trace(
        model, training.X, num_samples=300, seed=1
    )
    jacobian = keras_fisher.fisher_trace(
        model, training.X, estimator="exact", likelihood="gaussian"
    )
    assert abs(trace - jacobian) < 4 * trace.standard_error
    assert trace.standard_error < 0.05 * trace
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.likelihood, _Exponential)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_likelihood_of_ones_own_draws_in_32_bits(policy):
    keras.config.set_dtype_policy(policy)
    network = training.dense_network(6, outputs=2)
    model = keras_fisher.FisherModel(
        network, 0.1, likelihood=_Exponential(), seed=0
    )
    model.compile("sgd", "mse")
    y = np.exp(training.X[:, :2])
    logs = model.fit(training.X, y, batch_size=8, verbose=0).history
    assert logs["fisher_nonfinite"] == [0]
    assert np.isfinite(logs["fisher_trace"]).all()


@pytest.mark.parametrize(
    ("call", "missing"),
    [
        (lambda likelihood, z: likelihood.sample(z, None), "sample"),
        (lambda likelihood, z: likelihood.uniform(z, None), "uniform"),
        (lambda likelihood, z: likelihood.fisher_factors(z), "factors"),
        (
            lambda likelihood, z: likelihood.negative_log_likelihood(z, z),
            "log_probability",
        ),
    ],
)
def test_what_a_likelihood_of_ones_own_misses_is_named(call, missing):
    class Own(likelihoods.Likelihood):
        pass

    with pytest.raises(NotImplementedError, match=f"Own .*`{missing}`"):
        call(Own(), tf.ones([1, 2]))


def test_one_output_and_several_are_told_apart():
    one, several = likelihoods.Categorical(), likelihoods.Joint(["mse"] * 2)
    z = tf.ones([1, 2])
    one.check_structure(z)
    several.check_structure([z, z])
    for likelihood, outputs, found in (
        (one, {"a": z, "b": z}, "several outputs.*'a', 'b'"),
        (several, z, "one output"),
    ):
        with pytest.raises(ValueError, match=found):
            likelihood.check_structure(outputs)
