"""A bounded penalty moves the weights as a loop in double precision does.

∇L + min(1, c min(‖∇L‖, m) / ‖∇P‖) ∇P, m the running mean of ‖∇L‖, with a c
that grows over the first steps.
"""

from __future__ import annotations

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
import training

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import GradientPenalty
from keras_fisher import InputGradientPenalty
from keras_fisher import likelihoods
from keras_fisher.layers import FisherRegularization

pytestmark = pytest.mark.usefixtures("double_precision")

# Keras rounds functional models' inputs to single precision. Longer in some
# batches, so that the loss is steeper at some steps.
_X = training.X[:48] * np.repeat([1, 1, 3, 1, 2, 1], 8)[:, None]
_Y = training.Y[:48]
_BATCH, _EPOCHS, _RATE = 8, 3, 0.125


def _drawn(outputs):
    return tf.argmax(outputs, -1, tf.int32)


class _Determined(likelihoods.Categorical):
    """Draws what the outputs say, so that a loop knows it."""

    def sample(self, outputs, seed):
        return _drawn(outputs)


def _network():
    return training.dense_network(6, seed=1)


def _loss(y, outputs):
    """Mean cross entropy, without Keras."""
    rows = tf.nn.log_softmax(outputs)
    return -tf.reduce_mean(tf.gather(rows, y, batch_dims=1))


