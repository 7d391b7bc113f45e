"""Tr(F): the trace of the Fisher Information Matrix of a model on data."""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any
import weakref

import keras
import numpy as np
import tensorflow as tf

from keras_fisher._common import checks
from keras_fisher._common import examples as examples_lib
from keras_fisher._common import keras_3
from keras_fisher._common import keras_layers
from keras_fisher._common import noisy_targets
from keras_fisher._common import random_draws
from keras_fisher._common import structures
from keras_fisher._derivatives.forward import number_of_examples
from keras_fisher._derivatives.independence import mixes_some_batches
from keras_fisher._measuring import batches as batches_lib
from keras_fisher._measuring import estimators
from keras_fisher._measuring import function_cache
from keras_fisher._measuring import per_example
from keras_fisher._measuring import whole_batch
from keras_fisher._measuring.estimators import ESTIMATORS
from keras_fisher._measuring.sums import Pairs
from keras_fisher._measuring.sums import Sums
from keras_fisher.estimates import Estimate
from keras_fisher.estimates import Estimates
from keras_fisher.likelihoods import output_checks
from keras_fisher.likelihoods.base import Likelihood
from keras_fisher.likelihoods.lookup import of_model

_BY = ("total", "layer", "variable", "example")
# Examples of a batch that are drawn a second time, for the standard error.
_LEAST_PAIRS, _SHARE_OF_PAIRS = 16, 1 / 16
# From so many backward passes on, batches are cut up in turn.
_MANY, _PIECES = 4, 4
_LEAST_TELLING = 8  # examples
# Draws that one call of a compiled function makes.
_MOST_DRAWS = 7 * estimators.MOST_TOGETHER


