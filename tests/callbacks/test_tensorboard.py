"""What TensorBoard gets, read back from its event files."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util import tensor_util
import tensorflow as tf

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import fisher_trace
from keras_fisher._tensorboard import event_files
from keras_fisher.callbacks import EarlyPhase
from keras_fisher.callbacks import FisherTensorBoard
from keras_fisher.callbacks import heat_map

_X = np.random.default_rng(0).normal(size=(40, 6)).astype("float32")
_Y = np.arange(40) % 3
_LAYERS = ("sequential/first", "sequential/second")


def _model(penalty=None, *, compiled=True, trace_every=2, **kwargs):
    keras.utils.set_random_seed(1)
    network = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, activation="tanh", name="first"),
            keras.layers.Dense(3, name="second"),
        ],
        name="sequential",
    )
    model = FisherModel(network, penalty, trace_every=trace_every, seed=1)
    if compiled:
        model.compile(
            kwargs.pop("optimizer", None) or keras.optimizers.SGD(0.1),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            **kwargs,
        )
    return model


def _fit(model, callbacks, epochs=2, y=_Y, **kwargs):
    return model.fit(
        _X,
        y,
        batch_size=8,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
        **kwargs,
    )


def _noisy_labels():
    noisy = np.arange(40) % 4 == 0
    return {
        "label": np.where(noisy, (_Y + 1) % 3, _Y),
        "is_noisy": noisy,
        "true_label": _Y,
    }


def _events(directory):
    events = event_accumulator.EventAccumulator(
        str(directory), size_guidance={event_accumulator.TENSORS: 0}
    )
    return events.Reload()


def _scalars(directory, tag):
    return [
        (event.step, tensor_util.make_ndarray(event.tensor_proto).item())
        for event in _events(directory).Tensors(tag)
    ]


def _curves(directory):
    """All of our curves, as lists of points in the order of writing."""
    found = {}
    for point in event_files.scalars(str(directory)):
        if point.tag.startswith(("fisher/", "memorization/", "metric/")):
            found.setdefault(point.tag, []).append((point.step, point.value))
    return found


def _assert_same_curves(actual, expected, rtol=1e-6):
    assert actual.keys() == expected.keys()
    for tag, points in expected.items():
        assert [s for s, _ in actual[tag]] == [s for s, _ in points], tag
        np.testing.assert_allclose(
            actual[tag], points, rtol=rtol, atol=1e-7, err_msg=tag
        )


class _Record(keras.callbacks.Callback):
    """Measurements and logs, as a user's own callback sees them."""

    def __init__(self):
        super().__init__()
        self.points = []
        self.logs = {}

    def on_train_batch_end(self, batch, logs=None):
        m = self.model.measurements
        self.points.extend(zip(m.step, m.trace_by_variable, m.penalty))

    def on_epoch_end(self, epoch, logs=None):
        self.logs[int(self.model.optimizer.iterations.numpy())] = dict(logs)


def _by_hand(steps, **kwargs):
    """The curves of a loop over batches, without `fit` and callbacks."""
    model = _model(**kwargs)
    curves, first, peak = {}, None, 0.0
    for step in range(steps):
        batch = slice(step % 5 * 8, step % 5 * 8 + 8)
        model.train_on_batch(_X[batch], _Y[batch])
        m = model.measurements
        for at, traces, penalty in zip(*m[:3]):
            assert at == step
            trace = sum(traces)
            first = trace if first is None else first
            peak = max(peak, trace)
            values = {
                "fisher/trace": trace,
                "fisher/explosion": peak / first,
                f"fisher/trace_by_layer/{_LAYERS[0]}": traces[0] + traces[1],
                f"fisher/trace_by_layer/{_LAYERS[1]}": traces[2] + traces[3],
            }
            if np.isfinite(penalty):
                values["fisher/penalty"] = penalty
            for tag, value in values.items():
                curves.setdefault(tag, []).append((step, value))
    return curves


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
    model = _model(penalty, steps_per_execution=steps, jit_compile=jit)
    board = FisherTensorBoard(tmp_path, early_phase=EarlyPhase("loss", 0.0))
    for _ in range(2):  # a second `fit` goes on where the first has ended
        _fit(model, [board], validation_data=(_X, _Y))
    written = _curves(tmp_path / "train")
    del written["fisher/early_threshold"]
    expected = _by_hand(20, penalty=penalty, jit_compile=jit)
    _assert_same_curves(written, expected, rtol=1e-4)
    assert [s for s, _ in written["fisher/penalty"]] == [0, 5, 10, 15]
    assert [s for s, _ in written["fisher/trace"]] == [
        *(0, 2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18),
    ]
    # TensorBoard's own reader sees the same.
    np.testing.assert_allclose(
        _scalars(tmp_path / "train", "fisher/trace"), written["fisher/trace"]
    )
    # What Keras writes is still there.
    assert len(_scalars(tmp_path / "train", "epoch_loss")) == 4
    assert len(_scalars(tmp_path / "validation", "epoch_loss")) == 4


