"""`FisherModel` is a Keras model, around any other."""

from __future__ import annotations

import itertools

import keras
import networks
import numpy as np
import pytest
import tensorflow as tf
import training

import keras_fisher
from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import likelihoods
from keras_fisher.layers import FisherRegularization


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "optimizer, jit, steps",
    [
        ("sgd", False, 1),
        ("adam", True, 4),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(
                ["sgd", "adam"], [False, True], [1, 4]
            )
            if case not in [("sgd", False, 1), ("adam", True, 4)]
        ),
    ],
)
def test_without_penalty_and_trace_weights_are_the_wrapped_models_own(
    steps, jit, optimizer
):
    options = dict(
        optimizer=optimizer, steps_per_execution=steps, jit_compile=jit
    )
    plain = training.compiled(training.network(), **options)
    history = training.fit(plain)
    model = FisherModel(training.network(), trace_every=None)
    training.compiled(model, **options)
    same = training.fit(model)
    training.assert_equal(model.model.get_weights(), plain.get_weights())
    assert same.history == history.history
    assert model.evaluate(training.X, training.Y, verbose=0) == plain.evaluate(
        training.X, training.Y, verbose=0
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("trace_every", [1, 3])
def test_measuring_changes_no_bit_of_the_weights(trace_every, jit):
    plain = training.compiled(
        training.network(dropout=not jit), jit_compile=jit
    )
    history = training.fit(plain)
    model = FisherModel(
        training.network(dropout=not jit), trace_every=trace_every
    )
    training.compiled(model, jit_compile=jit)
    same = training.fit(model)
    for a, b in zip(model.model.get_weights(), plain.get_weights()):
        if jit:  # XLA fuses the two functions differently.
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(a, b)
    for name, values in history.history.items():
        np.testing.assert_allclose(same.history[name], values, rtol=1e-4)


@pytest.mark.parametrize("penalty", [None, 0.1])
def test_predictions_are_the_wrapped_models(penalty):
    model = training.compiled(FisherModel(training.network(), penalty))
    training.fit(model, epochs=1)
    np.testing.assert_array_equal(
        model.predict(training.X, verbose=0),
        model.model.predict(training.X, verbose=0),
    )


def test_loss_and_metrics_in_the_logs_are_without_the_penalty():
    """With learning rate 0, so that both see the same weights."""
    options = dict(optimizer=keras.optimizers.SGD(0.0))
    plain = training.fit(
        training.compiled(training.network(dropout=False), **options)
    ).history
    model = FisherModel(training.network(dropout=False), FisherPenalty(1000.0))
    logs = training.fit(
        training.compiled(model, optimizer=keras.optimizers.SGD(0.0))
    ).history
    assert sorted(set(logs) - set(plain)) == [
        "fisher_nonfinite",
        "fisher_penalty",
        "fisher_ratio",
        "fisher_trace",
    ]
    for name, values in plain.items():
        np.testing.assert_allclose(logs[name], values, rtol=1e-5)
    assert min(logs["fisher_penalty"]) > 1


def test_train_step_can_be_called_in_a_loop_of_ones_own():
    model = training.compiled(
        FisherModel(training.network(), FisherPenalty(0.1, every=2))
    )
    step = tf.function(model.train_step, autograph=False)
    batch = tf.constant(training.X[:8]), tf.constant(training.Y[:8])
    values = [float(step(batch)["fisher_penalty"]) for _ in range(4)]
    assert values[0] == values[1] != values[2] == values[3]
    assert int(model.optimizer.iterations) == 4
    eager = model.train_step(batch)
    assert set(eager) == {
        "loss",
        "accuracy",
        "fisher_trace",
        "fisher_penalty",
        "fisher_nonfinite",
        "fisher_ratio",
    }


def test_train_on_batch():
    model = training.compiled(FisherModel(training.network(), 0.1))
    logs = model.train_on_batch(
        training.X[:8], training.Y[:8], return_dict=True
    )
    assert logs["fisher_penalty"] > 0
    assert np.isfinite(logs["fisher_trace"])


class WithoutTrainingArgument(keras.Model):
    def __init__(self):
        super().__init__()
        self.out = keras.layers.Dense(3)

    def call(self, x):
        return self.out(x)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "make", [training.Subclassed, WithoutTrainingArgument, lambda: _unbuilt()]
)
@pytest.mark.parametrize("jit", [False, True])
def test_wraps_models_that_are_not_built_yet(make, jit):
    model = FisherModel(make(), FisherPenalty(0.1, every=2), seed=1)
    history = training.fit(
        training.compiled(model, jit_compile=jit, steps_per_execution=2)
    )
    assert np.all(np.isfinite(history.history["fisher_penalty"]))


