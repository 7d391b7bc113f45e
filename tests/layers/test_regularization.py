"""`FisherRegularization` in stock Keras models."""

from __future__ import annotations

import cases
import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
import training

import keras_fisher
from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import UniformLabelPenalty
from keras_fisher import likelihoods
from keras_fisher._common import keras_layers
from keras_fisher.layers import FisherRegularization

_X, _Y = training.X[:48], training.Y[:48]


def _regularized(network, *args, **kwargs):
    x = keras.Input((6,))
    return keras.Model(x, FisherRegularization(network, *args, **kwargs)(x))


def _fit(model, epochs=2, learning_rate=0.1, **kwargs):
    optimizer = keras.optimizers.SGD(learning_rate)
    model.compile(optimizer, training.LOSS, metrics=["accuracy"], **kwargs)
    return model.fit(
        _X, _Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0
    ).history


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize(
    "penalty",
    [
        *cases.FISHER_PENALTIES,
        UniformLabelPenalty(0.3, bound=None, exclude="bias"),
    ],
    ids=cases.name_of_penalty,
)
def test_around_a_whole_model_it_is_fisher_models_penalty(penalty, mode):
    options = dict(jit_compile=mode == "xla", run_eagerly=mode == "eager")
    dropout = mode != "xla"
    wrapped = FisherModel(
        training.network(dropout=dropout), penalty, trace_every=None, seed=4
    )
    expected = _fit(wrapped, **options)
    network = training.network(dropout=dropout)
    logs = _fit(_regularized(network, penalty, seed=4), **options)
    finite_difference = penalty.method == "finite_difference"
    for a, b in zip(network.get_weights(), wrapped.model.get_weights()):
        np.testing.assert_allclose(
            a, b, rtol=1e-2, atol=1e-2 if finite_difference else 2e-4
        )
    if penalty.measures_trace:
        np.testing.assert_allclose(
            logs["fisher_trace"], expected["fisher_trace"], rtol=1e-2
        )
    assert "fisher_penalty" in expected


def test_penalty_is_part_of_the_loss_as_with_any_regularizer():
    plain = _fit(training.network(dropout=False), epochs=1, learning_rate=0.0)
    model = _regularized(
        training.network(dropout=False), FisherPenalty(2.0), seed=4
    )
    logs = _fit(model, epochs=1, learning_rate=0.0)
    layer = model.layers[-1]
    twin = FisherModel(
        training.network(dropout=False), FisherPenalty(2.0), seed=4
    )
    seen = []

    class Record(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(self.model.measurements.penalty[0])

    twin.compile(keras.optimizers.SGD(0.0), training.LOSS)
    twin.fit(
        _X, _Y, batch_size=8, shuffle=False, verbose=0, callbacks=[Record()]
    )
    np.testing.assert_allclose(
        logs["loss"][0] - plain["loss"][0], np.mean(seen), rtol=1e-4
    )
    np.testing.assert_allclose(
        float(layer.state.fisher_penalty), seen[-1], rtol=1e-5
    )


def test_out_of_training_it_is_the_wrapped_layer():
    network = training.network()
    model = _regularized(network, 0.1)
    np.testing.assert_array_equal(
        model.predict(_X, verbose=0), network.predict(_X, verbose=0)
    )
    model(_X, training=False)
    assert model.losses == []
    assert int(model.layers[-1].step) == 0


def test_part_of_a_model_gets_the_penalty_of_its_own_variables():
    """And its gradient reaches the layers in front of it."""
    keras.config.set_dtype_policy("float64")
    head = keras.layers.Dense(3)
    body = keras.layers.Dense(4, activation="tanh")
    layer = FisherRegularization(head, FisherPenalty(0.5, bound=None), seed=3)
    model = keras.Sequential([keras.Input((6,), dtype="float64"), body, layer])
    x = tf.constant(_X[:8], "float64")

    def loss():
        layer.seed_generator.state.assign([3, 0])
        model(x, training=True)
        (value,) = model.losses
        return value

    hidden, logits = body(x), model(x)
    seed = tf.constant([3, 0], tf.int64)
    labels = likelihoods.Categorical().sample(logits, seed)
    score = tf.nn.softmax(logits) - tf.one_hot(labels, 3, dtype="float64")
    kernel = np.einsum("bi,bc->ic", hidden, score) / 8
    bias = np.mean(score, axis=0)
    expected = 0.5 * (np.sum(kernel**2) + np.sum(bias**2))
    np.testing.assert_allclose(loss(), expected, rtol=1e-12)
    np.testing.assert_allclose(
        0.5 * float(layer.state.fisher_trace) / 8, expected, rtol=1e-12
    )

    with tf.GradientTape() as tape:
        value = loss()
    variables = model.trainable_variables
    assert len(variables) == 4
    gradients = tape.gradient(value, variables)
    direction = [training.RANDOM.normal(size=v.shape) for v in variables]
    slope = networks.directional_difference(
        lambda: float(loss()), variables, direction
    )
    along = sum(np.sum(g * d) for g, d in zip(gradients, direction))
    np.testing.assert_allclose(along, slope, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 3}], ids=str)