def test_values_are_those_that_callbacks_see_bit_for_bit(tmp_path):
    record = _Record()
    model = _model(0.1, steps_per_execution=3)
    _fit(model, [FisherTensorBoard(tmp_path), record])
    expected = [(s, np.float32(t.sum())) for s, t, _ in record.points]
    assert _curves(tmp_path / "train")["fisher/trace"] == expected


@pytest.mark.parametrize("update_freq", ["batch", 3, "epoch"])
def test_no_measurement_is_left_out_by_update_freq(update_freq, tmp_path):
    _fit(_model(), [FisherTensorBoard(tmp_path, update_freq=update_freq)])
    steps = [s for s, _ in _curves(tmp_path / "train")["fisher/trace"]]
    assert steps == [0, 2, 4, 6, 8]


def test_write_every_leaves_out_what_one_asks_to(tmp_path):
    early = EarlyPhase()
    board = FisherTensorBoard(
        tmp_path, write_every=4, by_layer=False, early_phase=early
    )
    _fit(_model(), [board])
    curves = _curves(tmp_path / "train")
    assert [s for s, _ in curves["fisher/trace"]] == [0, 4, 8]
    assert early.steps == [0, 2, 4, 6, 8]
    assert not any("by_layer" in tag for tag in curves)


def test_arguments_of_keras_keep_their_positions(tmp_path):
    board = FisherTensorBoard(tmp_path, 1, True)
    assert isinstance(board, keras.callbacks.TensorBoard)
    assert board.histogram_freq == 1 and board.write_graph is True
    _fit(_model(), [board], epochs=1)
    tags = _events(tmp_path / "train").Tags()["tensors"]
    assert "sequential/first/kernel/histogram" in tags
    assert "keras" in tags  # the graph of the wrapped network


def test_penalties_that_say_nothing_of_the_trace_write_themselves(tmp_path):
    model = _model("gradient", trace_every=None)
    _fit(model, [FisherTensorBoard(tmp_path)], epochs=1)
    assert set(_curves(tmp_path / "train")) == {"fisher/penalty"}


def test_a_model_that_measures_nothing_writes_what_keras_does(tmp_path):
    _fit(_model(trace_every=None), [FisherTensorBoard(tmp_path)])
    assert not _curves(tmp_path / "train")
    assert len(_scalars(tmp_path / "train", "epoch_loss")) == 2


# Memorization.


