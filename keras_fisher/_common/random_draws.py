"""Random draws that are the same eagerly, in a graph and under XLA.

The 32-bit integers of Philox are the one random primitive of TensorFlow whose
values do not depend on how the program is compiled (XLA turns the same bits
into other floats); everything here is built on them.
"""

from __future__ import annotations

import math
import random
from typing import Any

import keras
import tensorflow as tf

from keras_fisher._common import checks
from keras_fisher._common import dtypes

# Seeds of replicas lie far apart, so that no other run is likely to hit them.
_REPLICA_STRIDE = 0x3C6EF35F
_OUTPUT_STRIDE = 0x510E527FADE682D1
_PHILOX = 1
_OTHER_STRIDE = 0x1F83D9ABFB41BD6B


def generator(seed: int | None) -> keras.random.SeedGenerator:
    """A source of seeds; a random one leaves the next of Keras as they are.

    Keras takes those from Python's generator, as do the layers of a wrapped
    model that are made later: they shall start as they do without the wrapper.
    """
    before = random.getstate()
    made = keras.random.SeedGenerator(seed)
    random.setstate(before)
    return made


def draw(seed: int | keras.random.SeedGenerator, stream: int = 0) -> tf.Tensor:
    """Draws the seed of one random operation.

    Args:
        seed: An integer, for the same draw every time, or a
            `keras.random.SeedGenerator`, for the next of a sequence.
        stream: What is drawn from one integer in different streams is
            independent. A generator needs none.

    Returns:
        An `int64` tensor of shape `(2,)`, different on every replica of a
        `tf.distribute` strategy.
    """
    if isinstance(seed, keras.random.SeedGenerator):
        state = tf.cast(seed.next(), tf.int64)
    else:
        # Any integer: its remainder is what fits.
        seed = int(seed)
        seed = (seed + 2**63) % 2**64 - 2**63
        state = tf.constant([seed, stream], tf.int64)
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return state
    replica = tf.cast(context.replica_id_in_sync_group, tf.int64)
    return state + tf.stack([replica * _REPLICA_STRIDE, 0])


def start(seed: int | None) -> int:
    """The integer given, or a random one.

    A random one follows `keras.utils.set_random_seed`.

    Raises:
        ValueError: If `seed` is not an integer of at least 0.
    """
    if seed is not None:
        seed = checks.integer("seed", seed, 0)
    source = keras.random.SeedGenerator() if seed is None else seed
    return int(draw(source)[0])


def from_example(seed: tf.Tensor, first) -> tf.Tensor:
    """A seed for some of a larger set of examples.

    What is drawn with it has one row for each example, and the row of an
    example is the same whatever others it is drawn with.

    Args:
        seed: `int64` tensor of shape `(2,)`, see `draw`.
        first: Position in the whole set of the first of them.

    Returns:
        An `int64` tensor of shape `(3,)`, to be used like a seed.
    """
    return tf.concat([seed, [tf.cast(first, tf.int64)]], axis=0)


def of_output(seed: tf.Tensor, number: int) -> tf.Tensor:
    """A seed for one of several outputs, that of the first the seed itself.

    Args:
        seed: See `draw` and `from_example`.
        number: Position of the output.
    """
    stride = (number * _OUTPUT_STRIDE + 2**63) % 2**64 - 2**63
    rest = [0] * (seed.shape[0] - 1)
    return seed + tf.constant([stride, *rest], tf.int64)


def another(seed: tf.Tensor) -> tf.Tensor:
    """A seed for something else that belongs to the same draw.

    Args:
        seed: See `draw` and `from_example`.
    """
    rest = [0] * (seed.shape[0] - 2)
    return seed + tf.constant([0, _OTHER_STRIDE, *rest], tf.int64)


def _bits(shape: Any, seed: tf.Tensor) -> tf.Tensor:
    """Draws `uint32` integers, all of their bits random."""
    if seed.shape[0] == 2:
        return tf.random.stateless_uniform(
            shape, seed, minval=None, maxval=None, dtype=tf.uint32, alg="philox"
        )
    # The generator makes four integers for each count; a row starts a new one.
    shape = tf.convert_to_tensor(shape)
    counts = (tf.reduce_prod(shape[1:]) + 3) // 4
    key, counter = _key_and_counter(seed[:2])
    skipped = tf.cast(seed[2] * tf.cast(counts, tf.int64), tf.uint64)
    bits = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=tf.stack([shape[0], 4 * counts]),
        key=key,
        counter=counter + tf.stack([skipped, tf.zeros_like(skipped)]),
        alg=_PHILOX,
        dtype=tf.uint32,
    )
    return tf.reshape(bits[:, : tf.reduce_prod(shape[1:])], shape)


