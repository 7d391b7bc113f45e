"""What TensorBoard's plugins are given."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util import tensor_util
import tensorflow as tf
import written_curves

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher._tensorboard import event_files
from keras_fisher._tensorboard import hyperparameters
from keras_fisher.callbacks import EarlyPhase
from keras_fisher.callbacks import FisherTensorBoard
from keras_fisher.callbacks import heat_map


def _charts(directory):
    [event] = written_curves.events(directory).Tensors(
        "custom_scalars__config__"
    )
    layout = layout_pb2.Layout.FromString(
        tensor_util.make_ndarray(event.tensor_proto).item()
    )
    return {
        chart.title: list(chart.multiline.tag)
        for category in layout.category
        for chart in category.chart
    }


def test_without_noise_flags_there_is_no_empty_chart(tmp_path):
    written_curves.fit(written_curves.model(), [FisherTensorBoard(tmp_path)])
    assert list(_charts(tmp_path / "train")) == [
        "Tr(F)",
        "Explosion ratio",
        "Tr(F) by layer",
    ]


def test_a_bound_has_a_chart_of_its_own(tmp_path):
    for bound, titles in ((1.0, 1), (None, 0)):
        model = written_curves.model(FisherPenalty(0.1, bound=bound))
        directory = tmp_path / str(bound)
        written_curves.fit(model, [FisherTensorBoard(directory)], epochs=1)
        charts = _charts(directory / "train")
        found = [p for ps in charts.values() for p in ps if "ratio" in p]
        assert found == ["^fisher/ratio$"] * titles


def test_the_layout_of_custom_scalars_has_a_chart_of_each_kind(tmp_path):
    written_curves.fit(
        written_curves.model(),
        [FisherTensorBoard(tmp_path)],
        y=written_curves.noisy_labels(),
    )
    charts = _charts(tmp_path / "train")
    assert list(charts) == [
        "Tr(F)",
        "Explosion ratio",
        "Tr(F) by layer",
        "Clean against noisy accuracy",
    ]
    tags = [
        *written_curves.read_curves(tmp_path / "train"),
        "fisher/probe_trace",
    ]
    drawn = {
        title: {t for t in tags for p in patterns if re.match(p, t)}
        for title, patterns in charts.items()
    }
    assert drawn == {
        "Tr(F)": {"fisher/trace", "fisher/probe_trace"},
        "Explosion ratio": {"fisher/explosion"},
        "Tr(F) by layer": {
            f"fisher/trace_by_layer/{n}" for n in written_curves.LAYERS
        },
        "Clean against noisy accuracy": {
            "memorization/clean_accuracy",
            "memorization/noisy_accuracy",
        },
    }


def test_hyperparameters_are_collected_without_asking(tmp_path):
    model = written_curves.model(FisherPenalty(0.3, every=4, exclude=["bias"]))
    board = FisherTensorBoard(tmp_path, hyperparameters={"augment": True})
    written_curves.fit(model, [board], epochs=1)
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


@pytest.mark.parametrize(
    "loss, weights, expected",
    [
        (
            {"b": "mse", "a": keras.losses.Huber()},
            {"a": 2, "b": 0.5},
            {"loss_function": "a: huber_loss, b: mse"}
            | {"loss_weights": "a: 2, b: 0.5"},
        ),
        (["mae", None], None, {"loss_function": "mae, none"}),
        (None, None, {"loss_function": "none"}),
    ],
)
def test_hyperparameters_of_several_losses(loss, weights, expected):
    x = keras.Input((3,))
    outputs = {name: keras.layers.Dense(1, name=name)(x) for name in "ab"}
    if not isinstance(loss, dict):
        outputs = [*outputs.values()]
    model = FisherModel(keras.Model(x, outputs), trace_every=None)
    model.compile("sgd", loss, loss_weights=weights)
    found = hyperparameters.of(model)
    assert expected.items() <= found.items()
    assert ("loss_weights" in found) == (weights is not None)


def test_hyperparameters_of_a_plain_run(tmp_path):
    optimizer = keras.mixed_precision.LossScaleOptimizer(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 9))
    )
    written_curves.fit(
        written_curves.model(optimizer=optimizer), [FisherTensorBoard(tmp_path)]
    )
    found = event_files.hyperparameters(str(tmp_path / "hparams"))
    assert found["optimizer"] == "Adam"
    assert found["learning_rate"] == "CosineDecay"
    assert found["penalty"] == "none" and found["alpha"] == 0
    assert not {"every", "weight_decay", "ema_momentum", "name"} & set(found)


def test_hyperparameters_name_what_averages_the_weights(tmp_path):
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)
    written_curves.fit(
        written_curves.model(optimizer=optimizer), [FisherTensorBoard(tmp_path)]
    )
    found = event_files.hyperparameters(str(tmp_path / "hparams"))
    assert found["use_ema"] is True and found["ema_momentum"] == 0.9


def test_metrics_of_a_run_are_its_last_values(tmp_path):
    record = written_curves.Record()
    early = EarlyPhase("loss", threshold=1.2)
    board = FisherTensorBoard(tmp_path, early_phase=early)
    written_curves.fit(
        written_curves.model(),
        [board, record],
        6,
        validation_data=(written_curves.X, written_curves.Y),
    )
    metrics = written_curves.read_curves(tmp_path / "hparams")
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
            "peak_step",
            "peak_trace",
            "val_accuracy",
        )
    }
    for name in ("accuracy", "val_accuracy"):
        assert last[f"metric/{name}"] == np.float32(logs[name])
    traces = dict(
        written_curves.read_curves(tmp_path / "train")["fisher/trace"]
    )
    assert last["metric/peak_trace"] == max(traces.values())
    assert last["metric/peak_step"] == max(traces, key=traces.get)
    np.testing.assert_allclose(
        last["metric/explosion"], max(traces.values()) / traces[0], rtol=1e-6
    )
    assert last["metric/early_trace"] == traces[early.early_step]


def test_without_accuracies_the_losses_are_metrics(tmp_path):
    model = written_curves.model(compiled=False)
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    record = written_curves.Record()
    written_curves.fit(
        model,
        [FisherTensorBoard(tmp_path), record],
        validation_data=(written_curves.X, written_curves.Y),
    )
    metrics = written_curves.read_curves(tmp_path / "hparams")
    for name in ("loss", "val_loss"):
        value = record.logs[10][name]
        assert metrics[f"metric/{name}"][-1] == (10, np.float32(value))
    assert not any("fisher" in tag for tag in metrics)


def _images(directory):
    tensors = written_curves.events(directory).Tensors("fisher/heat_map")
    return {
        event.step: tf.io.decode_png(
            tensor_util.make_ndarray(event.tensor_proto)[2]
        ).numpy()
        for event in tensors
    }


def test_the_heat_map_is_drawn_after_the_first_and_the_last_epoch(tmp_path):
    written_curves.fit(
        written_curves.model(), [FisherTensorBoard(tmp_path)], epochs=4
    )
    images = _images(tmp_path / "train")
    assert {5, 20} <= set(images) <= {5, 10, 15, 20}
    assert images[20].shape[2] == 3
    assert images[20].shape[1] >= 600
    assert (images[5] != images[20]).any()


def test_without_a_heat_map_none_is_drawn(tmp_path):
    board = FisherTensorBoard(tmp_path, heat_map=False)
    written_curves.fit(written_curves.model(), [board], epochs=1)
    tags = written_curves.events(tmp_path / "train").Tags()["tensors"]
    assert "fisher/trace" in tags and "fisher/heat_map" not in tags


def test_without_matplotlib_all_but_the_heat_map_is_written(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(
        heat_map.HeatMap, "is_available", staticmethod(lambda: False)
    )
    with pytest.warns(UserWarning, match=r"keras_fisher\[plot\]"):
        written_curves.fit(
            written_curves.model(), [FisherTensorBoard(tmp_path)], epochs=1
        )
    tags = written_curves.events(tmp_path / "train").Tags()["tensors"]
    assert "fisher/trace" in tags and "fisher/heat_map" not in tags


def test_a_heat_map_holds_layers_that_were_frozen_for_a_while(tmp_path):
    model = written_curves.model()
    board = FisherTensorBoard(tmp_path)
    written_curves.fit(model, [board], epochs=1)
    model.model.layers[0].trainable = False
    model.compile(
        model.optimizer, model.loss, metrics=["accuracy"], jit_compile=False
    )
    written_curves.fit(model, [board], epochs=1)
    steps, traces, layers = board._map.collected()
    assert steps.tolist() == [0, 2, 4, 6, 8] and layers == list(
        written_curves.LAYERS
    )
    assert np.isnan(traces[3:, 0]).all() and np.isfinite(traces[:, 1]).all()
