"""What TensorBoard gets, read back from its event files."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher.callbacks import FisherTensorBoard

_X = np.random.default_rng(0).normal(size=(40, 6)).astype("float32")
_Y = np.arange(40) % 3


def _scalars(directory, tag):
    events = event_accumulator.EventAccumulator(
        str(directory), size_guidance={event_accumulator.TENSORS: 0}
    )
    events.Reload()
    return [
        (event.step, tensor_util.make_ndarray(event.tensor_proto).item())
        for event in events.Tensors(tag)
    ]


@pytest.mark.parametrize("steps", [1, 3, 7])
@pytest.mark.parametrize("jit", [False, True])
def test_every_measured_step_is_written_at_its_step(steps, jit, tmp_path):
    measured = []

    class Record(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            m = self.model.measurements
            measured.extend(
                zip(m.step, m.trace_by_variable.sum(axis=1), m.penalty)
            )

    network = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    model = FisherModel(
        network, FisherPenalty(0.1, every=5), trace_every=2, seed=1
    )
    model.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=steps,
        jit_compile=jit,
    )
    board = FisherTensorBoard(str(tmp_path))
    for _ in range(2):  # a second `fit` goes on where the first has ended
        model.fit(
            _X,
            _Y,
            batch_size=8,
            epochs=2,
            validation_data=(_X, _Y),
            callbacks=[board, Record()],
            verbose=0,
        )
    traces = _scalars(tmp_path / "train", "fisher/trace")
    assert [s for s, _ in traces] == [0, 2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18]
    np.testing.assert_allclose(traces, [m[:2] for m in measured], rtol=1e-6)
    penalties = _scalars(tmp_path / "train", "fisher/penalty")
    assert [s for s, _ in penalties] == [0, 5, 10, 15]
    np.testing.assert_allclose(
        penalties,
        [(m[0], m[2]) for m in measured if not np.isnan(m[2])],
        rtol=1e-6,
    )
    # What Keras writes is still there.
    assert len(_scalars(tmp_path / "train", "epoch_loss")) == 4
    assert len(_scalars(tmp_path / "validation", "epoch_loss")) == 4
