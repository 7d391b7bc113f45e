"""What `FisherModel` refuses."""

from __future__ import annotations

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
import training

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty


@pytest.mark.parametrize("every", [0, -1, 2.5, True])
def test_bad_trace_every_is_refused(every):
    with pytest.raises(ValueError, match="trace_every"):
        FisherModel(training.network(), trace_every=every)


def test_only_models_are_wrapped():
    with pytest.raises(ValueError, match=r"keras\.Model.*Dense"):
        FisherModel(keras.layers.Dense(3))


def test_models_with_their_own_step_are_refused():
    class Own(training.Subclassed):
        def train_step(self, data):
            return {}

    with pytest.raises(ValueError, match="train_step"):
        FisherModel(Own())


def test_unknown_losses_are_refused_by_compile():
    model = FisherModel(training.network(), 0.1)
    with pytest.raises(ValueError, match="hinge"):
        training.compiled(model, "hinge")
    with pytest.raises(ValueError, match="No likelihood"):
        training.compiled(model, None)
    training.compiled(
        FisherModel(training.network(), trace_every=None), "hinge"
    )


@pytest.mark.parametrize("label", [-1, 3])
@pytest.mark.parametrize("jit", [False, True])
def test_labels_out_of_range_are_refused_before_a_step(label, jit):
    model = training.compiled(
        FisherModel(training.network(), "gradient"), jit_compile=jit
    )
    y = np.append(training.Y[:-1], label)
    before = training.weights(model.model)
    for targets in (y, {"label": y, "is_noisy": y > 0}):
        with pytest.raises(ValueError, match=rf"0 to 2.*{label}"):
            model.fit(training.X, targets, verbose=0)
    training.assert_equal(training.weights(model.model), before)


def test_frozen_models_are_refused_by_compile():
    network = training.network()
    network.trainable = False
    with pytest.raises(ValueError, match=r"No variable.*trainable=False"):
        training.compiled(FisherModel(network, 0.1))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_outputs_that_are_no_probabilities_are_refused_before_a_step(
    jit, eager
):
    network = training.network()
    before = training.weights(network)
    model = training.compiled(
        FisherModel(network, 0.1),
        "sparse_categorical_crossentropy",
        jit_compile=jit and not eager,
        run_eagerly=eager,
    )
    with pytest.raises(ValueError, match="from_logits=True"):
        training.fit(model)
    training.assert_equal(training.weights(network), before)


def test_layers_without_second_derivative_point_to_finite_differences():
    def model(method):
        network = keras.Sequential(
            [
                keras.Input((4, 4, 1)),
                keras.layers.Conv2D(3, 2),
                keras.layers.Lambda(tf.nn.local_response_normalization),
                keras.layers.Flatten(),
                keras.layers.Dense(3),
            ]
        )
        return training.compiled(
            FisherModel(network, FisherPenalty(0.1, method=method))
        )

    x = training.RANDOM.normal(size=(8, 4, 4, 1))
    with pytest.raises(ValueError, match=r"finite_difference.*LRN"):
        model("exact").fit(x, training.Y[:8], verbose=0)
    history = (
        model("finite_difference").fit(x, training.Y[:8], verbose=0).history
    )
    assert history["fisher_penalty"][0] > 0


class Careless(training.Subclassed):
    def __init__(self):
        super().__init__()
        self.hidden.name, self.out.name = "hidden", "out"
        self.unused = keras.layers.Dense(3, name="unused")

    def call(self, x, training=None):
        self.unused(x)
        return super().call(x, training=training)


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        dict(trace_every=1),
        dict(penalty=FisherPenalty(3.0)),
        dict(penalty=FisherPenalty(0.3, bound=None)),
        dict(penalty=FisherPenalty(3.0, every=3)),
        dict(penalty=FisherPenalty(3.0, micro_batch_size=3)),
        dict(penalty=FisherPenalty(3.0, method="finite_difference")),
        dict(penalty=FisherPenalty(3.0, fraction=0.5), accumulate=2),
    ],
)
def test_variables_that_no_output_depends_on_change_nothing(settings, jit):
    settings = dict(settings)
    optimizer = keras.optimizers.SGD(
        0.1, gradient_accumulation_steps=settings.pop("accumulate", None)
    )
    found = []
    for cls in (Careless, training.Subclassed):
        model = training.compiled(
            FisherModel(cls(), **settings, seed=0),
            optimizer=optimizer.from_config(optimizer.get_config()),
            jit_compile=jit,
        )
        model(training.X[:1])
        for k, variable in enumerate(model.trainable_variables):
            shape = variable.shape
            variable.assign(np.random.default_rng(k).normal(size=shape))
        before = training.weights(model)
        history = training.fit(model).history
        after = training.weights(model)
        found.append((history["fisher_trace"], after[:4]))
        training.assert_equal(after[4:], before[4:])
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for actual, expected, old in zip(found[0][1], found[1][1], before):
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5)
        assert abs(actual - old).max() > 1e-3  # It was trained.


def test_penalties_of_variables_that_no_output_depends_on_are_refused():
    penalty = FisherPenalty(0.1, exclude=["hidden", "out"])
    names = "no gradient.*unused/kernel.*unused/bias"
    with pytest.raises(ValueError, match=names):
        training.fit(training.compiled(FisherModel(Careless(), penalty)))