def _key_and_counter(seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Where Philox starts, as `tf.random.stateless_uniform` computes it.

    `tf.raw_ops.StatelessRandomGetKeyCounter` does as well, but under XLA it
    leaves out all but the lower 32 bits of the seed.
    """
    mixed = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[4],
        key=tf.constant([0x02461E293EC8F720], tf.uint64),
        counter=tf.cast(seed, tf.uint64),
        alg=_PHILOX,
        dtype=tf.uint32,
    )
    low, high = tf.unstack(
        tf.cast(tf.reshape(mixed, [2, 2]), tf.uint64), axis=1
    )
    words = low + high * 2**32
    return words[:1], tf.stack([tf.zeros_like(words[1]), words[1]])


def uniform(shape: Any, seed: tf.Tensor, dtype: Any = tf.float32) -> tf.Tensor:
    """Draws from the multiples of 2**-24 in [0, 1), the same in any dtype.

    Those of 16 bits have fewer digits, of which they are the first.

    Args:
        shape: Shape of the result.
        seed: What a likelihood is given to draw from: an `int64` tensor of
            shape `(2,)`, or `(3,)` for a draw that begins at an example.
        dtype: A dtype of floating point.

    Returns:
        Tensor of the given shape and dtype.

    Example:
    >>> seed = tf.constant([0, 1], tf.int64)
    >>> draws.uniform((3,), seed).shape
    TensorShape([3])
    """
    # With more digits than the dtype has, some would be rounded to 1.
    digits = min(24, 1 - round(math.log2(dtypes.rounding_unit(dtype))))
    leading = tf.bitwise.right_shift(
        _bits(shape, seed), tf.constant(32 - digits, tf.uint32)
    )
    # In between not in 16 bits, where 2**24 is infinite.
    scaled = tf.cast(tf.cast(leading, tf.int32), tf.float32) * 2.0**-digits
    return tf.cast(scaled, dtype)


def centred(shape: Any, seed: tf.Tensor) -> tf.Tensor:
    """Draws the middle of one of 2**24 cells of (0, 1): never 0, never 1."""
    return uniform(shape, seed, tf.float64) + 2.0**-25


def integers(shape: Any, bound: int | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Draws integers from 0 to `bound - 1`, each as likely as the others.

    Args:
        shape: Shape of the result.
        bound: One more than the largest.
        seed: An `int64` tensor of shape `(2,)`.

    Example:
    >>> seed = tf.constant([0, 1], tf.int64)
    >>> draws.integers((3,), 10, seed).dtype
    tf.int32
    """
    bound = tf.cast(bound, tf.float64)
    return tf.cast(uniform(shape, seed, tf.float64) * bound, tf.int32)


def gumbel(shape: Any, seed: tf.Tensor, dtype: Any = tf.float32) -> tf.Tensor:
    """Draws from the standard Gumbel distribution, finite values.

    Args:
        shape: Shape of the result.
        seed: An `int64` tensor of shape `(2,)`.
        dtype: Of the result.

    Example:
    >>> seed = tf.constant([0, 1], tf.int64)
    >>> draws.gumbel((3,), seed).shape
    TensorShape([3])
    """
    return tf.cast(-tf.math.log(-tf.math.log(centred(shape, seed))), dtype)


def normal(shape: Any, seed: tf.Tensor, dtype: Any = tf.float32) -> tf.Tensor:
    """Draws from the standard normal distribution, finite values.

    Args:
        shape: Shape of the result.
        seed: An `int64` tensor of shape `(2,)`.
        dtype: Of the result.

    Example:
    >>> seed = tf.constant([0, 1], tf.int64)
    >>> draws.normal((3,), seed).shape
    TensorShape([3])
    """
    return tf.cast(tf.math.ndtri(centred(shape, seed)), dtype)


def permutation(size: int | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Draws an order of `range(size)`, each as likely as the others."""
    return tf.argsort(uniform([size], seed), stable=True)
