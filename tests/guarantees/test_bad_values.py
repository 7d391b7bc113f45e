"""What bad values end in: an error, or a finite and documented result."""

from __future__ import annotations

import warnings

import keras
from keras import layers
import numpy as np
import pytest
import tensorflow as tf
import training

import keras_fisher
from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import GradientPenalty
from keras_fisher import InputGradientPenalty
from keras_fisher import UniformLabelPenalty
from keras_fisher._derivatives import gradients
from keras_fisher._training.guarded_gradient import GuardedGradient
from keras_fisher.layers import FisherRegularization

_MODES = pytest.mark.parametrize(
    "mode", ["graph", pytest.param("xla", marks=pytest.mark.slow), "eager"]
)
_HUGE = 1e300  # finite, but not in float32
_LARGE = 1e25  # finite in float32, but not its square


def _data(count=8, classes=3):
    random = np.random.default_rng(0)
    x = random.normal(size=(count, 4)).astype("float32")
    return x, random.integers(0, classes, count)


def _compiled(model, mode="graph", optimizer=None):
    model.compile(
        optimizer or keras.optimizers.SGD(0.1),
        training.LOSS,
        jit_compile=mode == "xla",
        run_eagerly=mode == "eager",
    )
    return model


@_MODES
def test_a_penalty_that_overflows_does_not_reach_the_weights(mode):
    model = _compiled(
        FisherModel(training.dense_network(), FisherPenalty(_HUGE, bound=None)),
        mode,
    )
    before = model.get_weights()
    x, y = _data()
    logs = model.fit(x, y, batch_size=4, epochs=2, verbose=0).history
    assert logs["fisher_nonfinite"] == [2, 4]
    assert np.isnan(logs["loss"]).all()
    # Seed, counts and last values change, the network does not.
    for value, old in zip(model.model.get_weights(), before):
        np.testing.assert_array_equal(value, old)


@_MODES
@pytest.mark.parametrize(
    "options", [dict(every=2, bound=None), dict(bound=1.0)]
)
def test_computed_apart_the_step_takes_that_of_the_loss(mode, options):
    network = training.dense_network()
    weights = network.get_weights()
    x, y = _data()
    found, losses = [], []
    for penalty in (FisherPenalty(_HUGE, **options), None):
        network.set_weights(weights)
        model = FisherModel(network, penalty, trace_every=None)
        _compiled(model, mode)
        logs = model.fit(x, y, batch_size=2, shuffle=False, verbose=0).history
        found.append(network.get_weights())
        losses.append(logs["loss"][0])
    for value, plain in zip(*found):
        np.testing.assert_allclose(value, plain, rtol=1e-6)
    assert np.isnan(losses[0]) and np.isfinite(losses[1]), losses


def test_terminate_on_nan_ends_the_training_with_the_old_weights():
    model = _compiled(
        FisherModel(training.dense_network(), FisherPenalty(_HUGE, bound=None))
    )
    before = model.model.get_weights()
    history = model.fit(
        *_data(),
        batch_size=2,
        epochs=5,
        verbose=0,
        callbacks=[keras.callbacks.TerminateOnNaN()],
    )
    assert len(history.epoch) == 1
    assert int(model.optimizer.iterations) == 1
    for value, old in zip(model.model.get_weights(), before):
        np.testing.assert_array_equal(value, old)


def test_a_gradient_that_alone_is_not_finite_is_noticed():
    @tf.custom_gradient
    def bad(x):
        return x, lambda upstream: upstream * tf.constant(float("inf"))

    class Bad(layers.Layer):
        def call(self, x):
            return bad(x)

    network = keras.Sequential([*training.dense_network().layers, Bad()])
    network.build((None, 4))
    penalty = FisherPenalty(0.1, bound=None)
    model = _compiled(FisherModel(network, penalty))
    before = network.get_weights()
    logs = model.fit(*_data(), batch_size=8, verbose=0).history
    assert logs["fisher_nonfinite"] == [1]
    for value, old in zip(network.get_weights(), before):
        np.testing.assert_array_equal(value, old)


