"""Label noise that depends on nothing but the example and a seed."""

from __future__ import annotations

import dataclasses
import hashlib
import operator
import struct
from typing import Any

import tensorflow as tf

from keras_fisher._common import checks

# Hashes below 2**53 convert to float64 without rounding.
_RESOLUTION = 2**53


def add_label_noise(
    dataset: tf.data.Dataset[Any], rate: float, num_classes: int, seed: int = 0
) -> tf.data.Dataset[Any]:
    """Redraw a share of the labels and keep track of which ones.

    With probability `rate` the label of an example is drawn anew, uniformly
    from all `num_classes` classes. An example whose drawn label happens to be
    its true one is clean, so the expected share of noisy examples is
    `rate * (1 - 1 / num_classes)`.

    Which examples, and which labels, is decided by a keyed hash of the
    example's own content (every tensor of `x`, and `y`) and of the seed,
    never by its position. Shuffling, batching, repeating and reading in
    parallel change nothing, and neither does a second program that reads the
    same data. It follows that:

    - two examples with the same `x` and `y` share their fate;
    - random augmentation goes after the noise, or else an example gets a new
      label in every epoch; so does batching that pads;
    - a larger `rate` redraws the examples of a smaller one, to the same
      labels, and some more.

    Works on single examples and on batches alike. Integer labels have shape
    `()`, or `(batch,)` or `(batch, 1)` in batches; one-hot labels are floating
    point and have shape `(num_classes,)`, or `(batch, num_classes)` in
    batches.

    Labels outside the classes are an error. They are looked for in the first
    element at once, if the data set can give it without reading from the
    start, and in every element while it is read, where they raise a
    `tf.errors.InvalidArgumentError`.

    Args:
        dataset: A `tf.data.Dataset` of `(x, y)` or `(x, y, sample_weight)`,
            `x` being any nested structure.
        rate: Share of the labels to draw anew, from 0 to 1.
        num_classes: Number of classes, at least 2.
        seed: Any integer; another one redraws other examples.

    Returns:
        A `tf.data.Dataset` with the elements of `dataset` in the same order,
        and in place of `y` a dictionary of

        - `"label"`, the label to train on, with dtype and shape of `y`;
        - `"is_noisy"`, whether it differs from the true one: a bool, or one
          for each example of a batch;
        - `"true_label"`, which is `y`.

    Raises:
        ValueError: If an argument is out of its range, if the elements are
            not as described above, or if they carry label noise already.

    Example:
    ```python
    train = keras_fisher.datasets.load("mnist1d", "train")
    train = keras_fisher.datasets.add_label_noise(train, 0.4, 10)
    train = train.shuffle(4000).batch(128)
    ```

    Reference:

    - [Understanding Deep Learning Requires Rethinking Generalization](
      https://arxiv.org/abs/1611.03530) (Zhang et al., ICLR 2017), for
      training on redrawn labels.
    """
    rate = checks.number(
        "rate",
        rate,
        lambda share: 0 <= share <= 1,
        "a number from 0 to 1, the share of the labels to draw anew (0.4 for "
        "40 %)",
    )
    checks.integer(
        "num_classes",
        num_classes,
        2,
        "of at least 2, since noise needs another label to draw",
    )
    redraw_key, label_key = _keys(seed)
    labels = _labels_of(dataset, num_classes)
    _check_first_element(dataset, labels)
    threshold = round(rate * _RESOLUTION)

    def redraw(x: Any, y: tf.Tensor, *sample_weight: tf.Tensor) -> tuple:
        tf.debugging.Assert(labels.are_valid(y), [labels.rule, "Received:", y])
        true = labels.decode(y)
        content = labels.contents(x, true)
        # Two keys, so that the label tells nothing about the first decision.
        is_redrawn = _hash(content, _RESOLUTION, redraw_key) < threshold
        drawn = _hash(content, num_classes, label_key)
        given = tf.where(is_redrawn, drawn, true)
        target = {
            "label": labels.encode(given, y),
            "is_noisy": given != true,
            "true_label": y,
        }
        return x, target, *sample_weight

    return dataset.map(
        redraw, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )


