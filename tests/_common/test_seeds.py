"""Seeds of operations, replicas, examples and orders."""

import itertools
import json
import math
import os
import subprocess
import sys

import cases
import keras
import numpy as np
import pytest
from scipy import stats
import tensorflow as tf

from keras_fisher._common import random_draws

_MODES = ["eager", "graph", "xla"]


def _seed(first=0, second=0):
    return tf.constant([first, second], tf.int64)


_INTEGERS = [
    0,
    1,
    -1,
    7,
    2**31,
    -(2**31),
    2**32 + 5,
    2**63 - 1,
    2**63,
    -(2**63),
    -(2**63) - 1,
    2**64 - 1,
    2**64,
    2**64 + 1,
    3 * 2**64 + 11,
    -(5**60),
    10**40,
]


@pytest.mark.parametrize("integer", _INTEGERS)
def test_seed_of_an_integer_is_its_lowest_64_bits(integer):
    seed = random_draws.draw(integer)
    assert (seed.dtype, seed.shape) == (tf.int64, (2,)), seed
    # Two's complement, by way of bytes.
    lowest = (integer % 2**64).to_bytes(8, "little")
    expected = [int.from_bytes(lowest, "little", signed=True), 0]
    assert seed.numpy().tolist() == expected, f"{integer}: {seed.numpy()}"


@pytest.mark.parametrize("integer", _INTEGERS)
def test_same_integer_gives_the_same_seed_every_time(integer):
    np.testing.assert_array_equal(
        random_draws.draw(integer), random_draws.draw(integer)
    )


def test_integers_that_differ_in_64_bits_give_different_draws():
    integers = {integer % 2**64: integer for integer in _INTEGERS}.values()
    draws = {
        integer: random_draws.uniform([8], random_draws.draw(integer)).numpy()
        for integer in integers
    }
    assert len(draws) > 10
    for one, other in itertools.combinations(draws, 2):
        shared = np.sum(draws[one] == draws[other])
        assert shared == 0, f"seeds {one} and {other} share {shared} of 8 draws"


@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_integer_seeds_are_constants_of_a_graph(mode):
    function = cases.compiled(lambda: random_draws.draw(-3), mode)
    np.testing.assert_array_equal(function(), [-3, 0])
    np.testing.assert_array_equal(function(), [-3, 0])


@pytest.mark.parametrize(
    "integer", [np.int64(5), np.int32(-3), np.uint8(7), np.uint64(2**64 - 1)]
)
def test_numpy_integers_are_integers(integer):
    np.testing.assert_array_equal(
        random_draws.draw(integer), random_draws.draw(int(integer))
    )


@pytest.mark.parametrize("mode", _MODES)
def test_generator_gives_the_sequence_keras_would(mode):
    generator = keras.random.SeedGenerator(5)
    twin = keras.random.SeedGenerator(5)
    next_seed = cases.compiled(lambda: random_draws.draw(generator), mode)
    seeds = [next_seed() for _ in range(5)]
    assert all(seed.dtype == tf.int64 for seed in seeds)
    assert all(seed.shape == (2,) for seed in seeds)
    seeds = [seed.numpy().tolist() for seed in seeds]
    expected = [twin.next().numpy().tolist() for _ in range(5)]
    assert seeds == expected, f"{seeds}, expected {expected}"
    assert len(set(map(tuple, seeds))) == 5, seeds


@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_two_draws_of_one_graph_differ(mode):
    generator = keras.random.SeedGenerator(0)
    pair = cases.compiled(
        lambda: (random_draws.draw(generator), random_draws.draw(generator)),
        mode,
    )
    seeds = {tuple(seed.numpy()) for _ in range(3) for seed in pair()}
    assert len(seeds) == 6, seeds


def test_generators_of_different_seeds_differ():
    seeds = {
        tuple(random_draws.draw(keras.random.SeedGenerator(seed)).numpy())
        for seed in range(20)
    }
    assert len(seeds) == 20, seeds


