"""What `compile` and `fit` of Keras take acts on the penalty as it should.

Each run is compared with a loop by hand in double precision: loss and penalty
are formulas on plain tapes, and a stock optimizer gets their gradient.
"""

from __future__ import annotations

import keras
from keras import layers
import numpy as np
import pytest
import tensorflow as tf
import training

from keras_fisher import FisherModel
from keras_fisher import GradientPenalty
from keras_fisher.layers import FisherRegularization

_BATCH, _BATCHES, _EPOCHS = 4, 4, 2
_RANDOM = np.random.default_rng(0)
# In arrays Keras rounds to single precision.
_X = _RANDOM.normal(size=(_BATCH * _BATCHES, 5)).astype("float32")
_Y = _RANDOM.integers(0, 3, len(_X))
_WEIGHTS = _RANDOM.choice([0.0, 0.5, 3.0], len(_X))
_ALPHA = 0.5


def _network(dtype="float64"):
    keras.config.set_dtype_policy(dtype)
    # No batch normalization: on plain tapes its moments have, in TensorFlow,
    # wrong second derivatives.
    return training.dense_network(5, (4, 4), seed=1)


def _loss(dtype="float64"):
    return keras.losses.SparseCategoricalCrossentropy(True, dtype=dtype)


def _sgd(**options):
    return keras.optimizers.SGD(0.1, momentum=0.5, **options)


def _fit(model, optimizer, mode="graph", steps=1, **options):
    model.compile(
        optimizer,
        _loss(),
        jit_compile=mode == "xla",
        run_eagerly=mode == "eager",
        steps_per_execution=steps,
    )
    return model.fit(
        _X,
        _Y,
        batch_size=_BATCH,
        epochs=options.pop("epochs", _EPOCHS),
        shuffle=False,
        verbose=0,
        **options,
    ).history


def _batches(weights=None):
    weights = np.ones(len(_X)) if weights is None else weights
    for begin in range(0, len(_X), _BATCH):
        chosen = slice(begin, begin + _BATCH)
        yield tf.constant(_X[chosen]), _Y[chosen], weights[chosen]


def _negative_log_likelihood(outputs, labels):
    probabilities = tf.nn.softmax(tf.cast(outputs, tf.float64))
    return -tf.math.log(tf.gather(probabilities, labels, batch_dims=1))


def _by_hand(
    network,
    optimizer,
    *,
    epochs=_EPOCHS,
    alpha=_ALPHA,
    every=1,
    weights=None,
    share=None,
    likeliest=False,
    stored=None,
):
    """Trains with a penalty of α ‖∇ mean loss‖², and returns the last one.

    Args:
        network: To be trained.
        optimizer: A stock optimizer.
        epochs: Passes over the data.
        alpha: α.
        every: Optimizer steps from one fresh gradient of the penalty to the
            next; steps in between take the last one.
        weights: Of the examples in the loss.
        share: Of each batch in a penalty; one over those that are accumulated
            by default.
        likeliest: Whether the labels in the penalty are the likeliest ones.
        stored: Gradients of the penalty by variable; changed.
    """
    if share is None:
        share = 1 / (optimizer.gradient_accumulation_steps or 1)
    scale = optimizer.loss_scale_factor or 1.0
    stored = {} if stored is None else stored
    variables = network.trainable_variables
    for _ in range(epochs):
        for x, y, weight in _batches(weights):
            with tf.GradientTape(persistent=True) as tape:
                with tf.GradientTape() as inner:
                    outputs = network(x, training=True)
                    labels = tf.argmax(outputs, axis=1) if likeliest else y
                    mean = tf.reduce_mean(
                        _negative_log_likelihood(outputs, labels)
                    )
                gradients = inner.gradient(mean, variables)
                norm = sum(tf.reduce_sum(g**2) for g in gradients)
                penalty = share * alpha * norm
                losses = _negative_log_likelihood(outputs, y)
                loss = tf.reduce_mean(weight * losses)
            if not optimizer.built or int(optimizer.iterations) % every == 0:
                value = float(penalty)
                fresh = tape.gradient(penalty, variables)
                stored.update(zip([v.path for v in variables], fresh))
            gradients = tape.gradient(loss, variables)
            optimizer.apply(
                [
                    scale * (gradient + stored[variable.path])
                    for gradient, variable in zip(gradients, variables)
                ],
                variables,
            )
    optimizer.finalize_variable_values(variables)
    return value


