"""α may move: with a schedule, or as it is assigned; all else says so.

Each training is compared with a loop by hand in double precision.
"""

from __future__ import annotations

import pickle

import cases
import keras
from keras.optimizers.schedules import PiecewiseConstantDecay
from keras.optimizers.schedules import PolynomialDecay
import numpy as np
import pytest
import tensorflow as tf
import training

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import GradientPenalty
from keras_fisher import likelihoods
from keras_fisher import logs
from keras_fisher.callbacks import FisherTensorBoard
from keras_fisher.layers import FisherRegularization

pytestmark = pytest.mark.usefixtures("double_precision")

_X, _Y = training.X[:32], training.Y[:32]
_BATCH, _STEPS, _RATE = 8, 4, 0.125  # steps of an epoch


class _Counted(GradientPenalty):
    """Counts how often it is traced."""

    def labels(self, likelihood, outputs, y, seed):
        self.traces = self.__dict__.get("traces", 0) + 1
        return super().labels(likelihood, outputs, y, seed)


def _network():
    return training.dense_network(6, seed=1)


def _compile(model, mode="graph", steps=1):
    model.compile(
        keras.optimizers.SGD(_RATE),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=mode == "xla",
        run_eagerly=mode == "eager",
        steps_per_execution=steps,
    )
    return model


def _fit(model, epochs=1, callbacks=()):
    return model.fit(
        _X,
        _Y,
        batch_size=_BATCH,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[*callbacks],
    ).history


def _loss(network, x, labels):
    rows = tf.nn.log_softmax(network(x))
    return -tf.reduce_mean(tf.gather(rows, labels, batch_dims=1))


def _train_by_hand(
    network, alpha_at, steps, every=1, bound=None, likeliest=False, first=0
):
    """Plain SGD on ∇L + α ∇‖g‖², bounded; the latter anew every so often."""
    variables = [v.value for v in network.trainable_variables]
    for step in range(first, first + steps):
        begin = step % _STEPS * _BATCH
        x = tf.constant(_X[begin : begin + _BATCH], tf.float64)
        y = _Y[begin : begin + _BATCH]
        with tf.GradientTape(persistent=True) as tape:
            with tf.GradientTape() as inner:
                labels = tf.argmax(network(x), -1) if likeliest else y
                sampled = _loss(network, x, labels)
            square = sum(
                tf.reduce_sum(g**2) for g in inner.gradient(sampled, variables)
            )
            loss = _loss(network, x, y)
        if (step - first) % every == 0:
            own = [alpha_at(step) * g for g in tape.gradient(square, variables)]
            length = tf.linalg.global_norm(own)
            limit = tf.sqrt(square)
        gradients = tape.gradient(loss, variables)
        factor = 1.0
        if bound is not None:
            limits = bound * tf.minimum(tf.linalg.global_norm(gradients), limit)
            factor = tf.minimum(1.0, limits / length)
        for variable, g, p in zip(variables, gradients, own):
            variable.assign_sub(_RATE * (g + factor * p))
    return network


def _assert_same(network, expected):
    for a, b in zip(network.weights, expected.weights, strict=True):
        np.testing.assert_allclose(a, b, 1e-10, 1e-12, err_msg=a.path)


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize(
    "steps, every, bound", [(1, 1, None), (4, 3, None), (4, 1, 0.5)]
)
def test_a_schedule_of_the_optimizer_step_is_followed(
    mode, steps, every, bound
):
    # Exact in single precision, which schedules compute in.
    schedule = PolynomialDecay(0.5, 8, end_learning_rate=0.25)
    network = _network()
    penalty = GradientPenalty(
        schedule, every=every, bound=bound, warmup_steps=0
    )
    model = _compile(FisherModel(network, penalty), mode, steps)
    history = _fit(model, epochs=2)
    expected = _train_by_hand(
        _network(),
        lambda step: 0.5 - step / 32,
        2 * _STEPS,
        every,
        bound,
    )
    _assert_same(network, expected)
    assert history["fisher_alpha"] == [0.5 - 3 / 32, 0.5 - 7 / 32]


