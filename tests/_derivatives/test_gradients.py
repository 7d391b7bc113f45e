"""The tools on tapes, by themselves."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from keras_fisher._derivatives import gradients


def test_squared_norms_of_each_gradient():
    found = gradients.squared_norms(
        [tf.constant([3.0, 4.0]), None, tf.constant([[2.0]])]
    )
    np.testing.assert_array_equal(found, [25, 0, 4])
    assert found.dtype == tf.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_squares_of_half_precision_do_not_overflow(dtype):
    found = gradients.squared_norms([tf.constant([60000.0], dtype)])
    np.testing.assert_allclose(found, [3.6e9], rtol=2e-2)
    scaled = gradients.squared_norms([tf.constant([60000.0], dtype)], 2.0**15)
    np.testing.assert_allclose(scaled, [3.6e9 / 2.0**30], rtol=2e-2)


def test_double_precision_anywhere_makes_all_squares_double():
    found = gradients.squared_norms(
        [tf.constant([1.0]), tf.constant([1.0], tf.float64)]
    )
    assert found.dtype == tf.float64


def test_gradient_of_squared_norms_is_finite_at_zero():
    x = tf.zeros([3])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum(gradients.squared_norms([x]))
    np.testing.assert_array_equal(tape.gradient(y, x), [0, 0, 0])


def test_repeated_rows_of_an_embedding_are_added_before_the_square():
    table = tf.Variable([[1.0], [2.0]])
    with tf.GradientTape(persistent=True) as tape:
        y = tf.gather(table, [0, 0, 1])
    (g,) = gradients.vector_jacobian(tape, y, [table], tf.ones_like(y))
    np.testing.assert_array_equal(gradients.squared_norms([g]), [2**2 + 1])


def _product(rows: int, static=True, dtype="float64"):
    """A function of x and δ, with the norm of xᵀδ and its gradient."""

    @tf.function(
        input_signature=[
            tf.TensorSpec([rows if static else None, size], dtype)
            for size in (7, 6)
        ]
    )
    def norm(x, above):
        with tf.GradientTape() as tape:
            tape.watch([x, above])
            g = tf.matmul(x, above, transpose_a=True)
            norms = gradients.squared_norms_alone(
                [None, g, 2.0 * g], [True] * 3, 4.0
            )
            norm_of_g = norms[1]
        return norms, tape.gradient(norm_of_g, [x, above])

    return norm


# Up to 4 rows the examples take fewer products than the 7x6 weights.
@pytest.mark.parametrize("rows", [1, 4, 5])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_norms_from_factors_are_those_of_the_products(rows, static, dtype):
    random = np.random.default_rng(rows)
    x, above = random.normal(size=[rows, 7]), random.normal(size=[rows, 6])
    found, derivatives = _product(rows, static, dtype)(
        tf.constant(x, dtype), tf.constant(above, dtype)
    )
    expected = np.sum((x.T @ above) ** 2) / 16
    tolerance = {"float16": 1e-2, "float32": 1e-5, "float64": 1e-12}[dtype]
    np.testing.assert_allclose(
        found, [0, expected, 4 * expected], rtol=tolerance
    )
    for found, wanted in zip(
        derivatives,
        [above @ above.T @ x / 8, x @ x.T @ above / 8],
    ):
        np.testing.assert_allclose(
            found, wanted, rtol=tolerance, atol=2 * tolerance
        )


@pytest.mark.parametrize("rows", [4, 5])
def test_a_gradient_is_not_computed_where_its_factors_are_cheaper(rows):
    graph = _product(rows).get_concrete_function().graph
    shapes = [
        operation.outputs[0].shape.as_list()
        for operation in graph.get_operations()
        if operation.type == "MatMul"
    ]
    # The second gradient is no product, so its own product is there once.
    assert shapes.count([rows, rows]) == (2 if rows == 4 else 0), shapes


@pytest.mark.parametrize("size", [1, 5, 6])
@pytest.mark.parametrize("micro", [None, 1, 2, 4, 6, 9])
@pytest.mark.parametrize("static", [False, True])
def test_micro_batches_cover_each_example_once(size, micro, static):
    def run(n):
        return gradients.sum_over_micro_batches(
            lambda weights, count: [weights * count, count],
            size if static else n,
            micro,
            tf.float64,
        )

    run = run if static else tf.function(run)
    weights, count = run(tf.constant(size))
    np.testing.assert_allclose(weights, np.ones(size))
    assert float(count) == size


@pytest.mark.parametrize("size", [1, 5, 6, 19])
@pytest.mark.parametrize("part_size", [1, 2, 4])
@pytest.mark.parametrize("mode", ["eager", "static", "unknown", "xla"])
def test_parts_cover_each_example_once(size, part_size, mode):
    part_size = min(size, part_size)

    def run(n):
        step = tf.minimum(n, part_size) if mode == "unknown" else part_size

        def part(first, weights, count):
            assert weights.shape[0] in (None, part_size), weights.shape
            rows = first + tf.range(step)
            each = tf.scatter_nd(rows[:, None], weights * count, [size])
            return [each, count]

        zeros = [tf.zeros([size], tf.float64), tf.zeros([], tf.float64)]
        n = n if mode == "unknown" else size
        return gradients.sum_over_parts(part, n, step, tf.float64, zeros)

    if mode != "eager":
        run = tf.function(run, jit_compile=mode == "xla")
    weights, count = run(tf.constant(size))
    np.testing.assert_allclose(weights, np.ones(size))
    assert float(count) == size


def test_with_gradient_gives_a_value_another_derivative():
    v, w = tf.Variable([1.0, 2.0]), tf.Variable(3.0)
    with tf.GradientTape() as tape:
        value = gradients.with_gradient(
            v[0] * 5.0, [v, w], [tf.constant([7.0, 8.0]), None]
        )
        doubled = 2 * value
    assert float(value) == 5
    found = tape.gradient(doubled, [v, w])
    np.testing.assert_array_equal(found[0], [14, 16])
    assert found[1] is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_difference_step_is_finite_where_the_gradient_is_zero(dtype):
    step = gradients.difference_step([tf.zeros([3])], [tf.ones([3])], dtype)
    assert np.isfinite(step) and step > 0


def test_difference_step_moves_by_a_share_of_the_parameters():
    at = [tf.constant([30.0, 40.0])]
    for direction in ([tf.constant([1e-8, 0.0])], [tf.constant([1e8, 0.0])]):
        step = gradients.difference_step(direction, at, tf.float32)
        moved = float(step) * float(tf.norm(direction[0]))
        expected = 0.1 * np.sqrt(np.finfo("float32").eps) * 51
        np.testing.assert_allclose(moved, expected, rtol=1e-4)


def test_dense_adds_repeated_rows():
    rows = tf.IndexedSlices(
        tf.constant([[1.0], [2.0]]), tf.constant([1, 1]), tf.constant([3, 1])
    )
    found = gradients.dense([None, rows])
    assert found[0] is None
    np.testing.assert_array_equal(found[1], [[0.0], [3.0], [0.0]])


def test_a_norm_from_factors_is_never_negative():
    """Where the gradients of examples cancel, rounding is all there is."""
    random = np.random.default_rng(0)
    norm = _product(4, dtype="float32")
    found = []
    for _ in range(20):
        x = np.tile(random.normal(size=[1, 7]), [4, 1])
        above = random.normal(size=[4, 6])
        above -= above.mean(axis=0)
        norms, _ = norm(
            tf.constant(x, tf.float32), tf.constant(above, tf.float32)
        )
        found.append(norms[1])
    assert min(found) == 0 and max(found) < 1e-4, found


def test_what_has_no_derivative_may_be_infinite():
    x = tf.constant(1e30)
    with tf.GradientTape() as tape:
        tape.watch(x)
        norms = gradients.squared_norms_alone([x, 1e-30 * x], [False, True])
        total = tf.reduce_sum(tf.gather(norms, [1]))
    assert np.isinf(norms[0])
    np.testing.assert_allclose(tape.gradient(total, x), 2e-30, rtol=1e-6)