def _assert_close(network, expected, **options):
    options = {"rtol": 1e-9, "atol": 1e-12, **options}
    for a, b in zip(network.weights, expected.weights, strict=True):
        np.testing.assert_allclose(a, b, err_msg=a.path, **options)


def _distance(network, other):
    return max(
        float(np.max(np.abs(a.numpy() - b.numpy())))
        for a, b in zip(network.trainable_variables, other.trainable_variables)
    )


_OPTIMIZERS = {
    "clipnorm": dict(clipnorm=0.1),
    "global_clipnorm": dict(global_clipnorm=0.2),
    "clipvalue": dict(clipvalue=0.02),
    "ema": dict(use_ema=True, ema_momentum=0.8, weight_decay=0.1),
    "accumulated": dict(gradient_accumulation_steps=2),
    "all": dict(
        gradient_accumulation_steps=3,
        clipnorm=0.1,
        use_ema=True,
        ema_momentum=0.8,
        ema_overwrite_frequency=2,
        loss_scale_factor=256.0,
    ),
}


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("name", "every", "mode", "steps"),
    [
        ("global_clipnorm", 1, "graph", 1),
        ("clipvalue", 1, "eager", 1),
        ("ema", 1, "graph", 1),
        ("accumulated", 2, "eager", 1),
        ("all", 2, "graph", 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("clipnorm", 2, "graph", 1),
                ("global_clipnorm", 2, "xla", 1),
                ("accumulated", 2, "graph", 4),
                ("all", 1, "xla", 3),
                ("all", 2, "eager", 1),
            ]
        ),
    ],
)
def test_optimizers_get_the_gradient_of_loss_and_penalty(
    name, every, mode, steps
):
    options = _OPTIMIZERS[name]
    model = FisherModel(
        _network(),
        GradientPenalty(_ALPHA, bound=None, every=every),
        trace_every=None,
    )
    logs = _fit(model, _sgd(**options), mode, steps)
    expected = _network()
    value = _by_hand(expected, _sgd(**options), every=every)
    np.testing.assert_allclose(logs["fisher_penalty"][-1], value, rtol=1e-9)
    _assert_close(model.model, expected)
    # Options and penalty are of consequence here.
    for other, changes in ((_sgd(), {}), (_sgd(**options), dict(alpha=0.0))):
        network = _network()
        _by_hand(network, other, every=every, **changes)
        assert _distance(network, expected) > 1e-3, (name, changes)


@pytest.mark.parametrize("kind", ["sample_weight", "class_weight"])
def test_weights_are_of_the_loss_and_not_of_the_penalty(kind):
    weights, given = _WEIGHTS, _WEIGHTS
    if kind == "class_weight":
        given = {0: 0.0, 1: 0.5, 2: 3.0}
        weights = np.array([given[label] for label in _Y])
    model = FisherModel(
        _network(), GradientPenalty(_ALPHA, bound=None), trace_every=None
    )
    logs = _fit(model, _sgd(), **{kind: given})
    expected, unweighted = _network(), _network()
    value = _by_hand(expected, _sgd(), weights=weights)
    np.testing.assert_allclose(logs["fisher_penalty"][-1], value, rtol=1e-9)
    _assert_close(model.model, expected)
    _by_hand(unweighted, _sgd())
    assert _distance(unweighted, expected) > 1e-2


def test_layers_are_frozen_and_unfrozen_while_a_gradient_is_reused():
    """One optimizer for all fits, of which the later ones begin with reuse."""
    penalty = GradientPenalty(_ALPHA, bound=None, every=5)
    network, expected = _network(), _network()
    model = FisherModel(network, penalty, trace_every=None)
    optimizers, stored = (_sgd(), _sgd()), {}
    for trainable in (True, False, True):
        before = network.layers[1].get_weights()
        for each in (network, expected):
            each.layers[0].trainable = each.layers[1].trainable = trainable
        _fit(model, optimizers[0], epochs=1)
        _by_hand(expected, optimizers[1], epochs=1, every=5, stored=stored)
        _assert_close(network, expected)
        moved = [
            np.any(a != b)
            for a, b in zip(before, network.layers[1].get_weights())
        ]
        assert moved == [trainable] * len(moved), moved
    assert int(optimizers[0].iterations) == 3 * _BATCHES


def _flat(network):
    return np.concatenate([w.ravel() for w in network.get_weights()])


