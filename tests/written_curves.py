"""Training that is written for TensorBoard, and reading it back."""

from __future__ import annotations

import keras
import numpy as np
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

from keras_fisher import FisherModel
from keras_fisher._tensorboard import event_files

X = np.random.default_rng(0).normal(size=(40, 6)).astype("float32")
Y = np.arange(40) % 3
LAYERS = ("sequential/first", "sequential/second")


def model(penalty=None, *, compiled=True, trace_every=2, **kwargs):
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


def fit(model, callbacks, epochs=2, y=Y, **kwargs):
    return model.fit(
        X,
        y,
        batch_size=8,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
        **kwargs,
    )


def noisy_labels():
    noisy = np.arange(40) % 4 == 0
    return {
        "label": np.where(noisy, (Y + 1) % 3, Y),
        "is_noisy": noisy,
        "true_label": Y,
    }


def events(directory):
    events = event_accumulator.EventAccumulator(
        str(directory), size_guidance={event_accumulator.TENSORS: 0}
    )
    return events.Reload()


def scalars(directory, tag):
    return [
        (event.step, tensor_util.make_ndarray(event.tensor_proto).item())
        for event in events(directory).Tensors(tag)
    ]


def read_curves(directory):
    """All of our curves, as lists of points in the order of writing."""
    found = {}
    for point in event_files.scalars(str(directory)):
        if point.tag.startswith(("fisher/", "memorization/", "metric/")):
            found.setdefault(point.tag, []).append((point.step, point.value))
    return found


def assert_same_curves(actual, expected, rtol=1e-6):
    assert actual.keys() == expected.keys()
    for tag, points in expected.items():
        assert [s for s, _ in actual[tag]] == [s for s, _ in points], tag
        np.testing.assert_allclose(
            actual[tag], points, rtol=rtol, atol=1e-7, err_msg=tag
        )


class Record(keras.callbacks.Callback):
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
