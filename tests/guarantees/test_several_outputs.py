"""Several outputs: their log-likelihoods add up, in lists and in dicts."""

from __future__ import annotations

import itertools

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
from keras_fisher import likelihoods
from keras_fisher.layers import FisherRegularization
from keras_fisher.likelihoods import Bernoulli
from keras_fisher.likelihoods import Categorical
from keras_fisher.likelihoods import Gaussian
from keras_fisher.likelihoods import Joint

_BATCH = 6
_PARTS = {"a": Categorical(), "b": Gaussian(0.7), "t": Categorical()}
_LOSSES = {"a": training.LOSS, "b": "mse", "t": training.LOSS}


def _network(structure, dtype="float64"):
    """Classes, two numbers, and a class for each of three tokens."""
    keras.config.set_dtype_policy(dtype)
    x = keras.Input((3,), dtype=dtype)
    h = layers.Dense(4, activation="tanh")(x)
    outputs = {
        "a": layers.Dense(3, name="a")(h),
        "b": layers.Dense(2, name="b")(h),
        "t": layers.Dense(2, name="t")(layers.Reshape((2, 2))(h)),
    }
    if structure == "list":
        outputs = list(outputs.values())
    return keras.Model(x, outputs)


def _data(structure):
    random = np.random.default_rng(3)
    x = random.normal(size=(_BATCH, 3))
    y = {
        "a": random.integers(0, 3, _BATCH),
        "b": random.normal(size=(_BATCH, 2)),
        "t": random.integers(0, 2, (_BATCH, 2)),
    }
    return tf.constant(x), list(y.values()) if structure == "list" else y


def _as_list(values):
    if isinstance(values, dict):
        return [values[name] for name in _PARTS]
    return list(values)


def _gradient(model, x, y, i):
    """∇_θ of Σ_k -log p_k(y_k|x) for one example, each part by its formula."""
    with tf.GradientTape() as tape:
        a, b, t = (each[i] for each in _as_list(model(x, training=True)))
        loss = (
            -tf.nn.log_softmax(a)[int(y[0][i])]
            + tf.reduce_sum((y[1][i] - b) ** 2) / (2 * 0.7**2)
            - sum(tf.nn.log_softmax(t[j])[int(y[2][i][j])] for j in range(2))
        )
    return tape.gradient(loss, model.trainable_variables)


@pytest.mark.parametrize("structure", ["list", "dict"])
@pytest.mark.parametrize(
    "penalty",
    [
        GradientPenalty(0.3),
        GradientPenalty(0.3, micro_batch_size=2),
        GradientPenalty(0.3, method="finite_difference"),
        GradientPenalty(0.3, fraction=0.5),
    ],
    ids=["whole", "micro", "difference", "fraction"],
)
def test_a_penalty_is_that_of_the_sum(structure, penalty):
    model, (x, y) = _network(structure), _data(structure)
    likelihood = likelihoods.of_model(_PARTS, model)
    forward = penalty.forward(model, x, seed=5)
    value = penalty(forward, likelihood, y, seed=6).value
    size = int(forward.subset.size)
    first = forward.subset.first
    start = 0 if first is None else int(first)
    chosen = [(start + k) % _BATCH for k in range(size)]
    count = penalty.micro_batch_size or size
    expected = 0.0
    for begin in range(0, size, count):
        gradients = [
            _gradient(model, x, _as_list(y), i)
            for i in chosen[begin : begin + count]
        ]
        expected += sum(
            float(tf.reduce_sum(sum(g) ** 2)) for g in zip(*gradients)
        )
    expected *= 0.3 / (size * _BATCH)
    np.testing.assert_allclose(float(value), expected, rtol=1e-9)


@pytest.mark.few(1)
@pytest.mark.parametrize("structure", ["list", "dict"])
def test_the_exact_trace_is_the_expectation_over_all_labels(structure):
    model, (x, _) = _network(structure), _data(structure)
    expected = np.zeros(len(model.trainable_variables))
    a, b, t = _as_list(model(x))
    nodes = (-0.7, 0.7)  # mean 0 and variance σ², all that the trace takes
    draws = itertools.product(range(3), nodes, nodes, range(2), range(2))
    p, q = tf.nn.softmax(a).numpy(), tf.nn.softmax(t).numpy()
    for k, u, v, first, second in draws:
        labels = (
            np.full(_BATCH, k),
            np.add(b, [u, v]),
            np.tile([first, second], (_BATCH, 1)),
        )
        for i in range(_BATCH):
            gradients = _gradient(model, x, labels, i)
            norms = np.array([float(tf.reduce_sum(g**2)) for g in gradients])
            weight = p[i, k] * q[i, 0, first] * q[i, 1, second] / 4
            expected += weight * norms / _BATCH
    found = keras_fisher.fisher_trace(
        model, x, estimator="exact", likelihood=_PARTS, by="variable"
    )
    np.testing.assert_allclose(
        list(map(float, found.values())), expected, rtol=1e-9
    )


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["batch", "monte_carlo"])
def test_estimates_agree_with_the_exact_trace(estimator):
    model, (x, _) = _network("dict"), _data("dict")
    arguments = dict(likelihood=_PARTS, seed=0)
    exact = keras_fisher.fisher_trace(model, x, estimator="exact", **arguments)
    found = keras_fisher.fisher_trace(
        model, x, estimator=estimator, num_samples=300, **arguments
    )
    assert abs(found - exact) < 4 * found.standard_error, (found, exact)


