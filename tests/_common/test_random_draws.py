"""Draws are the same however compiled, and have their distribution."""

import itertools
import math

import cases
import keras
import numpy as np
import pytest
from scipy import stats
import tensorflow as tf

from keras_fisher._common import random_draws

_MODES = ["eager", "graph", "xla"]
_DTYPES = [tf.float16, tf.bfloat16, tf.float32, tf.float64]
_SHAPES = [(7,), (3, 4), (2, 3, 2, 5), (1,), (0, 3)]
_MANY = 100_000
_FLOATS = {
    "uniform": random_draws.uniform,
    "gumbel": random_draws.gumbel,
    "normal": random_draws.normal,
}
# Draws as functions of (shape, seed), with the tolerance of a comparison.
_DRAWS = {
    "uniform": (random_draws.uniform, 1e-6),
    "gumbel": (random_draws.gumbel, 1e-6),
    "normal": (random_draws.normal, 1e-6),
    "integers": (lambda shape, seed: random_draws.integers(shape, 10, seed), 0),
    "many_integers": (
        lambda shape, seed: random_draws.integers(shape, 2**31 - 1, seed),
        0,
    ),
    "permutation": (
        lambda shape, seed: random_draws.permutation(
            tf.reduce_prod(tf.cast(shape, tf.int32)), seed
        ),
        0,
    ),
}


def _seed(first=0, second=0):
    return tf.constant([first, second], tf.int64)


def _double(tensor):
    return tf.cast(tensor, tf.float64).numpy()


def _assert_close(actual, expected, tolerance, what):
    actual, expected = _double(actual), _double(expected)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = np.max(np.abs(actual - expected), initial=0)
    assert error <= tolerance, f"{what} differ by {error:.3g}"


def _ks(sample, cdf):
    """Returns the p-value of a Kolmogorov-Smirnov test."""
    return stats.kstest(_double(sample).ravel(), cdf).pvalue


@pytest.mark.parametrize("name", _DRAWS)
@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_draws_do_not_depend_on_compilation(name, mode):
    function, tolerance = _DRAWS[name]
    for shape in _SHAPES:
        seed = _seed(3, math.prod(shape))
        compiled = cases.compiled(lambda seed, s=shape: function(s, seed), mode)
        _assert_close(
            compiled(seed), function(shape, seed), tolerance, f"{name} {shape}"
        )


@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.parametrize(
    "seed", [(7, 2**32), (2**33 + 5, 7), (7, -1), (-5, 3), (-(2**63), 0)]
)
def test_any_seed_draws_the_same_however_compiled(seed, mode):
    def draw(seed):
        return random_draws.uniform(
            [3, 4], random_draws.from_example(seed, 2**33)
        )

    seed = _seed(*seed)
    np.testing.assert_array_equal(cases.compiled(draw, mode)(seed), draw(seed))
    # As TensorFlow draws from it.
    np.testing.assert_array_equal(
        random_draws.uniform([8], random_draws.from_example(seed, 0)[:2]),
        random_draws.uniform([1, 8], random_draws.from_example(seed, 0))[0],
    )


@pytest.mark.parametrize("name", _DRAWS)
@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_draws_of_unknown_shape_do_not_depend_on_compilation(name, mode):
    function, tolerance = _DRAWS[name]
    compiled = cases.compiled(
        lambda x, seed: function(tf.shape(x), seed),
        mode,
        [tf.TensorSpec([None, None]), tf.TensorSpec([2], tf.int64)],
    )
    for shape in [(5, 3), (1, 1), (64, 10)]:
        seed = _seed(-1, 2**40)
        _assert_close(
            compiled(tf.zeros(shape), seed),
            function(shape, seed),
            tolerance,
            f"{name} {shape}",
        )


@pytest.mark.parametrize("name", _DRAWS)
@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_draws_behind_variables_do_not_depend_on_compilation(name, mode):
    # Here XLA's own floats differ from TensorFlow's, for the same seed.
    function, tolerance = _DRAWS[name]
    layer = keras.layers.Dense(4)
    layer.build((None, 3))

    def step(x, seed):
        return function(tf.shape(layer(x)), seed)

    x, seed = tf.ones([6, 3]), _seed(1, 2)
    signature = [tf.TensorSpec([None, 3]), tf.TensorSpec([2], tf.int64)]
    compiled = cases.compiled(step, mode, signature)
    _assert_close(
        compiled(x, seed), function((6, 4), seed), tolerance, f"{name}"
    )