def fisher_trace(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    estimator: str = "monte_carlo",
    num_samples: int = 1,
    by: str = "total",
    likelihood: Any = "auto",
    batch_size: int | None = None,
    steps: int | None = None,
    training: bool = False,
    seed: int | None = None,
    verbose: str | int = "auto",
) -> Estimate | dict[str, Estimate] | Estimates:
    """Tr(F), the trace of the Fisher Information Matrix, on given data.

    With g(x, y) = ∇_θ [-log p_θ(y|x)], θ the trainable variables and N
    examples x_i,

        Tr(F) = (1/N) Σ_i E_{ŷ~p_θ(y|x_i)} ‖g(x_i, ŷ)‖².

    Source: Jastrzebski et al., *Catastrophic Fisher Explosion*, ICML 2021,
    section 2.

    | `estimator` | what it computes | unbiased | passes |
    |---|---|---|---|
    | `"monte_carlo"` | mean of ‖g(x_i, ŷ_i)‖², ŷ_i drawn | yes | 1 |
    | `"exact"` | the expectation over ŷ | no error | C - 1 |
    | `"empirical"` | mean of ‖g(x_i, y_i)‖², y_i given | not Tr(F) | 1 |
    | `"batch"` | B ‖(1/B) Σ_i g(x_i, ŷ_i)‖² in each batch | yes | 1 |

    Passes are backward passes for each batch and sample; there is one forward
    pass. `"exact"` takes one less than there are classes, times the tokens or
    pixels of an example; with the other likelihoods, one for each output. The
    error of `"batch"` is tens of percent, but it needs no gradient of single
    examples, and so holds with batch normalization in training mode, and for
    graph networks: it counts examples by the rows of the outputs, of which the
    inputs may have more (atoms of molecules); the others refuse such models.

    Args:
        model: A Keras model, or any layer. Each of several outputs needs a
            likelihood; their log-likelihoods add up.
        x: What `fit` takes: a batch or a longer array of inputs, dense,
            sparse (measured as dense by example) or ragged (example after
            example, except with `"batch"`), a `pandas.DataFrame`, or a list or
            dict of these; or a batched `tf.data.Dataset`,
            `keras.utils.PyDataset`, `torch.utils.data.DataLoader`, data set
            or loader of Grain, or generator of `x`, `(x, y)` or
            `(x, y, sample_weight)`, which is read once. Weights are not used.
        y: Labels, if x is not a data set: for `"empirical"`, and for
            likelihoods that leave out positions without a label
            (`ignore_class`), which count if no labels are given.
        estimator: See the table.
        num_samples: Draws of ŷ for each example.
        by: `"total"`; `"layer"` or `"variable"` for a dict by their paths,
            which sums to the total; `"example"` for a vector whose mean is
            the total.
        likelihood: p_θ(y|x) given the outputs, as
            `keras_fisher.likelihoods.of_model` takes it. `"auto"` goes by
            the compiled loss.
        batch_size: Examples computed at once, if x is not a data set; all by
            default.
        steps: Number of batches to read; None for all. Endless data and
            generators need it.
        training: The mode the model is called in. Its state does not change.
        seed: Integer that the draws start from. With `"monte_carlo"`, the
            same seed gives the same figure however the data are batched.
        verbose: 0 for no progress bar, 1 for one, `"auto"` for one that
            appears if the work takes longer than two seconds.

    Returns:
        An `Estimate` (a float with a `standard_error`), a dict of them, or
        for `by="example"` `Estimates` (an array of shape `(N,)` with one).
        The standard error is that of drawing labels, with the data as they
        are. With `num_samples=1`, `"monte_carlo"` finds it from some examples
        (at least 16 in a batch, and a sixteenth of it) that are drawn a second
        label for: another one, weighted by how probable that is, so that the
        error holds as well where the model is sure of its labels. The error
        of single examples and of `"batch"` is then NaN: one draw says nothing
        of its spread.

    Raises:
        ValueError: If an argument is not as described; if the model has no
            trainable variable, or outputs that the likelihood does not expect;
            if the gradient of a single example does not exist (batch
            normalization in training mode; outputs whose rows are not those
            of the inputs).

    Example:
    ```python
    trace = keras_fisher.fisher_trace(model, x)
    print(trace, trace.standard_error)
    for layer, share in keras_fisher.fisher_trace(
        model, dataset, by="layer"
    ).items():
        print(layer, share / trace)
    ```
    """
    keras_3.check_layer(model)
    checks.choice("estimator", estimator, tuple(ESTIMATORS))
    checks.choice("by", by, _BY)
    num_samples = checks.integer("num_samples", num_samples, 1)
    row = ESTIMATORS[estimator]
    if by == "example" and not row.by_example:
        raise ValueError(
            f"`estimator={estimator!r}` computes no gradients of single "
            'examples. Received: by="example". Use `estimator="monte_carlo"`.'
        )
    seed = random_draws.start(seed)
    batches = batches_lib.Batches(x, y, batch_size, steps, verbose, model)
    likelihood = of_model(likelihood, model)
    keras_layers.build_by_call(model, batches.first[0])
    keras_layers.check_trainable(model, "its Fisher information is empty")
    keras_layers.check_calls_are_traced_anew(model)
    measure = function_cache.kept(
        model,
        ("fisher_trace", estimator, bool(training)),
        [likelihood],
        lambda: _Measure(model, likelihood, estimator, bool(training)),
    )
    draws = num_samples if row.draws_labels else 1
    sums, position = Sums(model.trainable_variables, by), 0
    for inputs, labels, _ in batches:
        labels = _wanted(labels, row, likelihood)
        with function_cache.in_graphs():
            values, pairs, size = measure(inputs, labels, seed, position, draws)
        sums.add(values, pairs, size)
        position += size
    return sums.result(has_error=row.draws_labels)


