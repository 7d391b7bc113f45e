"""Runs killed at any moment end as runs that were never killed, to the bit.

Each run is a process that `_supervise` kills, at moments from a seeded
generator, and starts again with the same command until it has ended.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import clusters
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import GradientPenalty
from keras_fisher import InputGradientPenalty
from keras_fisher import UniformLabelPenalty
from keras_fisher._tensorboard import event_files
from keras_fisher._training.optimizers import step_of
from keras_fisher.callbacks import BackupAndRestore
from keras_fisher.callbacks import EarlyPhase
from keras_fisher.callbacks import FisherTensorBoard

_STEPS, _EPOCHS = 6, 6
_BATCH = 8
_X = np.random.default_rng(0).normal(size=(_BATCH * _STEPS, 6))
_X = _X.astype("float32")
_Y = np.argmax(_X[:, :3] + 0.5 * _X[:, 3:], axis=1)

_PENALTIES = {
    "every step": FisherPenalty(0.1),
    "reused": FisherPenalty(0.1, every=4),
    "scheduled": FisherPenalty(
        keras.optimizers.schedules.CosineDecay(10.0, 30), warmup_steps=20
    ),
    "fraction": FisherPenalty(0.1, fraction=0.5),
    "difference": FisherPenalty(0.1, method="finite_difference"),
    "averaged": FisherPenalty(0.1, every=2),
    "given labels": GradientPenalty(0.1, every=4),
    "uniform labels": UniformLabelPenalty(0.1, fraction=0.5),
    "inputs": InputGradientPenalty(0.1, micro_batch_size=4),
}
# Each of these in all ways to be saved and killed.
_MOST = ("every step", "reused", "fraction", "difference", "averaged")
# An epoch is a whole number of updates, by which `_batches` finds its place.
_OPTIONS = {
    "averaged": dict(
        use_ema=True,
        ema_momentum=0.8,
        ema_overwrite_frequency=4,
        gradient_accumulation_steps=2,
        global_clipnorm=0.5,
    )
}


# What the processes run.


def _model(penalty):
    # Functional: Keras gives the variables of a Sequential other paths, by
    # which the curves of layers are named, when it is loaded from a file.
    inputs = x = keras.Input((6,))
    x = keras.layers.Dense(64)(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.ReLU()(x)
    x = keras.layers.Dropout(0.3)(x)
    network = keras.Model(inputs, keras.layers.Dense(3)(x))
    model = FisherModel(network, _PENALTIES[penalty], trace_every=3, seed=0)
    model.compile(
        keras.optimizers.Adam(0.01, **_OPTIONS.get(penalty, {})),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def _batches(model, steps):
    """Batches that are a function of the step, read as iteration begins."""

    def examples():
        first = step_of(model)
        first *= model.optimizer.gradient_accumulation_steps or 1
        for step in itertools.count(first) if steps is None else range(steps):
            step = step if steps is None else first + step
            order = np.random.default_rng(step // _STEPS).permutation(len(_X))
            at = step % _STEPS * _BATCH
            chosen = order[at : at + _BATCH]
            yield _X[chosen], _Y[chosen]

    return tf.data.Dataset.from_generator(
        examples,
        output_signature=(
            tf.TensorSpec((_BATCH, 6), tf.float32),
            tf.TensorSpec((_BATCH,), tf.int64),
        ),
    )


class _Tell(keras.callbacks.Callback):
    """Tells the test how far the run is."""

    def on_epoch_begin(self, epoch, logs=None):
        _tell("epoch", step_of(self.model))

    def on_train_batch_end(self, batch, logs=None):
        _tell("step", step_of(self.model))

    def on_epoch_end(self, epoch, logs=None):
        _tell("saving", step_of(self.model))


def _tell(*what):
    print(*what, flush=True)


def _latest(directory):
    """The newest model that was written as a whole, and its epoch."""
    for path in sorted(directory.glob("*.keras"), reverse=True):
        try:
            return keras.models.load_model(path), int(path.stem)
        except Exception:  # torn files raise whatever meets their end
            pass
    return None, 0


def train(directory, penalty, how):
    """Trains, or goes on.

    Args:
        directory: Of the run.
        penalty: One of `_PENALTIES`.
        how: `"backup"`, also with two replicas (`"mirrored"`); `"short"` for
            backups within a pass over the data; `"checkpoint"` for
            `ModelCheckpoint`; `"keras"` for its own backup.
    """
    tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(0)
    directory = pathlib.Path(directory)
    directory.mkdir(exist_ok=True)
    early = EarlyPhase("loss", 0.5, warn_above=None)
    board = FisherTensorBoard(directory / "logs", early_phase=early)
    model, epoch, steps = None, 0, _STEPS
    if how == "checkpoint":
        model, epoch = _latest(directory)
        save = keras.callbacks.ModelCheckpoint(directory / "{epoch:03d}.keras")
    elif how == "keras":
        save = keras.callbacks.BackupAndRestore(
            directory / "backup", delete_checkpoint=False
        )
    else:
        save = BackupAndRestore(directory / "backup", delete_checkpoint=False)
    model = model or _model(penalty)
    if how == "short":
        steps = 2
    history = model.fit(
        _batches(model, None if how == "short" else steps),
        epochs=_EPOCHS * _STEPS // steps,
        initial_epoch=epoch,
        steps_per_epoch=steps if how == "short" else None,
        verbose=0,
        callbacks=[board, _Tell(), save],
    )
    end = {
        "weights": [w.ravel().tolist() for w in model.get_weights()],
        "history": {
            k: dict(zip(history.epoch, v, strict=True))
            for k, v in history.history.items()
        },
    }
    _tell("end", json.dumps(end))


def _scope(how):
    if "TF_CONFIG" in os.environ:
        return tf.distribute.MultiWorkerMirroredStrategy().scope()
    if how == "mirrored":
        return clusters.mirrored(2).scope()
    return contextlib.nullcontext()


def main():
    directory, penalty, how = sys.argv[1:]
    with _scope(how):
        train(directory, penalty, how)


# The supervisor.

_PROCESS = """
import sys
sys.path[:0] = {path!r}
import test_interruption
test_interruption.main()
"""


_NUMBERS = itertools.count()


class _Process:
    def __init__(self, directory, *arguments, config=None):
        code = _PROCESS.format(path=sys.path)
        # A file of its own: workers have one directory.
        self._errors = pathlib.Path(f"{directory}-errors-{next(_NUMBERS)}")
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(directory), *arguments],
                env=os.environ | ({"TF_CONFIG": config} if config else {}),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.first = self.saved = self.steps = None
        self.last = ""

    def line(self):
        """Reads what the process tells next; empty at its end."""
        line = self._process.stdout.readline()
        what, _, rest = line.partition(" ")
        if self.first is None and what == "epoch":
            self.first = int(rest)
        if what in ("epoch", "step", "saving"):
            self.steps = int(rest)
        if what == "step" and self.last.startswith("saving"):
            self.saved = int(self.last.split()[1])
        self.last = line or self.last
        return line

    def until(self, what, count):
        """Reads on to the line that is the `count`-th to begin with `what`."""
        while count and (line := self.line()):
            count -= line.startswith(what)

    def kill(self):
        self._process.kill()

    def end(self, timeout=None):
        """Waits; returns the exit code."""
        if timeout is None:
            while self.line():
                pass
        code = self._process.wait(timeout)
        self._process.stdout.close()
        return code

    def errors(self):
        return self._errors.read_text()[-3000:]


def _kill_at_a_moment(process, kind, random_numbers, seconds=None):
    """Kills a process, that takes so many seconds, at a random moment."""
    if kind == "time":
        pause = random_numbers.uniform(0.0, 0.6 * seconds)
        time.sleep(pause)
        moment = f"{pause:.2f} s after the start"
    elif kind == "between":
        # Keras's own backup does not stand being killed while it saves.
        count = 1 + _STEPS * random_numbers.randint(1, _EPOCHS - 1)
        count += random_numbers.randrange(_STEPS // 2)
        process.until("step", count)
        moment = f"at step {count}"
    else:
        most = {"step": 2 * _STEPS, "saving": 3}[kind]
        count = random_numbers.randint(1, most)
        pause = random_numbers.uniform(0.0, 0.06)
        process.until(kind, count)
        time.sleep(pause)
        moment = f"{1000 * pause:.0f} ms after {kind} {count}"
    process.kill()
    return moment


def _supervise(directory, penalty, how, kinds=(), seed=0, seconds=None):
    """Runs to the end, killed once at a moment of each of some kinds.

    Returns:
        What the run has told at its end, how often it was `"killed"`, and how
        many `"seconds"` it took.
    """
    begin = time.monotonic()
    random_numbers = random.Random(seed)
    saved = killed = 0
    for kind in [*kinds, None]:
        process = _Process(directory, penalty, how)
        if kind is not None:
            moment = _kill_at_a_moment(process, kind, random_numbers, seconds)
        code = process.end()
        if process.first is not None:
            assert process.first >= saved, (
                f"began at step {process.first} with a backup of {saved}"
            )
        saved = process.saved or saved
        if kind is not None:
            print(f"{how}, {penalty}: killed {moment}, at {process.last[:12]}")
        if code == 0:
            end = json.loads(process.last.removeprefix("end "))
            taken = time.monotonic() - begin
            return {**end, "killed": killed, "seconds": taken}
        killed += code == -signal.SIGKILL
        assert kind is not None, process.errors()
    raise AssertionError("the last process was not killed, and has not ended")


def _points(directory, name):
    logs = directory / "logs"
    assert not list(logs.glob("run_*")), "there is but one run"
    return sorted(p[:3] for p in event_files.scalars(str(logs / name)))


def _assert_same_run(directory, end, whole_directory, whole):
    assert end["weights"] == whole["weights"]
    for name, values in end["history"].items():
        for epoch, value in values.items():
            expected = whole["history"][name][epoch]
            assert value == expected or value != value != expected, (
                f"{name} of epoch {epoch}: {value}, not {expected}"
            )
    for name in ("train", "hparams"):
        expected = _points(whole_directory, name)
        assert len(expected) > 0
        assert _points(directory, name) == expected, name


_WHOLE = {}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Function that gives the directory and the end of a run never killed."""

    def run(*case):
        if case not in _WHOLE:
            directory = tmp_path_factory.mktemp("whole") / "run"
            _WHOLE[case] = directory, _supervise(directory, *case)
        return _WHOLE[case]

    return run


