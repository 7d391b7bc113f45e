"""What the example scripts share: data, networks, files."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
import tempfile

from absl import flags
import keras
import numpy as np
import tensorflow as tf

import keras_fisher
from keras_fisher import applications

_MODELS = {
    "simple_cnn": applications.SimpleCNN,
    "vgg11": applications.VGG11,
    "resnet8": functools.partial(applications.ResNet, depth=8),
    "resnet20": functools.partial(applications.ResNet, depth=20),
    "resnet56": functools.partial(applications.ResNet, depth=56),
    "wide_resnet": functools.partial(
        applications.WideResNet, depth=16, widen_factor=8
    ),
    "dense_net": functools.partial(
        applications.DenseNet, depth=100, bottleneck=True, reduction=0.5
    ),
}
MODELS = (*_MODELS, "mlp")

STRATEGIES = ("none", "mirrored", "multi_worker")

# Images whose mean and deviation are known.
_NORMALIZED = ("cifar10", "cifar100", "fashion_mnist", "tiny_imagenet")


@dataclasses.dataclass(frozen=True)
class Data:
    """The batches of one training run.

    Attributes:
        train: What to train on, in a new order each epoch. A process that
            goes on with a run begins again with the order of the first.
        of_epoch: Function of the number of an epoch, from 0 on: the same, in
            an order, and with an augmentation, that the number alone decides.
        examples: The same examples in one order and all of them, to measure.
        test: The test set, or what was held out for validation.
        classes: Number of classes.
    """

    train: tf.data.Dataset
    of_epoch: Callable[[int], tf.data.Dataset]
    examples: tf.data.Dataset
    test: tf.data.Dataset
    classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.train.element_spec[0].shape[1:])

    @property
    def has_noise(self) -> bool:
        """Whether targets are those of `add_label_noise`."""
        return isinstance(self.train.element_spec[1], dict)


def load_data(
    name: str,
    batch_size: int,
    *,
    label_noise: float = 0.0,
    holdout: float = 0.0,
    train_examples: int | None = None,
    augment: bool = False,
    seed: int = 0,
) -> Data:
    """Loads a data set to train and to test on.

    Args:
        name: `"mnist1d"`, `"digits"`, or any TFDS name with a `"train"` and a
            `"test"` split.
        batch_size: Number of examples in a batch.
        label_noise: Share of training labels to draw anew.
        holdout: Share of the training set to hold out: it takes the place of
            the test set, which is not read. Its labels are as noisy.
        train_examples: Size of the training set, held-out examples included:
            the first ones. `None` takes all.
        augment: Whether images to train on are shifted and flipped.
        seed: Seed of the noise, of the order and of the augmentation.
    """
    (train, test), info = loaded(name, _splits(holdout, train_examples))
    classes = number_of_classes(info)
    shape = train.element_spec[0].shape
    if not classes or not shape.is_fully_defined():
        sys.exit(
            "The scripts classify inputs of one size. Received: "
            f"--dataset={name}, with inputs of shape {shape} and "
            f"{classes or 'no'} classes."
        )
    if label_noise:
        add_noise = keras_fisher.datasets.add_label_noise
        train = add_noise(train, label_noise, classes, seed)
        test = add_noise(test, label_noise, classes, seed) if holdout else test
    train, test = normalized(train, name), normalized(test, name)
    if (count := int(train.cardinality())) < batch_size:
        sys.exit(
            f"There are {count} examples to train on, fewer than make one "
            f"batch of {batch_size}: lower --batch_size."
        )
    if augment and train.element_spec[0].shape.rank != 3:
        sys.exit(f"--augment shifts and flips images, and {name} has none.")
    size = info.splits["train"].num_examples
    train, test = (part.with_options(_options()) for part in (train, test))
    train, test = _cached(train), _cached(test.batch(batch_size))

    def batches(seed):
        shuffled = train.shuffle(min(size, 50_000), seed=seed)
        if augment:
            height = train.element_spec[0].shape[0]
            shuffled = keras_fisher.datasets.augment(
                shuffled, padding=height // 8, seed=seed
            )
        # A smaller last batch would be penalized more: alpha acts as alpha/B.
        return shuffled.batch(batch_size, drop_remainder=True).prefetch(
            tf.data.AUTOTUNE
        )

    return Data(
        train=batches(seed),
        of_epoch=lambda epoch: batches(_seed_of_epoch(seed, epoch)),
        examples=train.batch(batch_size).prefetch(tf.data.AUTOTUNE),
        test=test.prefetch(tf.data.AUTOTUNE),
        classes=classes,
    )


def _seed_of_epoch(seed: int, epoch: int) -> int:
    return int(np.random.default_rng([seed, epoch]).integers(2**31))


def by_step(data: Data, model: keras.Model) -> tf.data.Dataset:
    """What to train on, in an order that goes by the optimizer's step.

    A run that goes on from a backup sees what it would have seen without the
    interruption.
    """
    length = int(data.train.cardinality())

    def batches():
        # Read as an iteration begins: `fit` may iterate ahead of an epoch.
        step = int(keras.ops.convert_to_numpy(model.optimizer.iterations))
        epoch = step // max(1, length)  # There may be less than a batch.
        yield from data.of_epoch(epoch).as_numpy_iterator()

    return (
        tf.data.Dataset.from_generator(
            batches, output_signature=data.train.element_spec
        )
        .apply(tf.data.experimental.assert_cardinality(length))
        .with_options(_options())
        .prefetch(tf.data.AUTOTUNE)
    )


def _splits(holdout: float, train_examples: int | None) -> list[str]:
    """What TFDS calls the examples to train on and to test on."""
    if train_examples is None:
        kept, end = f"{round(100 * (1 - holdout))}%", ""
    else:
        kept, end = round(train_examples * (1 - holdout)), train_examples
    return [f"train[:{kept}]", f"train[{kept}:{end}]" if holdout else "test"]


def loaded(name: str, split):
    """Data sets and their info, or an end that says what there is to do."""
    try:
        return keras_fisher.datasets.load(name, split, with_info=True)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(str(error))


def number_of_classes(info) -> int | None:
    """How many classes the labels of a data set have; None without."""
    key = info.supervised_keys[1]
    label = dict(info.features).get(key) if isinstance(key, str) else None
    return getattr(label, "num_classes", None)


def normalized(dataset: tf.data.Dataset, name: str) -> tf.data.Dataset:
    """Images as networks of `train.py` take them, if there is a usual way."""
    if name not in _NORMALIZED:
        return dataset
    return keras_fisher.datasets.normalize(dataset, name)


def _cached(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Keeps a data set in memory, all of it from now on.

    A reader that stops early, while the cache is being filled, now and then
    leaves what it has read there as if it were all.
    """
    cached = dataset.cache()
    cached.reduce(0, lambda count, *_: count + 1)
    return cached