def test_memorization_is_what_each_epoch_has_shown(tmp_path):
    record = _Record()
    y = _noisy_labels()
    _fit(
        _model(),
        [FisherTensorBoard(tmp_path), record],
        y=y,
        validation_data=(_X, y),
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
        curves = _curves(tmp_path / split)
        _assert_same_curves(
            {t: p for t, p in curves.items() if "memorization" in t}, expected
        )


# TrF_i.


def test_the_early_trace_is_written_once(tmp_path):
    early = EarlyPhase("loss", threshold=0.9)
    board = FisherTensorBoard(tmp_path, early_phase=early)
    model = _model(optimizer=keras.optimizers.SGD(0.5))
    for _ in range(2):
        _fit(model, [board, early], epochs=3)  # told twice, counted once
    assert 0 < early.early_step < 30
    curves = _curves(tmp_path / "train")
    [(step, value)] = curves["fisher/early_trace"]
    assert dict(curves["fisher/trace"])[step] == value
    assert (step, np.float32(early.early_trace)) == (early.early_step, value)
    assert curves["fisher/early_threshold"] == [(0, np.float32(0.9))]
    assert early.steps == [s for s, _ in curves["fisher/trace"]]


# The probe.


class _Weights(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.at = {}

    def on_train_begin(self, logs=None):
        self._keep()

    def on_train_batch_end(self, batch, logs=None):
        self._keep()

    def _keep(self):
        step = int(self.model.optimizer.iterations.numpy())
        self.at[step] = self.model.get_weights()


@pytest.mark.parametrize(
    "every, steps, expected",
    [
        ("epoch", 1, [0, 5, 10]),
        (4, 1, [0, 4, 8]),
        (4, 3, [0, 5, 8]),  # calls end at 3, 5, 8, 10
    ],
)
@pytest.mark.parametrize("estimator", ["monte_carlo", "empirical"])
def test_the_probe_is_measured_with_the_weights_of_its_step(
    every, steps, expected, estimator, tmp_path
):
    weights = _Weights()
    model = _model(0.1, steps_per_execution=steps)
    board = FisherTensorBoard(
        tmp_path,
        probe=(_X[:16], _Y[:16]),
        probe_every=every,
        probe_estimator=estimator,
    )
    _fit(model, [board, weights])
    curves = _curves(tmp_path / "train")
    probe = curves["fisher/probe_trace"]
    assert [step for step, _ in probe] == expected
    for step, value in probe:
        model.set_weights(weights.at[step])
        by_layer = fisher_trace(
            model,
            _X[:16],
            _Y[:16],
            estimator=estimator,
            by="layer",
            seed=0,
        )
        np.testing.assert_allclose(value, sum(by_layer.values()), rtol=1e-5)
        for layer in _LAYERS:
            np.testing.assert_allclose(
                dict(curves[f"fisher/probe_trace_by_layer/{layer}"])[step],
                by_layer[layer],
                rtol=1e-5,
            )


def test_the_probe_does_not_change_what_is_trained(tmp_path):
    weights = []
    for probe in (None, _X[:8]):
        model = _model(0.1)
        _fit(
            model,
            [FisherTensorBoard(tmp_path / str(len(weights)), probe=probe)],
        )
        weights.append(model.get_weights())
    for a, b in zip(*weights):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("probe", [_X[:0], (_X[:0], _Y[:0]), np.float32(1.0)])
def test_an_empty_probe_is_refused(probe):
    with pytest.raises(ValueError, match="at least one example"):
        FisherTensorBoard("unused", probe=probe)


def test_a_probe_of_another_shape_is_refused_before_training(tmp_path):
    model = _model()
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"\(None, 6\).*\(8, 5\)"):
        _fit(model, [FisherTensorBoard(tmp_path, probe=_X[:8, :5])])
    for a, b in zip(before, model.get_weights()):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("every", [0, "batch", 1.5])
def test_a_wrong_schedule_of_the_probe_is_refused(every):
    with pytest.raises(ValueError, match="probe_every"):
        FisherTensorBoard("unused", probe=_X[:8], probe_every=every)


# Plugins.


def _charts(directory):
    [event] = _events(directory).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(
        tensor_util.make_ndarray(event.tensor_proto).item()
    )
    return {
        chart.title: list(chart.multiline.tag)
        for category in layout.category
        for chart in category.chart
    }


def test_without_noise_flags_there_is_no_empty_chart(tmp_path):
    _fit(_model(), [FisherTensorBoard(tmp_path)])
    assert list(_charts(tmp_path / "train")) == [
        "Tr(F)",
        "Explosion ratio",
        "Tr(F) by layer",
    ]


def test_the_layout_of_custom_scalars_has_a_chart_of_each_kind(tmp_path):
    _fit(_model(), [FisherTensorBoard(tmp_path)], y=_noisy_labels())
    charts = _charts(tmp_path / "train")
    assert list(charts) == [
        "Tr(F)",
        "Explosion ratio",
        "Tr(F) by layer",
        "Clean against noisy accuracy",
    ]
    tags = [*_curves(tmp_path / "train"), "fisher/probe_trace"]
    drawn = {
        title: {t for t in tags for p in patterns if re.match(p, t)}
        for title, patterns in charts.items()
    }
    assert drawn == {
        "Tr(F)": {"fisher/trace", "fisher/probe_trace"},
        "Explosion ratio": {"fisher/explosion"},
        "Tr(F) by layer": {f"fisher/trace_by_layer/{n}" for n in _LAYERS},
        "Clean against noisy accuracy": {
            "memorization/clean_accuracy",
            "memorization/noisy_accuracy",
        },
    }


def test_hyperparameters_are_collected_without_asking(tmp_path):
    model = _model(FisherPenalty(0.3, every=4, exclude=["bias"]))
    board = FisherTensorBoard(tmp_path, hyperparameters={"augment": True})
    _fit(model, [board], epochs=1)
    found = event_files.hyperparameters(str(tmp_path / "hparams"))
    expected = {
        "model": "sequential",
        "parameters": 53.0,
        "precision": "float32",
        "loss_function": "sparse_categorical_crossentropy",
        "trace_every": 2.0,
        "seed": 1.0,
        "batch_size": 8.0,
        "optimizer": "SGD",
        "momentum": 0.0,
        "nesterov": False,
        "penalty": "fisher",
        "alpha": 0.3,
        "fraction": 1.0,
        "every": 4.0,
        "reuse": True,
        "start": 0.0,
        "method": "exact",
        "exclude": "['bias']",
        "augment": True,
    }
    assert expected.items() <= found.items()
    np.testing.assert_allclose(found["learning_rate"], 0.1, rtol=1e-6)


def test_hyperparameters_of_a_plain_run(tmp_path):
    optimizer = keras.mixed_precision.LossScaleOptimizer(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 9))
    )
    _fit(_model(optimizer=optimizer), [FisherTensorBoard(tmp_path)])
    found = event_files.hyperparameters(str(tmp_path / "hparams"))
    assert found["optimizer"] == "Adam"
    assert found["learning_rate"] == "CosineDecay"
    assert found["penalty"] == "none" and found["alpha"] == 0
    assert not {"every", "weight_decay", "ema_momentum", "name"} & set(found)


