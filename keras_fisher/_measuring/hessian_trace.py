"""Tr(H): how curved the loss is, by Hutchinson's estimator."""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any
import weakref

import keras
import numpy as np
import tensorflow as tf

from keras_fisher._common import checks
from keras_fisher._common import dtypes
from keras_fisher._common import examples as examples_lib
from keras_fisher._common import keras_3
from keras_fisher._common import keras_layers
from keras_fisher._common import noisy_targets
from keras_fisher._common import random_draws
from keras_fisher._common import structures
from keras_fisher._derivatives import gradients as gradients_lib
from keras_fisher._derivatives import loss_scale
from keras_fisher._derivatives import second_derivatives
from keras_fisher._derivatives import way
from keras_fisher._measuring import batches as batches_lib
from keras_fisher._measuring import function_cache
from keras_fisher._measuring import recorded_call
from keras_fisher._measuring.sums import groups_of
from keras_fisher.estimates import Estimate
from keras_fisher.likelihoods.lookup import of_model

# Fewer samples say too little of their own spread to stop by it.
_LEAST_PROBES = 8
_MOST_TOGETHER = 8
_BY = ("total", "layer", "variable")


def hessian_trace(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    loss: Any = None,
    by: str = "total",
    num_probes: int = 100,
    tolerance: float | None = 0.05,
    batch_size: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    verbose: str | int = "auto",
) -> Estimate | dict[str, Estimate]:
    """Tr(H), the trace of the Hessian of the loss, on given data.

    H is the matrix of second derivatives of the loss L by the trainable
    variables. With probe vectors v of random signs, E[v vᵀ] is the identity, so

        Tr(H) = E_v [vᵀ H v],    H v = ∇_θ ⟨∇_θ L, v⟩.

    The entries of v that belong to some variables give the trace of their block
    of H, Σ_j E[v_j (H v)_j], from the same products. Where a layer or the loss
    has no second derivative, H v is a central difference of gradients, and a
    warning says so if the network has kinks that spoil it.

    On several batches, L is the mean over examples of the batches' losses, as
    Keras computes them, and each batch has probes of its own. So it depends on
    how data are batched with a compiled `reduction="sum"`, and where positions
    are masked or ignored. The model is called with `training=False`.

    Source: Hutchinson, *A stochastic estimator of the trace of the influence
    matrix for Laplacian smoothing splines*, 1990; in Jastrzebski et al., ICML
    2021, Tr(H) tells how flat the minimum is.

    Args:
        model: A compiled Keras model, or any with `loss`.
        x: What `fit` takes: a batch or a longer array of inputs, dense,
            sparse or ragged, a `pandas.DataFrame`, or a list or dict of these;
            or a batched `tf.data.Dataset`, `keras.utils.PyDataset`,
            `torch.utils.data.DataLoader`, data set or loader of Grain, or
            generator of `(x, y)` or `(x, y, sample_weight)`, which is read
            once for every eight probes; a generator's batches are kept.
        y: Labels, if x is not a data set.
        loss: A Keras loss, its name, or a function of `(y_true, y_pred)`;
            its mean over examples is taken. None for what the model is
            trained on: its compiled loss with its regularization losses, and
            without a Fisher penalty.
        by: `"total"`; `"layer"` or `"variable"` for a dict by their paths,
            which sums to the total, and may have negative entries.
        num_probes: The most probes to take.
        tolerance: Stop when the standard error of the total is below this share
            of it; None to take all probes.
        batch_size: Examples computed at once, if x is not a data set; all by
            default.
        steps: Number of batches to read; None for all. Endless data and
            generators need it.
        seed: Integer that the probes start from.
        verbose: 0 for no progress bar, 1 for one, `"auto"` for one that
            appears if reading the data once takes longer than two seconds.

    Returns:
        An `Estimate`, or a dict of them: a float with a `standard_error`, that
        of the random probes; NaN for a single one. It is a little too small
        where `tolerance` has stopped, as it has by chance been small then.

    Raises:
        ValueError: If an argument is not as described, if there is no loss,
            or if the model has no trainable variable.

    Example:
    ```python
    trace = keras_fisher.hessian_trace(model, x, y)
    print(trace, trace.standard_error)
    ```
    """
    checks.choice("by", by, _BY)
    keras_3.check_layer(model)
    num_probes = checks.integer("num_probes", num_probes, 1)
    if tolerance is not None:
        tolerance = checks.number(
            "tolerance",
            tolerance,
            lambda t: 0 < t < math.inf,
            "a positive, finite number or None",
        )
    seed = random_draws.start(seed)
    batches = batches_lib.Batches(x, y, batch_size, steps, verbose, model)
    keras_layers.build_by_call(model, batches.first[0])
    keras_layers.check_trainable(model, "its Hessian is empty")
    keras_layers.check_calls_are_traced_anew(model)
    has_loss = loss is not None or getattr(model, "loss", None) is not None
    if has_loss and batches.first[1] is None:
        raise ValueError(
            "No labels were given, but the loss needs them. Pass `y`, or a "
            "data set of `(x, y)`."
        )
    loss_of = _loss_function(model, loss)
    measure = function_cache.kept(
        model,
        "hessian_trace",
        _what_the_loss_is(model, loss),
        lambda: _Curvature(model, loss_of),
    )
    check_labels = _label_check(model, loss, batches.first[0])
    variables = model.trainable_variables
    samples = np.zeros([0, len(variables)])
    while len(samples) < num_probes:
        count = min(_MOST_TOGETHER, num_probes - len(samples))
        total, examples = np.zeros([count, len(variables)]), 0
        for k, batch in enumerate(batches):
            check_labels(batch[1])
            size = batches_lib.size_of(batch[0])
            of_batch = tf.constant([seed, len(samples) + (k << 32)], tf.int64)
            total += size * measure(*batch, of_batch, count)
            examples += size
        samples = np.concatenate([samples, total / examples])
        if tolerance is not None and len(samples) >= _LEAST_PROBES:
            estimate = _estimate(samples.sum(axis=1))
            if estimate.standard_error <= tolerance * abs(estimate):
                break
    return _grouped(samples, variables, by)