class _Assigns(keras.callbacks.Callback):
    """Assigns α in front of the given steps."""

    def __init__(self, alphas):
        super().__init__()
        self._alphas = alphas

    def on_train_batch_begin(self, batch, logs=None):
        if batch in self._alphas:
            self.model.penalty.alpha = self._alphas[batch]


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("bound", [None, 1.0])
def test_an_assigned_number_takes_effect_without_tracing(mode, bound):
    network = _network()
    penalty = _Counted(0.25, bound=bound, warmup_steps=0)
    model = _compile(FisherModel(network, penalty, trace_every=None), mode)
    assert "fisher_alpha" not in _fit(model)
    traces = penalty.traces
    history = _fit(model, callbacks=[_Assigns({1: 0.75, 3: 0.1})])
    if mode != "eager":
        assert penalty.traces == traces
    expected = _train_by_hand(
        _network(),
        [*[0.25] * 5, 0.75, 0.75, 0.1].__getitem__,
        2 * _STEPS,
        bound=bound,
    )
    _assert_same(network, expected)
    assert history["fisher_alpha"] == [0.1]
    assert penalty.alpha == penalty.get_config()["alpha"] == 0.1


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("moves", ["schedule", "assigned", "variable"])
def test_alpha_moves_in_a_layer(moves, every):
    alphas = [0.5, 0.5, 0.5, 0.5, 0.125, 0.125, 0.125, 0.125]
    alpha = {
        "schedule": PiecewiseConstantDecay([_STEPS - 1], [0.5, 0.125]),
        "assigned": 0.5,
        "variable": keras.Variable(0.5, dtype="float64"),
    }[moves]
    network = _network()
    penalty = training.LikeliestLabels(alpha, bound=None, every=every)
    layer = FisherRegularization(network, penalty)
    inputs = keras.Input((6,))
    model = _compile(keras.Model(inputs, layer(inputs)))
    _fit(model)
    if moves == "assigned":
        layer.penalty.alpha = 0.125
    elif moves == "variable":
        alpha.assign(0.125)
    _fit(model)
    expected = _train_by_hand(
        _network(), alphas.__getitem__, 2 * _STEPS, every, likeliest=True
    )
    _assert_same(network, expected)


@pytest.mark.parametrize("is_layer", [False, True])
def test_a_variable_of_the_users_is_not_trained(is_layer):
    alpha = keras.Variable(0.5, dtype="float64")
    assert alpha.trainable
    network = _network()
    penalty = GradientPenalty(alpha, bound=None, start=1)
    if is_layer:
        layer = FisherRegularization(network, FisherPenalty(alpha))
        model = keras.Sequential([keras.Input((6,)), layer])
    else:
        model = FisherModel(network, penalty)
    _compile(model, steps=2)
    _fit(model, epochs=2)
    assert float(alpha) == 0.5
    assert all(v is not alpha for v in model.weights)
    if not is_layer:
        expected = _train_by_hand(
            _network(), [0, *[0.5] * 7].__getitem__, 2 * _STEPS
        )
        _assert_same(network, expected)


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_a_variable_has_to_be_a_possible_alpha(value):
    with pytest.raises(ValueError, match="at least 0"):
        FisherPenalty(keras.Variable(value))


def test_a_loop_by_hand_reads_what_is_assigned():
    network, penalty = _network(), GradientPenalty(0.25)
    likelihood = likelihoods.Categorical(from_logits=True)

    @tf.function
    def value():
        forward = penalty.forward(network, tf.constant(_X, tf.float64))
        return penalty(forward, likelihood, _Y).value

    first = value()
    penalty.alpha = 0.5
    np.testing.assert_allclose(value(), 2 * first, 1e-12)
    scheduled = GradientPenalty(PolynomialDecay(0.5, 10, 0.0))
    forward = scheduled.forward(network, tf.constant(_X, tf.float64))
    found = scheduled(forward, likelihood, _Y, step=tf.constant(5)).value
    np.testing.assert_allclose(found, first, 1e-6)
    with pytest.raises(ValueError, match="Pass `step="):
        scheduled(forward, likelihood, _Y)