class _OverflowsBackwards(layers.Layer):
    """Passes outputs on, and infinity back where an input is above 5."""

    def call(self, outputs, inputs):
        @tf.custom_gradient
        def passed(outputs):
            last = tf.where(tf.reduce_any(inputs > 5.0), float("inf"), 1.0)
            return outputs, lambda upstream: upstream * last

        return passed(outputs)


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", ["graph", "eager"])
@pytest.mark.parametrize(
    "penalty",
    [None, GradientPenalty(0.1, stop=1), GradientPenalty(0.1, every=2)],
    ids=["none", "stopped", "reused"],
)
def test_fit_warns_of_weights_that_its_last_step_has_lost(penalty, mode):
    """A step of Keras's own, whose loss is finite and its gradient is not."""
    network, inputs = training.dense_network(), keras.Input((4,))
    network = keras.Model(
        inputs, _OverflowsBackwards()(network(inputs), inputs)
    )
    model = _compiled(FisherModel(network, penalty, trace_every=None), mode)
    x, y = _data()
    options = dict(batch_size=4, shuffle=False, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model.fit(x, y, **options)
    x[-1, 0] = 6.0
    with pytest.warns(RuntimeWarning, match="4 such variables of 4, first"):
        logs = model.fit(x, y, **options).history
    assert np.isfinite(logs["loss"]).all(), "else it had said so"
    assert not any(np.isfinite(w).any() for w in network.get_weights())


@pytest.mark.parametrize(
    ("optimizer", "every"),
    [
        (lambda: keras.optimizers.SGD(0.1, global_clipnorm=1.0), 1),
        (lambda: keras.optimizers.SGD(0.1, global_clipnorm=1.0), 2),
        (lambda: keras.optimizers.Adam(0.1), 1),
    ],
    ids=["clipped", "stored", "adam"],
)
def test_a_gradient_that_overflows_when_squared_is_left_out(optimizer, every):
    """Each of its entries is finite, but what optimizers make of it is not."""
    network = training.dense_network()
    before = network.get_weights()
    penalty = GradientPenalty(_LARGE, every=every, bound=None)
    model = _compiled(FisherModel(network, penalty), "eager", optimizer())
    logs = model.fit(*_data(), batch_size=4, verbose=0).history
    assert logs["fisher_nonfinite"] == [2 // every]
    assert np.isnan(logs["loss"]).all()
    for value, old in zip(network.get_weights(), before):
        distance = np.max(np.abs(value - old))
        if every == 1:
            assert distance == 0
        else:
            assert 0 < distance < 0.2, "the gradient of the loss, clipped"


def test_a_finite_penalty_is_not_counted_and_the_loss_is_the_users():
    model = _compiled(FisherModel(training.dense_network(), 0.1))
    logs = model.fit(*_data(), batch_size=4, verbose=0).history
    assert logs["fisher_nonfinite"] == [0]
    assert np.isfinite(logs["loss"]).all()


def test_the_count_is_saved(tmp_path):
    model = _compiled(
        FisherModel(training.dense_network(), FisherPenalty(_HUGE, bound=None))
    )
    model.fit(*_data(), batch_size=4, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert float(loaded.state.fisher_nonfinite) == 2


@pytest.mark.parametrize(
    ("penalty", "dtype"),
    [
        (FisherPenalty(_HUGE, bound=None), "mixed_float16"),
        # With entries that are finite, also when they are scaled.
        (GradientPenalty(_LARGE, bound=None), "float32"),
    ],
    ids=["huge", "large"],
)
def test_loss_scaling_skips_the_step_and_lowers_the_scale(penalty, dtype):
    network = training.dense_network(dtype=dtype)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    model = _compiled(
        FisherModel(network, penalty, dtype=dtype),
        optimizer=optimizer,
    )
    before = network.get_weights()
    logs = model.fit(*_data(), batch_size=4, verbose=0).history
    assert logs["fisher_nonfinite"] == [2]
    assert np.isfinite(logs["loss"]).all()
    assert float(optimizer.dynamic_scale) == optimizer.initial_scale / 4
    for value, old in zip(network.get_weights(), before):
        np.testing.assert_array_equal(value, old)


@pytest.mark.parametrize(
    ("alpha", "every"), [(_HUGE, 1), (_HUGE, 2), (_LARGE, 1)]
)
def test_the_layer_leaves_its_penalty_out_and_tells_by_the_loss(alpha, every):
    network = training.dense_network()
    weights = network.get_weights()
    layer = FisherRegularization(network, FisherPenalty(alpha, every=every))
    x = keras.Input((4,))
    found, losses = [], []
    for model in (keras.Model(x, layer(x)), network):
        network.set_weights(weights)
        _compiled(model)
        logs = model.fit(*_data(), batch_size=4, shuffle=False, verbose=0)
        found.append(network.get_weights())
        losses.append(logs.history["loss"][0])
    for value, plain in zip(*found):
        np.testing.assert_allclose(value, plain, rtol=1e-6)
    assert np.isnan(losses[0]) and np.isfinite(losses[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_inputs_show_in_the_loss_and_the_count(bad):
    x, y = _data()
    x[1, 2] = bad
    model = _compiled(FisherModel(training.dense_network(), 0.1))
    logs = model.fit(x, y, batch_size=8, verbose=0).history
    assert np.isnan(logs["loss"]).all()
    assert logs["fisher_nonfinite"] == [1]


@pytest.mark.parametrize(
    "bad", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)]
)
def test_bad_inputs_show_in_the_traces(bad):
    network, (x, y) = training.dense_network(), _data()
    _compiled(network)
    x[1, 2] = bad
    for estimator in ("monte_carlo", "exact", "batch"):
        found = keras_fisher.fisher_trace(network, x, estimator=estimator)
        assert np.isnan(found), (estimator, found)
    assert np.isnan(keras_fisher.hessian_trace(network, x, y))
    by_example = keras_fisher.fisher_trace(
        network, x, estimator="exact", by="example"
    )
    # The others are what they are.
    assert np.flatnonzero(~np.isfinite(by_example)).tolist() == [1]


_OF_ALL_KINDS = [
    FisherPenalty(0.3),
    FisherPenalty(0.3, method="finite_difference"),
    FisherPenalty(0.3, fraction=0.5, micro_batch_size=1),
    GradientPenalty(0.3, every=2),
    UniformLabelPenalty(0.3),
    InputGradientPenalty(0.3),
]
_BAD = ["nan", "inf", "large inputs", "large weights", "large alpha", "huge"]


@pytest.mark.parametrize(
    ("bad", "index"),
    [
        pytest.param(
            bad,
            index,
            # Each bad value with two penalties, the others if slow.
            marks=() if (index - number) % 3 == 0 else pytest.mark.slow,
        )
        for number, bad in enumerate(_BAD)
        for index in range(len(_OF_ALL_KINDS))
    ],
)
def test_no_weights_are_lost_unseen(bad, index):
    """Neither NaN nor infinite, unless the logs say so."""
    network, (x, y) = training.dense_network(), _data()
    config = _OF_ALL_KINDS[index].get_config()
    if bad == "nan" or bad == "inf":
        x[-1, 2] = float(bad)
    elif bad == "large inputs":
        x *= np.float32(1e30)
    elif bad == "large weights":
        for variable in network.trainable_variables:
            variable.assign(1e15 * (1.0 + variable.value))
    else:
        config["alpha"] = _LARGE if bad == "large alpha" else _HUGE
    penalty = type(_OF_ALL_KINDS[index]).from_config(config)
    optimizer = keras.optimizers.SGD(0.1, global_clipnorm=1.0)
    model = _compiled(FisherModel(network, penalty), "eager", optimizer)
    logs = model.fit(x, y, batch_size=8, verbose=0).history
    finite = all(np.isfinite(w).all() for w in network.get_weights())
    said = np.isnan(logs["loss"]).all() and logs["fisher_nonfinite"] == [1]
    assert finite or said, logs
    if bad in ("nan", "inf", "huge"):
        assert said, logs


def test_exploding_logits_are_penalized_as_far_as_they_are_finite():
    network = training.dense_network()
    kernel = network.layers[-1].kernel
    kernel.assign(1e30 * kernel.value)
    model = _compiled(FisherModel(network, 0.1))
    logs = model.fit(*_data(), batch_size=8, verbose=0).history
    lost = logs["fisher_nonfinite"] == [1]
    finite = all(np.isfinite(w).all() for w in network.get_weights())
    assert finite and (lost == np.isnan(logs["loss"][0])), logs


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "penalty",
    [
        FisherPenalty(0.3),
        FisherPenalty(0.3, fraction=0.5),
        FisherPenalty(0.3, micro_batch_size=2),
        FisherPenalty(0.3, method="finite_difference"),
        GradientPenalty(0.3),
        InputGradientPenalty(0.3),
    ],
    ids=lambda p: f"{type(p).__name__}{p.fraction}{p.method[0]}",
)
def test_an_empty_batch_has_no_penalty_and_no_trace(penalty):
    network = training.dense_network()
    x, y = tf.zeros([0, 4]), tf.zeros([0], tf.int64)
    likelihood = keras_fisher.likelihoods.Categorical()

    @tf.function(input_signature=[tf.TensorSpec([None, 4])])
    def value_and_gradient(x):
        with tf.GradientTape() as tape:
            forward = penalty.forward(network, x)
            labels = tf.zeros(tf.shape(x)[:1], tf.int64)
            term = penalty(forward, likelihood, labels)
        variables = network.trainable_variables
        return term.value, tape.gradient(term.value, variables)

    value, found = value_and_gradient(x)
    assert float(value) == 0
    assert bool(gradients.has_finite_norm(found)), found
    forward = penalty.forward(network, x)
    assert float(penalty(forward, likelihood, y).value) == 0


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_an_empty_batch_among_others_changes_nothing(mode):
    """With plain SGD and labels that are not drawn."""
    x, y = _data()

    def batches(*sizes):
        def examples():
            begin = 0
            for size in sizes:
                yield x[begin : begin + size], y[begin : begin + size]
                begin += size

        return tf.data.Dataset.from_generator(
            examples,
            output_signature=(
                tf.TensorSpec([None, 4], tf.float32),
                tf.TensorSpec([None], tf.int64),
            ),
        )

    network = training.dense_network()
    weights = network.get_weights()
    found, logs = [], []
    for data in (batches(4, 0, 4), batches(4, 4)):
        network.set_weights(weights)
        penalty = GradientPenalty(0.3, warmup_steps=0)
        model = FisherModel(network, penalty, trace_every=None)
        logs.append(_compiled(model, mode).fit(data, verbose=0).history)
        found.append(network.get_weights())
    for value, other in zip(*found):
        np.testing.assert_allclose(value, other, rtol=1e-6)
    for name, values in logs[1].items():
        np.testing.assert_allclose(logs[0][name], values, err_msg=name)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("count", [1, 3])
def test_one_example_and_one_class_train(count, classes):
    network = training.dense_network(outputs=classes)
    model = _compiled(FisherModel(network, 0.1))
    logs = model.fit(*_data(count, classes), verbose=0).history
    assert np.isfinite(logs["loss"]).all()
    trace = keras_fisher.fisher_trace(model, _data(count)[0])
    if classes == 1:
        # The only class is certain: nothing is left to learn of it.
        assert logs["fisher_trace"] == [0] and trace == 0
    else:
        assert logs["fisher_trace"][0] > 0 and trace > 0


def test_labels_out_of_range_are_refused_before_training():
    model = _compiled(FisherModel(training.dense_network(), 0.1))
    x, y = _data()
    for bad in (y - 5, y + 5):
        with pytest.raises(ValueError, match="from 0 to 2"):
            model.fit(x, bad, verbose=0)


def test_labels_out_of_range_in_a_data_set_do_not_pass_unseen():
    x, y = _data()
    dataset = tf.data.Dataset.from_tensor_slices((x, y + 5)).batch(4)
    model = _compiled(FisherModel(training.dense_network(), 0.1))
    try:
        logs = model.fit(dataset, verbose=0).history
    except tf.errors.InvalidArgumentError as error:
        # What the loss of Keras says on a CPU.
        assert "label" in str(error)
    else:
        assert np.isnan(logs["loss"]).all(), logs


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([[1.0, 2.0], None, [3.0]], True),
        ([None], True),
        ([[1.0], [float("nan"), 1.0]], False),
        ([[float("inf")], [1.0]], False),
        ([[float("inf"), -float("inf")]], False),
        ([[1e19], [1.0]], True),
        ([[1e19], [1e19, 1e19, 1e19]], False),
    ],
)
def test_gradients_of_finite_norm_are_told_from_others(tensors, expected):
    tensors = [None if t is None else tf.constant(t) for t in tensors]
    is_finite = gradients.has_finite_norm(tensors)
    assert bool(is_finite) == expected
    for value in (0.0, float("nan")):
        guarded = GuardedGradient(tensors, is_finite, 1.0)
        kept = guarded.where(is_finite, value)
        for tensor, found in zip(tensors, kept):
            if tensor is not None:
                np.testing.assert_array_equal(
                    found, tensor if expected else tf.fill(tensor.shape, value)
                )
