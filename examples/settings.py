"""Flags that training scripts have in common."""

from __future__ import annotations

from absl import flags
import common

DATASET = flags.DEFINE_string(
    "dataset",
    "mnist1d",
    "Data set: mnist1d or digits, which need no download, fashion_mnist, or "
    "another TFDS name.",
)
MODEL = flags.DEFINE_enum(
    "model", "simple_cnn", common.MODELS, "Network to train."
)
TRAIN_EXAMPLES = flags.DEFINE_integer(
    "train_examples",
    None,
    "Train on so many examples, the first ones; all if not given.",
    1,
)
AUGMENT = flags.DEFINE_boolean(
    "augment", False, "Shift and flip the images to train on."
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Examples a step.", 1)
EPOCHS = flags.DEFINE_integer("epochs", 120, "Passes over the data.", 1)
MOMENTUM = flags.DEFINE_float(
    "momentum", 0.9, "Momentum of SGD, in [0, 1].", 0.0, 1.0
)
EARLY_ACCURACY = flags.DEFINE_float(
    "early_accuracy",
    0.5,
    "Training accuracy at which TrF_i is read, in [0, 1].",
    0.0,
    1.0,
)
FRACTION = flags.DEFINE_float(
    "fraction", 1.0, "Share of the batch to compute a penalty on, in (0, 1]."
)
_JIT = flags.DEFINE_enum(
    "jit",
    "auto",
    ["auto", "true", "false"],
    "Whether to compile with XLA; auto is Keras's choice, GPUs only. On CPUs "
    "true is faster for signals and dense networks, slower for images.",
)
flags.register_validator(
    "fraction",
    lambda fraction: 0 < fraction <= 1,
    "--fraction must be in (0, 1].",
)


def jit() -> bool | str:
    """Whether XLA compiles, as `jit_compile` of Keras."""
    return {"auto": "auto", "true": True, "false": False}[_JIT.value]