class _Measure:
    """Measures batches of one model in one way."""

    def __init__(
        self, model, likelihood: Likelihood, estimator: str, training: bool
    ):
        # A weak reference, or the model would live as long as the program.
        self._model = weakref.ref(model)
        self._likelihood = likelihood
        self._estimator = ESTIMATORS[estimator]
        self._training = training
        self._functions: dict[tuple, Callable] = {}
        self._classes: int | None = None
        self._factors: int | None = None
        self._one_by_one: frozenset[int] | None = None
        self._told: list[tuple[int, ...]] = []
        self._is_looked_at = False
        self._mixes_some = False

    def __call__(
        self, x: Any, y: Any, seed: int, position: int, draws: int
    ) -> tuple[np.ndarray, Pairs | None, int]:
        """Measures one batch.

        Args:
            x: Inputs.
            y: Labels, or None where none are needed.
            seed: What draws start from.
            position: Number of examples in the batches before.
            draws: Draws of labels for each example.

        Returns:
            What `Sums.add` takes: with `"batch"`, the examples are the rows
            of the outputs.
        """
        if self._estimator.by_example:
            x = examples_lib.apply(_dense, x)
        if self._classes is None:
            self._inspect(x)
        if self._estimator.by_example:
            self._look_for_mixing(x)
        if y is not None:
            given = structures.apply(lambda t: t.numpy(), y)
            self._likelihood.check_labels(given, self._classes)
        if not self._estimator.by_example or self._passes(draws) < _MANY:
            return self._measure(x, y, seed, position, draws)
        size = batches_lib.size_of(x)
        length = -(-size // _PIECES)
        pieces = []
        for begin in range(0, size, length):
            piece = batches_lib.rows((x, y), begin, begin + length)
            values, *_ = self._measure(*piece, seed, position + begin, draws)
            pieces.append(values)
        return np.concatenate(pieces, axis=1), None, size

    def _inspect(self, x: Any) -> None:
        """Looks at outputs, and refuses what is not expected of them."""
        outputs = keras_layers.outputs_of(self._model(), x)
        self._likelihood.check_structure(outputs)
        self._mixes_some = mixes_some_batches(self._model())
        rows = number_of_examples(outputs)
        if self._estimator.by_example and rows != batches_lib.size_of(x):
            raise ValueError(
                f"The outputs have {rows} rows, the first of the inputs has "
                f"{batches_lib.size_of(x)}, so that it is unknown which "
                "inputs an example has; gradients of single examples need as "
                'many. Use `estimator="batch"`, which counts examples by the '
                "rows of the outputs."
            )
        output_checks.check(self._likelihood, self._model(), x, outputs)
        outputs = structures.apply(lambda t: t[:1], outputs)
        self._classes = structures.apply(lambda t: t.shape[-1], outputs)
        if self._estimator.sums_over_labels:
            self._factors, _ = self._likelihood.fisher_factors(outputs)

    def _look_for_mixing(self, x: Any) -> None:
        """Refuses models whose examples see each other, where norms may not.

        Those of few examples, or of pieces of few, do not tell, and those of
        later batches are not looked at but where it goes by the values.
        """
        model, size = self._model(), batches_lib.size_of(x)
        if examples_lib.has_ragged(x) or self._mixes_some:
            per_example.check_alone(model, x)
            return
        norms_tell = size >= _PIECES * _LEAST_TELLING
        is_first = self._one_by_one is None
        if not (
            self._is_looked_at
            or self._training
            or keras_layers.has_fixed_batch(model)
            or (is_first and norms_tell)
        ):
            per_example.check_alone(model, x)
        self._is_looked_at |= size >= _LEAST_TELLING

    def _passes(self, draws: int) -> int:
        """Number of backward passes."""
        return draws if self._factors is None else self._factors

    def _measure(self, x, y, seed, position, draws):
        with_pairs = self._estimator.draws_pairs(draws)
        values, pairs = [], None
        size = batches_lib.size_of(x)
        for first in range(0, draws, _MOST_DRAWS):
            count = min(_MOST_DRAWS, draws - first)
            found = self._function(x, y, count, with_pairs)(
                x,
                y,
                tf.constant([seed, first], tf.int64),
                tf.constant(position, tf.int64),
            )
            values.append(found["values"].numpy())
            size = int(found.get("size", size))
            if with_pairs:
                pairs = Pairs(
                    found["pairs"].numpy(), found["pair_weights"].numpy()
                )
        return np.concatenate(values), pairs, size

    def _function(self, x, y, draws: int, with_pairs: bool) -> Callable:
        shapes = tuple(
            (tuple(t.shape), t.dtype)
            for t in keras.tree.flatten((x, y))
            if t is not None
        )
        key = (shapes, draws, with_pairs)
        if key not in self._functions:
            self._functions[key] = self._compiled(x, draws, with_pairs)
        return self._functions[key]

    def _compiled(self, x: Any, draws: int, with_pairs: bool) -> Callable:
        record = self._recorder(x, draws, with_pairs)

        def measure(x, y, seed, position):
            size, rows = batches_lib.size_of(x), None
            if with_pairs:
                (x, y), rows = _with_pairs((x, y), seed)
            recording = record(x)
            if not self._estimator.by_example:
                size = recording.size
            batch = estimators.Batch(
                recording,
                structures.split(recording.outputs, recording.structure),
                self._likelihood,
                y,
                size,
                rows,
                seed,
                position,
                draws,
            )
            norms = self._estimator.norms(batch)
            if not with_pairs:
                return {"values": norms, "size": size}
            first = tf.gather(norms[0], rows)
            return {
                "values": norms[:, :size],
                "pairs": tf.stack([first, norms[0, size:]]),
                "pair_weights": batch.pair_weights(),
            }

        is_ragged = examples_lib.has_ragged(x)
        return tf.function(
            measure,
            # XLA needs shapes, and those of ragged tensors are others in
            # each batch.
            jit_compile=function_cache.uses_xla(self._model())
            and not is_ragged,
            reduce_retracing=is_ragged,
            autograph=False,
        )

    def _recorder(self, x: Any, draws: int, with_pairs: bool) -> Callable:
        """Function that runs the model on inputs."""
        model, training = self._model(), self._training
        if not self._estimator.by_example:
            return lambda x: whole_batch.Recording(self._model(), x, training)
        if with_pairs:
            x, _ = _with_pairs(x, tf.zeros([2], tf.int64))
        try:
            layout = per_example.layout_for(model, x, training)
        except Exception as error:
            if not keras_layers.has_fixed_batch(model):
                raise
            raise ValueError(
                "Gradients of single examples are found with other numbers of "
                f"examples, but {model.name} takes one alone. Use "
                '`estimator="batch"`, or make the model without a `batch_size`.'
            ) from error
        self._find_untrusted(x, layout)
        return lambda x: per_example.Recording(
            self._model(),
            x,
            layout,
            training=training,
            passes=self._passes(draws),
            one_by_one=self._one_by_one,
        )

    def _find_untrusted(self, x: Any, layout: per_example.Layout) -> None:
        """Finds what has to be computed one by one, unless shapes told it.

        An axis of few entries, as of a batch of one, does not tell which axis
        another is a part of.
        """
        told = tuple(
            min(_LEAST_TELLING, size)
            for leaf in examples_lib.tensors(x)
            for size in leaf.shape
            if size is not None
        )
        if any(
            len(told) == len(known) and all(a <= b for a, b in zip(told, known))
            for known in self._told
        ):
            return
        self._told.append(told)
        known = self._one_by_one or frozenset()
        self._one_by_one = known | per_example.untrusted(
            self._model(), x, layout, self._training
        )
        if self._one_by_one > known:
            self._functions.clear()


def _with_pairs(x: Any, seed: tf.Tensor) -> tuple[Any, tf.Tensor]:
    """Appends some of the examples again; returns which ones."""
    size = batches_lib.size_of(x)
    count = min(size, max(_LEAST_PAIRS, math.ceil(_SHARE_OF_PAIRS * size)))
    # Drawn with a seed that no labels are drawn with.
    rows = random_draws.permutation(size, seed - 1)[:count]
    return examples_lib.with_again(x, rows), rows


def _wanted(
    y: Any, estimator: estimators.Estimator, likelihood: Likelihood
) -> Any:
    """Labels for the estimator, or to see where there are none."""
    y = noisy_targets.label_of(y, likelihood.names or ())
    y = structures.taken_out(y, likelihood.takes_several_outputs)
    if estimator.reads_labels:
        return _given(y)
    if not likelihood.reads_labels:
        return None
    return structures.apply(tf.convert_to_tensor, y)


def _given(y: Any) -> Any:
    if y is None:
        raise ValueError(
            '`estimator="empirical"` takes the gradients with the labels of '
            "the data set, but no `y` was given. Pass `y`, or use "
            '`estimator="monte_carlo"`, which draws labels from the model.'
        )
    return structures.apply(tf.convert_to_tensor, y)


def _dense(x: Any) -> Any:
    """An input whose examples can be told apart in a graph."""
    return tf.sparse.to_dense(x) if isinstance(x, tf.SparseTensor) else x
