"""Training by several replicas and workers is the training of one.

The runs are in processes of their own, since TensorFlow has to know of devices
and workers before it starts. Each calls `run`, as the tests do without a
strategy and with micro-batches in the place of replicas.
"""

from __future__ import annotations

import json
import os

import clusters
import keras
import numpy as np
import pytest
import tensorflow as tf
import training

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import GradientPenalty
from keras_fisher import fisher_trace
from keras_fisher import likelihoods
from keras_fisher._tensorboard import event_files
from keras_fisher.callbacks import BackupAndRestore
from keras_fisher.callbacks import FisherTensorBoard
from keras_fisher.layers import FisherRegularization

_BATCH, _STEPS, _ALPHA = 16, 20, 0.3
_X = np.random.default_rng(0).normal(size=(_BATCH * _STEPS // 2, 6))
_Y = np.argmax(_X[:, :3] + 0.5 * _X[:, 3:], axis=1)

_PENALTIES = {
    "fisher": (FisherPenalty, {}),
    "fisher reused": (FisherPenalty, {"every": 3}),
    "fisher skipped": (FisherPenalty, {"every": 3, "reuse": False, "stop": 8}),
    "fisher difference": (FisherPenalty, {"method": "finite_difference"}),
    "labels": (GradientPenalty, {}),
    "labels reused": (GradientPenalty, {"every": 3}),
    "labels weighted": (GradientPenalty, {}),
    "fisher averaged": (FisherPenalty, {"every": 3}),
    "labels scheduled": (
        GradientPenalty,
        {"alpha": keras.optimizers.schedules.PolynomialDecay(_ALPHA, 30)},
    ),
    "labels assigned": (GradientPenalty, {}),
    "bounded": (FisherPenalty, {"bound": 0.1}),
    "bounded reused": (FisherPenalty, {"every": 3, "bound": 0.1}),
}
# What Keras can do on several replicas, and does to gradients of them all.
_OPTIONS = {
    "fisher averaged": dict(
        use_ema=True,
        ema_momentum=0.8,
        weight_decay=0.1,
        loss_scale_factor=256.0,
    )
}


class _Determined(likelihoods.Categorical):
    """Draws what the outputs say: replicas draw as one batch would."""

    def sample(self, outputs, seed):
        return tf.argmin(outputs, axis=-1, output_type=tf.int32)


def _compiled(model, learning_rate, metrics=("accuracy",), **options):
    model.compile(
        keras.optimizers.SGD(learning_rate, momentum=0.9, **options),
        # In the precision that is set now.
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[*metrics],
    )
    return model


def run(kind, name, parts=None, dtype="float64", logs=None):
    """Trains for 20 steps.

    Args:
        kind: `"model"` or `"layer"`; `"model loop"` or `"layer loop"` without
            `fit`, which Keras's own cannot do with several workers.
        name: One of `_PENALTIES`.
        parts: Number of micro-batches of the batch.
        dtype: What to compute in.
        logs: Directory for TensorBoard.

    Returns:
        The weights, as one list, and the logs of the two epochs.
    """
    cls, options = _PENALTIES[name]
    size = None if parts is None else _BATCH // parts
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    try:
        options = {"alpha": _ALPHA, "bound": None, **options}
        penalty = cls(micro_batch_size=size, **options)
        likelihood = _Determined(from_logits=True)
        network = training.dense_network(6, seed=1)
        if kind.startswith("layer"):
            layer = FisherRegularization(
                network, penalty, likelihood=likelihood
            )
            model = keras.Sequential([keras.Input((6,)), layer])
        else:
            # Tr(F) that is measured by itself has no micro-batches.
            model = FisherModel(
                network, penalty, likelihood=likelihood, trace_every=None
            )
        # Which Keras would make in the loop, where nothing can be made.
        metrics = () if kind.endswith("loop") else ("accuracy",)
        _compiled(model, 0.2, metrics, **_OPTIONS.get(name, {}))
        weights = np.linspace(0.0, 2.0, len(_X)).astype(dtype)
        data = (_X.astype(dtype), _Y, weights)[: 2 + ("weighted" in name)]
        data = tf.data.Dataset.from_tensor_slices(data)
        data = data.batch(_BATCH, drop_remainder=True)
        if kind.endswith("loop"):
            _loop(model, data)
            return {"weights": _flat(network)}
        history = model.fit(
            data,
            validation_data=data if kind == "model" else None,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=[
                *([FisherTensorBoard(logs)] if logs else []),
                *([_Assigns()] if "assigned" in name else []),
            ],
        )
    finally:
        keras.config.set_floatx("float32")
    return {"weights": _flat(network), **history.history}


def _flat(network):
    return np.concatenate([np.ravel(w) for w in network.get_weights()]).tolist()


def _loop(model, data):
    strategy = model.distribute_strategy
    model.optimizer.build(model.trainable_variables)

    @tf.function
    def step(batch):
        strategy.run(model.train_step, args=(batch,))

    for batch in strategy.experimental_distribute_dataset(data.repeat(2)):
        step(batch)
    model.optimizer.finalize_variable_values(model.trainable_variables)


class _Assigns(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.model.penalty.alpha = _ALPHA / (1 + epoch)


class _Penalties(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.values = []

    def on_train_batch_end(self, batch, logs=None):
        self.values += self.model.measurements.penalty.tolist()


def draws(count):
    """Penalties of one batch with weights that stay, in many draws."""
    model = FisherModel(training.dense_network(6, seed=1), _ALPHA, seed=0)
    _compiled(model, 0.0)
    x = tf.data.Dataset.from_tensors((_X[:_BATCH], _Y[:_BATCH]))
    record = _Penalties()
    model.fit(x.repeat(count), verbose=0, callbacks=[record])
    return record.values


def uneven(count, options):
    """One step on a batch of which replicas get parts of unequal sizes."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        network = training.dense_network(6, seed=1)
        likelihood = _Determined(from_logits=True)
        model = FisherModel(
            network, FisherPenalty(_ALPHA, bound=None), likelihood=likelihood
        )
        _compiled(model, 0.2, **options)
        data = tf.data.Dataset.from_tensors((_X[:count], _Y[:count]))
        logs = model.fit(data, verbose=0).history
    finally:
        keras.config.set_floatx("float32")
    sizes = model.measurements.batch_size.tolist()
    return {"weights": _flat(network), "sizes": sizes, **logs}


def _uneven_by_hand(count, replicas, most):
    """The same from its parts, as the design has it.

    Keras clips the gradient of each replica, to the norm `most`.
    """
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    network = training.dense_network(6, seed=1)
    keras.config.set_floatx("float32")
    largest = -(-count // replicas)
    penalty = FisherPenalty(_ALPHA)
    trace = value = 0.0
    variables, sums = network.trainable_variables, 0.0
    for begin in range(0, count, largest):
        x = tf.constant(_X[begin : min(begin + largest, count)])
        y = _Y[begin : begin + len(x)]
        with tf.GradientTape() as tape:
            forward = penalty.forward(network, x)
            term = penalty(forward, _Determined(from_logits=True))
            trace += len(x) / count * float(tf.reduce_sum(term.traces))
            # term.value is α T / b; its share of α Tr(F) / B is α b T / B².
            part = term.value * (len(x) / count) ** 2
            value += float(part)
            losses = keras.losses.sparse_categorical_crossentropy(
                y, forward.outputs, from_logits=True
            )
            part += tf.reduce_mean(losses) / replicas
        gradients = np.concatenate(
            [np.ravel(g) for g in tape.gradient(part, variables)]
        )
        sums += gradients * min(1.0, most / np.linalg.norm(gradients))
    weights = np.array(_flat(network)) - 0.2 * sums
    return {
        "weights": weights,
        "fisher_trace": [trace],
        "fisher_penalty": [value],
    }


def one_overflows(dtype):
    """One step on a batch whose second half overflows when differentiated."""
    keras.config.set_dtype_policy(dtype)
    # Of zeros: an example that is classified with certainty has no gradient.
    head = keras.layers.Dense(3, kernel_initializer="zeros")
    network = keras.Sequential([keras.Input((6,)), head])
    before = _flat(network)
    x = _X[:_BATCH].astype("float32")
    # The norm of the gradient is about that of the inputs.
    x[_BATCH // 2 :] *= 1e22 if dtype == "float32" else 1e4
    model = FisherModel(
        network, GradientPenalty(_ALPHA, bound=None), trace_every=None
    )
    _compiled(model, 0.1)
    data = tf.data.Dataset.from_tensors((x, _Y[:_BATCH]))
    logs = model.fit(data, verbose=0).history
    keras.config.set_dtype_policy("float32")
    after = _flat(network)
    optimizer = model.optimizer
    return {
        **logs,
        "finite": bool(np.isfinite(after).all()),
        "moved": after != before,
        "scale": float(tf.convert_to_tensor(optimizer.dynamic_scale))
        if dtype == "mixed_float16"
        else None,
    }


def counted():
    """The logs of an epoch that learns nothing, and of its validation."""
    x, labels, flags = _X[:13], _Y[:13], np.arange(13) % 3 == 0
    y = {
        "label": np.where(flags, (labels + 1) % 3, labels),
        "is_noisy": flags,
        "true_label": labels,
    }
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(6)
    model = FisherModel(training.dense_network(6, seed=1), trace_every=1)
    _compiled(model, 0.0)
    logs = model.fit(data, validation_data=data, verbose=0).history
    return {
        name: values
        for name, values in logs.items()
        if not name.startswith("fisher")
    }


def batches(name):
    """What steps have done that `train_on_batch` has made."""
    cls, options = _PENALTIES[name]
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        network = training.dense_network(6, seed=1)
        model = FisherModel(
            network,
            cls(_ALPHA, **{"bound": None, **options}),
            likelihood=_Determined(from_logits=True),
            trace_every=None,
        )
        _compiled(model, 0.2)
        logs, sizes = [], []
        for i in range(4):
            rows = slice(i * _BATCH, (i + 1) * _BATCH)
            logs.append(
                model.train_on_batch(_X[rows], _Y[rows], return_dict=True)
            )
            sizes += model.measurements.batch_size.tolist()
    finally:
        keras.config.set_floatx("float32")
    keys = [key for key in logs[0] if key != "accuracy"]
    return {
        "weights": _flat(network),
        "sizes": sizes,
        **{key: [float(each[key]) for each in logs] for key in keys},
    }


def of_unknown_length():
    """Steps and seeds that two epochs of three batches have taken."""
    data = tf.data.Dataset.from_tensor_slices((_X, _Y)).batch(16).take(3)
    data = data.filter(lambda x, y: True)
    model = FisherModel(training.dense_network(6, seed=1), _ALPHA)
    _compiled(model, 0.1).fit(data, epochs=2, verbose=0)
    step = int(tf.convert_to_tensor(model.optimizer.iterations))
    seeds = model.seed_generator.state.value.values
    return [step, *(int(seed[1]) for seed in seeds)]


def restore_apart(directory):
    """What a backup says that one worker of two finds."""
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    if index == 0:
        os.makedirs(f"{directory}/0/epoch-3")
    backup = BackupAndRestore(f"{directory}/{index}")
    backup.set_model(
        _compiled(FisherModel(training.dense_network(6, seed=1)), 0.1)
    )
    with pytest.raises(ValueError) as error:
        backup.on_train_begin()
    return str(error.value)


# The tests.


def _results(kind, number, *calls):
    """What the calls return in each of the processes."""
    return clusters.results("test_distribution", kind, number, *calls)


def _assert_same(actual, expected, rtol, what):
    for key in ("fisher_trace", "fisher_penalty", "loss", "weights"):
        if key in actual:
            np.testing.assert_allclose(
                actual[key],
                expected[key],
                rtol=0,
                atol=rtol * np.max(np.abs(expected[key])),
                err_msg=f"{key}: {what}",
            )


_FAST = [
    ("model", "fisher reused"),
    ("model", "bounded reused"),
    ("layer", "fisher reused"),
]
_WITHOUT_LABELS = [name for name in _PENALTIES if name.startswith("fisher")]
_MODELS = [("model", name) for name in _PENALTIES]
_LAYERS = [("layer", name) for name in _WITHOUT_LABELS]
_LOOPS = [("layer loop", name) for name in _WITHOUT_LABELS]
_OWN = [("model loop", name) for name in ("labels", "fisher")]


@pytest.mark.parametrize(
    "strategy, number, cases",
    [
        ("replicas", 2, _FAST),
        pytest.param(
            "replicas", 2, _MODELS + _LAYERS + _OWN, marks=pytest.mark.slow
        ),
        pytest.param("replicas", 4, _MODELS + _LAYERS, marks=pytest.mark.slow),
        pytest.param("workers", 2, _MODELS + _LOOPS, marks=pytest.mark.slow),
    ],
)
def test_parts_of_the_batch_train_as_micro_batches_do(strategy, number, cases):
    calls = [("run", *case) for case in cases]
    for results in _results(strategy, number, *calls):
        for (kind, name), actual in zip(cases, results, strict=True):
            # A difference of gradients loses half of the digits.
            rtol = 1e-6 if "difference" in name else 1e-10
            expected = run(kind.removesuffix(" loop"), name, number)
            what = f"{kind}, {name} on {number} {strategy}"
            _assert_same(actual, expected, rtol, what)


@pytest.mark.slow
def test_replicas_count_by_their_examples():
    # Parts of two examples and of one; of one and of none.
    cases = [(7, {}), (7, dict(global_clipnorm=0.1)), (3, {})]
    calls = [("uneven", *case) for case in cases]
    [results] = _results("replicas", 4, *calls)
    for found, (count, options) in zip(results, cases, strict=True):
        assert found["sizes"] == [count]
        most = options.get("global_clipnorm", np.inf)
        for key, expected in _uneven_by_hand(count, 4, most).items():
            np.testing.assert_allclose(
                found[key], expected, rtol=0, atol=1e-9, err_msg=f"{key} {most}"
            )


@pytest.mark.slow
def test_a_batch_that_all_replicas_get_counts_once():
    """As in Keras, whose `train_on_batch` divides it among none."""
    names = ["fisher", "labels reused", "bounded"]
    [results] = _results("replicas", 2, *[("batches", name) for name in names])
    for name, actual in zip(names, results, strict=True):
        expected = batches(name)
        assert actual["sizes"] == expected["sizes"] != [], name
        _assert_same(actual, expected, 1e-10, name)


def test_a_penalty_that_one_replica_loses_does_not_reach_the_weights():
    calls = [("one_overflows", dtype) for dtype in ("float32", "mixed_float16")]
    [[single, half]] = _results("replicas", 2, *calls)
    for result in (single, half):
        assert result["fisher_nonfinite"] == [1] and result["finite"], result
    # The other replica goes on; under loss scaling the step is skipped.
    assert single["moved"] and np.isnan(single["loss"]).all()
    assert not half["moved"] and half["scale"] == 2.0**14, half
    assert np.isfinite(half["loss"]).all()


@pytest.mark.slow
def test_logs_of_an_epoch_count_each_example_once():
    """Replicas have three, three, and one or none of the examples."""
    [[found]] = _results("replicas", 2, ("counted",))
    expected = counted()
    assert found.keys() == expected.keys()
    assert {"loss", "accuracy", "noisy_accuracy", "val_loss"} <= found.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, err_msg=name)
        if not name.startswith("val_"):  # nothing is learned in between
            np.testing.assert_allclose(
                values, expected[f"val_{name}"], rtol=1e-6, err_msg=name
            )


@pytest.mark.slow
def test_replicas_count_no_step_where_data_of_unknown_length_end():
    assert _results("replicas", 2, ("of_unknown_length",)) == [[[6] * 3]]


@pytest.mark.slow
def test_two_workers_train_as_one_and_write_once(tmp_path):
    case = ("model", "fisher reused")
    expected = run(*case, 2, "float32", str(tmp_path / "one"))
    first, second = _results(
        "workers", 2, ("run", *case, None, "float32", str(tmp_path / "two"))
    )
    assert first == second, "workers disagree"
    _assert_same(first[0], expected, 1e-5, "two workers")
    np.testing.assert_allclose(
        first[0]["val_loss"], expected["val_loss"], rtol=1e-5
    )
    for name in ("train", "validation", "hparams"):
        one, two = (tmp_path / run / name for run in ("one", "two"))
        assert len(event_files.paths(str(two))) == 1, name
        one, two = (
            [(p.tag, p.step) for p in event_files.scalars(str(directory))]
            for directory in (one, two)
        )
        assert two == one, name


@pytest.mark.slow
def test_workers_with_backups_of_different_epochs_are_refused(tmp_path):
    calls = ("restore_apart", str(tmp_path))
    [first], [second] = _results("workers", 2, calls)
    assert "a backup of 3 epochs" in first and "1.5 on average" in first
    assert "a backup of 0 epochs" in second


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_expected_penalty_does_not_depend_on_the_number_of_replicas(replicas):
    [[values]] = _results("replicas", replicas, ("draws", 2000))
    trace = fisher_trace(
        training.dense_network(6, seed=1),
        _X[:_BATCH],
        estimator="exact",
        likelihood="categorical",
        training=True,
    )
    expected = _ALPHA * trace / _BATCH
    error = np.std(values) / np.sqrt(len(values))
    deviation = (np.mean(values) - expected) / error
    assert len(values) == 2000
    assert abs(deviation) < 4, (
        f"{replicas} replicas: {np.mean(values):.5f} ± {error:.5f}, "
        f"expected {expected:.5f}"
    )