@dataclasses.dataclass(frozen=True)
class _Labels:
    """How the labels of a data set are written.

    Attributes:
        num_classes: Number of classes.
        batched: Whether an element holds a batch of examples.
        one_hot: Whether a label is a vector rather than an integer.
    """

    num_classes: int
    batched: bool
    one_hot: bool

    @property
    def rule(self) -> str:
        """What the values of labels have to satisfy."""
        if self.one_hot:
            return (
                "Floating point labels must be one-hot, a single 1 among "
                f"{self.num_classes - 1} zeros. Cast class indices to int64, "
                "and smooth labels after adding noise."
            )
        return (
            f"Labels must be in [0, {self.num_classes}). Pass the number of "
            "classes of the data set as `num_classes`, and count them from 0."
        )

    def are_valid(self, y: tf.Tensor) -> tf.Tensor:
        """Returns whether all labels satisfy the rule."""
        classes = self.decode(y)
        if self.one_hot:
            return tf.reduce_all(y == self.encode(classes, y))
        return tf.reduce_all((classes >= 0) & (classes < self.num_classes))

    def decode(self, y: tf.Tensor) -> tf.Tensor:
        """Returns int64 classes, a scalar or one for each of a batch."""
        if self.one_hot:
            return tf.argmax(y, axis=-1)
        return tf.reshape(tf.cast(y, tf.int64), [-1] if self.batched else [])

    def encode(self, classes: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
        """Returns `classes` in the dtype and shape of `like`."""
        if self.one_hot:
            return tf.one_hot(classes, self.num_classes, dtype=like.dtype)
        label = tf.reshape(tf.cast(classes, like.dtype), tf.shape(like))
        return tf.ensure_shape(label, like.shape)

    def contents(self, x: Any, classes: tf.Tensor) -> tf.Tensor:
        """Returns each example as a string, the same in and out of batches."""
        if not self.batched:
            return _content((x, classes))
        contents = tf.map_fn(
            _content, (x, classes), fn_output_signature=tf.string
        )
        return tf.ensure_shape(contents, classes.shape)


def _content(example: Any) -> tf.Tensor:
    """Returns one string that no other example has."""
    leaves = tf.nest.flatten(example, expand_composites=True)
    strings = tf.stack([tf.io.serialize_tensor(leaf) for leaf in leaves])
    # Not joined: serializing them keeps the bounds between the leaves.
    return tf.io.serialize_tensor(strings)


def _hash(content: tf.Tensor, buckets: int, key: list[int]) -> tf.Tensor:
    """Returns uniform int64 hashes in `[0, buckets)`."""
    return tf.strings.to_hash_bucket_strong(content, buckets, key)


def _keys(seed: int) -> tuple[list[int], list[int]]:
    """Returns two independent hash keys, of two 64-bit integers each."""
    try:
        text = f"keras_fisher label noise {operator.index(seed)}"
    except TypeError:
        raise ValueError(
            f"`seed` must be an integer, of any size. Received: seed={seed!r}."
        ) from None
    numbers_ = struct.unpack("<4q", hashlib.sha256(text.encode()).digest())
    return list(numbers_[:2]), list(numbers_[2:])


def _check_first_element(
    dataset: tf.data.Dataset[Any], labels: _Labels
) -> None:
    """Raises if the first labels break the rule and are within easy reach."""
    # Random access, since iterating could fill a shuffle buffer, discard a
    # cache or use up a generator. Where it is known not to be supported, an
    # attempt would only make TensorFlow log a warning.
    if not tf.executing_eagerly() or dataset.cardinality() < 0:
        return
    # Optimizations would fuse a map and a batch into what does not support it.
    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False
    try:
        _, y, *_ = tf.data.experimental.at(dataset.with_options(options), 0)
    except tf.errors.OpError:
        return
    if not labels.are_valid(y):
        raise ValueError(
            f"{labels.rule} Received in the first element: {y.numpy()}."
        )


def _labels_of(dataset: tf.data.Dataset[Any], num_classes: int) -> _Labels:
    """Returns how `dataset` writes its labels."""
    x, y = _supervised_spec(dataset)
    has_batch = _have_batch(x, y)
    shape = y.shape
    if y.dtype.is_integer and num_classes - 1 <= y.dtype.max:
        if shape.rank == 0 or (shape == [1] and not has_batch):
            return _Labels(num_classes, batched=False, one_hot=False)
        if has_batch and (shape.rank == 1 or shape[1:] == [1]):
            return _Labels(num_classes, batched=True, one_hot=False)
    if y.dtype.is_floating and shape[-1:].is_compatible_with([num_classes]):
        if shape.rank == 1:
            return _Labels(num_classes, batched=False, one_hot=True)
        if shape.rank == 2 and has_batch:
            return _Labels(num_classes, batched=True, one_hot=True)
    raise ValueError(
        f"With num_classes={num_classes}, labels must be integers of shape "
        "(), or (batch,) or (batch, 1) in batches, with a dtype that holds "
        "every class; or one-hot floating point vectors of shape "
        f"({num_classes},), or (batch, {num_classes}) in batches. Received: "
        f"y={y} with x={x}. Cast or reshape them with `dataset.map()`, or add "
        "the noise before batching."
    )


def _supervised_spec(
    dataset: tf.data.Dataset[Any],
) -> tuple[Any, tf.TensorSpec]:
    """Returns what `x` and `y` look like."""
    if not isinstance(dataset, tf.data.Dataset):
        raise ValueError(
            "`dataset` must be a tf.data.Dataset. Received: "
            f"{type(dataset).__name__}. Make arrays into one with "
            "`tf.data.Dataset.from_tensor_slices((x, y))`."
        )
    spec = dataset.element_spec
    if not (isinstance(spec, tuple) and len(spec) in (2, 3)):
        raise ValueError(
            "The elements must be tuples (x, y) or (x, y, sample_weight). "
            f"Received: element_spec={spec}. Rearrange them with "
            "`dataset.map()`."
        )
    x, y, *_ = spec
    if isinstance(y, dict) and "is_noisy" in y:
        raise ValueError(
            "The labels carry noise already. Received: "
            f"y={y}. Add noise once, to the data set with the true labels."
        )
    if not isinstance(y, tf.TensorSpec) or y.shape.rank is None:
        raise ValueError(
            "Labels must be one dense tensor of known rank. Received: "
            f"y={y}. Use `tf.ensure_shape` in `dataset.map()` if it is one."
        )
    return x, y


def _have_batch(x: Any, y: tf.TensorSpec) -> bool:
    """Returns whether `x` and `y` can have a first axis in common."""
    return all(
        spec.shape[:1].is_compatible_with(y.shape[:1])
        for spec in tf.nest.flatten(x)
    )
