"""`FisherTensorBoard` writes what was measured, where it was measured."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import written_curves

import keras_fisher
from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher.callbacks import EarlyPhase
from keras_fisher.callbacks import FisherTensorBoard


def _by_hand(steps, **kwargs):
    """The curves of a loop over batches, without `fit` and callbacks."""
    model = written_curves.model(**kwargs)
    curves, first, peak = {}, None, 0.0
    for step in range(steps):
        batch = slice(step % 5 * 8, step % 5 * 8 + 8)
        model.train_on_batch(written_curves.X[batch], written_curves.Y[batch])
        m = model.measurements
        for at, traces, penalty, ratio in zip(*m[:3], m.ratio):
            assert at == step
            trace = sum(traces)
            first = trace if first is None else first
            peak = max(peak, trace)
            values = {
                "fisher/trace": trace,
                "fisher/explosion": peak / first,
                f"fisher/trace_by_layer/{written_curves.LAYERS[0]}": traces[0]
                + traces[1],
                f"fisher/trace_by_layer/{written_curves.LAYERS[1]}": traces[2]
                + traces[3],
            }
            if np.isfinite(penalty):
                values["fisher/penalty"] = penalty
            if np.isfinite(ratio):
                values["fisher/ratio"] = ratio
            for tag, value in values.items():
                curves.setdefault(tag, []).append((step, value))
    return curves


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "jit, steps",
    [
        (False, 1),
        (True, 7),
        pytest.param(False, 7, marks=pytest.mark.slow),
        pytest.param(True, 1, marks=pytest.mark.slow),
    ],
)
def test_every_measured_step_is_written_at_its_step(steps, jit, tmp_path):
    penalty = FisherPenalty(0.1, every=5)
    model = written_curves.model(
        penalty, steps_per_execution=steps, jit_compile=jit
    )
    board = FisherTensorBoard(tmp_path, early_phase=EarlyPhase("loss", 0.0))
    for _ in range(2):  # a second `fit` goes on where the first has ended
        written_curves.fit(
            model, [board], validation_data=(written_curves.X, written_curves.Y)
        )
    written = written_curves.read_curves(tmp_path / "train")
    del written["fisher/early_threshold"]
    expected = _by_hand(20, penalty=penalty, jit_compile=jit)
    written_curves.assert_same_curves(written, expected, rtol=1e-4)
    assert [s for s, _ in written["fisher/penalty"]] == [0, 5, 10, 15]
    # Also of a gradient that is used again, where Tr(F) is measured.
    assert [s for s, _ in written["fisher/ratio"]] == [
        s for s, _ in written["fisher/trace"]
    ]
    assert [s for s, _ in written["fisher/trace"]] == [
        *(0, 2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18),
    ]
    # TensorBoard's own reader sees the same.
    np.testing.assert_allclose(
        written_curves.scalars(tmp_path / "train", "fisher/trace"),
        written["fisher/trace"],
    )
    # What Keras writes is still there.
    assert len(written_curves.scalars(tmp_path / "train", "epoch_loss")) == 4
    assert (
        len(written_curves.scalars(tmp_path / "validation", "epoch_loss")) == 4
    )


def test_values_are_those_that_callbacks_see_bit_for_bit(tmp_path):
    record = written_curves.Record()
    model = written_curves.model(0.1, steps_per_execution=3)
    written_curves.fit(model, [FisherTensorBoard(tmp_path), record])
    expected = [(s, np.float32(t.sum())) for s, t, _ in record.points]
    assert (
        written_curves.read_curves(tmp_path / "train")["fisher/trace"]
        == expected
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("update_freq", ["batch", 3, "epoch"])
def test_no_measurement_is_left_out_by_update_freq(update_freq, tmp_path):
    written_curves.fit(
        written_curves.model(),
        [FisherTensorBoard(tmp_path, update_freq=update_freq)],
    )
    steps = [
        s
        for s, _ in written_curves.read_curves(tmp_path / "train")[
            "fisher/trace"
        ]
    ]
    assert steps == [0, 2, 4, 6, 8]


def test_write_every_leaves_out_what_one_asks_to(tmp_path):
    early = EarlyPhase()
    board = FisherTensorBoard(
        tmp_path, write_every=4, by_layer=False, early_phase=early
    )
    written_curves.fit(written_curves.model(), [board])
    curves = written_curves.read_curves(tmp_path / "train")
    assert [s for s, _ in curves["fisher/trace"]] == [0, 4, 8]
    assert early.steps == [0, 2, 4, 6, 8]
    assert not any("by_layer" in tag for tag in curves)


def test_arguments_of_keras_keep_their_positions(tmp_path):
    board = FisherTensorBoard(tmp_path, 1, True)
    assert isinstance(board, keras.callbacks.TensorBoard)
    assert board.histogram_freq == 1 and board.write_graph is True
    written_curves.fit(written_curves.model(), [board], epochs=1)
    tags = written_curves.events(tmp_path / "train").Tags()["tensors"]
    # Keras 3.12 leaves out the names of model and layer.
    assert any(t.endswith("kernel/histogram") for t in tags)
    assert "keras" in tags  # the graph of the wrapped network


def test_penalties_that_say_nothing_of_the_trace_write_themselves(tmp_path):
    model = written_curves.model("gradient", trace_every=None)
    written_curves.fit(model, [FisherTensorBoard(tmp_path)], epochs=1)
    assert set(written_curves.read_curves(tmp_path / "train")) == {
        "fisher/penalty",
        "fisher/ratio",
    }


def test_a_model_that_measures_nothing_writes_what_keras_does(tmp_path):
    written_curves.fit(
        written_curves.model(trace_every=None), [FisherTensorBoard(tmp_path)]
    )
    assert not written_curves.read_curves(tmp_path / "train")
    assert len(written_curves.scalars(tmp_path / "train", "epoch_loss")) == 2


@pytest.mark.parametrize(
    "kwargs, scale",
    [
        ({"trace_every": None}, 1.0),
        ({"trace_every": None, "penalty": FisherPenalty(start=100)}, 1.0),
        ({"trace_every": 2}, np.nan),
    ],
)
def test_a_threshold_without_any_trace_is_not_written(kwargs, scale, tmp_path):
    early = EarlyPhase("loss", threshold=0.5, warn_above=None)
    model = written_curves.model(**kwargs)
    board = FisherTensorBoard(tmp_path, early_phase=early)
    model.fit(
        scale * written_curves.X,
        written_curves.Y,
        batch_size=8,
        verbose=0,
        callbacks=[board],
    )
    found = written_curves.read_curves(tmp_path / "train")
    assert "fisher/early_threshold" not in found


def test_memorization_is_what_each_epoch_has_shown(tmp_path):
    record = written_curves.Record()
    y = written_curves.noisy_labels()
    written_curves.fit(
        written_curves.model(),
        [FisherTensorBoard(tmp_path), record],
        y=y,
        validation_data=(written_curves.X, y),
    )
    for split, prefix in (("train", ""), ("validation", "val_")):
        expected = {
            f"memorization/{name}": [
                (step, logs[prefix + name])
                for step, logs in record.logs.items()
            ]
            for name in (
                "clean_accuracy",
                "noisy_accuracy",
                "recovered_accuracy",
            )
        }
        clean, noisy = (
            np.array(expected[f"memorization/{name}_accuracy"])
            for name in ("clean", "noisy")
        )
        assert clean[:, 0].tolist() == [5, 10]
        expected["memorization/gap"] = list(
            zip(clean[:, 0], clean[:, 1] - noisy[:, 1])
        )
        curves = written_curves.read_curves(tmp_path / split)
        written_curves.assert_same_curves(
            {t: p for t, p in curves.items() if "memorization" in t}, expected
        )


def test_the_early_trace_is_written_once(tmp_path):
    early = EarlyPhase("loss", threshold=0.9)
    board = FisherTensorBoard(tmp_path, early_phase=early)
    model = written_curves.model(optimizer=keras.optimizers.SGD(0.5))
    for _ in range(2):
        written_curves.fit(
            model, [board, early], epochs=3
        )  # told twice, counted once
    assert 0 < early.early_step < 30
    curves = written_curves.read_curves(tmp_path / "train")
    [(step, value)] = curves["fisher/early_trace"]
    assert dict(curves["fisher/trace"])[step] == value
    assert (step, np.float32(early.early_trace)) == (early.early_step, value)
    assert curves["fisher/early_threshold"] == [(0, np.float32(0.9))]
    assert early.steps == [s for s, _ in curves["fisher/trace"]]


class Interrupt(keras.callbacks.Callback):
    def __init__(self, batch):
        super().__init__()
        self._batch = batch

    def on_train_batch_end(self, batch, logs=None):
        if batch == self._batch:
            raise KeyboardInterrupt


def test_the_early_trace_is_written_when_it_is_known(tmp_path):
    early = EarlyPhase("loss", threshold=1e9)
    board = FisherTensorBoard(tmp_path, early_phase=early)
    with pytest.raises(KeyboardInterrupt):
        written_curves.fit(written_curves.model(), [board, Interrupt(3)])
    curves = written_curves.read_curves(tmp_path / "train")
    assert curves["fisher/early_threshold"] == [(0, np.float32(1e9))]
    assert curves["fisher/early_trace"] == curves["fisher/trace"][:1]


def test_models_of_other_kinds_are_refused(tmp_path):
    network = written_curves.model().model
    network.compile("sgd", "mse")
    for callback in (FisherTensorBoard(tmp_path), EarlyPhase()):
        with pytest.raises(ValueError, match="FisherModel"):
            network.fit(
                written_curves.X, written_curves.X[:, :3], callbacks=[callback]
            )
    assert not list(tmp_path.iterdir())


def test_without_validation_there_is_no_run_of_it(tmp_path):
    written_curves.fit(written_curves.model(), [FisherTensorBoard(tmp_path)])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"train", "hparams"}


def test_evaluation_alone_is_written_as_keras_does(tmp_path):
    board = FisherTensorBoard(tmp_path)
    written_curves.model().evaluate(
        written_curves.X, written_curves.Y, verbose=0, callbacks=[board]
    )
    tag = "evaluation_loss_vs_iterations"
    assert len(written_curves.scalars(tmp_path / "validation", tag)) == 1


def test_evaluation_after_a_fit_is_written_to_its_run(tmp_path):
    board, model = FisherTensorBoard(tmp_path), written_curves.model()
    written_curves.fit(model, [board], epochs=1)
    x, y = written_curves.X, written_curves.Y
    loss, _ = model.evaluate(x, y, verbose=0, callbacks=[board])
    tag = "evaluation_loss_vs_iterations"
    [(step, value)] = written_curves.scalars(tmp_path / "validation", tag)
    assert (step, value) == (5, np.float32(loss))


@pytest.mark.few(1)
@pytest.mark.parametrize("update_freq", ["epoch", 1])
def test_a_loop_of_ones_own_needs_no_epochs(update_freq, tmp_path):
    """The hooks of batches are enough, as they are for Keras's callback."""
    for count in (6, 4):
        model = written_curves.model()
        board = FisherTensorBoard(
            tmp_path, update_freq=update_freq, probe=written_curves.X
        )
        callbacks = keras.callbacks.CallbackList([board], model=model)
        if count == 4:
            model.optimizer.iterations.assign(4)  # as resumed
        callbacks.on_train_begin()
        for batch in range(count):
            callbacks.on_train_batch_begin(batch)
            logs = model.train_on_batch(
                written_curves.X, written_curves.Y, return_dict=True
            )
            callbacks.on_train_batch_end(batch, logs)
        callbacks.on_train_end()
    curves = written_curves.read_curves(tmp_path / "train")
    assert [at for at, _ in curves["fisher/trace"]] == [0, 2, 4, 6]
    assert [at for at, _ in curves["fisher/probe_trace"]] == [0, 4]
    if update_freq == 1:
        found = written_curves.scalars(tmp_path / "train", "batch_loss")
        assert len(found) == 10


