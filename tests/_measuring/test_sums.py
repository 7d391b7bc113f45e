"""Sums over batches carry their errors."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from keras_fisher._measuring import sums as sums_lib


def _variables(*paths):
    variables = []
    for path in paths:
        with keras.name_scope(path.rpartition("/")[0]):
            variables.append(keras.Variable(0.0, name=path.rpartition("/")[2]))
    return variables


def test_means_and_errors_are_weighted_by_examples():
    """Against the same sums over all examples at once."""
    random = np.random.default_rng(0)
    values = random.normal(size=(4, 10, 3)).astype("float32")
    sums = sums_lib.Sums(_variables("a/k", "a/b", "c/k"), "layer")
    sums.add(values[:, :7], None, 7)
    sums.add(values[:, 7:], None, 3)
    result = sums.result(has_error=True)
    for name, members in {"a": [0, 1], "c": [2]}.items():
        of_layer = values[:, :, members].astype("float64").sum(axis=2)
        assert result[name] == pytest.approx(of_layer.mean())
        error = np.sqrt((of_layer.var(axis=0, ddof=1) / 4).sum()) / 10
        assert result[name].standard_error == pytest.approx(error)


@pytest.mark.parametrize("by", ["total", "layer", "variable"])
def test_one_draw_takes_the_error_from_pairs(by):
    values = np.arange(12.0).reshape(1, 6, 2)
    norms = np.array([[[0.0, 0.0], [1.0, 0.0]], [[2.0, 1.0], [1.0, 3.0]]])
    pairs = sums_lib.Pairs(norms, np.array([0.5, 0.1]))
    sums = sums_lib.Sums(_variables("a/k", "a/b"), by)
    sums.add(values, pairs, 6)
    result = sums.result(has_error=True)
    if by == "total":
        result = {"a": result}
    expected = {
        # Differences of the totals of 3 each, squared and weighted.
        "a": (values.sum() / 6, (0.5 * 9 + 0.1 * 9) / 4),
        "a/k": (5.0, 0.5 * 4 / 4),
        "a/b": (6.0, (0.5 * 1 + 0.1 * 9) / 4),
    }
    assert result.keys() == ({"a/k", "a/b"} if by == "variable" else {"a"})
    for name, found in result.items():
        value, variance = expected[name]
        assert found == pytest.approx(value)
        assert found.standard_error == pytest.approx(np.sqrt(variance / 6))


def test_pairs_say_nothing_of_single_examples():
    sums = sums_lib.Sums(_variables("a/k"), "example")
    pairs = sums_lib.Pairs(np.ones([2, 3, 1]), np.ones([3]))
    sums.add(np.ones([1, 3, 1]), pairs, 3)
    assert np.isnan(sums.result(has_error=True).standard_error).all()


def test_a_row_can_stand_for_a_batch():
    """As estimates from whole batches do."""
    values = np.array([[[1.0]], [[3.0]]])
    sums = sums_lib.Sums(_variables("a/k"), "total")
    sums.add(values, None, 30)
    sums.add(values + 4.0, None, 10)
    result = sums.result(has_error=True)
    assert result == pytest.approx((30 * 2.0 + 10 * 6.0) / 40)
    error = np.sqrt(30**2 * 1.0 + 10**2 * 1.0) / 40
    assert result.standard_error == pytest.approx(error)


def test_paths_that_come_twice_are_numbered():
    variables = [*_variables("a/k"), *_variables("a/k"), *_variables("b")]
    sums = sums_lib.Sums(variables, "variable")
    sums.add(np.ones([1, 1, 3]), None, 1)
    assert list(sums.result(has_error=False)) == ["a/k", "a/k_1", "b"]
    sums = sums_lib.Sums(variables, "layer")
    sums.add(np.ones([1, 1, 3]), None, 1)
    assert sums.result(has_error=False) == {"a": 2.0, "b": 1.0}
