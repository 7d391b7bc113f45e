"""Predictive distributions p(y|x): what the outputs of a model say of labels.

A likelihood draws labels from the model (ŷ ~ p_θ(y|x)), draws them uniformly,
and gives the negative log-likelihood of each example. The first axis of the
outputs runs over examples; axes between it and the classes (tokens, pixels)
are independent parts of one example, and their log-likelihoods add up. So do
those of several outputs (`Joint`).
"""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_fisher import sampling

_PACKAGE = "keras_fisher"


def compute_dtype(dtype) -> tf.DType:
    """The dtype probabilities are computed in: at least single precision."""
    dtype = tf.as_dtype(dtype)
    return dtype if dtype.size >= 4 else tf.float32


def precise(outputs) -> tf.Tensor:
    """Outputs in at least single precision."""
    return tf.cast(outputs, compute_dtype(outputs.dtype))


def _log(probabilities: tf.Tensor) -> tf.Tensor:
    # Only an exact zero is moved: a larger floor would stop the gradient of
    # improbable labels, which `UniformLabelPenalty` draws all the time.
    tiny = np.finfo(probabilities.dtype.as_numpy_dtype).tiny
    return tf.math.log(tf.maximum(probabilities, tiny))


def _aligned(mask: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """A mask of the first axes of `x`, with as many axes as `x`."""
    missing = x.shape.rank - mask.shape.rank
    return tf.reshape(mask, tf.concat([tf.shape(mask), [1] * missing], 0))


def _one_by_one(entries: tf.Tensor):
    """Factors of a diagonal matrix, given the roots of its diagonal."""
    shape = entries.shape
    size = math.prod(shape[1:])

    def factor(k):
        chosen = tf.one_hot(k, size, dtype=entries.dtype)
        return entries * tf.reshape(chosen, [1, *shape[1:]])

    return size, factor


class Likelihood:
    """Base class of predictive distributions.

    A subclass implements `sample`, `uniform`, `log_probability` (without
    summing over the parts of an example) and, for `fisher_factors`,
    `_factors`.
    """

    def sample(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Draws ŷ ~ p(y|x).

        Args:
            outputs: Model outputs, of shape `(batch, ...)`.
            seed: `int64` tensor of shape `(2,)`, see `sampling.draw`.

        Returns:
            Labels that `negative_log_likelihood` takes. No gradient flows
            through them. The same seed gives the same labels eagerly, in a
            graph and under XLA.
        """
        raise NotImplementedError

    def uniform(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Draws labels with equal probability, whatever the outputs say.

        Args:
            outputs: Model outputs, of shape `(batch, ...)`.
            seed: `int64` tensor of shape `(2,)`.

        Returns:
            Labels that `negative_log_likelihood` takes.
        """
        raise NotImplementedError

    def log_probability(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        """Log p(y|x) of each part of each example, in 32 bits or more."""
        raise NotImplementedError

    def negative_log_likelihood(
        self,
        y: tf.Tensor,
        outputs: tf.Tensor,
        mask: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """-log p(y|x), summed over the parts of each example.

        Args:
            y: Labels: drawn by `sample` or `uniform`, or of the data set.
            outputs: Model outputs, of shape `(batch, ...)`.
            mask: Boolean, of the shape of the parts (`(batch, time)`). Parts
                that it hides are no part of the example: they add zero.

        Returns:
            Tensor of shape `(batch,)`, `float32` or the wider dtype of
            `outputs`.
        """
        parts = -self.log_probability(y, outputs)
        if mask is not None:
            mask = tf.cast(_aligned(mask, parts), parts.dtype)
            # Whatever the hidden parts are, NaN included.
            parts = tf.math.multiply_no_nan(parts, mask)
        return tf.reduce_sum(parts, axis=list(range(1, parts.shape.rank)))

    def score(
        self,
        y: tf.Tensor,
        outputs: tf.Tensor,
        mask: tf.Tensor | None = None,
        weights: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """The gradient of Σ_i w_i (-log p(y_i|x_i)) at the outputs.

        Args:
            y: Labels.
            outputs: Model outputs, of shape `(batch, ...)`.
            mask: As for `negative_log_likelihood`.
            weights: w, of shape `(batch,)`; ones if None.

        Returns:
            Tensor of the shape and dtype of `outputs`.
        """
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(outputs)
            loss = self.negative_log_likelihood(y, outputs, mask)
        if weights is not None:
            weights = tf.cast(weights, loss.dtype)
        return tape.gradient(loss, outputs, output_gradients=weights)

    def fisher_factors(
        self, outputs: tf.Tensor, mask: tf.Tensor | None = None
    ) -> tuple[int, Callable[[tf.Tensor], tf.Tensor]]:
        """The Fisher information at the outputs, in closed form.

        For each example, with ∇ the derivative by its outputs f,

            E_{ŷ~p(y|x)} [∇(-log p(ŷ|x)) ∇(-log p(ŷ|x))ᵀ] = Σ_k s_k s_kᵀ,

        so that E ‖∇_θ -log p(ŷ|x)‖² = Σ_k ‖(∂f/∂θ)ᵀ s_k‖² needs one backward
        pass for each k.

        Args:
            outputs: Model outputs, of known shape `(batch, ...)`.
            mask: As for `negative_log_likelihood`.

        Returns:
            The number of factors, and a function of k, an `int32` scalar,
            that returns s_k for all examples, of the shape of `outputs`, in
            32 bits or more.
        """
        count, factor = self._factors(precise(outputs))
        if mask is None:
            return count, factor
        mask = _aligned(mask, outputs)
        return count, lambda k: tf.math.multiply_no_nan(
            factor(k), tf.cast(mask, compute_dtype(outputs.dtype))
        )

    def _factors(self, outputs: tf.Tensor):
        """`fisher_factors` of outputs in 32 bits or more, without a mask."""
        raise NotImplementedError(
            f"{type(self).__name__} has no closed-form Fisher information: it "
            'implements no `_factors`. Use `estimator="monte_carlo"`.'
        )

    def check(self, outputs: Any) -> None:
        """Raises a `ValueError` where outputs cannot be what is claimed.

        Args:
            outputs: Concrete (not symbolic) model outputs.
        """

    def check_labels(self, y: Any, classes: int) -> None:
        """Raises a `ValueError` where labels are none of the classes.

        Args:
            y: NumPy array of labels; what is none is not looked at.
            classes: Size of the last axis of the outputs.
        """

    def get_config(self) -> dict:
        return {}

    @classmethod
    def from_config(cls, config: dict) -> Likelihood:
        return cls(**config)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v}" for k, v in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


def _is_dense(y: tf.Tensor, outputs: tf.Tensor) -> bool:
    """Whether labels are probabilities per class, not class indices."""
    return (
        y.shape.rank == outputs.shape.rank
        and y.shape[-1] == outputs.shape[-1]
        and outputs.shape[-1] != 1
    )


@keras.saving.register_keras_serializable(package=_PACKAGE)
class Categorical(Likelihood):
    """One of C classes, the softmax of the last axis.

    Labels are class indices of shape `outputs.shape[:-1]` (or with a last
    axis of 1), or one-hot or soft labels of the shape of the outputs.

    Args:
        from_logits: Whether outputs are logits rather than probabilities.
    """

    def __init__(self, from_logits: bool = True):
        self.from_logits = bool(from_logits)

    def _log_probabilities(self, outputs: tf.Tensor) -> tf.Tensor:
        outputs = precise(outputs)
        return tf.nn.log_softmax(outputs) if self.from_logits else _log(outputs)

    def sample(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        logits = (
            precise(outputs) if self.from_logits else _log(precise(outputs))
        )
        # Gumbel-max: `tf.random.stateless_categorical` has no XLA kernel.
        noise = sampling.gumbel(tf.shape(logits), seed, logits.dtype)
        return tf.argmax(tf.stop_gradient(logits) + noise, axis=-1)

    def uniform(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        classes = outputs.shape[-1]
        labels = sampling.integers(tf.shape(outputs)[:-1], classes, seed)
        return tf.cast(labels, tf.int64)

    def log_probability(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        log_probabilities = self._log_probabilities(outputs)
        if not _is_dense(y, outputs):
            if y.shape.rank == outputs.shape.rank:
                y = tf.squeeze(y, axis=-1)
            # One-hot rather than gather: its gradient needs no scatter.
            y = tf.one_hot(
                tf.cast(y, tf.int64),
                outputs.shape[-1],
                dtype=log_probabilities.dtype,
            )
        y = tf.cast(y, log_probabilities.dtype)
        # A class with probability 0 counts only if it is the label.
        return tf.reduce_sum(
            tf.math.multiply_no_nan(log_probabilities, y), axis=-1
        )

    def _factors(self, outputs: tf.Tensor):
        """C - 1 factors for each part of an example.

        Of diag(p) - p pᵀ, the information at the logits, the Cholesky factor
        is known: with q_j = Σ_{i>j} p_i, column j is
        √(p_j q_j / q_{j-1}) (e_j - Σ_{i>j} (p_i / q_j) e_i), the information
        in whether the class is j, given that none before j is. At
        probabilities, that is divided by p.

        Source: Tanabe & Sagae, *An exact Cholesky decomposition and the
        generalized inverse of the variance-covariance matrix of the
        multinomial distribution*, JRSS B, 1992.
        """
        shape = outputs.shape
        parts, classes = math.prod(shape[1:-1]), shape[-1]
        p = tf.nn.softmax(outputs) if self.from_logits else outputs
        p = tf.reshape(p, [-1, parts, classes])
        after = tf.cumsum(p, axis=-1, exclusive=True, reverse=True)
        size = tf.sqrt(p * tf.math.divide_no_nan(after, after + p))

        def factor(k):
            j = k % (classes - 1)
            is_class = tf.one_hot(j, classes, dtype=p.dtype)
            # Of the classes after j.
            share = tf.math.divide_no_nan(
                p, tf.reduce_sum(after * is_class, -1, keepdims=True)
            ) * tf.cast(tf.range(classes) > j, p.dtype)
            column = is_class - share
            column *= tf.reduce_sum(size * is_class, -1, keepdims=True)
            if not self.from_logits:
                column = tf.math.divide_no_nan(column, p)
            is_part = tf.one_hot(k // (classes - 1), parts, dtype=p.dtype)
            return tf.reshape(column * is_part[None, :, None], shape)

        return parts * (classes - 1), factor

    def check_labels(self, y: Any, classes: int) -> None:
        if (
            not isinstance(y, np.ndarray)
            or not np.issubdtype(y.dtype, np.integer)
            or y.size == 0
        ):
            return
        if y.min() < 0 or y.max() >= classes:
            raise ValueError(
                f"The model has {classes} classes, so labels have to be from "
                f"0 to {classes - 1}. Received labels from {y.min()} to "
                f"{y.max()}. Number the classes from 0, or give the model "
                "more outputs."
            )

    def check(self, outputs: Any) -> None:
        if self.from_logits:
            return
        outputs = keras.ops.convert_to_numpy(keras.ops.cast(outputs, "float32"))
        sums = outputs.sum(axis=-1)
        errors = abs(sums - 1)
        if not ((outputs >= 0).all() and (errors <= 1e-2).all()):
            raise ValueError(
                "The likelihood expects probabilities (from_logits=False), "
                "but the outputs of the model are not: they range from "
                f"{outputs.min():.3g} to {outputs.max():.3g} and sum to "
                f"{sums.flat[errors.argmax()]:.3g} over the last axis. Pass "
                "`from_logits=True` to the loss or likelihood, or end the "
                "model with a softmax."
            )

    def get_config(self) -> dict:
        return {"from_logits": self.from_logits}


@keras.saving.register_keras_serializable(package=_PACKAGE)
class Bernoulli(Likelihood):
    """Independent yes-or-no labels, the sigmoid of each output.

    Labels have the shape of the outputs; a label between 0 and 1 counts as
    both answers, weighted.

    Args:
        from_logits: Whether outputs are logits rather than probabilities.
    """

    def __init__(self, from_logits: bool = True):
        self.from_logits = bool(from_logits)

    def sample(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        outputs = tf.stop_gradient(precise(outputs))
        p = tf.sigmoid(outputs) if self.from_logits else outputs
        draws = sampling.uniform(tf.shape(p), seed, p.dtype)
        return tf.cast(draws < p, p.dtype)

    def uniform(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        draws = sampling.uniform(tf.shape(outputs), seed)
        return tf.cast(draws < 0.5, compute_dtype(outputs.dtype))

    def log_probability(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        outputs = precise(outputs)
        y = tf.reshape(tf.cast(y, outputs.dtype), tf.shape(outputs))
        if self.from_logits:
            yes, no = -tf.nn.softplus(-outputs), -tf.nn.softplus(outputs)
        else:
            yes, no = _log(outputs), _log(1 - outputs)
        return y * yes + (1 - y) * no

    def _factors(self, outputs: tf.Tensor):
        # The variance of a yes, p (1 - p), at the logit; 1 over it at p.
        if self.from_logits:
            p = tf.sigmoid(outputs)
            return _one_by_one(tf.sqrt(p * tf.sigmoid(-outputs)))
        variance = outputs * (1 - outputs)
        return _one_by_one(tf.math.divide_no_nan(1.0, tf.sqrt(variance)))

    def check(self, outputs: Any) -> None:
        if self.from_logits:
            return
        outputs = keras.ops.convert_to_numpy(keras.ops.cast(outputs, "float32"))
        if not ((outputs >= 0).all() and (outputs <= 1).all()):
            raise ValueError(
                "The likelihood expects probabilities (from_logits=False), "
                "but the outputs of the model are not: they range from "
                f"{outputs.min():.3g} to {outputs.max():.3g}. Pass "
                "`from_logits=True` to the loss or likelihood, or end the "
                "model with a sigmoid."
            )

    def get_config(self) -> dict:
        return {"from_logits": self.from_logits}


@keras.saving.register_keras_serializable(package=_PACKAGE)
class Gaussian(Likelihood):
    """Real-valued labels, normal around each output.

    -log p(y|x) = (y - f(x))² / 2σ² + log σ + log(2π)/2 for each output. With
    σ = 1 the gradient is that of half the squared error, summed over outputs.

    Args:
        stddev: The standard deviation σ, a positive number.
    """

    def __init__(self, stddev: float = 1.0):
        if not (math.isfinite(stddev) and stddev > 0):
            raise ValueError(
                "`stddev` must be a positive, finite number. "
                f"Received: stddev={stddev}"
            )
        self.stddev = float(stddev)

    def sample(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        mean = tf.stop_gradient(precise(outputs))
        noise = sampling.normal(tf.shape(mean), seed, mean.dtype)
        return mean + self.stddev * noise

    def uniform(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        raise ValueError(
            "A Gaussian likelihood has no uniform labels: the real line "
            "cannot be drawn from uniformly. Use `FisherPenalty` or "
            "`GradientPenalty` with a regression loss."
        )

    def log_probability(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        outputs = precise(outputs)
        y = tf.reshape(tf.cast(y, outputs.dtype), tf.shape(outputs))
        scaled = (y - outputs) / self.stddev
        constant = math.log(self.stddev) + 0.5 * math.log(2 * math.pi)
        return -0.5 * tf.square(scaled) - constant

    def _factors(self, outputs: tf.Tensor):
        return _one_by_one(tf.ones_like(outputs) / self.stddev)

    def get_config(self) -> dict:
        return {"stddev": self.stddev}


@keras.saving.register_keras_serializable(package=_PACKAGE)
class Joint(Likelihood):
    """Independent labels of several outputs: log p(y|x) = Σ_k log p_k(y_k|x).

    Outputs, labels and masks are lists in the order of the likelihoods, or
    dicts by name.

    Args:
        likelihoods: A likelihood for each output, as `get` takes it, in a list
            or in a dict by name; None for an output that has no label.
        names: Names of the outputs, if `likelihoods` is a list.

    Raises:
        ValueError: If no output has a likelihood.
    """

    def __init__(self, likelihoods: Any, names: list[str] | None = None):
        if isinstance(likelihoods, dict):
            names, likelihoods = list(likelihoods), likelihoods.values()
        self.likelihoods = [
            None if part is None else get(part) for part in likelihoods
        ]
        self.names = None if names is None else list(names)
        if not any(self.likelihoods):
            raise ValueError(
                "One of several outputs at least needs a likelihood. "
                f"Received: {self.likelihoods}"
            )

    @property
    def from_logits(self) -> bool:
        """Whether there is nothing to `check`."""
        return all(
            getattr(part, "from_logits", True) for part in self.likelihoods
        )

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
        keys = list(values) if isinstance(values, dict) else values
        raise ValueError(
            f"There are likelihoods for {len(self.likelihoods)} outputs"
            f"{f' of the names {self.names}' if self.names else ''}, so the "
            f"{what} have to be a list of as many or a dict with these names. "
            f"Received: {keys}"
        )

    def _parts(self, outputs, *others) -> list[tuple]:
        """Position, likelihood, output and others of those with a label."""
        columns = [self._in_order(values, what) for what, values in others]
        return [
            (k, part, *rest)
            for k, (part, *rest) in enumerate(
                zip(self.likelihoods, self._in_order(outputs), *columns)
            )
            if part is not None
        ]

    def _like(self, outputs: Any, found: dict[int, tf.Tensor]) -> Any:
        """Tensors by position, zeros elsewhere, in the outputs' structure."""
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
        for k, part, output in self._parts(outputs):
            own_seed = sampling.of_output(seed, k)
            labels[k] = getattr(part, draw)(output, own_seed)
        return labels

    def sample(self, outputs, seed):
        return self._drawn("sample", outputs, seed)

    def uniform(self, outputs, seed):
        return self._drawn("uniform", outputs, seed)

    def negative_log_likelihood(self, y, outputs, mask=None):
        return tf.add_n(
            [
                part.negative_log_likelihood(label, output, hidden)
                for _, part, output, label, hidden in self._parts(
                    outputs, ("labels", y), ("masks", mask)
                )
            ]
        )

    def score(self, y, outputs, mask=None, weights=None):
        return self._like(
            outputs,
            {
                k: part.score(label, output, hidden, weights)
                for k, part, output, label, hidden in self._parts(
                    outputs, ("labels", y), ("masks", mask)
                )
            },
        )

    def fisher_factors(self, outputs, mask=None):
        count, blocks = 0, []
        for k, part, output, hidden in self._parts(outputs, ("masks", mask)):
            size, factor = part.fisher_factors(output, hidden)
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
        for _, part, output in self._parts(outputs):
            part.check(output)

    def check_labels(self, y, classes):
        for _, part, count, label in self._parts(classes, ("labels", y)):
            part.check_labels(label, count)

    def get_config(self):
        return {
            "likelihoods": [
                keras.saving.serialize_keras_object(part)
                for part in self.likelihoods
            ],
            "names": self.names,
        }

    def __repr__(self):
        return f"Joint({self.likelihoods}, names={self.names})"


def _no_options(loss: keras.losses.Loss) -> dict:
    return {}


def _from_logits(loss: keras.losses.Loss) -> dict:
    config = loss.get_config()
    # The sparse loss leaves its axis out of the configuration.
    axis = getattr(loss, "_fn_kwargs", config).get("axis", -1)
    if axis != -1:
        raise ValueError(
            "Only losses over the last axis have a likelihood here. "
            f"Received: axis={axis}. Move the classes to the last "
            "axis, or pass `likelihood=` yourself."
        )
    return {"from_logits": config.get("from_logits", False)}


# A loss, the function Keras also accepts in its place, and what it assumes.
_BY_LOSS = (
    (
        keras.losses.SparseCategoricalCrossentropy,
        keras.losses.sparse_categorical_crossentropy,
        Categorical,
        _from_logits,
    ),
    (
        keras.losses.CategoricalCrossentropy,
        keras.losses.categorical_crossentropy,
        Categorical,
        _from_logits,
    ),
    (
        keras.losses.BinaryCrossentropy,
        keras.losses.binary_crossentropy,
        Bernoulli,
        _from_logits,
    ),
    (
        keras.losses.MeanSquaredError,
        keras.losses.mean_squared_error,
        Gaussian,
        _no_options,
    ),
)
_BY_NAME = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
}


def is_auto(identifier: Any) -> bool:
    """Whether the likelihood is to be found from the compiled loss."""
    return isinstance(identifier, str) and identifier == "auto"


def get(identifier: Any) -> Likelihood:
    """Finds the likelihood that a loss, a name or a config stands for.

    Args:
        identifier: A `Likelihood` (instance, class or serialized config);
            `"categorical"`, `"bernoulli"` or `"gaussian"`; or a Keras loss
            (instance, class, function, name or config) out of
            (sparse) categorical crossentropy, binary crossentropy and mean
            squared error, whose `from_logits` is taken over. A list or a
            dict with one of these counts as that one, with several as their
            `Joint`.

    Returns:
        A `Likelihood`.

    Raises:
        ValueError: If nothing above fits.
    """
    if isinstance(identifier, Likelihood):
        return identifier
    if isinstance(identifier, dict) and "class_name" in identifier:
        return get(_deserialized(identifier))
    if isinstance(identifier, (list, tuple)) and len(identifier) == 1:
        return get(identifier[0])
    if isinstance(identifier, dict) and len(identifier) == 1:
        return get(next(iter(identifier.values())))
    if isinstance(identifier, (list, tuple, dict)) and identifier:
        return Joint(identifier)
    if isinstance(identifier, str):
        if identifier.lower() in _BY_NAME:
            return _BY_NAME[identifier.lower()]()
        return get(_loss_named(identifier))
    if isinstance(identifier, type) and issubclass(
        identifier, (Likelihood, keras.losses.Loss)
    ):
        return get(identifier())
    for loss, function, likelihood, options in _BY_LOSS:
        if isinstance(identifier, loss):
            return likelihood(**options(identifier))
        if identifier is function:
            return likelihood(**options(loss()))
    raise _unknown(identifier)


def of_model(identifier: Any, model: keras.layers.Layer) -> Likelihood:
    """As `get`, for the outputs of a model.

    If it is known to have several outputs, one identifier counts for all of
    them, and a dict goes by their names, as with losses of Keras.

    Args:
        identifier: What `get` takes.
        model: A model or layer.

    Raises:
        ValueError: If `get` raises it, or if there are names that no output
            has.
    """
    outputs = symbolic_outputs(model)
    if not isinstance(outputs, (list, tuple, dict)):
        return get(identifier)
    is_dict = isinstance(outputs, dict)
    names = list(outputs) if is_dict else list(model.output_names)
    if isinstance(identifier, Joint):
        identifier = (
            identifier.likelihoods
            if identifier.names is None
            else dict(zip(identifier.names, identifier.likelihoods))
        )
    if isinstance(identifier, dict) and "class_name" not in identifier:
        unknown = set(identifier) - set(names)
        if unknown:
            raise ValueError(
                f"The outputs of the model are called {names}. Received a "
                f"loss or likelihood for {sorted(unknown)}."
            )
        return Joint([identifier.get(name) for name in names], names)
    if isinstance(identifier, (list, tuple)):
        if len(identifier) != len(names):
            raise ValueError(
                f"The model has {len(names)} outputs, {names}. Received "
                f"{len(identifier)} losses or likelihoods."
            )
        return Joint(identifier, names)
    found = get(identifier)
    if isinstance(found, Joint):
        return of_model(found, model)
    return Joint([found] * len(names), names)


def symbolic_outputs(model: Any) -> Any:
    """The outputs of a functional model in their structure, else None."""
    try:
        shapes = model.output_shape
    except (AttributeError, ValueError):
        return None
    return keras.tree.map_shape_structure(keras.KerasTensor, shapes)


def _deserialized(config: dict):
    try:
        found = keras.saving.deserialize_keras_object(config)
    except (TypeError, ValueError):
        raise _unknown(config) from None
    if isinstance(found, dict):
        raise _unknown(config)
    return found


def _loss_named(name: str):
    try:
        return keras.losses.get(name)
    except ValueError:
        raise _unknown(name) from None


def _unknown(identifier: Any) -> ValueError:
    return ValueError(
        "No likelihood is known for this loss, so labels cannot be sampled "
        f"from the model. Received: {identifier!r}. Known are "
        "(Sparse)CategoricalCrossentropy, BinaryCrossentropy and "
        'MeanSquaredError, the names "categorical", "bernoulli" and '
        '"gaussian", and instances of `keras_fisher.likelihoods.Likelihood`. '
        "Pass one of these as `likelihood=`; the loss itself can stay."
    )