def test_hyperparameters_name_what_averages_the_weights(tmp_path):
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)
    _fit(_model(optimizer=optimizer), [FisherTensorBoard(tmp_path)])
    found = event_files.hyperparameters(str(tmp_path / "hparams"))
    assert found["use_ema"] is True and found["ema_momentum"] == 0.9


def test_metrics_of_a_run_are_its_last_values(tmp_path):
    record = _Record()
    early = EarlyPhase("loss", threshold=1.2)
    board = FisherTensorBoard(tmp_path, early_phase=early)
    _fit(_model(), [board, record], 6, validation_data=(_X, _Y))
    metrics = _curves(tmp_path / "hparams")
    steps = [5, 10, 15, 20, 25, 30]
    assert [s for s, _ in metrics["metric/accuracy"]] == steps
    last = {tag: points[-1][1] for tag, points in metrics.items()}
    logs = record.logs[30]
    assert set(last) == {
        f"metric/{name}"
        for name in (
            "accuracy",
            "early_trace",
            "explosion",
            "peak_trace",
            "val_accuracy",
        )
    }
    for name in ("accuracy", "val_accuracy"):
        assert last[f"metric/{name}"] == np.float32(logs[name])
    traces = dict(_curves(tmp_path / "train")["fisher/trace"])
    assert last["metric/peak_trace"] == max(traces.values())
    np.testing.assert_allclose(
        last["metric/explosion"], max(traces.values()) / traces[0], rtol=1e-6
    )
    assert last["metric/early_trace"] == traces[early.early_step]


def test_without_accuracies_the_losses_are_metrics(tmp_path):
    model = _model(compiled=False)
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    record = _Record()
    _fit(model, [FisherTensorBoard(tmp_path), record], validation_data=(_X, _Y))
    metrics = _curves(tmp_path / "hparams")
    for name in ("loss", "val_loss"):
        value = record.logs[10][name]
        assert metrics[f"metric/{name}"][-1] == (10, np.float32(value))
    assert not any("fisher" in tag for tag in metrics)


def _images(directory):
    tensors = _events(directory).Tensors("fisher/heat_map")
    return {
        event.step: tf.io.decode_png(
            tensor_util.make_ndarray(event.tensor_proto)[2]
        ).numpy()
        for event in tensors
    }