def _unbuilt():
    return keras.Sequential([keras.layers.Dense(3)])


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [None, 0.1])
def test_building_it_builds_the_network(penalty, tmp_path):
    def made():
        layers = [keras.layers.Dense(4), keras.layers.Dense(3)]
        return FisherModel(keras.Sequential(layers), penalty, seed=0)

    x = np.ones((2, 5), "float32")
    trained = made()
    trained(x)
    trained.save_weights(tmp_path / "a.weights.h5")
    built = made()
    built.build((None, 5))
    assert built.model.built
    built.load_weights(tmp_path / "a.weights.h5")
    np.testing.assert_array_equal(built(x), trained(x))


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "penalty", [keras_fisher.FisherPenalty(), keras_fisher.GradientPenalty()]
)
@pytest.mark.parametrize("ignore_class", [None, 0])
def test_labels_of_one_output_may_be_in_a_list(penalty, ignore_class):
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    y = np.arange(8) % 3

    def trained(y):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,))
        network = keras.Model(inputs, keras.layers.Dense(3)(inputs))
        model = FisherModel(network, penalty, seed=0)
        loss = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, ignore_class=ignore_class
        )
        model.compile("sgd", [loss])
        model.fit(x, y, verbose=0, batch_size=4, shuffle=False)
        trace = keras_fisher.fisher_trace(model, x, y, estimator="empirical")
        return *network.get_weights(), float(trace)

    for found, expected in zip(trained([y]), trained(y), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_wraps_models_of_keras_applications():
    network = keras.applications.MobileNet(
        input_shape=(32, 32, 3), weights=None, classes=4, alpha=0.25
    )
    model = FisherModel(network, FisherPenalty(0.01, fraction=0.5))
    loss = keras.losses.SparseCategoricalCrossentropy()
    training.compiled(model, loss)
    x = training.RANDOM.normal(size=(4, 32, 32, 3))
    history = model.fit(x, np.arange(4), batch_size=4, verbose=0).history
    assert history["fisher_penalty"][0] > 0
    assert isinstance(model.likelihood, likelihoods.Categorical)
    assert not model.likelihood.from_logits


def test_wraps_models_with_several_inputs():
    model, x = networks.build("two_inputs", "float32")
    y = np.arange(networks.BATCH) % networks.CLASSES
    for fraction in (1.0, 0.5):
        wrapped = training.compiled(
            FisherModel(model, FisherPenalty(fraction=fraction))
        )
        history = wrapped.fit(x, y, batch_size=3, verbose=0).history
        assert history["fisher_penalty"][0] > 0


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "loss, outputs, activation, expected",
    [
        (
            keras.losses.BinaryCrossentropy(from_logits=True),
            1,
            None,
            likelihoods.Bernoulli(from_logits=True),
        ),
        (
            "binary_crossentropy",
            1,
            "sigmoid",
            likelihoods.Bernoulli(from_logits=False),
        ),
        ("mse", 1, None, likelihoods.Gaussian()),
        (
            "sparse_categorical_crossentropy",
            3,
            "softmax",
            likelihoods.Categorical(from_logits=False),
        ),
    ],
)
def test_likelihood_is_inferred_from_the_loss(
    loss, outputs, activation, expected
):
    network = training.network(outputs, activation=activation)
    model = training.compiled(FisherModel(network, 0.1), loss)
    y = (
        training.Y
        if outputs == 3
        else (training.Y > 0).astype("float32")[:, None]
    )
    logs = model.fit(training.X, y, batch_size=8, verbose=0).history
    assert logs["fisher_penalty"][0] > 0
    assert repr(model.likelihood) == repr(expected)


def test_a_given_likelihood_frees_the_loss():
    model = FisherModel(training.network(), 0.1, likelihood="categorical")
    training.compiled(model, lambda y, z: keras.ops.mean(z**2, axis=-1))
    assert training.fit(model).history["fisher_penalty"][0] > 0