@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_generator_and_draws_agree_in_one_graph(mode):
    generator = keras.random.SeedGenerator(9)
    twin = keras.random.SeedGenerator(9)
    compiled = cases.compiled(
        lambda x: random_draws.uniform(
            tf.shape(x), random_draws.draw(generator)
        ),
        mode,
        [tf.TensorSpec([None])],
    )
    drawn = [compiled(tf.zeros(8)).numpy() for _ in range(3)]
    expected = [
        random_draws.uniform([8], random_draws.draw(twin)).numpy()
        for _ in range(3)
    ]
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", _DRAWS)
def test_different_seeds_give_different_draws(name):
    function, _ = _DRAWS[name]
    seeds = [(0, 0), (1, 0), (0, 1), (-1, 0), (1, 1), (2**40, 0)]
    draws = [_double(function([60], _seed(*seed))) for seed in seeds]
    for (one, x), (other, y) in itertools.combinations(zip(seeds, draws), 2):
        shared = np.mean(x == y)
        assert shared < 0.4, f"{one} and {other} share {shared:.0%}"


@pytest.mark.parametrize("name", _DRAWS)
def test_same_seed_gives_the_same_draws(name):
    function, _ = _DRAWS[name]
    np.testing.assert_array_equal(
        function([60], _seed(4, 5)), function([60], _seed(4, 5))
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "distribution"),
    [("uniform", "uniform"), ("gumbel", "gumbel_r"), ("normal", "norm")],
)
def test_floats_have_the_distribution_of_their_name(name, distribution, seed):
    sample = _FLOATS[name]([_MANY], random_draws.draw(seed))
    p = _ks(sample, distribution)
    assert p > 1e-3, f"Kolmogorov-Smirnov p-value {p:.2g} over {_MANY}"


@pytest.mark.parametrize(
    ("name", "distribution"),
    [
        ("uniform", stats.uniform),
        ("gumbel", stats.gumbel_r),
        ("normal", stats.norm),
    ],
)
def test_moments_are_those_of_the_distribution(name, distribution):
    sample = _double(_FLOATS[name]([10 * _MANY], _seed(8)))
    for power in (1, 2, 3):
        values = sample**power
        error = values.std() / np.sqrt(values.size)
        difference = values.mean() - distribution.moment(power)
        assert abs(difference) < 4 * error, (
            f"moment {power} is off by {difference:.3g}, standard error "
            f"{error:.3g}"
        )


@pytest.mark.parametrize("name", _FLOATS)
def test_neighbours_are_independent(name):
    # Along rows, along columns, and between consecutive seeds.
    sample = _double(_FLOATS[name]([300, 300], _seed(1)))
    other = _double(_FLOATS[name]([300, 300], _seed(2)))
    for what, x, y in [
        ("rows", sample[1:], sample[:-1]),
        ("columns", sample[:, 1:], sample[:, :-1]),
        ("seeds", sample, other),
    ]:
        correlation = np.corrcoef(x.ravel(), y.ravel())[0, 1]
        error = 1 / np.sqrt(x.size)
        assert abs(correlation) < 4 * error, (
            f"{what} correlate with {correlation:.4f}, error {error:.4f}"
        )


def test_uniform_draws_are_multiples_of_2_to_the_minus_24():
    cells = _double(random_draws.uniform([_MANY], _seed(5))) * 2**24
    np.testing.assert_array_equal(cells, np.floor(cells))
    # All the bits vary, each of them every other time.
    bits = (cells.astype(np.int64)[:, None] >> np.arange(24)) & 1
    worst = np.abs(bits.mean(axis=0) - 0.5).max()
    assert worst < 4.5 * 0.5 / np.sqrt(_MANY), f"a bit is off by {worst:.4f}"


@pytest.mark.parametrize("seed", range(3))
def test_uniform_draws_stay_within_zero_and_one(seed):
    sample = random_draws.uniform([2**21], random_draws.draw(seed)).numpy()
    assert sample.min() >= 0, f"{sample.min()}"
    assert sample.max() < 1, f"{sample.max()}"
    # They come close to both ends, as two million draws must.
    assert sample.min() < 1e-5, f"{sample.min()}"
    assert sample.max() > 1 - 1e-5, f"{sample.max()}"


@pytest.mark.parametrize("bound", [1, 2, 3, 10, 257])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_integer_is_as_likely_as_the_others(bound, seed):
    sample = random_draws.integers([_MANY], bound, random_draws.draw(seed))
    assert sample.dtype == tf.int32, sample.dtype
    counts = np.bincount(sample.numpy(), minlength=bound)
    assert len(counts) == bound, f"{len(counts) - 1} drawn below {bound}"
    if bound == 1:
        assert counts[0] == _MANY, counts
        return
    p = stats.chisquare(counts).pvalue
    assert p > 1e-3, f"chi-squared p-value {p:.2g}"


@pytest.mark.parametrize("bound", [1, 2, 3, 10, 1000, 2**24 + 1, 2**31 - 1])
def test_integers_stay_below_their_bound(bound):
    sample = random_draws.integers([_MANY], bound, _seed(2)).numpy()
    assert sample.min() >= 0, f"{sample.min()}"
    assert sample.max() < bound, f"{sample.max()}"
    spread = int(sample.max()) - int(sample.min())
    assert spread >= (bound - 1) * 0.999, f"{spread} of {bound}"


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("bound", [1, 3, 10, 1000, 2**24 + 1, 2**31 - 1])
def test_integers_are_the_whole_part_of_uniform_times_bound(bound, mode):
    # In integers of any size, so without rounding.
    cells = _double(random_draws.uniform([_MANY], _seed(2))) * 2**24
    expected = [int(cell) * bound >> 24 for cell in cells]
    draw = cases.compiled(
        lambda: random_draws.integers([_MANY], bound, _seed(2)), mode
    )
    np.testing.assert_array_equal(draw(), expected)