@pytest.mark.few(1)
@cases.since_keras("3.15")
@pytest.mark.parametrize("scaled", [False, True])
def test_accumulation_that_nobody_counts_is_refused(scaled):
    def optimizer(steps):
        optimizers = keras.optimizers
        each = optimizers.SGD(0.1, gradient_accumulation_steps=steps)
        several = optimizers.MultiOptimizer(optimizers.OptimizerMap(each))
        return optimizers.LossScaleOptimizer(several) if scaled else several

    def fitted(penalty, steps):
        model = FisherModel(training.network(), penalty)
        return training.fit(
            training.compiled(model, optimizer=optimizer(steps))
        )

    with pytest.raises(ValueError, match=r"accumulat.*Received.*=\[2\]"):
        fitted(0.1, 2)
    assert fitted(None, 2).history["fisher_trace"][-1] > 0
    assert fitted(0.1, None).history["fisher_penalty"][-1] > 0


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(
    ("loss", "activation"),
    [
        ("categorical_crossentropy", "softmax"),
        ("binary_crossentropy", "sigmoid"),
        ("poisson", "exponential"),
    ],
)
def test_outputs_of_any_precision_are_looked_at(loss, activation, dtype):
    keras.config.set_dtype_policy(dtype)
    model = FisherModel(training.network(activation=activation))
    training.compiled(model, loss, metrics=None)
    y = np.eye(3)[training.Y]
    logs = model.fit(training.X, y, batch_size=50, verbose=0).history
    assert np.isfinite(logs["fisher_trace"]).all()


class OwnStep(FisherModel):
    def train_step(self, data):
        return {**super().train_step(data), "mine": tf.constant(7.0)}


class OwnCall(FisherModel):
    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training)


class OwnLoss(FisherModel):
    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize(
    "cls, what", [(OwnStep, "train_step"), (OwnCall, "call"), (OwnLoss, None)]
)
@pytest.mark.parametrize(
    "options, observes",
    [
        ({"trace_every": None}, False),
        ({"trace_every": 2}, True),
        ({"penalty": 0.1}, True),
    ],
    ids=["nothing", "trace", "penalty"],
)
def test_what_a_subclass_overrides_is_heeded_or_refused(
    cls, what, options, observes
):
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")

    def trained(cls):
        network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        network.set_weights([np.full((4, 3), 0.1), np.zeros(3)])
        model = cls(network, seed=0, **options)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        history = model.fit(x, x[:, :3], verbose=0).history
        return history, network.get_weights()[0]

    if observes and what:
        with pytest.raises(ValueError, match=f"`{what}` would have no effect"):
            trained(cls)
        return
    history, weights = trained(cls)
    if cls is OwnStep:
        assert history["mine"] == [7.0]
    else:
        plain = trained(FisherModel)
        assert history["loss"] != pytest.approx(plain[0]["loss"])
        assert not np.allclose(weights, plain[1])


class OwnWeight(FisherModel):
    """Has a trainable weight of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.extra = self.add_weight(shape=(), initializer="ones", name="extra")

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) + self.extra**2


@pytest.mark.parametrize(
    "penalty, accumulated, works",
    [
        (dict(every=2, bound=None), None, False),
        (dict(), 2, False),
        (dict(every=2, bound=None, reuse=False), None, True),
        (dict(), None, True),
    ],
    ids=["reused", "accumulated", "not reused", "bounded"],
)
def test_weights_of_a_wrapper_are_trained_or_refused(
    penalty, accumulated, works
):
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model = OwnWeight(network, FisherPenalty(**penalty), seed=0)
    optimizer = keras.optimizers.SGD(
        0.1, gradient_accumulation_steps=accumulated
    )
    if works:
        model.trace_every = 2
        model.compile(optimizer, "mse", steps_per_execution=2)
        model.fit(x, x[:, :3], batch_size=4, verbose=0)
        assert float(model.extra) == pytest.approx(0.64)
    else:
        with pytest.raises(ValueError, match=r"extra.*of its wrapper"):
            model.compile(optimizer, "mse")


@pytest.mark.parametrize(
    "penalty, accumulated, advice",
    [
        (dict(every=2, bound=None), None, "`reuse=False`."),
        (dict(reuse=False), 2, "`bound=None`."),
        (dict(every=2), 2, "`reuse=False` and `bound=None`."),
    ],
)
def test_what_to_do_about_weights_of_a_wrapper_is_what_helps(
    penalty, accumulated, advice
):
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model = OwnWeight(network, FisherPenalty(**penalty))
    optimizer = keras.optimizers.SGD(gradient_accumulation_steps=accumulated)
    with pytest.raises(ValueError) as raised:
        model.compile(optimizer, "mse")
    assert str(raised.value).endswith(f"keep none: {advice}")


def test_the_paths_of_what_may_be_excluded_are_of_trained_variables():
    network = keras.Sequential(
        [keras.Input((4,)), keras.layers.BatchNormalization()]
    )
    model = FisherModel(network, FisherPenalty(exclude="gamma|beta"))
    with pytest.raises(ValueError, match="leaves all") as raised:
        model.compile("sgd", "mse")
    assert "beta" in str(raised.value) and "moving" not in str(raised.value)