class Plain(keras.Model):
    """A network that nobody knows the parameters of before it is called."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3)

    def call(self, x):
        return self.dense(x)


@pytest.mark.parametrize(
    "network", [lambda: keras.Sequential([keras.layers.Dense(3)]), Plain]
)
@pytest.mark.parametrize("eager", [False, True])
def test_a_network_that_is_not_built_yet(network, eager, tmp_path):
    model = FisherModel(network(), FisherPenalty(0.1), seed=0)
    model.compile(
        "sgd",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        run_eagerly=eager,
    )
    written_curves.fit(model, [FisherTensorBoard(tmp_path / "run")])
    [row] = keras_fisher.logs.runs(tmp_path).to_dict("records")
    assert row["parameters"] == 6 * 3 + 3
    assert row["peak_trace"] > 0


def test_a_monitor_that_is_not_in_the_logs_is_told_of(tmp_path):
    early = EarlyPhase("acuracy", 0.5)
    board = FisherTensorBoard(tmp_path, early_phase=early)
    with pytest.warns(UserWarning, match="`acuracy` is not in the logs"):
        written_curves.fit(written_curves.model(), [board])


def test_a_loop_of_ones_own_needs_no_logs(tmp_path):
    model = written_curves.model()
    board = FisherTensorBoard(tmp_path)
    board.set_model(model)
    board.on_train_begin()
    for batch in range(4):
        board.on_train_batch_begin(batch)
        model.train_on_batch(written_curves.X, written_curves.Y)
        board.on_train_batch_end(batch)
    board.on_epoch_end(0)
    board.on_train_end()
    curves = written_curves.read_curves(tmp_path / "train")
    assert [at for at, _ in curves["fisher/trace"]] == [0, 2]


def test_a_trace_that_overflowed_ends_nothing(tmp_path):
    """It is no number for a curve, and no first value of an explosion."""
    network = keras.Sequential(
        [
            keras.Input([4]),
            keras.layers.Dense(3, kernel_initializer="zeros"),
        ]
    )
    model = FisherModel(network, trace_every=1, seed=0)
    model.compile(
        keras.optimizers.SGD(0.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    x = np.ones([24, 4], "float32")
    x[:8] *= 1e20
    model.fit(
        x,
        np.zeros(24),
        batch_size=8,
        shuffle=False,
        verbose=0,
        callbacks=[FisherTensorBoard(tmp_path)],
    )
    curves = written_curves.read_curves(tmp_path / "train")
    steps = [step for step, _ in curves["fisher/trace"]]
    assert steps == [1, 2]