def test_finite_difference_reaches_the_layers_in_front_of_it(options):
    keras.config.set_dtype_policy("float64")
    x = tf.constant(_X[:8], "float64")
    found = []
    for method in ("exact", "finite_difference"):
        keras.utils.set_random_seed(3)
        penalty = FisherPenalty(0.5, method=method, bound=None, **options)
        model = keras.Sequential(
            [
                keras.Input((6,), dtype="float64"),
                keras.layers.Dense(4, activation="tanh"),
                FisherRegularization(keras.layers.Dense(3), penalty, seed=3),
            ]
        )
        with tf.GradientTape() as tape:
            model(x, training=True)
            (value,) = model.losses
        gradients = tape.gradient(value, model.trainable_variables)
        found.append([value, *gradients])
    for a, b in zip(*found):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_trace_in_half_precision_is_close_to_single_precision(policy):
    def mean_trace(policy):
        keras.config.set_dtype_policy(policy)
        network = training.network(dropout=False)
        layer = FisherRegularization(network, 0.1, seed=2)
        traces = []
        for _ in range(100):
            layer(_X[:16], training=True)
            traces.append(float(layer.state.fisher_trace))
        return np.mean(traces)

    half, single = mean_trace(policy), mean_trace("float32")
    assert abs(half / single - 1) < 0.03, (half, single)


@pytest.mark.few(1)
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_trains(policy):
    keras.config.set_dtype_policy(policy)
    model = _regularized(training.network(), 0.1)
    logs = _fit(model, epochs=10)
    assert logs["loss"][-1] < logs["loss"][0]
    if policy == "mixed_float16":
        assert float(model.optimizer.dynamic_scale) >= 2.0**13


@pytest.mark.parametrize("name", ["attention", "two_inputs", "lstm"])
def test_wraps_unbuilt_and_several_inputs(name):
    model, x = networks.build(name, "float32")
    layer = FisherRegularization(networks.NETWORKS[name](), 0.1)
    outputs = layer(x, training=True)
    assert outputs.shape == (networks.BATCH, networks.CLASSES)
    assert float(layer.losses[0]) > 0
    assert len(layer.trainable_variables) == len(model.trainable_variables)


@pytest.mark.parametrize("every", [*cases.slow([1]), 10])
def test_two_and_two_epochs_through_a_file_equal_four(every, tmp_path):
    penalty = FisherPenalty(0.3, every=every)

    def compiled():
        keras.utils.clear_session()
        model = _regularized(training.network(), penalty, seed=2)
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), training.LOSS)
        return model

    def fit(model, epochs):
        return model.fit(
            _X, _Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0
        ).history

    whole, half = compiled(), compiled()
    expected = fit(whole, 4)
    first = fit(half, 2)
    half.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    second = fit(loaded, 2)
    for name in expected:
        np.testing.assert_array_equal(
            first[name] + second[name], expected[name], err_msg=name
        )
    for a, b in zip(loaded.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@keras.saving.register_keras_serializable()
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = keras.layers.Dense(4, activation="tanh")
        self.last = FisherRegularization(keras.layers.Dense(3), seed=0)

    def call(self, x, training=None):
        return self.last(self.first(x), training=training)


def test_a_subclassed_model_that_fit_has_built_is_loaded(tmp_path):
    model = Subclassed()
    logs = _fit(model)
    assert min(logs["fisher_trace"]) > 0
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        loaded.predict(_X, verbose=0), model.predict(_X, verbose=0)
    )


