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


def test_one_draw_takes_the_error_from_pairs():
    values = np.arange(12.0).reshape(1, 6, 2)
    again = np.array([[[0.0, 0.0], [1.0, 0.0]], [[2.0, 1.0], [1.0, 3.0]]])
    sums = sums_lib.Sums(_variables("a/k", "a/b"), "total")
    sums.add(values, again, 6)
    result = sums.result(has_error=True)
    assert result == pytest.approx(values.sum() / 6)
    # Differences of the totals of 3 each, so a variance of 4.5 an example.
    assert result.standard_error == pytest.approx(np.sqrt(6 * 4.5) / 6)


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
