"""Trains a network while following, and penalizing, its Fisher information.

python examples/train.py --dataset=mnist1d --learning_rate=0.01 \
        --penalty=fisher --log_dir=logs/fp
tensorboard --logdir=logs
"""

from __future__ import annotations

import inspect
import os
import re
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app
from absl import flags
import common
import keras
import numpy as np
import settings
import tensorflow as tf

import keras_fisher
from keras_fisher import penalties as penalties_lib

flags.adopt_module_key_flags(settings)
_LEARNING_RATE = flags.DEFINE_float(
    "learning_rate", 0.01, "Learning rate of SGD.", lower_bound=0.0
)
_PENALTY = flags.DEFINE_enum(
    "penalty",
    "none",
    ["none", "fisher", "gradient", "uniform_label", "input_gradient"],
    "Penalty: FP, GP, GP_r or GP_x of the paper.",
)
_ALPHA = flags.DEFINE_float(
    "alpha", 1.0, "Strength of the penalty.", lower_bound=0.0
)
_BOUND = flags.DEFINE_float(
    "bound",
    1.0,
    "The penalty's gradient is at most so many times as long as that of the "
    "loss; 0 for no bound, as in the paper.",
    lower_bound=0.0,
)
_WARMUP_STEPS = flags.DEFINE_integer(
    "warmup_steps",
    500,
    "Steps over which the bound grows; lower it for short trainings.",
    0,
)
_EVERY = flags.DEFINE_integer(
    "every", 1, "Compute the penalty every so many steps.", 1
)
_REUSE = flags.DEFINE_boolean(
    "reuse", True, "Add the last gradient of the penalty in between."
)
_START = flags.DEFINE_integer("start", 0, "First step with the penalty.", 0)
_STOP = flags.DEFINE_integer(
    "stop", None, "First step without the penalty again; never if not given.", 1
)
_MICRO_BATCH_SIZE = flags.DEFINE_integer(
    "micro_batch_size",
    None,
    "Examples in each of the micro-batches whose norms are averaged.",
    1,
)
_METHOD = flags.DEFINE_enum(
    "method",
    "exact",
    ["exact", "finite_difference"],
    "How to differentiate the gradient norm.",
)
_EXCLUDE = flags.DEFINE_multi_string(
    "exclude", [], "Regular expression on paths of variables to leave out."
)
_TRACE_EVERY = flags.DEFINE_integer(
    "trace_every", 10, "Measure Tr(F) every so many steps.", 1
)
_PROBE_SIZE = flags.DEFINE_integer(
    "probe_size",
    0,
    "Test examples on which Tr(F) is measured, with little noise, after each "
    "epoch; 0 for none.",
    0,
)
_LABEL_NOISE = flags.DEFINE_float(
    "label_noise",
    0.0,
    "Share of training labels to draw anew, in [0, 1].",
    0.0,
    1.0,
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of everything.", 0, 2**32 - 1)
_STEPS_PER_EXECUTION = flags.DEFINE_integer(
    "steps_per_execution", 1, "Steps in one call of the train function.", 1
)
_STRATEGY = flags.DEFINE_enum(
    "strategy",
    "none",
    common.STRATEGIES,
    "Devices that share each batch: one, all of this machine, or those of the "
    "workers in TF_CONFIG (see docs/distribution.md).",
)
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices",
    1,
    "Devices to make of the CPU, to try --strategy=mirrored without GPUs.",
    1,
)
_LOG_DIR = flags.DEFINE_string(
    "log_dir",
    None,
    "Directory for TensorBoard; nothing is written without.",
    allow_override=True,  # of the flag for files of absl's own log
)
_BACKUP_DIR = flags.DEFINE_string(
    "backup_dir",
    None,
    "Directory for a backup after each epoch; none is made without. The same "
    "command goes on from there after a kill. Deleted when training ends.",
)
_SAVE = flags.DEFINE_string(
    "save",
    None,
    "`.keras` file for the trained model, which examples/measure.py reads; "
    "not saved without.",
)


