"""Targets that flag which labels are noisy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher._common import noisy_targets

_CLASSES = 4


@pytest.mark.parametrize(
    ("y", "expected"),
    [
        ({"label": 1, "is_noisy": True}, True),
        ({"label": 1, "is_noisy": True, "true_label": 2}, True),
        ({"is_noisy": True, "true_label": 2, "label": 1}, True),
        ({"label": 1}, False),
        ({"label": 1, "true_label": 2}, False),
        ({"is_noisy": True, "true_label": 2}, False),
        ({"label": 1, "is_noisy": True, "weight": 2}, False),
        ({"head": 1, "tail": 2}, False),
        ({}, False),
        (["label", "is_noisy"], False),
        (("label", "is_noisy", "true_label"), False),
        ({"label", "is_noisy"}, False),
        (np.zeros(3), False),
        (tf.zeros(3), False),
        (None, False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_dictionary_with_labels_and_mask_is_a_noisy_target(y, expected):
    found = noisy_targets.has_noise_flags(y)
    assert found is expected, f"{found} for {y}"


def test_label_of_a_target_with_a_mask_is_its_label():
    label, other = object(), object()
    y = {"label": label, "is_noisy": other}
    assert noisy_targets.label_of(y) is label
    assert noisy_targets.label_of({**y, "true_label": other}) is label


@pytest.mark.parametrize(
    "y",
    [
        None,
        np.zeros(3),
        {"label": 1},
        {"head": 1, "tail": 2},
        {"label": 1, "is_noisy": True, "extra": 2},
        [1, 2],
    ],
    ids=str,
)
def test_other_targets_are_their_own_labels_and_weights(y):
    assert noisy_targets.label_of(y) is y
    assert noisy_targets.weight_of(y) is y


class _Recorder(keras.Model):
    """Keeps what Keras hands to `compute_loss`."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(_CLASSES)
        self.received = []

    def call(self, x):
        return self.dense(x)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        self.received.append((y, sample_weight))
        return keras.ops.mean(y_pred)


@pytest.mark.parametrize(
    "keys", [["label", "is_noisy"], ["label", "is_noisy", "true_label"]]
)
def test_weight_of_what_keras_makes_of_an_array_is_the_array(keys):
    model = _Recorder()
    model.compile("sgd", "mse", run_eagerly=True)
    weight = np.arange(1.0, 6.0, dtype="float32")
    y = {key: np.arange(5) + 10 * n for n, key in enumerate(keys)}
    model.fit(
        np.ones((5, 3)),
        y,
        sample_weight=weight,
        batch_size=2,
        shuffle=False,
        verbose=0,
    )
    assert len(model.received) == 3, len(model.received)
    labels, weights = [], []
    for received_y, received_weight in model.received:
        # One weight for each of the targets, all the same.
        assert noisy_targets.has_noise_flags(received_weight), received_weight
        assert set(received_weight) == set(keys), received_weight
        for copy in received_weight.values():
            np.testing.assert_array_equal(copy, received_weight["label"])
        labels.append(noisy_targets.label_of(received_y))
        weights.append(noisy_targets.weight_of(received_weight))
    np.testing.assert_array_equal(np.concatenate(weights), weight)
    np.testing.assert_array_equal(np.concatenate(labels), y["label"])


def test_weight_of_what_keras_makes_of_no_weights_is_none():
    model = _Recorder()
    model.compile("sgd", "mse", run_eagerly=True)
    y = {"label": np.arange(4), "is_noisy": np.ones(4, bool)}
    model.fit(np.ones((4, 3)), y, verbose=0)
    ((_, received),) = model.received
    assert noisy_targets.weight_of(received) is None, received


@pytest.mark.parametrize(
    ("names", "flags"),
    [
        ((), True),
        (["label"], True),
        (["out", "is_noisy"], True),
        (["label", "is_noisy"], False),
        (["is_noisy", "label", "more"], False),
    ],
)
def test_labels_of_outputs_that_are_called_so_are_no_flags(names, flags):
    y = {"label": [1], "is_noisy": [0]}
    assert noisy_targets.has_noise_flags(y, names) == flags
    for of in (noisy_targets.label_of, noisy_targets.weight_of):
        assert of(y, names) is (y["label"] if flags else y)