# The first and the last draw that `uniform` can return.
_ENDS = (0.0, 1 - 2.0**-24)


@pytest.fixture
def extreme_uniforms(monkeypatch):
    def ends(shape, seed, dtype=tf.float32):
        return tf.cast(tf.constant(_ENDS, tf.float64), dtype)

    monkeypatch.setattr(random_draws, "uniform", ends)


@pytest.mark.parametrize("bound", [1, 2, 3, 10, 1000, 2**24 + 1, 2**31 - 1])
def test_extreme_draws_stay_below_the_bound(extreme_uniforms, bound):
    first, last = random_draws.integers([2], bound, _seed()).numpy()
    assert first == 0, first
    assert last <= bound - 1, f"{last}"
    assert last >= bound - 1 - bound * 2.0**-23, f"{last} of {bound}"


def test_extreme_normals_are_finite_and_symmetric(extreme_uniforms):
    first, last = _double(random_draws.normal([2], _seed()))
    expected = stats.norm.ppf(2.0**-25)
    np.testing.assert_allclose([first, last], [expected, -expected], 1e-6)


def test_extreme_gumbels_are_finite(extreme_uniforms):
    sample = _double(random_draws.gumbel([2], _seed()))
    assert np.isfinite(sample).all(), sample


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize(
    "name, dtype",
    [
        (name, dtype)
        for name in _FLOATS
        for dtype in _DTYPES
        # Half precision has not all of the multiples of 2**-24.
        if name != "uniform" or dtype.size >= 4
    ],
)
def test_dtype_does_not_change_the_draws(name, dtype, mode):
    function = _FLOATS[name]
    compiled = cases.compiled(lambda: function([1000], _seed(6), dtype), mode)
    sample = compiled()
    assert sample.dtype == dtype, sample.dtype
    expected = _double(function([1000], _seed(6), tf.float64))
    # Within rounding to that dtype.
    allowed = np.maximum(np.abs(expected) * _epsilon(dtype), 1e-6)
    excess = np.max(np.abs(_double(sample) - expected) / allowed)
    assert excess <= 1, f"off by {excess:.3g} times the rounding of {dtype}"


def _epsilon(dtype):
    """Returns the distance from 1 to the next number of a dtype."""
    bits = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}
    return 2.0 ** -bits[dtype.name]


def test_single_and_double_precision_uniforms_are_equal():
    single = _double(random_draws.uniform([_MANY], _seed(7), tf.float32))
    double = _double(random_draws.uniform([_MANY], _seed(7), tf.float64))
    np.testing.assert_array_equal(single, double)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize(
    ("dtype", "digits"), [(tf.float16, 11), (tf.bfloat16, 8)]
)
def test_uniforms_of_16_bits_are_the_first_digits(dtype, digits, mode):
    def draw(dtype):
        return _double(
            cases.compiled(
                lambda: random_draws.uniform([2**16], _seed(3), dtype), mode
            )()
        )

    expected = np.floor(draw(tf.float64) * 2**digits) / 2**digits
    np.testing.assert_array_equal(draw(dtype), expected)
    assert expected.max() == 1 - 2.0**-digits


@pytest.mark.parametrize("seed", [0, 7, -3])
def test_streams_of_an_integer_are_other_seeds(seed):
    first, second = (random_draws.draw(seed, stream=k) for k in (0, 1))
    np.testing.assert_array_equal(first, random_draws.draw(seed))
    assert (first.numpy() != second.numpy()).any()


def test_streams_of_integers_are_independent():
    draws = np.array(
        [
            [
                float(random_draws.uniform([], random_draws.draw(seed, k)))
                for k in (0, 1)
            ]
            for seed in range(600)
        ]
    )
    correlation = np.corrcoef(draws.T)[0, 1]
    assert abs(correlation) < 4 / np.sqrt(len(draws)), correlation


def test_a_generator_takes_no_seed_from_others():
    keras.utils.set_random_seed(3)
    expected = [keras.random.SeedGenerator() for _ in range(2)]
    keras.utils.set_random_seed(3)
    ours = random_draws.generator(None)
    found = [keras.random.SeedGenerator() for _ in range(2)]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.state, b.state)
    # It follows the seed of all, unless it has one.
    keras.utils.set_random_seed(3)
    np.testing.assert_array_equal(
        random_draws.generator(None).state, ours.state
    )
    assert random_draws.generator(7).state.numpy()[0] == 7