def _is_regular_expression(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


flags.register_validator(
    "save",
    lambda path: path is None or path.endswith(".keras"),
    "--save must end in .keras.",
)
flags.register_validator(
    "exclude",
    lambda patterns: all(map(_is_regular_expression, patterns)),
    "--exclude must be a regular expression, as dense/kernel or bias$.",
)
flags.register_multi_flags_validator(
    ["start", "stop"],
    lambda f: f["stop"] is None or f["stop"] > f["start"],
    "--stop must be larger than --start.",
)
# Which have flags of the same names.
_OF_A_PENALTY = tuple(inspect.signature(penalties_lib.Penalty).parameters)
flags.register_multi_flags_validator(
    ["penalty", *_OF_A_PENALTY],
    lambda f: (
        f["penalty"] != "none"
        or not any(flags.FLAGS[name].present for name in _OF_A_PENALTY)
    ),
    f"--{', --'.join(_OF_A_PENALTY)} are of a penalty: name one, as "
    "--penalty=fisher.",
)
flags.register_multi_flags_validator(
    ["probe_size", "log_dir"],
    lambda f: not f["probe_size"] or f["log_dir"] is not None,
    "--probe_size is measured for the logs: give --log_dir, too.",
)
flags.register_validator(
    "strategy",
    lambda strategy: strategy != "multi_worker" or common.has_cluster(),
    "--strategy=multi_worker needs the environment variable TF_CONFIG, with a "
    '"cluster" and a "task".',
)
flags.register_multi_flags_validator(
    ["strategy", "steps_per_execution", "jit"],
    lambda f: (
        f["strategy"] == "none"
        or (f["steps_per_execution"] == 1 and f["jit"] != "true")
    ),
    "Keras has neither --steps_per_execution nor --jit=true on several "
    "devices: leave both out with --strategy.",
)
flags.register_multi_flags_validator(
    ["strategy", "cpu_devices"],
    lambda f: f["strategy"] == "mirrored" or f["cpu_devices"] == 1,
    "--cpu_devices is for --strategy=mirrored.",
)


def penalty() -> penalties_lib.Penalty | None:
    """The penalty that the flags ask for."""
    if _PENALTY.value == "none":
        return None
    cls = type(penalties_lib.get(_PENALTY.value))
    return cls(
        _ALPHA.value,
        fraction=settings.FRACTION.value,
        every=_EVERY.value,
        reuse=_REUSE.value,
        start=_START.value,
        stop=_STOP.value,
        micro_batch_size=_MICRO_BATCH_SIZE.value,
        method=_METHOD.value,
        exclude=_EXCLUDE.value,
        bound=_BOUND.value or None,
        warmup_steps=_WARMUP_STEPS.value,
    )


def probe(test: tf.data.Dataset) -> np.ndarray | None:
    """The examples that `--probe_size` asks for."""
    if not _PROBE_SIZE.value:
        return None
    batch = test.unbatch().batch(_PROBE_SIZE.value).take(1)
    x, _ = next(batch.as_numpy_iterator())
    return x


def compiled_model(data: common.Data) -> keras_fisher.FisherModel:
    """The model that the flags ask for."""
    model = keras_fisher.FisherModel(
        common.build_network(
            settings.MODEL.value, data.input_shape, data.classes
        ),
        penalty=penalty(),
        trace_every=_TRACE_EVERY.value,
        seed=_SEED.value,
    )
    model.compile(
        keras.optimizers.SGD(
            _LEARNING_RATE.value, momentum=settings.MOMENTUM.value
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=settings.jit(),
        steps_per_execution=_STEPS_PER_EXECUTION.value,
    )
    return model


def callbacks(data: common.Data) -> list[keras.callbacks.Callback]:
    """What looks on, the early phase first."""
    early = keras_fisher.callbacks.EarlyPhase(
        "accuracy", settings.EARLY_ACCURACY.value
    )
    found = [early]
    if _LOG_DIR.value:
        found.append(
            keras_fisher.callbacks.FisherTensorBoard(
                _LOG_DIR.value,
                early_phase=early,
                probe=probe(data.test),
                hyperparameters={
                    "dataset": settings.DATASET.value,
                    "label_noise": _LABEL_NOISE.value,
                },
            )
        )
    if _BACKUP_DIR.value:
        # The last, so that no backup is ahead of the curves.
        found.append(keras_fisher.callbacks.BackupAndRestore(_BACKUP_DIR.value))
    return found


def trained() -> keras_fisher.FisherModel:
    """The model of `compiled_model`, trained; prints what came of it."""
    # Rather than after all of the training.
    common.check_finite_flags()
    for directory in filter(None, (_LOG_DIR.value, _BACKUP_DIR.value)):
        common.check_writable(os.path.join(directory, "file"))
    if _SAVE.value:
        common.check_writable(_SAVE.value)
    strategy = common.strategy(_STRATEGY.value, _CPU_DEVICES.value)
    keras.utils.set_random_seed(_SEED.value)
    data = common.load_data(
        settings.DATASET.value,
        settings.BATCH_SIZE.value,
        label_noise=_LABEL_NOISE.value,
        train_examples=settings.TRAIN_EXAMPLES.value,
        augment=settings.AUGMENT.value,
        seed=_SEED.value,
    )
    with strategy.scope():
        try:
            model = compiled_model(data)
        except ValueError as error:  # flags that do not go with the network
            sys.exit(str(error))
    early, *others = callbacks(data)
    model.fit(
        common.by_step(data, model) if _BACKUP_DIR.value else data.train,
        validation_data=data.test,
        epochs=settings.EPOCHS.value,
        callbacks=[early, *others],
        shuffle=False,  # the data set does
    )
    results = model.evaluate(data.test, return_dict=True, verbose=0)
    print(
        f"TrF_i: {early.early_trace:.4g} (step {early.early_step}), "
        f"peak Tr(F): {early.peak_trace:.4g} (step {early.peak_step})"
    )
    print(f"Test accuracy: {100 * results['accuracy']:.1f} %")
    if _SAVE.value:
        # By each worker of several, all of which have the same weights.
        with common.replacing(_SAVE.value) as temporary:
            model.save(temporary)
    return model


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. See --help.")
    trained()


if __name__ == "__main__":
    app.run(main)