@pytest.mark.parametrize(
    ("policy", "error"), [("mixed_bfloat16", 0.03), ("mixed_float16", 0.003)]
)
def test_half_precision_penalizes_as_double_precision_does(policy, error):
    """With weights of zero the penalty alone moves the network."""
    nothing = np.zeros(len(_X))
    expected, network = _network(), _network(policy)
    network.set_weights(expected.get_weights())
    start = _flat(network)
    penalty = GradientPenalty(_ALPHA, bound=None)
    model = FisherModel(network, penalty, trace_every=None)
    logs = _fit(model, _sgd(), sample_weight=nothing)
    value = _by_hand(expected, _sgd(), weights=nothing)
    assert logs["loss"][-1] == 0 and logs["fisher_nonfinite"][-1] == 0
    off = abs(logs["fisher_penalty"][-1] / value - 1)
    assert off < error, f"penalty off by {off:.2%}"
    way = _flat(expected) - start
    off = np.linalg.norm(_flat(network) - start - way) / np.linalg.norm(way)
    assert off < error, f"weights off by {off:.2%} of their way"


@pytest.mark.parametrize("kind", ["layer", "model"])
def test_the_fisher_penalty_of_a_layer_takes_options_as_the_models(kind):
    """But it does not see how many batches the optimizer accumulates."""
    options = dict(
        gradient_accumulation_steps=2,
        clipnorm=0.1,
        use_ema=True,
        ema_momentum=0.8,
    )
    network, penalty = _network(), training.LikeliestLabels(_ALPHA, bound=None)
    if kind == "layer":
        inputs = keras.Input((5,))
        layer = FisherRegularization(network, penalty)
        model = keras.Model(inputs, layer(inputs))
    else:
        model = FisherModel(network, penalty, trace_every=None)
    optimizer = _sgd(**options)
    # Keras adds up the losses of layers in this precision.
    keras.config.set_floatx("float64")
    try:
        _fit(model, optimizer, steps=3, sample_weight=_WEIGHTS)
    finally:
        keras.config.set_floatx("float32")
    expected = _network()
    _by_hand(
        expected,
        _sgd(**options),
        weights=_WEIGHTS,
        share=1 if kind == "layer" else 1 / 2,
        likeliest=True,
    )
    _assert_close(network, expected)


def test_weights_of_outputs_and_examples_are_of_the_loss_alone():
    """The penalty is of the sum of log-likelihoods, as it is."""
    keras.config.set_dtype_policy("float64")
    inputs = keras.Input((5,))
    hidden = layers.Dense(4, activation="tanh")(inputs)
    network = keras.Model(
        inputs,
        {
            "a": layers.Dense(3, name="a")(hidden),
            "b": layers.Dense(2, name="b")(hidden),
        },
    )
    expected = keras.models.clone_model(network)
    expected.set_weights(network.get_weights())
    targets = _RANDOM.normal(size=(len(_X), 2)).astype("float32")
    model = FisherModel(
        network, GradientPenalty(_ALPHA, bound=None), trace_every=None
    )
    model.compile(
        keras.optimizers.SGD(0.1),
        {"a": _loss(), "b": keras.losses.MeanSquaredError(dtype="float64")},
        loss_weights={"a": 2.0, "b": 0.25},
    )
    model.fit(
        _X,
        {"a": _Y, "b": targets},
        sample_weight={"a": _WEIGHTS, "b": np.ones(len(_X))},
        batch_size=_BATCH,
        shuffle=False,
        verbose=0,
    )
    variables = expected.trainable_variables
    optimizer = keras.optimizers.SGD(0.1)
    for begin, (x, y, weight) in enumerate(_batches(_WEIGHTS)):
        t = tf.constant(targets[_BATCH * begin :][:_BATCH], tf.float64)
        with tf.GradientTape() as tape:
            with tf.GradientTape() as inner:
                outputs = expected(x, training=True)
                classes = _negative_log_likelihood(outputs["a"], y)
                squares = tf.reduce_sum((outputs["b"] - t) ** 2, axis=1)
                mean = tf.reduce_mean(classes + squares / 2)
            gradients = inner.gradient(mean, variables)
            norm = sum(tf.reduce_sum(g**2) for g in gradients)
            loss = 2.0 * tf.reduce_mean(weight * classes)
            loss += 0.25 * tf.reduce_mean(squares / 2) + _ALPHA * norm
        optimizer.apply(tape.gradient(loss, variables), variables)
    _assert_close(network, expected)