def test_the_heat_map_is_drawn_after_the_first_and_the_last_epoch(tmp_path):
    _fit(_model(), [FisherTensorBoard(tmp_path)], epochs=4)
    images = _images(tmp_path / "train")
    assert {5, 20} <= set(images) <= {5, 10, 15, 20}
    assert images[20].shape[2] == 3
    assert images[20].shape[1] >= 600
    assert (images[5] != images[20]).any()


def test_without_matplotlib_all_but_the_heat_map_is_written(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(
        heat_map.HeatMap, "is_available", staticmethod(lambda: False)
    )
    with pytest.warns(UserWarning, match=r"pip install keras_fisher\[plot\]"):
        _fit(_model(), [FisherTensorBoard(tmp_path)], epochs=1)
    assert "fisher/trace" in _curves(tmp_path / "train")
    assert "fisher/heat_map" not in _events(tmp_path / "train").Tags()


def test_a_heat_map_holds_layers_that_were_frozen_for_a_while(tmp_path):
    model = _model()
    board = FisherTensorBoard(tmp_path)
    _fit(model, [board], epochs=1)
    model.model.layers[0].trainable = False
    model.compile(
        model.optimizer, model.loss, metrics=["accuracy"], jit_compile=False
    )
    _fit(model, [board], epochs=1)
    steps, traces, layers = board._map.collected()
    assert steps.tolist() == [0, 2, 4, 6, 8] and layers == list(_LAYERS)
    assert np.isnan(traces[3:, 0]).all() and np.isfinite(traces[:, 1]).all()


# Directories.


def _contents(directory):
    return {
        path: path.read_bytes()
        for path in pathlib.Path(directory).rglob("*tfevents*")
    }


def test_a_second_run_in_a_directory_gets_one_of_its_own(tmp_path):
    _fit(_model(), [FisherTensorBoard(tmp_path)])
    first = _contents(tmp_path)
    for name in ("run_2", "run_3"):
        with pytest.warns(UserWarning, match=name):
            _fit(_model(), [FisherTensorBoard(tmp_path)])
        assert _curves(tmp_path / name / "train") == _curves(tmp_path / "train")
        assert len(_scalars(tmp_path / name / "train", "epoch_loss")) == 2
    after = _contents(tmp_path)
    for path, content in first.items():
        assert after[path] == content


def test_a_resumed_run_goes_on_in_the_latest_directory(tmp_path):
    _fit(_model(), [FisherTensorBoard(tmp_path)])
    model = _model()
    with pytest.warns(UserWarning, match="run_2"):
        _fit(model, [FisherTensorBoard(tmp_path)])
    with pytest.warns(UserWarning, match="run_2"):
        _fit(model, [FisherTensorBoard(tmp_path)])
    steps = [s for s, _ in _curves(tmp_path / "run_2/train")["fisher/trace"]]
    assert steps == list(range(0, 20, 2))
    assert len(_curves(tmp_path / "train")["fisher/trace"]) == 5


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    model = _model()
    with pytest.raises(ValueError, match=r"log_dir.*file"):
        _fit(model, [FisherTensorBoard(file / "logs")])
    assert model.optimizer.iterations == 0
    assert file.read_text() == "in the way"


def test_models_of_other_kinds_are_refused(tmp_path):
    network = _model().model
    network.compile("sgd", "mse")
    for callback in (FisherTensorBoard(tmp_path), EarlyPhase()):
        with pytest.raises(ValueError, match="FisherModel"):
            network.fit(_X, _X[:, :3], callbacks=[callback])
    assert not list(tmp_path.iterdir())


def test_without_validation_there_is_no_run_of_it(tmp_path):
    _fit(_model(), [FisherTensorBoard(tmp_path)])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"train", "hparams"}


def test_evaluation_alone_is_written_as_keras_does(tmp_path):
    board = FisherTensorBoard(tmp_path)
    _model().evaluate(_X, _Y, verbose=0, callbacks=[board])
    tag = "evaluation_loss_vs_iterations"
    assert len(_scalars(tmp_path / "validation", tag)) == 1