def _grouped(samples: np.ndarray, variables: list, by: str):
    """Estimates from samples of shape `(probes, variables)`."""
    found = {
        name: _estimate(samples[:, members].sum(axis=1))
        for name, members in groups_of(variables, by).items()
    }
    return found["total"] if by == "total" else found


def _estimate(samples: np.ndarray) -> Estimate:
    if len(samples) == 1:
        return Estimate(samples[0], math.nan)
    error = samples.std(ddof=1) / math.sqrt(len(samples))
    return Estimate(samples.mean(), error)


class _Curvature:
    """The terms of vᵀ H v by variable, for several probes at once.

    Of each batch, of shape `(probes, variables)`.
    """

    def __init__(self, model, loss_of: Callable):
        # A weak reference, or the model would live as long as the program.
        self._model = weakref.ref(model)
        self._loss_of = loss_of
        self._function = self._compiled(self._exact)

    def __call__(self, x, y, sample_weight, seed, count: int) -> np.ndarray:
        arguments = x, y, sample_weight, seed
        try:
            return self._function(*arguments, count).numpy()
        except (LookupError, tf.errors.NotFoundError):
            # A layer without second derivative, as recurrent ones, or a loss:
            # TensorFlow then has no kernel for that of CTC.
            self._function = self._compiled(self._difference)
            return self._function(*arguments, count).numpy()

    def _compiled(self, method: Callable) -> Callable:
        return tf.function(
            method,
            jit_compile=function_cache.uses_xla(self._model()),
            autograph=False,
        )

    def _values(self) -> list[tf.Tensor]:
        variables = self._model().trainable_variables
        return [tf.identity(v.value) for v in variables]

    def _loss(self, weights, x, y, sample_weight) -> tf.Tensor:
        model = self._model()
        mapping = [*zip(model.trainable_variables, weights)]
        # Losses that layers add are of the loss as well.
        with keras.StatelessScope(mapping, collect_losses=True):
            outputs = model(x, training=False)
            return self._loss_of(model, x, y, outputs, sample_weight)

    def _way(self, weights, x) -> way.Way:
        """What is on the way from the weights to the outputs."""
        model = self._model()

        def outputs(values):
            return recorded_call.call(model, values, x, training=False)[0]

        otherwise = [w.dtype for w in weights]
        return way.of_function(outputs, weights, otherwise)

    def _gradient(self, weights, x, y, sample_weight) -> list[tf.Tensor]:
        """∇L at `weights`, differentiable; without loss scale."""
        tape = tf.GradientTape(persistent=True, watch_accessed_variables=False)
        with tape, second_derivatives.exact():
            for weight in weights:
                tape.watch(weight)
            loss = self._loss(weights, x, y, sample_weight)
        cotangent = tf.ones_like(loss)
        dtype = keras_layers.compute_dtype(self._model())
        # A mean over B examples starts from 1 / B in each.
        size = tf.cast(examples_lib.number(x), cotangent.dtype)
        scale = loss_scale.fitting([cotangent * tf.math.rsqrt(size)], dtype)
        gradients = gradients_lib.vector_jacobian(
            tape, loss, weights, dtypes.times(cotangent, scale)
        )
        return [
            tf.zeros_like(w) if g is None else loss_scale.unscaled(g, scale)
            for w, g in zip(weights, gradients)
        ]

    def _exact(self, x, y, sample_weight, seed, count):
        weights = self._values()
        tape = tf.GradientTape(persistent=True, watch_accessed_variables=False)
        with tape:
            for weight in weights:
                tape.watch(weight)
            gradients = self._gradient(weights, x, y, sample_weight)

        def curvature(k):
            vector = _signs(weights, seed, k)
            with second_derivatives.complete():
                products = tape.gradient(
                    gradients,
                    weights,
                    output_gradients=vector,
                    unconnected_gradients=tf.UnconnectedGradients.ZERO,
                )
            return _inner_products(vector, gradients_lib.dense(products))

        return _for_each(curvature, count, weights)

    def _difference(self, x, y, sample_weight, seed, count):
        """(∇L(θ + εv) - ∇L(θ - εv)) / 2ε in place of H v."""
        weights = self._values()
        found = self._way(weights, x)
        way.warn_of_kinks(
            found,
            "A layer or the loss has no second derivative; by differences of "
            "gradients Tr(H)",
            'Use the dtype policy "float64", smooth activations and average '
            "pooling, or layers with second derivatives.",
        )

        def curvature(k):
            vector = _signs(weights, seed, k)
            step = _step(weights, found.precision)
            ahead, behind = (
                self._gradient(
                    [
                        w + tf.cast(s, w.dtype) * v
                        for w, v in zip(weights, vector)
                    ],
                    x,
                    y,
                    sample_weight,
                )
                for s in (step, -step)
            )
            change = [a - b for a, b in zip(ahead, behind)]
            return _inner_products(vector, change) / (2.0 * step)

        return _for_each(curvature, count, weights)