@pytest.mark.slow
def test_a_last_batch_of_one_micro_batch_trains_under_xla():
    """Its number of examples is not known when the step is compiled."""

    def weights(**options):
        penalty = FisherPenalty(0.3, micro_batch_size=4, bound=None)
        network = training.network(dropout=False)
        model = _regularized(network, penalty, seed=4)
        model.compile(keras.optimizers.SGD(0.1), training.LOSS, **options)
        model.fit(_X[:11], _Y[:11], batch_size=8, shuffle=False, verbose=0)
        return np.concatenate([np.ravel(w) for w in network.get_weights()])

    np.testing.assert_allclose(
        weights(jit_compile=True), weights(jit_compile=False), atol=1e-4
    )


def test_config_round_trip():
    layer = FisherRegularization(
        keras.layers.Dense(1),
        UniformLabelPenalty(0.3, every=4),
        likelihood=likelihoods.Bernoulli(from_logits=False),
        seed=5,
    )
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(layer)
    )
    assert repr(again.penalty) == repr(layer.penalty)
    assert repr(again.likelihood) == repr(layer.likelihood)
    assert again.seed == 5
    assert isinstance(again.layer, keras.layers.Dense)


@pytest.mark.parametrize("penalty", ["gradient", "input_gradient", None])
def test_penalties_that_need_labels_are_refused(penalty):
    with pytest.raises(ValueError, match="labels of the data set"):
        FisherRegularization(keras.layers.Dense(3), penalty)


def test_layers_without_second_derivative_point_to_finite_differences():
    network = keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            keras.layers.Conv2D(3, 2),
            keras.layers.Lambda(tf.nn.local_response_normalization),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )
    x = tf.ones([2, 4, 4, 1])
    with pytest.raises(ValueError, match="finite_difference"):
        FisherRegularization(network, 0.1)(x, training=True)
    penalty = FisherPenalty(0.1, method="finite_difference")
    layer = FisherRegularization(network, penalty)
    layer(x, training=True)
    assert float(layer.losses[0]) > 0


def test_frozen_layers_add_nothing():
    layer = FisherRegularization(training.network(), 0.1)
    layer.layer.trainable = False
    layer(_X, training=True)
    assert layer.losses == []


@pytest.mark.few(1)
@pytest.mark.parametrize("change", ["unfrozen", "lora"])
def test_variables_that_are_new_since_a_fit_are_penalized(change):
    network = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(4, activation="tanh"),
            keras.layers.Dense(3),
        ]
    )
    first = network.layers[0]
    first.trainable = change != "unfrozen"
    layer = FisherRegularization(network, FisherPenalty(0.1, every=2))
    model = keras.Sequential([keras.Input((6,)), layer])
    assert np.isfinite(_fit(model)["loss"]).all()
    if change == "unfrozen":
        first.trainable = True
    else:
        first.enable_lora(2)
    before = first.kernel.numpy()
    logs = _fit(model)
    assert np.isfinite(logs["loss"]).all() and logs["fisher_trace"][-1] > 0
    assert np.abs(first.kernel.numpy() - before).max() > 0
    # Stored for the steps between.
    assert all(map(np.any, layer.state.gradients(network)))


def test_layers_in_float8_are_refused():
    network = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    network.quantize("float8")
    model = FisherModel(network, FisherPenalty())
    for call in (
        lambda: _fit(_regularized(network, FisherPenalty())),
        lambda: _fit(model),
        lambda: keras_fisher.fisher_trace(
            network, _X, likelihood="categorical"
        ),
    ):
        with pytest.raises(ValueError, match="float8"):
            call()
    # Nothing is measured, and nothing is refused.
    model = FisherModel(network, trace_every=None)
    assert np.isfinite(_fit(model)["loss"]).all()


def test_masks_go_through_it_without_a_warning(recwarn):
    embedding = keras.layers.Embedding(5, 4, mask_zero=True)
    lstm = keras.layers.LSTM(3, return_sequences=True)
    model = keras.Sequential([embedding, FisherRegularization(lstm)])
    tokens = np.array([[1, 2, 0, 0], [3, 1, 2, 0]])
    for training_ in (False, True):
        outputs = model(tokens, training=training_)
        mask = keras_layers.mask_of(outputs)
        np.testing.assert_array_equal(mask, tokens != 0)
    assert not [w for w in recwarn if "mask" in str(w.message)]
