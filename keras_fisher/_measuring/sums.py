"""Measurements of single batches, added up by layer, variable or example."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import itertools

import keras
import numpy as np

from keras_fisher.estimates import Estimate
from keras_fisher.estimates import Estimates


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Examples that labels were drawn for twice.

    Attributes:
        norms: With the first and with the second label, of shape
            `(2, pairs, variables)`.
        weights: What makes half of their squared differences unbiased, of
            shape `(pairs,)`: see `likelihoods/pairs.py`.
    """

    norms: np.ndarray
    weights: np.ndarray


class Sums:
    """Adds up measurements, in constant memory but for `by="example"`."""

    def __init__(self, variables: Sequence[keras.Variable], by: str):
        self._by = by
        groups = groups_of(variables, by)
        self._names = list(groups)
        self._members = np.zeros([len(variables), len(groups)])
        for k, members in enumerate(groups.values()):
            self._members[members, k] = 1.0
        self._values, self._variances, self._count = [], [], 0

    def add(self, values: np.ndarray, pairs: Pairs | None, size: int):
        """Takes the measurements of one batch.

        Args:
            values: Of shape `(draws, examples, variables)`; with one row for
                all examples if there are none of single examples.
            pairs: Examples drawn for twice, where there is one draw, or None.
            size: Number of examples.
        """
        values = values.astype("float64") @ self._members
        # What a row counts for: the mean of a batch stands for all of it.
        weight = size / values.shape[1]
        draws, rows, _ = values.shape
        if draws > 1:
            variances = values.var(axis=0, ddof=1) / draws
        elif pairs is not None and self._by != "example":
            first, second = pairs.norms.astype("float64") @ self._members
            squares = np.square(first - second)
            variances = (pairs.weights[:, None] * squares).mean(axis=0) / 2
            variances = np.broadcast_to(variances, [rows, len(variances)])
        else:
            variances = np.full(values.shape[1:], np.nan)
        means = weight * values.mean(axis=0)
        variances = weight**2 * variances
        if self._by != "example":
            means, variances = means.sum(axis=0), variances.sum(axis=0)
            if self._count:
                means += self._values.pop()
                variances += self._variances.pop()
        self._values.append(means)
        self._variances.append(variances)
        self._count += size

    def result(self, has_error: bool):
        if self._by == "example":
            values = np.concatenate(self._values)[:, 0]
            errors = np.sqrt(np.concatenate(self._variances)[:, 0])
            return Estimates(values, errors if has_error else 0.0 * values)
        values = self._values[0] / self._count
        errors = np.sqrt(self._variances[0]) / self._count
        found = {
            name: Estimate(value, error if has_error else 0.0)
            for name, value, error in zip(self._names, values, errors)
        }
        return found["total"] if self._by == "total" else found


def groups_of(
    variables: Sequence[keras.Variable], by: str
) -> dict[str, list[int]]:
    """Positions of the variables in each group, by its name."""
    if by in ("total", "example"):
        return {"total": list(range(len(variables)))}
    groups: dict[str, list[int]] = {}
    paths = set()
    for i, variable in enumerate(variables):
        path = variable.path
        for k in itertools.count(1):
            if path not in paths:
                break
            # Keras lets variables of subclassed models share a path.
            path = f"{variable.path}_{k}"
        paths.add(path)
        name = path.rpartition("/")[0] if by == "layer" else path
        groups.setdefault(name or path, []).append(i)
    return groups