_CASES = [
    pytest.param(
        penalty,
        how,
        kinds,
        id=f"{how}-{penalty}-{'+'.join(kinds)}",
        marks=pytest.mark.slow if len(kinds) > 1 else (),
    )
    for how, penalty, kinds in [
        ("backup", "reused", ("saving",)),
        *itertools.product(
            ("backup", "short", "checkpoint"),
            _MOST,
            (("saving", "step"), ("step", "time"), ("time", "saving")),
        ),
        ("backup", "scheduled", ("step", "saving")),
        *itertools.product(
            ("short",),
            ("given labels", "uniform labels", "inputs"),
            (("saving", "step"),),
        ),
        *itertools.product(
            ("mirrored",), ("every step", "reused"), (("step", "saving"),)
        ),
        *itertools.product(
            ("keras",), ("reused", "averaged"), (("between", "between"),)
        ),
    ]
]


@pytest.mark.parametrize("penalty, how, kinds", _CASES)
def test_a_killed_run_ends_as_one_never_killed(
    penalty, how, kinds, whole, tmp_path, record_property
):
    whole_directory, expected = whole(penalty, how)
    seed, seconds = f"{penalty} {how} {kinds}", expected["seconds"]
    end = _supervise(tmp_path / "run", penalty, how, kinds, seed, seconds)
    record_property("kills", end["killed"])
    _assert_same_run(tmp_path / "run", end, whole_directory, expected)


