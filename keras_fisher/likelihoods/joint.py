"""Several outputs, each with a likelihood of its own."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_fisher._common import random_draws
from keras_fisher.likelihoods.base import LABELS
from keras_fisher.likelihoods.base import Likelihood
from keras_fisher.likelihoods.losses import likelihood_of


@keras.saving.register_keras_serializable(package="keras_fisher")
class Joint(Likelihood):
    """Independent labels of several outputs: log p(y|x) = Σ_k log p_k(y_k|x).

    Outputs, labels and masks are lists in the order of the likelihoods, or
    dicts by name. Labels may be left out of outputs that have no likelihood:
    then there are those of the others alone, one of them as it is.

    Args:
        likelihoods: A likelihood for each output, as `get` takes it, in a list
            or in a dict by name; None for an output that has no label.
        names: Names of the outputs, if `likelihoods` is a list.

    Raises:
        ValueError: If no output has a likelihood.

    Example:
    >>> keras_fisher.likelihoods.Joint(["mse", "bernoulli"])
    Joint([Gaussian(stddev=1.0), Bernoulli(from_logits=True)], names=None)
    """

    def __init__(self, likelihoods: Any, names: list[str] | None = None):
        if isinstance(likelihoods, dict):
            names, likelihoods = list(likelihoods), likelihoods.values()
        self.likelihoods = [
            None if each is None else likelihood_of(each)
            for each in likelihoods
        ]
        self.names = None if names is None else list(names)
        if not any(self.likelihoods):
            raise ValueError(
                "One of several outputs at least needs a likelihood. "
                f"Received: {self.likelihoods}"
            )

    takes_several_outputs = True

    @property
    def constrains_outputs(self) -> bool:
        return any(each.constrains_outputs for each in self.likelihoods if each)

    def _in_order(self, values: Any, what: str = "outputs") -> list:
        """What belongs to each likelihood."""
        if isinstance(values, dict) and self.names is not None:
            if set(self.names) <= set(values):
                return [values[name] for name in self.names]
        elif isinstance(values, (list, tuple)):
            if len(values) == len(self.likelihoods):
                return list(values)
        elif values is None:
            return [None] * len(self.likelihoods)
        raise self._misfit(values, what)

    def _labels_in_order(self, y: Any) -> list:
        """Labels for each likelihood, and None or anything elsewhere."""
        labelled = [k for k, each in enumerate(self.likelihoods) if each]
        if isinstance(y, dict) and self.names is not None:
            if all(self.names[k] in y for k in labelled):
                return [y.get(name) for name in self.names]
        elif isinstance(y, (list, tuple)) and len(y) == len(self.likelihoods):
            return list(y)
        elif y is None:
            return [None] * len(self.likelihoods)
        given = y if isinstance(y, (list, tuple)) else [y]
        if isinstance(y, dict) or len(given) != len(labelled):
            raise self._misfit(y, "labels")
        labels = [None] * len(self.likelihoods)
        for k, label in zip(labelled, given):
            labels[k] = label
        return labels

    def _misfit(self, values: Any, what: str) -> ValueError:
        count, names = len(self.likelihoods), self.names
        found = values
        if isinstance(values, dict):
            found = list(values)
        elif not isinstance(values, (list, tuple)):
            found = f"one of the shape {getattr(values, 'shape', ())}"
        without = [
            names[k] if names else k
            for k, each in enumerate(self.likelihoods)
            if each is None
        ]
        return ValueError(
            f"There are likelihoods for {count} outputs"
            f"{f' of the names {names}' if names else ''}, so the "
            f"{what} have to be a list of as many or a dict with these names"
            + (f"; {without} may be left out of labels" if without else "")
            + f". Received: {found}"
        )

    def parts(self, outputs, *others):
        columns = [
            self._labels_in_order(values)
            if what == LABELS
            else self._in_order(values, what)
            for what, values in others
        ]
        return [
            (k, each, *rest)
            for k, (each, *rest) in enumerate(
                zip(self.likelihoods, self._in_order(outputs), *columns)
            )
            if each is not None
        ]

    def _like(self, outputs: Any, found: dict[int, tf.Tensor]) -> Any:
        """Tensors by number, zeros elsewhere, in the outputs' structure."""
        tensors = [
            found[k] if k in found else tf.zeros_like(output)
            for k, output in enumerate(self._in_order(outputs))
        ]
        if not isinstance(outputs, dict):
            return tensors
        rest = {name: tf.zeros_like(output) for name, output in outputs.items()}
        return {**rest, **dict(zip(self.names, tensors))}

    def _drawn(self, draw: str, outputs: Any, seed: tf.Tensor) -> list:
        labels = [None] * len(self.likelihoods)
        for k, each, output in self.parts(outputs):
            own_seed = random_draws.of_output(seed, k)
            labels[k] = getattr(each, draw)(output, own_seed)
        return labels

    def sample(self, outputs, seed):
        return self._drawn("sample", outputs, seed)

    def uniform(self, outputs, seed):
        return self._drawn("uniform", outputs, seed)

    def negative_log_likelihood(self, y, outputs, mask=None):
        return tf.add_n(
            [
                each.negative_log_likelihood(label, output, hidden)
                for _, each, output, label, hidden in self.parts(
                    outputs, (LABELS, y), ("masks", mask)
                )
            ]
        )

    def score(self, y, outputs, mask=None, weights=None):
        return self._like(
            outputs,
            {
                k: each.score(label, output, hidden, weights)
                for k, each, output, label, hidden in self.parts(
                    outputs, (LABELS, y), ("masks", mask)
                )
            },
        )

    @property
    def reads_labels(self) -> bool:
        return any(each.reads_labels for each in self.likelihoods if each)

    def visible(self, y, outputs, mask=None):
        masks = [None] * len(self.likelihoods)
        for k, each, output, label, hidden in self.parts(
            outputs, (LABELS, y), ("masks", mask)
        ):
            masks[k] = each.visible(label, output, hidden)
        return masks

    def fisher_factors(self, outputs, mask=None):
        count, blocks = 0, []
        for k, each, output, hidden in self.parts(outputs, ("masks", mask)):
            size, factor = each.fisher_factors(output, hidden)
            blocks.append((k, count, size, factor))
            count += size

        def factor(j):
            # Each belongs to one output, and is zero at the others.
            found = {}
            for k, begin, size, function in blocks:
                own = function(tf.clip_by_value(j - begin, 0, size - 1))
                inside = (j >= begin) & (j < begin + size)
                found[k] = tf.where(inside, own, tf.zeros_like(own))
            return self._like(outputs, found)

        return count, factor

    def check(self, outputs):
        for _, each, output in self.parts(outputs):
            each.check(output)

    @property
    def constrains_operations(self) -> bool:
        return any(
            each.constrains_operations for each in self.likelihoods if each
        )

    def check_operation(self, operation, outputs=None):
        for _, each, own, output in self.parts(operation, ("outputs", outputs)):
            if each.constrains_operations:
                each.check_operation(own, output)

    def check_labels(self, y, classes):
        for _, each, count, label in self.parts(classes, (LABELS, y)):
            each.check_labels(label, count)

    def _misses(self, method, needed_by):
        return (
            f"`{method}` is of one output. Call it for each of `likelihoods`; "
            "of all outputs together there is `negative_log_likelihood`."
        )

    def get_config(self):
        return {
            "likelihoods": [
                keras.saving.serialize_keras_object(each)
                for each in self.likelihoods
            ],
            "names": self.names,
        }

    def __repr__(self):
        return f"Joint({self.likelihoods}, names={self.names})"