def test_a_penalty_that_is_made_within_a_step_is_a_constant():
    network, made = _network(), []
    likelihood = likelihoods.Categorical(from_logits=True)

    @tf.function
    def value(x):
        made.append(GradientPenalty(0.25))
        forward = made[-1].forward(network, x)
        return made[-1](forward, likelihood, _Y).value

    x = tf.constant(_X, tf.float64)
    penalty = GradientPenalty(0.25)
    expected = penalty(penalty.forward(network, x), likelihood, _Y).value
    np.testing.assert_allclose(value(x), expected, 1e-12)
    with pytest.raises(ValueError, match="as a constant"):
        made[-1].alpha = 0.5


def test_a_loop_by_hand_on_replicas_says_that_alpha_stays():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    likelihood = likelihoods.Categorical(from_logits=True)
    penalty = GradientPenalty(0.25)
    with strategy.scope():
        network = _network()

    @tf.function
    def value():
        def replica():
            forward = penalty.forward(network, tf.constant(_X, tf.float64))
            return penalty(forward, likelihood, _Y).value

        return strategy.run(replica)

    assert float(value()) > 0
    with pytest.raises(ValueError, match="as a constant"):
        penalty.alpha = 0.5


def test_what_is_assigned_is_saved(tmp_path):
    model = _compile(FisherModel(_network(), GradientPenalty(0.25)))
    _fit(model)
    model.penalty.alpha = 0.75
    model.save(path := tmp_path / "model.keras")
    assert keras.saving.load_model(path).penalty.alpha == 0.75
    # A backup has weights alone.
    model.save_weights(path := tmp_path / "model.weights.h5")
    resumed = _compile(FisherModel(_network(), GradientPenalty(0.25)))
    resumed.build((None, 6))
    resumed.load_weights(path)
    assert resumed.penalty.alpha == 0.75
    _fit(model)
    _fit(resumed)
    _assert_same(resumed.model, model.model)


def test_a_schedule_is_saved(tmp_path):
    schedule = PolynomialDecay(0.5, 10, end_learning_rate=0.01)
    model = _compile(FisherModel(_network(), schedule))
    _fit(model)
    model.save(path := tmp_path / "model.keras")
    loaded = keras.saving.load_model(path)
    assert loaded.penalty.alpha.get_config() == schedule.get_config()
    _fit(model)
    _fit(loaded)
    _assert_same(loaded.model, model.model)


def test_tensorboard_shows_where_alpha_moves(tmp_path):
    model = _compile(FisherModel(_network(), GradientPenalty(0.25)))
    _fit(model, callbacks=[FisherTensorBoard(tmp_path)])
    assert "fisher/alpha" not in {*logs.read(tmp_path)["tag"]}
    board = FisherTensorBoard(tmp_path)
    _fit(model, callbacks=[board, _Assigns({1: 0.5, 3: 0.125})])
    found = logs.read(tmp_path).query("tag == 'fisher/alpha'")
    assert [*found["step"]] == [5, 6, 7]
    assert [*found["value"]] == [0.5, 0.5, 0.125]