# Workers.


def _supervise_workers(directory, kills, seed):
    """The same for two workers, one of which is killed each time."""
    random_numbers = random.Random(seed)
    for number in range(kills + 1):
        workers = [
            _Process(directory, "reused", "backup", config=config)
            for config in clusters.cluster(2)
        ]
        if number < kills:
            victim = random_numbers.randrange(2)
            kind = random_numbers.choice(["step", "saving"])
            moment = _kill_at_a_moment(workers[victim], kind, random_numbers)
            print(f"worker {victim} killed {moment}")
        codes = [worker.end() for worker in workers]
        if codes == [0, 0]:
            ends = [json.loads(w.last.removeprefix("end ")) for w in workers]
            return [{**end, "killed": number} for end in ends]
        assert number < kills, workers[0].errors()
        for worker, code in zip(workers, codes):
            # Without the other only if that was killed when all was done.
            assert code or worker.steps == _STEPS * _EPOCHS, (
                f"one worker has ended alone, at step {worker.steps}: {codes}"
            )
    raise AssertionError("the last processes have not ended")


@pytest.mark.slow
def test_workers_go_on_together_after_one_was_killed(tmp_path, record_property):
    expected, other = _supervise_workers(tmp_path / "whole", 0, 0)
    # Batch normalization keeps statistics of each replica, in Keras.
    assert expected["weights"][:4] == other["weights"][:4]
    end, other = _supervise_workers(tmp_path / "run", 3, 9)
    record_property("kills", end["killed"])
    assert end["weights"][:4] == other["weights"][:4]
    _assert_same_run(tmp_path / "run", end, tmp_path / "whole", expected)