def test_auxiliary_losses_and_weights_are_no_part_of_the_penalty():
    def penalties(**kwargs):
        network = training.network(dropout=False)
        network.layers[0].kernel.regularizer = keras.regularizers.L2(
            kwargs.pop("decay", 0.0)
        )
        model = FisherModel(network, 0.1, seed=3)
        training.compiled(model, optimizer=keras.optimizers.SGD(0.0))
        logs = training.fit(model, **kwargs).history
        return logs["fisher_penalty"], logs["loss"]

    expected, loss = penalties()
    weights = np.linspace(0, 9, 50)
    for options in (
        dict(decay=0.1),
        dict(sample_weight=weights),
        dict(class_weight={0: 9.0, 1: 0.1, 2: 0.0}),
    ):
        found, other_loss = penalties(**options)
        np.testing.assert_array_equal(found, expected)
        assert abs(other_loss[0] / loss[0] - 1) > 0.01, options


def test_public_names():
    for name in (
        "FisherModel",
        "FisherPenalty",
        "GradientPenalty",
        "UniformLabelPenalty",
        "InputGradientPenalty",
    ):
        assert getattr(keras_fisher, name).__doc__


class MadeInBuild(keras.Model):
    def build(self, input_shape):
        self.hidden = keras.layers.Dense(4, activation="tanh")
        self.hidden.build(input_shape)
        self.drop = keras.layers.Dropout(0.5)
        self.out = keras.layers.Dense(3)
        self.out.build((None, 4))
        self.built = True

    def call(self, x, training=None):
        return self.out(self.drop(self.hidden(x), training=training))


@pytest.mark.parametrize("wrap", [FisherModel, FisherRegularization])
def test_a_wrapped_model_starts_as_without_the_wrapper(wrap):
    found = []
    for wrapper in (lambda model: model, wrap):
        keras.utils.set_random_seed(3)
        network = MadeInBuild()
        wrapper(network)(training.X)
        found.append([v.numpy() for v in network.variables])
    training.assert_equal(*found)


@pytest.mark.parametrize("policy", ["mixed_float16", "float64"])
def test_computes_as_what_it_wraps_does_whatever_is_set_now(policy):
    keras.config.set_dtype_policy(policy)
    network = training.dense_network()
    keras.config.set_dtype_policy("float32")
    model = training.compiled(FisherModel(network, 0.1))
    assert model.dtype_policy.name == policy
    is_mixed = policy == "mixed_float16"
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == is_mixed
    layer = FisherRegularization(network, 0.1)
    for state in model.state, layer.state:
        assert state.fisher_trace.dtype == ("float32" if is_mixed else policy)


class Halving(keras.optimizers.SGD):
    def apply_gradients(self, gradients_and_variables):
        return super().apply_gradients(
            [(g / 2, v) for g, v in gradients_and_variables]
        )


def test_what_an_optimizer_overrides_counts_at_each_step():
    found = []
    for trace_every in 1, None:
        model = FisherModel(training.network(), trace_every=trace_every)
        training.compiled(model, optimizer=Halving(0.1))
        training.fit(model, epochs=1)
        found.append(training.weights(model.model))
    training.assert_equal(*found)


@pytest.mark.parametrize("takes_mask", [True, False])
def test_a_mask_that_is_given_reaches_the_network(takes_mask):
    class Sum(keras.Model):
        if takes_mask:

            def call(self, x, mask=None):
                return keras.ops.sum(x * keras.ops.cast(mask, x.dtype), 1)
        else:

            def call(self, x, training=True):
                return keras.ops.sum(x, 1) * (2.0 if training else 1.0)

    x = np.float32([[1.0, 2.0, 4.0]])
    mask = np.array([[True, False, True]])
    network = Sum()
    found = FisherModel(network, trace_every=None)(x, mask=mask)
    given = {"mask": mask} if takes_mask else {}
    np.testing.assert_array_equal(found, network(x, **given))


def test_a_model_that_has_predicted_is_built(tmp_path):
    network = keras.Sequential([keras.layers.Dense(3)])
    model = FisherModel(network, trace_every=None)
    model.predict(np.ones([2, 4]), verbose=0)
    model.save_weights(tmp_path / "of.weights.h5")
    assert model.count_params() >= network.count_params() == 15


def test_custom_objects_are_those_of_penalties_and_likelihoods_too():
    class Own(FisherPenalty):
        pass

    class Likely(likelihoods.Gaussian):
        pass

    model = FisherModel(training.network(), Own(), likelihood=Likely())
    given = {"Own": Own, "Likely": Likely}
    again = FisherModel.from_config(model.get_config(), given)
    assert type(again.penalty) is Own and type(again.likelihood) is Likely
