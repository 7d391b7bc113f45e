"""Directories of runs, and runs that go on in them."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import written_curves

from keras_fisher import FisherPenalty
from keras_fisher._tensorboard import event_files
from keras_fisher.callbacks import EarlyPhase
from keras_fisher.callbacks import FisherTensorBoard


def _contents(directory):
    return {
        path: path.read_bytes() for path in pathlib.Path(directory).rglob("*.*")
    }


def test_a_second_run_in_a_directory_gets_one_of_its_own(tmp_path):
    def board():
        return FisherTensorBoard(tmp_path, embeddings_freq=1, update_freq=1)

    written_curves.fit(written_curves.model(), [board()])
    first = _contents(tmp_path)
    for name in ("run_2", "run_3"):
        with pytest.warns(UserWarning, match=name):
            written_curves.fit(written_curves.model(), [board()])
        assert (tmp_path / name / "projector_config.pbtxt").exists()
        assert written_curves.read_curves(
            tmp_path / name / "train"
        ) == written_curves.read_curves(tmp_path / "train")
        assert (
            len(written_curves.scalars(tmp_path / name / "train", "epoch_loss"))
            == 2
        )
    after = {
        path: content
        for path, content in _contents(tmp_path).items()
        if not {"run_2", "run_3"} & {*path.relative_to(tmp_path).parts}
    }
    assert after == first


@pytest.mark.slow
def test_a_run_killed_before_any_backup_is_begun_anew(tmp_path):
    """However often: there is one run, as if it had not been killed."""

    def run(directory, *extra):
        board = FisherTensorBoard(directory, probe=written_curves.X[:8])
        written_curves.fit(
            written_curves.model(FisherPenalty(0.1)),
            [board, *extra],
            validation_data=(written_curves.X, written_curves.Y),
        )

    for number, step in enumerate((3, 7)):
        with (
            contextlib.nullcontext()
            if number == 0
            else pytest.warns(UserWarning, match="takes its place"),
            pytest.raises(KeyboardInterrupt),
        ):
            run(tmp_path / "killed", _Stop(step))
    with pytest.warns(UserWarning, match="replaced-"):
        run(tmp_path / "killed")
    run(tmp_path / "whole")
    assert not (tmp_path / "killed" / "run_2").exists()
    assert list((tmp_path / "killed" / "train").glob("replaced-1.*"))
    for name in ("train", "validation", "hparams"):
        killed, whole = (
            sorted(p[:3] for p in event_files.scalars(str(tmp_path / d / name)))
            for d in ("killed", "whole")
        )
        assert killed == whole, name
        assert len(whole) > 0
    found = event_files.hyperparameters(str(tmp_path / "killed" / "hparams"))
    assert found["batch_size"] == 8


def test_a_directory_is_locked_as_long_as_it_is_written(tmp_path):
    seen = []
    look = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(
            (tmp_path / ".lock").exists()
        )
    )
    board, model = FisherTensorBoard(tmp_path), written_curves.model()
    for _ in range(2):  # the second goes on
        seen.clear()
        written_curves.fit(model, [board, look], 1)
        assert seen == [True] * 5
        assert not (tmp_path / ".lock").exists()


def test_a_resumed_run_goes_on_in_the_latest_directory(tmp_path):
    written_curves.fit(written_curves.model(), [FisherTensorBoard(tmp_path)])
    model = written_curves.model()
    with pytest.warns(UserWarning, match="run_2"):
        written_curves.fit(model, [FisherTensorBoard(tmp_path)])
    with pytest.warns(UserWarning, match="run_2"):
        written_curves.fit(model, [FisherTensorBoard(tmp_path)])
    steps = [
        s
        for s, _ in written_curves.read_curves(tmp_path / "run_2/train")[
            "fisher/trace"
        ]
    ]
    assert steps == list(range(0, 20, 2))
    assert (
        len(written_curves.read_curves(tmp_path / "train")["fisher/trace"]) == 5
    )


def test_a_fit_without_an_epoch_is_no_run(tmp_path):
    model = written_curves.model()
    board = FisherTensorBoard(tmp_path, probe=written_curves.X)
    written_curves.fit(model, [board], 0)
    assert not written_curves.read_curves(tmp_path / "train")
    written_curves.fit(model, [board], 2)
    written_curves.fit(model, [board], 0)
    written_curves.fit(model, [board], 1)
    curves = written_curves.read_curves(tmp_path / "train")
    steps = [step for step, _ in curves["fisher/trace"]]
    assert steps == [*range(0, 15, 2)]


def test_a_run_keeps_the_learning_rate_and_the_alpha_it_began_with(tmp_path):
    def slower(epoch, rate):
        return rate / 2

    def row():
        found = event_files.hyperparameters(str(tmp_path / "hparams"))
        return found["learning_rate"], found["alpha"], found["every"]

    scheduler = keras.callbacks.LearningRateScheduler(slower)
    model = written_curves.model(FisherPenalty(0.5))
    rate = float(model.optimizer.learning_rate)
    for board in (FisherTensorBoard(tmp_path), FisherTensorBoard(tmp_path)):
        # Behind the board, which has been opened when it moves the rate.
        written_curves.fit(model, [board, scheduler], 1)
        assert row() == (pytest.approx(rate), 0.5, 1)
        model.penalty.alpha = 0.25
    assert float(model.optimizer.learning_rate) < rate
    # Another penalty is told of.
    model.penalty = FisherPenalty(0.125, every=2)
    written_curves.fit(model, [FisherTensorBoard(tmp_path)], 1)
    assert row()[1:] == (0.125, 2)


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    model = written_curves.model()
    with pytest.raises(ValueError, match=r"log_dir.*file"):
        written_curves.fit(model, [FisherTensorBoard(file / "logs")])
    assert model.optimizer.iterations == 0
    assert file.read_text() == "in the way"


class _Stop(keras.callbacks.Callback):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations >= self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "steps, save_freq",
    [
        pytest.param(1, "epoch", marks=pytest.mark.slow),
        pytest.param(1, 3, marks=pytest.mark.slow),
        pytest.param(3, "epoch", marks=pytest.mark.slow),
        (3, 3),
    ],
)
def test_a_resumed_run_has_the_curves_of_one_never_stopped(
    save_freq, steps, tmp_path
):
    """Stopped in the third epoch; what is done again is written once."""

    def run(name, *extra):
        model = written_curves.model(
            FisherPenalty(0.1, every=3),
            steps_per_execution=steps,
            optimizer=keras.optimizers.SGD(0.5, momentum=0.9),
        )
        directory = tmp_path / name
        board = FisherTensorBoard(
            directory / "logs",
            early_phase=EarlyPhase("loss", warn_above=None),
            probe=written_curves.X[:8],
        )
        backup = keras.callbacks.BackupAndRestore(
            directory / "backup", save_freq=save_freq
        )
        written_curves.fit(
            model, [board, backup, *extra], 5, y=written_curves.noisy_labels()
        )
        return directory / "logs"

    with pytest.raises(KeyboardInterrupt):
        run("stopped", _Stop(13))
    before = [
        s
        for s, _ in written_curves.read_curves(tmp_path / "stopped/logs/train")[
            "fisher/trace"
        ]
    ]
    resumed, whole = run("stopped"), run("whole")
    if save_freq == "epoch":  # else Keras begins the epoch with other weights
        assert before[-1] >= 12
        for name in ("train", "hparams"):
            written_curves.assert_same_curves(
                written_curves.read_curves(resumed / name),
                written_curves.read_curves(whole / name),
                rtol=1e-5,
            )
        # What was taken out is kept.
        kept = list((resumed / "train").glob("replaced-1.*"))
        assert len(kept) == 1
    numbers = [
        s
        for s, _ in written_curves.read_curves(resumed / "train")[
            "fisher/trace"
        ]
    ]
    every = [n for n in range(numbers[-1] + 1) if n % 2 == 0 or n % 3 == 0]
    assert numbers == every and numbers[-1] > 20
    assert not (resumed / "run_2").exists()


def test_peaks_that_were_not_written_are_not_forgotten(tmp_path):
    def run(name, *extra):
        model = written_curves.model(
            trace_every=1, optimizer=keras.optimizers.SGD(1.0, momentum=0.9)
        )
        directory = tmp_path / name
        board = FisherTensorBoard(directory / "logs", write_every=5)
        backup = keras.callbacks.BackupAndRestore(directory / "backup")
        written_curves.fit(model, [board, backup, *extra], 5)
        return {
            **written_curves.read_curves(directory / "logs" / "train"),
            **written_curves.read_curves(directory / "logs" / "hparams"),
        }

    with pytest.raises(KeyboardInterrupt):
        run("stopped", _Stop(21))
    resumed, whole = run("stopped"), run("whole")
    written = max(value for _, value in whole["fisher/trace"])
    peak = whole["metric/peak_trace"][-1][1]
    assert peak > 1.01 * written, "it is at a step that is not written"
    for tag in ("fisher/explosion", "metric/explosion", "metric/peak_trace"):
        np.testing.assert_allclose(resumed[tag], whole[tag], rtol=1e-5)


def test_an_epoch_that_is_done_again_is_written_once(tmp_path):
    """Keras's curves too, stopped after they are written and no backup."""

    class StopBehind(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(*extra):
        board = FisherTensorBoard(tmp_path / "logs")
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        written_curves.fit(
            written_curves.model(),
            [board, *extra, backup],
            4,
            validation_data=(written_curves.X, written_curves.Y),
        )

    with pytest.raises(KeyboardInterrupt):
        run(StopBehind())
    run()
    for name in ("train", "validation"):
        points = [*event_files.scalars(str(tmp_path / "logs" / name))]
        epochs = [p.step for p in points if p.tag == "epoch_loss"]
        assert epochs == [0, 1, 2, 3], name
    evaluated = [p.step for p in points if p.tag.startswith("evaluation_loss")]
    assert len(evaluated) == len({*evaluated}) == 4, evaluated


_KILLED = """
    import sys
    sys.path[:0] = {path!r}
    import keras
    import written_curves as t
    import time
    from keras_fisher import FisherPenalty
    from keras_fisher.callbacks import FisherTensorBoard

    class Wait(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.model.optimizer.iterations == {stop}:
                print("ready", flush=True)
                time.sleep(600)

    t.fit(
        t.model(FisherPenalty(0.1, every=3)),
        [
            FisherTensorBoard({logs!r}),
            keras.callbacks.BackupAndRestore({backup!r}),
            Wait(),
        ],
        epochs=4,
    )
"""


def _start(tmp_path, stop):
    code = textwrap.dedent(_KILLED).format(
        path=sys.path,
        stop=stop,
        logs=str(tmp_path / "logs"),
        backup=str(tmp_path / "backup"),
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_a_killed_process_leaves_curves_that_another_continues(tmp_path):
    with _start(tmp_path, stop=13) as process:
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGKILL)
    train = tmp_path / "logs" / "train"
    steps = [s for s, _ in written_curves.read_curves(train)["fisher/trace"]]
    assert steps == [0, 2, 3, 4, 6, 8, 9, 10, 12]
    # A record half-written, as a kill within a write leaves it.
    [path] = event_files.paths(str(train))
    with open(path, "ab") as file:
        file.write(b"\x18\x00\x00\x00")
    with _start(tmp_path, stop=-1) as process:
        process.wait()
    assert process.returncode == 0
    written_curves.fit(
        written_curves.model(FisherPenalty(0.1, every=3)),
        [FisherTensorBoard(tmp_path / "whole")],
        epochs=4,
    )
    written_curves.assert_same_curves(
        written_curves.read_curves(train),
        written_curves.read_curves(tmp_path / "whole" / "train"),
        rtol=1e-5,
    )


_MIRRORED = """
    import sys
    sys.path[:0] = {path!r}
    import tensorflow as tf
    [cpu] = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )
    import written_curves as t
    from keras_fisher import FisherPenalty
    from keras_fisher.callbacks import FisherTensorBoard
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    record = t.Record()
    with strategy.scope():
        model = t.model(FisherPenalty(0.1, every=3))
    t.fit(model, [FisherTensorBoard({logs!r}), record])
    for step, traces, _ in record.points:
        print(step, float(traces.sum()))
"""


@pytest.mark.slow
def test_replicas_are_written_once(tmp_path):
    code = textwrap.dedent(_MIRRORED).format(path=sys.path, logs=str(tmp_path))
    output = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    )
    assert output.returncode == 0
    seen = [line.split() for line in output.stdout.splitlines()]
    written = written_curves.read_curves(tmp_path / "train")["fisher/trace"]
    assert [s for s, _ in written] == [0, 2, 3, 4, 6, 8, 9]
    np.testing.assert_allclose(
        written, [(int(s), float(t)) for s, t in seen], rtol=1e-6
    )
    found = event_files.hyperparameters(str(tmp_path / "hparams"))
    assert found["batch_size"] == 8  # of both replicas