def _signs(weights: list, seed: tf.Tensor, k: tf.Tensor) -> list[tf.Tensor]:
    """Random signs, of the shapes of the weights; another draw for each k."""
    vector = []
    for i, weight in enumerate(weights):
        shift = tf.stack([tf.constant(i << 32, tf.int64), tf.cast(k, tf.int64)])
        is_one = random_draws.uniform(tf.shape(weight), seed + shift) < 0.5
        vector.append(tf.where(is_one, tf.ones_like(weight), -1.0))
    return vector


def _inner_products(a: list, b: list) -> tf.Tensor:
    dtype = gradients_lib.common_dtype(a)
    return tf.stack(
        [
            tf.reduce_sum(tf.cast(u, dtype) * tf.cast(v, dtype))
            for u, v in zip(a, b)
        ]
    )


def _for_each(function: Callable, count: int, weights: list) -> tf.Tensor:
    return tf.map_fn(
        function,
        tf.range(count),
        fn_output_signature=tf.TensorSpec(
            [len(weights)], gradients_lib.common_dtype(weights)
        ),
        parallel_iterations=1,
    )


def _step(weights: list, precision: tf.DType) -> tf.Tensor:
    """ε of a central difference along a vector, whose entries are ±1.

    The cube root of the rounding unit of the coarsest dtype times the typical
    size of a weight balances rounding errors with those of the difference.
    """
    dtype = gradients_lib.common_dtype(weights)
    squares = tf.reduce_sum(gradients_lib.squared_norms(weights))
    size = sum(w.shape.num_elements() for w in weights)
    typical = tf.sqrt(tf.cast(squares, dtype) / size)
    unit = dtypes.rounding_unit(precision)
    return unit ** (1 / 3) * (0.1 + typical)