def _squared_gradient(network, x, y):
    """‖∇ of the mean cross entropy‖², to be differentiated again."""
    variables = [v.value for v in network.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch(variables)
        loss = _loss(y, network(x))
    return sum(tf.reduce_sum(g**2) for g in tape.gradient(loss, variables))


def _penalty(network, penalty, x, y):
    """The gradient of P."""
    variables = [v.value for v in network.trainable_variables]
    with tf.GradientTape() as tape:
        if isinstance(penalty, InputGradientPenalty):
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = _loss(y, network(x))
            # Of the sum over examples; the mean of their squares.
            g = len(x) * inner.gradient(loss, x)
            square = tf.reduce_sum(g**2) / len(x)
        else:
            size = penalty.micro_batch_size or len(x)
            square = 0.0
            for begin in range(0, len(x), size):
                part = slice(begin, min(begin + size, len(x)))
                labels = y[part]
                if isinstance(penalty, FisherPenalty):
                    labels = _drawn(network(x[part]))
                b = part.stop - part.start
                square += b**2 * _squared_gradient(network, x[part], labels)
            square /= len(x) ** 2
    gradients = tape.gradient(square, variables)
    return [penalty.alpha * g.numpy() for g in gradients]


def _bound(penalty, step):
    return penalty.bound * min(1.0, (step + 1) / max(penalty.warmup_steps, 1))


def _norm(gradients):
    return np.sqrt(sum(np.sum(g**2) for g in gradients))


def _train_by_hand(network, penalty, accumulation=1, clipnorm=None):
    """Trains by plain SGD.

    Returns:
        ‖∇P‖ / ‖∇L‖, the factor, and whether m < ‖∇L‖, for each step.
    """
    said = []
    stored = mean = None
    batches = [
        slice(b, b + _BATCH) for b in range(0, len(_X), _BATCH)
    ] * _EPOCHS
    for step in range(len(batches) // accumulation):
        of_step = batches[step * accumulation : (step + 1) * accumulation]
        losses, own = [], []
        for batch in of_step:
            x = tf.constant(_X[batch], tf.float64)
            variables = [v.value for v in network.trainable_variables]
            with tf.GradientTape() as tape:
                loss = _loss(_Y[batch], network(x))
            losses.append([g.numpy() for g in tape.gradient(loss, variables)])
            if step % penalty.every == 0:
                stored = _penalty(network, penalty, x, _Y[batch])
                # Their sum over the batches has the variance of more labels.
                stored = [g / accumulation for g in stored]
            own.append(stored)
        loss, own = (
            [sum(gs) / accumulation for gs in zip(*of_batches)]
            for of_batches in (losses, own)
        )
        norm = _norm(loss)
        mean = norm if mean is None else 0.99 * mean + 0.01 * norm
        bound = _bound(penalty, step)
        factor = min(1.0, bound * min(norm, mean) / _norm(own))
        said.append((_norm(own) / norm, factor, mean < norm))
        total = [a + factor * b for a, b in zip(loss, own)]
        if clipnorm is not None:
            shrink = min(1.0, clipnorm / _norm(total))
            total = [shrink * g for g in total]
        for v, g in zip(network.trainable_variables, total):
            v.assign_sub(_RATE * g)
    return np.array(said)


def _fit(
    penalty,
    mode="graph",
    network=None,
    y=_Y,
    epochs=_EPOCHS,
    likelihood=None,
    **options,
):
    """Trains with `fit`; returns the model and its history."""
    scale = options.pop("loss_scale", None)
    optimizer = keras.optimizers.SGD(_RATE, **options)
    if scale is not None:
        optimizer = keras.optimizers.LossScaleOptimizer(
            optimizer, initial_scale=scale
        )
    model = FisherModel(
        _network() if network is None else network,
        penalty,
        likelihood=likelihood or _Determined(from_logits=True),
        trace_every=None,
        seed=0,
    )
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        run_eagerly=mode == "eager",
        jit_compile=mode == "xla",
    )
    history = model.fit(_X, y, _BATCH, epochs=epochs, shuffle=False, verbose=0)
    return model, history.history


def _assert_by_hand(model, network, rtol=1e-10, atol=1e-12):
    for a, b in zip(training.weights(model.model), training.weights(network)):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


_SETTINGS = {
    "fresh": (FisherPenalty(30.0, bound=0.7, warmup_steps=4), {}),
    "half": (FisherPenalty(0.2, bound=0.2, warmup_steps=4), {}),
    "reused": (FisherPenalty(30.0, every=3, bound=0.7, warmup_steps=4), {}),
    "accumulated": (
        FisherPenalty(30.0, bound=0.7, warmup_steps=4),
        {"gradient_accumulation_steps": 2},
    ),
    "accumulated and reused": (
        FisherPenalty(30.0, every=2, bound=0.7, warmup_steps=4),
        {"gradient_accumulation_steps": 3},
    ),
    "clipped": (
        FisherPenalty(30.0, bound=0.7, warmup_steps=4),
        {"global_clipnorm": 0.2},
    ),
    "scaled": (
        FisherPenalty(30.0, bound=0.7, warmup_steps=4),
        {"loss_scale": 64.0},
    ),
    "scaled and reused": (
        FisherPenalty(30.0, every=3, bound=0.7, warmup_steps=4),
        {"loss_scale": 64.0},
    ),
    "scaled and accumulated": (
        FisherPenalty(30.0, bound=0.7, warmup_steps=4),
        {"loss_scale": 64.0, "gradient_accumulation_steps": 2},
    ),
    "micro-batches": (
        FisherPenalty(30.0, bound=0.7, warmup_steps=4, micro_batch_size=3),
        {},
    ),
    "labels": (
        GradientPenalty(30.0, bound=0.7, warmup_steps=4, micro_batch_size=3),
        {},
    ),
    "inputs": (InputGradientPenalty(30.0, bound=0.7, warmup_steps=4), {}),
    "inputs reused": (
        InputGradientPenalty(30.0, every=3, bound=0.7, warmup_steps=4),
        {},
    ),
    "from the first step": (
        FisherPenalty(30.0, bound=0.7, warmup_steps=0),
        {},
    ),
    "no bound in reach": (FisherPenalty(0.3, bound=np.inf), {}),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("name", _SETTINGS)
def test_weights_equal_those_of_a_loop(name, mode):
    penalty, options = _SETTINGS[name]
    model, history = _fit(penalty, mode, **options)
    network = _network()
    said = _train_by_hand(
        network,
        penalty,
        options.get("gradient_accumulation_steps", 1),
        options.get("global_clipnorm"),
    )
    _assert_by_hand(model, network)
    ratios, factors, by_mean = said.T
    if name == "fresh":  # now the one, now the other
        assert 0 < by_mean.mean() < 1, by_mean
    # The bound matters, but where it is said not to.
    assert (factors < 1).any() == (name != "no bound in reach"), factors
    if "half" in name:
        assert 0 < (factors < 1).mean() < 1, factors
    each = len(ratios) // _EPOCHS
    np.testing.assert_allclose(
        history["fisher_ratio"], ratios[each - 1 :: each], rtol=1e-9
    )


def test_finite_differences_are_bounded_alike():
    penalty = FisherPenalty(
        30.0, bound=0.7, warmup_steps=4, method="finite_difference"
    )
    model, _ = _fit(penalty)
    network = _network()
    _train_by_hand(network, penalty)
    _assert_by_hand(model, network, rtol=1e-5, atol=1e-6)


def test_frozen_variables_are_in_no_norm():
    penalty = FisherPenalty(30.0, bound=0.7, warmup_steps=4)
    networks = [_network(), _network()]
    for network in networks:
        network.layers[0].trainable = False
    model, _ = _fit(penalty, network=networks[0])
    _train_by_hand(networks[1], penalty)
    _assert_by_hand(model, networks[1])
    np.testing.assert_array_equal(
        networks[0].layers[0].kernel, _network().layers[0].kernel
    )


def test_a_variable_left_out_of_the_norm_is_bounded_with_the_rest():
    network = _network()
    model, history = _fit(
        FisherPenalty(1e6, bound=1e-3, exclude=network.layers[0].kernel.path),
        network=network,
    )
    plain, _ = _fit(None)
    # At most a thousandth of the loss's steps, however large α.
    moved = training.weights(plain.model)
    far = max(
        np.abs(a - b).max()
        for a, b in zip(training.weights(model.model), moved)
    )
    assert 0 < far < 1e-2, far
    assert min(history["fisher_ratio"]) > 1


@pytest.mark.parametrize("every", [1, 3])
def test_it_resumes_to_the_bit(every, tmp_path):
    """In the middle of a step's accumulated batches, of a reused penalty."""

    def new():
        model, _ = _fit(
            FisherPenalty(30.0, every=every, bound=0.7, warmup_steps=4),
            gradient_accumulation_steps=4,
            momentum=0.5,
        )
        # 18 batches: two of the fifth step.
        return model

    def go_on(model):
        model.fit(_X, _Y, _BATCH, shuffle=False, verbose=0)
        return model.get_weights()

    model = new()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(
        tmp_path / "model.keras", custom_objects={"_Determined": _Determined}
    )
    training.assert_equal(go_on(loaded), go_on(model))


def test_without_a_gradient_of_the_loss_nothing_moves():
    """‖∇L‖ is zero: so is what the penalty may do."""
    model = FisherModel(
        _network(),
        FisherPenalty(30.0, bound=1.0),
        likelihood="categorical",
        trace_every=None,
    )
    model.compile("sgd", lambda y, outputs: 0.0 * tf.reduce_sum(outputs))
    before = model.model.get_weights()
    logs = model.fit(_X, _Y, _BATCH, verbose=0).history
    training.assert_equal(model.model.get_weights(), before)
    assert logs["fisher_ratio"] == [0.0]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "alpha, bound, most", [(0.0, 1.0, 0.1), (1e4, 1.0, 0.2), (1e4, None, None)]
)
def test_a_large_alpha_does_no_harm(alpha, bound, most):
    labels = np.argmax(_X[:, :3], axis=1)
    model, _ = _fit(
        FisherPenalty(alpha, bound=bound),
        y=labels,
        epochs=60,
        likelihood="categorical",
    )
    loss = model.evaluate(_X, labels, verbose=0)
    if bound is None:
        assert not loss < 1.0, loss
    else:
        assert loss < most, loss


@pytest.mark.parametrize("every", [1, 2])
def test_the_layer_is_bounded_by_the_gradient_that_it_sees(every):
    penalty = FisherPenalty(30.0, every=every, bound=0.7, warmup_steps=4)
    network = _network()
    layer = FisherRegularization(
        network, penalty, likelihood=_Determined(from_logits=True)
    )
    model = keras.Sequential([keras.Input((6,)), layer])
    model.compile(
        keras.optimizers.SGD(_RATE),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(_X, _Y, _BATCH, epochs=2, shuffle=False, verbose=0)
    by_hand, own = _network(), None
    for step in range(12):
        batch = slice(step % 6 * _BATCH, (step % 6 + 1) * _BATCH)
        x = tf.constant(_X[batch], tf.float64)
        variables = [v.value for v in by_hand.trainable_variables]
        with tf.GradientTape() as tape:
            loss = _loss(_Y[batch], by_hand(x))
        gradients = [g.numpy() for g in tape.gradient(loss, variables)]
        if step % every == 0:
            labels = _drawn(by_hand(x))
            square = float(_squared_gradient(by_hand, x, labels))
            own = _penalty(by_hand, penalty, x, _Y[batch])
            bound = _bound(penalty, step)
            factor = min(1.0, bound * np.sqrt(square) / _norm(own))
            assert factor < 1
            own = [factor * g for g in own]
        for v, g, p in zip(by_hand.trainable_variables, gradients, own):
            v.assign_sub(_RATE * (g + p))
    for a, b in zip(training.weights(network), training.weights(by_hand)):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("every", [1, 2])
def test_the_layer_bounds_what_reaches_layers_in_front_alike(every):
    """By the gradient of its own weights; reused is that of these alone."""
    found = []
    for bound in None, 0.01:
        body = keras.layers.Dense(4, activation="tanh")
        head = training.dense_network(4, seed=1)
        penalty = FisherPenalty(30.0, bound=bound, warmup_steps=0, every=every)
        layer = FisherRegularization(
            head, penalty, likelihood=_Determined(from_logits=True)
        )
        model = keras.Sequential([keras.Input((6,)), body, layer])
        body.kernel.assign(np.linspace(-1, 1, 24).reshape(6, 4))
        for _ in range(2):
            with tf.GradientTape() as tape:
                model(_X[:_BATCH], training=True)
                [value] = model.losses
            weights = [v.value for v in model.trainable_variables]
            gradients = tape.gradient(value, weights)
            found.append((value, gradients[:2], gradients[2:]))
    (value, front, own), (_, later, _), (_, bounded, shorter), last = found
    factor = 0.01 * np.sqrt(value / 30.0) / _norm([g.numpy() for g in own])
    assert factor < 0.5
    for a, b in zip([*bounded, *shorter], [*front, *own], strict=True):
        np.testing.assert_allclose(a, factor * b, rtol=1e-6)
    in_front = [np.abs(g).max() for g in (*later, *last[1])]
    assert (np.max(in_front) == 0) == (every == 2)


def test_it_warms_up_from_where_it_starts():
    penalty = FisherPenalty(bound=3.0, start=10, warmup_steps=4)
    found = [float(penalty.bound_at(step)) for step in range(9, 16)]
    np.testing.assert_allclose(found, [0, 0.75, 1.5, 2.25, 3, 3, 3])


@pytest.mark.parametrize("bound", [0, -1.0, float("nan"), "1", True])
def test_other_bounds_are_refused(bound):
    with pytest.raises(ValueError, match="`bound` must be above 0, or None"):
        FisherPenalty(bound=bound)


def test_only_a_bound_logs_the_ratio():
    _, history = _fit(FisherPenalty(0.1, bound=None), epochs=1)
    assert "fisher_ratio" not in history
    _, history = _fit(FisherPenalty(0.1, bound=1.0, start=100), epochs=1)
    assert np.isnan(history["fisher_ratio"]).all()