def test_a_copy_has_an_alpha_of_its_own():
    penalty = GradientPenalty(0.25)
    _fit(_compile(FisherModel(_network(), penalty)))
    copied = pickle.loads(pickle.dumps(penalty))
    penalty.alpha = 0.5
    assert copied.alpha == 0.25


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", cases.MODES)
def test_another_penalty_begins_at_the_next_step(mode):
    """Also within `fit`, and with nothing left of the one before."""
    network = _network()
    model = _compile(
        FisherModel(network, GradientPenalty(0.5, every=4, bound=None)), mode
    )

    class Changes(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 2:
                self.model.penalty = GradientPenalty(
                    0.25, every=3, start=3, bound=None
                )

    _fit(model, epochs=1, callbacks=[Changes()])
    expected = _train_by_hand(_network(), lambda _: 0.5, 2, every=4)
    _train_by_hand(expected, lambda _: 0.0, 1, first=2)
    _train_by_hand(expected, lambda _: 0.25, 1, first=3)
    _assert_same(network, expected)
    # One whose steps are not fresh yet adds nothing.
    model.penalty = GradientPenalty(8.0, every=8, bound=None)
    _fit(model)
    _train_by_hand(expected, lambda _: 0.0, _STEPS, first=4)
    _assert_same(network, expected)


def test_a_model_without_a_penalty_can_be_given_one():
    network = _network()
    model = _compile(FisherModel(network, trace_every=None))
    assert "fisher_trace" not in _fit(model)
    model.penalty = GradientPenalty(0.25, bound=None)
    model.trace_every = 2
    assert "fisher_trace" in _fit(model)
    expected = _train_by_hand(_network(), lambda _: 0.0, _STEPS)
    _train_by_hand(expected, lambda _: 0.25, _STEPS, first=_STEPS)
    _assert_same(network, expected)
    model.penalty = model.trace_every = None
    assert "fisher_trace" not in _fit(model)
    _train_by_hand(expected, lambda _: 0.0, _STEPS)
    _assert_same(network, expected)


def test_another_likelihood_is_taken():
    model = _compile(FisherModel(_network(), trace_every=1))
    _fit(model)
    model.likelihood = likelihoods.Gaussian(0.01)
    trace = _fit(model)["fisher_trace"][0]
    assert isinstance(model.likelihood, likelihoods.Gaussian)
    model.likelihood = "auto"
    assert isinstance(model.likelihood, likelihoods.Categorical)
    assert _fit(model)["fisher_trace"][0] < 0.01 * trace


@pytest.mark.parametrize(
    "make, name, value",
    [
        *[
            (FisherPenalty, name, value)
            for name, value in dict(
                fraction=0.5,
                every=2,
                reuse=False,
                start=1,
                stop=9,
                micro_batch_size=2,
                method="finite_difference",
                exclude="bias",
                bound=None,
                warmup_steps=5,
            ).items()
        ],
        (likelihoods.Categorical, "from_logits", False),
        (likelihoods.Gaussian, "stddev", 2.0),
        (lambda: FisherModel(_network()), "model", None),
        (lambda: FisherModel(_network()), "seed", 3),
        *[
            (lambda: FisherRegularization(_network()), name, None)
            for name in ("layer", "penalty", "likelihood", "seed")
        ],
    ],
)
def test_what_would_be_ignored_is_refused(make, name, value):
    owner = make()
    before = getattr(owner, name)
    with pytest.raises(AttributeError, match=f"`{name}` of .* Received: "):
        setattr(owner, name, value)
    assert getattr(owner, name) is before


@pytest.mark.parametrize(
    "value", [-1, np.nan, np.inf, "much", None, True, [0.1]]
)
def test_alpha_has_to_be_a_number(value):
    with pytest.raises(ValueError, match="`alpha` must be a finite number"):
        FisherPenalty(value)
    penalty = FisherPenalty(0.5)
    with pytest.raises(ValueError, match="`alpha` must be a finite number"):
        penalty.alpha = value
    assert penalty.alpha == 0.5


def test_a_number_is_no_schedule():
    schedule = PolynomialDecay(0.5, 10)
    penalty = FisherPenalty(0.5)
    with pytest.raises(ValueError, match="another penalty"):
        penalty.alpha = schedule
    penalty = FisherPenalty(schedule)
    with pytest.raises(ValueError, match="another penalty"):
        penalty.alpha = 0.5