def _label_check(model: Any, loss: Any, x: Any) -> Callable:
    """Function that refuses labels which the loss cannot take."""
    outputs = keras_layers.outputs_of(model, x)
    if loss is not None and not tf.is_tensor(outputs):
        return lambda y: None  # The loss itself is refused.
    try:
        likelihood = of_model(model.loss if loss is None else loss, model)
    except ValueError:
        # Other losses are free to take any labels.
        return lambda y: None
    classes = structures.apply(lambda output: output.shape[-1], outputs)
    names = likelihood.names or ()
    return lambda y: likelihood.check_labels(
        structures.apply(np.asarray, noisy_targets.label_of(y, names)), classes
    )


def _what_the_loss_is(model: Any, loss: Any) -> list:
    """What a function that was traced for a loss goes by."""
    # Weights that nobody can tell are equal to nothing that comes later.
    weights = keras_layers.loss_weights(model, unknown=object())
    return [loss, getattr(model, "loss", None), weights]


def _loss_function(model: Any, loss: Any) -> Callable:
    """Function of model, x, y, outputs and weights that gives the mean loss."""
    if loss is None:
        if not getattr(model, "compiled", False):
            raise ValueError(
                "The model is not compiled, so there is no loss to "
                "differentiate. Call `compile(loss=...)`, or pass `loss=`."
            )
        return _compiled_loss
    loss = keras.losses.get(loss)
    if isinstance(loss, keras.losses.Loss):
        loss = _with_mean(loss)

    def mean_loss(model, x, y, outputs, sample_weight):
        if not tf.is_tensor(outputs):
            raise ValueError(
                "The model has several outputs, whose losses are added up as "
                "`compile` was told. Compile it with them, and pass no `loss`."
            )
        y = tf.convert_to_tensor(noisy_targets.label_of(y))
        if y.shape.rank == outputs.shape.rank - 1 and outputs.shape[-1] == 1:
            y = y[..., None]
        if isinstance(loss, keras.losses.Loss):
            return loss(y, outputs, sample_weight=sample_weight)
        values = loss(y, outputs)
        if sample_weight is not None:
            values *= tf.cast(sample_weight, values.dtype)
        return tf.reduce_mean(values)

    return mean_loss


def _compiled_loss(model, x, y, outputs, sample_weight):
    names = structures.output_names(model, outputs)
    y = noisy_targets.label_of(y, names)
    return model.compute_loss(x, y, outputs, sample_weight, training=False)


def _with_mean(loss: keras.losses.Loss) -> keras.losses.Loss:
    """The loss, its sum or vector over a batch replaced by the mean."""
    if loss.reduction not in ("sum", "none", None):
        return loss
    # `copy` goes by the config, in which Keras's losses leave out their dtype.
    mean = object.__new__(type(loss))
    vars(mean).update(vars(loss), reduction="sum_over_batch_size")
    return mean