_ON_REPLICAS = """
import json
import keras
import tensorflow as tf

device = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(
    device, [tf.config.LogicalDeviceConfiguration()] * 3
)
from keras_fisher._common import random_draws

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1", "CPU:2"])
with strategy.scope():
    generator = keras.random.SeedGenerator(1)
results = {}
for name, step in {
    "integer": lambda: random_draws.draw(7),
    "generator": lambda: random_draws.draw(generator),
}.items():
    function = tf.function(lambda: strategy.run(step))
    steps = [strategy.experimental_local_results(function()) for _ in range(2)]
    results[name] = [
        [seed.numpy().tolist() for seed in replicas] for replicas in steps
    ]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def replica_seeds():
    # Logical devices have to be made before TensorFlow starts.
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join(path or "." for path in sys.path),
        TF_CPP_MIN_LOG_LEVEL="3",
    )
    result = subprocess.run(
        [sys.executable, "-c", _ON_REPLICAS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_replicas_draw_different_seeds_from_one_integer(replica_seeds):
    first, second = replica_seeds["integer"]
    assert len(first) == 3
    assert len(set(map(tuple, first))) == 3, first
    assert first == second, "an integer is the same seed in every step"
    assert first[0] == [7, 0], "the first replica draws as without replicas"


@pytest.mark.slow
def test_replicas_draw_different_seeds_from_one_generator(replica_seeds):
    steps = replica_seeds["generator"]
    seeds = {tuple(seed) for replicas in steps for seed in replicas}
    assert len(seeds) == 6, steps


@pytest.mark.parametrize("size", [0, 1, 2, 3, 17, 1000])
@pytest.mark.parametrize("mode", _MODES)
def test_permutation_has_each_index_once(size, mode):
    permute = cases.compiled(
        random_draws.permutation,
        mode,
        [tf.TensorSpec([], tf.int32), tf.TensorSpec([2], tf.int64)],
    )
    order = permute(tf.constant(size), _seed(4)).numpy()
    np.testing.assert_array_equal(np.sort(order), np.arange(size))
    assert size < 17 or not (order == np.arange(size)).all(), "in order"


def _permutations(size, count):
    permute = tf.function(
        lambda seeds: tf.map_fn(
            lambda seed: random_draws.permutation(size, seed),
            seeds,
            fn_output_signature=tf.int32,
        )
    )
    seeds = np.stack([np.arange(count), np.full(count, 3)], axis=1)
    return permute(tf.constant(seeds, tf.int64)).numpy()


def test_each_index_comes_to_each_position_equally_often():
    size, count = 6, 6000
    orders = _permutations(size, count)
    counts = np.zeros((size, size))
    for position in range(size):
        counts[position] = np.bincount(orders[:, position], minlength=size)
    expected = count / size
    statistic = ((counts - expected) ** 2 / expected).sum()
    p = stats.chi2.sf(statistic, (size - 1) ** 2)
    assert p > 1e-3, f"chi-squared {statistic:.1f}, p-value {p:.2g}"


def test_each_order_is_as_likely_as_the_others():
    orders = _permutations(4, 6000)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == math.factorial(4), f"{len(counts)} orders of 24"
    p = stats.chisquare(counts).pvalue
    assert p > 1e-3, f"chi-squared p-value {p:.2g}"


@pytest.mark.parametrize("row", [(), (1,), (3,), (4,), (2, 5)])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_an_example_draws_the_same_in_any_part(row, jit_compile):
    seed = random_draws.draw(5)

    @tf.function(jit_compile=jit_compile)
    def draws(first, count):
        part = random_draws.from_example(seed, first)
        return random_draws.uniform([count, *row], part)

    whole = draws(0, 50).numpy()
    for first, count in ((0, 7), (7, 1), (8, 42)):
        part = draws(first, count)
        np.testing.assert_array_equal(part, whole[first : first + count])
    assert len(np.unique(whole)) == whole.size


def test_draws_of_many_parts_are_uniform():
    parts = [
        random_draws.uniform(
            [100, 3], random_draws.from_example(random_draws.draw(0), k)
        )
        for k in range(0, 10_000, 100)
    ]
    draws = np.concatenate(parts)
    assert stats.kstest(draws.ravel(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.05


def test_start_follows_the_seed_of_keras():
    assert random_draws.start(7) == 7
    starts = []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(seed)
        starts.append(random_draws.start(None))
    assert starts[0] == starts[1] != starts[2]