def test_the_empirical_trace_is_that_of_the_labels_given():
    model, (x, y) = _network("list"), _data("list")
    norms = [
        sum(float(tf.reduce_sum(g**2)) for g in _gradient(model, x, y, i))
        for i in range(_BATCH)
    ]
    found = keras_fisher.fisher_trace(
        model, x, y, estimator="empirical", likelihood=_PARTS, by="example"
    )
    np.testing.assert_allclose(found, norms, rtol=1e-9)


def test_outputs_draw_labels_independently():
    outputs = [tf.zeros([4000, 2]), tf.zeros([4000, 2])]
    seed = tf.constant([1, 2], tf.int64)
    first, second = Joint([Categorical(), Categorical()]).sample(outputs, seed)
    alike = float(tf.reduce_mean(tf.cast(first == second, tf.float32)))
    assert abs(alike - 0.5) < 4 * 0.5 / 4000**0.5, alike
    np.testing.assert_array_equal(first, Categorical().sample(outputs[0], seed))


def test_hidden_parts_and_outputs_without_labels_add_nothing():
    joint = Joint({"a": Categorical(), "b": None, "c": Bernoulli()})
    outputs = {
        "c": tf.constant([[0.3], [0.2]]),
        "b": tf.ones([2, 5]),
        "a": tf.reshape(tf.range(12.0), [2, 3, 2]),
        "unnamed": tf.ones([2, 1]),
    }
    y = {"a": tf.zeros([2, 3], tf.int64), "b": None, "c": tf.ones([2, 1])}
    mask = {
        "a": tf.constant([[True, False, True], [False, False, True]]),
        "b": None,
        "c": None,
        "unnamed": None,
    }
    found = joint.negative_log_likelihood(y, outputs, mask)
    expected = Categorical().negative_log_likelihood(
        y["a"], outputs["a"], mask["a"]
    ) + Bernoulli().negative_log_likelihood(y["c"], outputs["c"])
    np.testing.assert_allclose(found, expected)
    score = joint.score(y, outputs, mask)
    assert list(score) == list(outputs)
    assert not score["b"].numpy().any() and not score["unnamed"].numpy().any()
    np.testing.assert_allclose(
        score["a"], Categorical().score(y["a"], outputs["a"], mask["a"])
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("structure", ["list", "dict"])
def test_fit_takes_losses_by_name_and_order(structure, jit, tmp_path):
    x, y = _data(structure)
    losses = _LOSSES
    if structure == "list":
        losses = list(losses.values())
    model = FisherModel(_network(structure, "float32"), 0.1, seed=0)
    model.compile("sgd", losses, jit_compile=jit)
    assert model.likelihood.names == list(_PARTS)
    history = model.fit(x, y, batch_size=3, verbose=0).history
    assert {"a_loss", "b_loss", "t_loss"} <= history.keys()
    assert history["fisher_trace"][0] > 0
    # E[penalty] = α Tr(F) / B, both of the last batch.
    np.testing.assert_allclose(
        history["fisher_penalty"], 0.1 * history["fisher_trace"][0] / 3
    )
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert repr(loaded.likelihood) == repr(model.likelihood)
    again = [m.fit(x, y, batch_size=3, verbose=0) for m in (model, loaded)]
    assert again[0].history == again[1].history


def _named(keys):
    """Classes and a number, by keys that are not the names of layers."""
    x = keras.Input((3,))
    made = {"c": layers.Dense(3), "n": layers.Dense(1), "d": layers.Dense(3)}
    return keras.Model(x, {key: made[key](x) for key in keys})


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("keys", "losses"),
    [
        ("nc", {"c": training.LOSS, "n": "mse"}),
        ("nc", [training.LOSS, "mse"]),
        ("cn", [training.LOSS, "mse"]),
        ("c", {"c": training.LOSS}),
        ("c", training.LOSS),
        ("dc", training.LOSS),
    ],
)
def test_keys_of_outputs_need_not_be_names_of_layers(keys, losses):
    x, y = _data("dict")
    x = tf.cast(x, tf.float32)
    labels = {"c": y["a"], "n": y["b"][:, :1], "d": y["a"]}
    labels = {key: labels[key] for key in keys}
    network = _named(keys)
    plain = keras.models.clone_model(network)
    plain.set_weights(network.get_weights())
    model = FisherModel(network, trace_every=1, seed=0)
    for each in (plain, model):
        each.compile("sgd", losses)
        each.fit(x, labels, shuffle=False, verbose=0)
    training.assert_equal(network.get_weights(), plain.get_weights())
    kinds = {"c": Categorical, "d": Categorical, "n": Gaussian}
    assert model.likelihood.names == sorted(keys)
    for name, part in zip(model.likelihood.names, model.likelihood.likelihoods):
        assert isinstance(part, kinds[name])
    trace = keras_fisher.fisher_trace(model, x, estimator="exact", by="layer")
    assert len(trace) == len(keys)


