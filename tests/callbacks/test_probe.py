"""A curve of little noise, on a fixed probe."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import written_curves

from keras_fisher import FisherModel
from keras_fisher import fisher_trace
from keras_fisher.callbacks import FisherTensorBoard


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


@pytest.mark.few(1)
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
    model = written_curves.model(0.1, steps_per_execution=steps)
    board = FisherTensorBoard(
        tmp_path,
        probe=(written_curves.X[:16], written_curves.Y[:16]),
        probe_every=every,
        probe_estimator=estimator,
    )
    written_curves.fit(model, [board, weights])
    curves = written_curves.read_curves(tmp_path / "train")
    probe = curves["fisher/probe_trace"]
    assert [step for step, _ in probe] == expected
    for step, value in probe:
        model.set_weights(weights.at[step])
        by_layer = fisher_trace(
            model,
            written_curves.X[:16],
            written_curves.Y[:16],
            estimator=estimator,
            by="layer",
            seed=0,
        )
        np.testing.assert_allclose(value, sum(by_layer.values()), rtol=1e-5)
        for layer in written_curves.LAYERS:
            np.testing.assert_allclose(
                dict(curves[f"fisher/probe_trace_by_layer/{layer}"])[step],
                by_layer[layer],
                rtol=1e-5,
            )


@pytest.mark.parametrize(
    "accumulated, steps, every, expected",
    [
        (4, 1, 3, [0, 3, 6, 9]),  # of 40 batches, 10 steps
        (None, 4, 12, [0, 14, 24, 38]),  # calls end at 4, 8, 10, 14, ...
    ],
)
def test_the_probe_goes_by_steps_that_were_made(
    accumulated, steps, every, expected, tmp_path
):
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model = FisherModel(network)
    model.compile(
        keras.optimizers.SGD(0.1, gradient_accumulation_steps=accumulated),
        "mse",
        steps_per_execution=steps,
    )
    x = np.ones((10, 4), "float32")
    board = FisherTensorBoard(tmp_path, probe=x, probe_every=every)
    model.fit(x, x[:, :3], batch_size=1, epochs=4, verbose=0, callbacks=[board])
    curves = written_curves.read_curves(tmp_path / "train")
    found = [step for step, _ in curves["fisher/probe_trace"]]
    assert found == expected


def test_the_probe_does_not_change_what_is_trained(tmp_path):
    weights = []
    for probe in (None, written_curves.X[:8]):
        model = written_curves.model(0.1)
        written_curves.fit(
            model,
            [FisherTensorBoard(tmp_path / str(len(weights)), probe=probe)],
        )
        weights.append(model.get_weights())
    for a, b in zip(*weights):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "probe",
    [
        written_curves.X[:0],
        (written_curves.X[:0], written_curves.Y[:0]),
        np.float32(1.0),
    ],
)
def test_an_empty_probe_is_refused(probe):
    with pytest.raises(ValueError, match="at least one example"):
        FisherTensorBoard("unused", probe=probe)


def test_a_probe_may_be_a_data_set(tmp_path):
    x, y = written_curves.X[:16], written_curves.Y[:16]
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    curves = []
    for name, probe in (("arrays", (x, y)), ("batches", batches)):
        board = FisherTensorBoard(
            tmp_path / name, probe=probe, probe_estimator="empirical"
        )
        written_curves.fit(written_curves.model(), [board], epochs=1)
        read = written_curves.read_curves(tmp_path / name / "train")
        curves.append({"probe": read["fisher/probe_trace"]})
    assert len(curves[0]["probe"]) == 2
    written_curves.assert_same_curves(*curves)


def test_a_probe_has_no_weights():
    x, y = written_curves.X, written_curves.Y
    with pytest.raises(ValueError, match="a tuple of 3"):
        FisherTensorBoard("unused", probe=(x, y, np.ones(len(x))))


def test_a_probe_of_another_shape_is_refused_before_training(tmp_path):
    model = written_curves.model()
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"\(None, 6\).*\(8, 5\)"):
        written_curves.fit(
            model, [FisherTensorBoard(tmp_path, probe=written_curves.X[:8, :5])]
        )
    for a, b in zip(before, model.get_weights()):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("every", [0, "batch", 1.5])
def test_a_wrong_schedule_of_the_probe_is_refused(every):
    with pytest.raises(ValueError, match="probe_every"):
        FisherTensorBoard(
            "unused", probe=written_curves.X[:8], probe_every=every
        )
