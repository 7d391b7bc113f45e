"""Class weights of labels with noise flags do what they do without."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_fisher

_RANDOM = np.random.default_rng(0)
_X = _RANDOM.normal(size=(24, 4)).astype("float32")
_Y = _RANDOM.integers(0, 3, 24)
_GIVEN = _RANDOM.uniform(0.5, 2.0, 24).astype("float32")
_WEIGHTS = {0: 0.5, 1: 3.0, 2: 1.0}


def _model(y=None):
    """A penalized model and its network, for the form of the labels."""
    keras.utils.set_random_seed(3)
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model = keras_fisher.FisherModel(
        network, keras_fisher.FisherPenalty(warmup_steps=0), seed=1
    )
    is_one_hot = isinstance(y, dict) and y["label"].shape[1:] == (3,)
    loss = (
        keras.losses.CategoricalCrossentropy(from_logits=True)
        if is_one_hot
        else keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    model.compile(keras.optimizers.SGD(0.1), loss)
    return model, network


def _fit(x, y=None, **kwargs):
    """Weights, losses and validation losses of a training."""
    model, network = _model(y)
    if not isinstance(x, tf.data.Dataset | keras.utils.PyDataset):
        kwargs["batch_size"] = 8
    history = model.fit(
        x, y, epochs=2, shuffle=False, verbose=0, **kwargs
    ).history
    names = [name for name in history if name.endswith("loss")]
    return network.get_weights(), {name: history[name] for name in names}


def _flagged(y=_Y):
    return {"label": y, "is_noisy": np.arange(24) % 2 == 0, "true_label": y}


def _dataset(*parts):
    return tf.data.Dataset.from_tensor_slices(parts).batch(8)


def _assert_same(found, expected):
    for a, b in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert found[1].keys() == expected[1].keys()
    for name, losses in expected[1].items():
        np.testing.assert_allclose(found[1][name], losses, rtol=1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"validation_split": 0.25},
        {"validation_data": (_X[:8], _Y[:8])},
    ],
    ids=["alone", "split", "data"],
)
def test_arrays_with_flags_are_weighted_as_those_without(kwargs):
    expected = _fit(_X, _Y, class_weight=_WEIGHTS, **kwargs)
    _assert_same(
        _fit(_X, _flagged(), class_weight=_WEIGHTS, **kwargs), expected
    )
    unweighted = _fit(_X, _flagged(), **kwargs)
    assert unweighted[1]["loss"] != pytest.approx(expected[1]["loss"])


def test_data_sets_with_flags_are_weighted_as_those_without():
    _assert_same(
        _fit(_dataset(_X, _flagged()), class_weight=_WEIGHTS),
        _fit(_dataset(_X, _Y), class_weight=_WEIGHTS),
    )


def test_weights_of_examples_are_multiplied():
    by_hand = (_GIVEN * [_WEIGHTS[k] for k in _Y]).astype("float32")
    expected = _fit(_X, _Y, sample_weight=by_hand)
    for found in (
        _fit(_X, _flagged(), sample_weight=_GIVEN, class_weight=_WEIGHTS),
        _fit(_dataset(_X, _flagged(), _GIVEN), class_weight=_WEIGHTS),
    ):
        _assert_same(found, expected)


@pytest.mark.parametrize("kind", ["column", "one_hot"])
def test_labels_have_any_of_the_forms(kind):
    forms = {"column": _Y[:, None], "one_hot": np.eye(3)[_Y]}
    found = _fit(_X, _flagged(forms[kind]), class_weight=_WEIGHTS)
    _assert_same(found, _fit(_X, _Y, class_weight=_WEIGHTS))


def test_a_class_without_a_weight_counts_once():
    _assert_same(
        _fit(_X, _flagged(), class_weight={0: 0.5, 1: 3.0}),
        _fit(_X, _Y, class_weight=_WEIGHTS),
    )


class _Batches(keras.utils.PyDataset):
    def __init__(self, y):
        super().__init__()
        self._y = y

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return _X, self._y


def test_batches_of_a_py_dataset_have_weights_of_their_own():
    _fit(_Batches(_Y), class_weight=_WEIGHTS)
    with pytest.raises(ValueError, match=r"Return.*sample_weight"):
        _fit(_Batches(_flagged()), class_weight=_WEIGHTS)


def test_single_batches_are_weighted_as_those_without():
    def trained(y):
        model, network = _model()
        losses = [
            model.train_on_batch(_X, y, class_weight=weights, return_dict=True)[
                "loss"
            ]
            for weights in (_WEIGHTS, None)
        ]
        return network.get_weights(), {"loss": losses}

    _assert_same(trained(_flagged()), trained(_Y))