def test_a_dict_of_outputs_that_nobody_knows_of_is_named():
    class Network(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            return {"logits": self.dense(x)}

    x, y = _data("dict")
    model = FisherModel(Network(), 0.1)
    model.compile("sgd", training.LOSS)
    with pytest.raises(ValueError, match=r"several outputs \(\['logits'\]\)"):
        model.fit(x, {"logits": y["a"]}, verbose=0)
    model = FisherModel(Network(), 0.1)
    model.compile("sgd", {"logits": training.LOSS})
    model.fit(x, {"logits": y["a"]}, verbose=0)


class _FixedLabels(FisherPenalty):
    """The Fisher Penalty with labels that no seed changes."""

    def labels(self, likelihood, outputs, y, seed):
        return likelihood.sample(outputs, tf.constant([1, 2], tf.int64))


def test_a_layer_penalizes_several_outputs_as_the_model_does():
    x, y = _data("list")
    network = _network("list", "float32")
    weights = network.get_weights()
    penalty = _FixedLabels(0.1, bound=None)
    inputs = keras.Input((3,))
    layer = FisherRegularization(network, penalty, likelihood=_PARTS, seed=0)
    stock = keras.Model(inputs, layer(inputs))
    model = FisherModel(network, penalty, likelihood=_PARTS, seed=0)
    found = []
    for each in (stock, model):
        network.set_weights(weights)
        each.compile("sgd", [training.LOSS, "mse", training.LOSS])
        each.fit(x, y, batch_size=3, shuffle=False, verbose=0)
        found.append(network.get_weights())
    for one, other in zip(*found):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_one_loss_counts_for_all_outputs():
    x = keras.Input((2,))
    model = keras.Model(x, [layers.Dense(2)(x), layers.Dense(3)(x)])
    joint = likelihoods.of_model(training.LOSS, model)
    assert [type(part) for part in joint.likelihoods] == [Categorical] * 2


def test_a_config_of_several_is_read_by_the_names_of_outputs():
    model = _network("dict")
    joint = likelihoods.of_model(_PARTS, model)
    config = keras.saving.serialize_keras_object(joint)
    read = likelihoods.of_model(config, model)
    assert isinstance(read, Joint) and read.names == joint.names
    assert [*map(type, read.likelihoods)] == [*map(type, joint.likelihoods)]


def test_wrong_structures_are_refused():
    model, (x, y) = _network("dict"), _data("dict")
    with pytest.raises(ValueError, match=r"called \['a', 'b', 't'\].*'z'"):
        likelihoods.of_model({"a": "mse", "z": "mse"}, model)
    with pytest.raises(ValueError, match=r"3 outputs.*2 losses"):
        likelihoods.of_model(["mse", "mse"], model)
    with pytest.raises(ValueError, match="at least needs a likelihood"):
        Joint([None, None])
    with pytest.raises(ValueError, match="labels have to be a list"):
        Joint(_PARTS).negative_log_likelihood([1, 2], model(x))
    with pytest.raises(ValueError, match=r"labels .* one of the shape"):
        Joint(_PARTS).negative_log_likelihood(np.ones(2), model(x))
    for outputs in ({"a": model(x)["a"]}, [*model(x).values()][:2], tf.ones(2)):
        with pytest.raises(ValueError, match="outputs have to be a list"):
            Joint(_PARTS).sample(outputs, [0, 0])
    with pytest.raises(ValueError, match="several outputs"):
        forward = FisherPenalty().forward(model, x)
        FisherPenalty()(forward, Categorical())
    with pytest.raises(ValueError, match="one output"):
        forward = FisherPenalty().forward(model.layers[1], x)
        FisherPenalty()(forward, Joint([Categorical()]))
    fisher = FisherModel(_network("dict", "float32"))
    fisher.compile("sgd", _LOSSES)
    with pytest.raises(ValueError, match="labels have to be from 0 to 2"):
        fisher.fit(x, {**y, "a": y["a"] + 7}, verbose=0)


def test_noise_flags_are_for_one_output():
    x, y = _data("list")
    model = FisherModel(_network("list", "float32"))
    model.compile("sgd", list(_LOSSES.values()))
    targets = {"label": y, "is_noisy": np.zeros(_BATCH, bool)}
    with pytest.raises(ValueError, match="one output"):
        model.fit(x, targets, verbose=0)


def test_probabilities_are_of_one_output():
    joint = keras_fisher.likelihoods.Joint(["mse", "bernoulli"])
    outputs = [tf.zeros([2, 1]), tf.zeros([2, 1])]
    with pytest.raises(NotImplementedError, match="each of `likelihoods`"):
        joint.log_probability(outputs, outputs)