def _options() -> tf.data.Options:
    options = tf.data.Options()
    # Workers share batches, not files: there may be one file alone.
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    # An epoch that ends while the tuner sleeps often waits for it, up to as
    # long as the epoch has taken.
    options.autotune.enabled = False
    return options


def has_cluster() -> bool:
    """Whether `TF_CONFIG` names workers, and which of them this process is."""
    try:
        config = json.loads(os.environ.get("TF_CONFIG", ""))
    except ValueError:
        return False
    return isinstance(config, dict) and {"cluster", "task"} <= config.keys()


def strategy(name: str, cpu_devices: int = 1) -> tf.distribute.Strategy:
    """One of `STRATEGIES`. To be made before TensorFlow does anything else.

    Args:
        name: Which one.
        cpu_devices: Number of devices to make of the CPU; if 1, `"mirrored"`
            takes the GPUs.
    """
    if name == "multi_worker":
        return tf.distribute.MultiWorkerMirroredStrategy()
    if name == "none":
        return tf.distribute.get_strategy()
    if cpu_devices == 1:
        return tf.distribute.MirroredStrategy()
    [cpu] = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * cpu_devices
    )
    return tf.distribute.MirroredStrategy(
        [f"CPU:{number}" for number in range(cpu_devices)]
    )


def build_network(
    name: str, input_shape: tuple[int, ...], classes: int
) -> keras.Model:
    """Builds one of `MODELS`, with logits as outputs.

    Ends with what there is to do if the network cannot take such inputs.
    """
    if name in _MODELS:
        try:
            return _MODELS[name](input_shape, classes=classes)
        except ValueError as error:
            sys.exit(f"--model={name} does not fit the data set. {error}")
    return keras.Sequential(
        [
            keras.Input(input_shape),
            keras.layers.Flatten(),
            keras.layers.Dense(256, activation="relu"),
            keras.layers.Dense(256, activation="relu"),
            keras.layers.Dense(classes),
        ],
        name="mlp",
    )


@contextlib.contextmanager
def replacing(path: str):
    """Context with a path to write to what will then be at `path`."""
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, f"writing-{os.getpid()}-{name}")
    yield temporary
    os.replace(temporary, path)


def check_finite_flags() -> None:
    """Ends where a flag is no number, which absl's bounds let through."""
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if isinstance(value, float) and not math.isfinite(value):
            sys.exit(f"--{name}={value} is no finite number.")


def check_writable(path: str) -> None:
    """Makes the directory of a file, and ends where nothing can be written."""
    if os.path.isdir(path):
        sys.exit(f"{path} is a directory. Name a file.")
    directory = os.path.dirname(path) or "."
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory):
            pass
    except OSError as error:
        sys.exit(f"{path} cannot be written: {error}")