# Interrupted runs.


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
        model = _model(
            FisherPenalty(0.1, every=3),
            steps_per_execution=steps,
            optimizer=keras.optimizers.SGD(0.5, momentum=0.9),
        )
        directory = tmp_path / name
        board = FisherTensorBoard(
            directory / "logs",
            early_phase=EarlyPhase("loss", warn_above=None),
            probe=_X[:8],
        )
        backup = keras.callbacks.BackupAndRestore(
            directory / "backup", save_freq=save_freq
        )
        _fit(model, [board, backup, *extra], 5, y=_noisy_labels())
        return directory / "logs"

    with pytest.raises(KeyboardInterrupt):
        run("stopped", _Stop(13))
    before = [
        s for s, _ in _curves(tmp_path / "stopped/logs/train")["fisher/trace"]
    ]
    resumed, whole = run("stopped"), run("whole")
    if save_freq == "epoch":  # else Keras begins the epoch with other weights
        assert before[-1] >= 12
        for name in ("train", "hparams"):
            _assert_same_curves(
                _curves(resumed / name), _curves(whole / name), rtol=1e-5
            )
        # What was taken out is kept.
        kept = list((resumed / "train").glob("replaced-1.*"))
        assert len(kept) == 1
    numbers = [s for s, _ in _curves(resumed / "train")["fisher/trace"]]
    every = [n for n in range(numbers[-1] + 1) if n % 2 == 0 or n % 3 == 0]
    assert numbers == every


def test_an_epoch_that_is_done_again_is_written_once(tmp_path):
    """Keras's curves too, stopped after they are written and no backup."""

    class StopBehind(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(*extra):
        board = FisherTensorBoard(tmp_path / "logs")
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        _fit(_model(), [board, *extra, backup], 4, validation_data=(_X, _Y))

    with pytest.raises(KeyboardInterrupt):
        run(StopBehind())
    run()
    for name in ("train", "validation"):
        points = event_files.scalars(str(tmp_path / "logs" / name))
        epochs = [p.step for p in points if p.tag == "epoch_loss"]
        assert epochs == [0, 1, 2, 3], name


_KILLED = """
    import sys
    sys.path[:0] = {path!r}
    import keras
    import test_tensorboard as t
    import time

    class Wait(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.model.optimizer.iterations == {stop}:
                print("ready", flush=True)
                time.sleep(600)

    t._fit(
        t._model(t.FisherPenalty(0.1, every=3)),
        [
            t.FisherTensorBoard({logs!r}),
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


def test_a_killed_process_leaves_curves_that_another_continues(tmp_path):
    with _start(tmp_path, stop=13) as process:
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGKILL)
    train = tmp_path / "logs" / "train"
    steps = [s for s, _ in _curves(train)["fisher/trace"]]
    assert steps == [0, 2, 3, 4, 6, 8, 9, 10, 12]
    # A record half-written, as a kill within a write leaves it.
    [path] = event_files.paths(str(train))
    with open(path, "ab") as file:
        file.write(b"\x18\x00\x00\x00")
    with _start(tmp_path, stop=-1) as process:
        process.wait()
    assert process.returncode == 0
    _fit(
        _model(FisherPenalty(0.1, every=3)),
        [FisherTensorBoard(tmp_path / "whole")],
        epochs=4,
    )
    _assert_same_curves(
        _curves(train), _curves(tmp_path / "whole" / "train"), rtol=1e-5
    )


_MIRRORED = """
    import sys
    sys.path[:0] = {path!r}
    import tensorflow as tf
    [cpu] = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )
    import test_tensorboard as t
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    record = t._Record()
    with strategy.scope():
        model = t._model(t.FisherPenalty(0.1, every=3))
    t._fit(model, [t.FisherTensorBoard({logs!r}), record])
    for step, traces, _ in record.points:
        print(step, float(traces.sum()))
"""


def test_replicas_are_written_once(tmp_path):
    code = textwrap.dedent(_MIRRORED).format(path=sys.path, logs=str(tmp_path))
    output = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    )
    assert output.returncode == 0
    seen = [line.split() for line in output.stdout.splitlines()]
    written = _curves(tmp_path / "train")["fisher/trace"]
    assert [s for s, _ in written] == [0, 2, 3, 4, 6, 8, 9]
    np.testing.assert_allclose(
        written, [(int(s), float(t)) for s, t in seen], rtol=1e-6
    )
    found = event_files.hyperparameters(str(tmp_path / "hparams"))
    assert found["batch_size"] == 8  # of both replicas
