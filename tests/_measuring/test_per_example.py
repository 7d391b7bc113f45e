"""Norms per example are those of a loop over examples, for any layer."""

from __future__ import annotations

import cases
import example_networks
import keras
from keras import layers
import networks
import numpy as np
import pytest
import tensorflow as tf

import keras_fisher
from keras_fisher._measuring import norms
from keras_fisher._measuring import per_example


def _build(make, dtype="float64"):
    """A network with large weights and odd statistics, and a batch for it."""
    keras.config.set_dtype_policy(dtype)
    model = make()
    random = np.random.default_rng(7)
    if isinstance(model, example_networks.Tied):
        x = tf.constant(random.integers(0, 5, (networks.BATCH, 4)))
    else:
        x = [
            tf.constant(
                random.normal(size=(networks.BATCH, *i.shape[1:])),
                example_networks.dtype(),
            )
            for i in model.inputs
        ]
        x = x if len(x) > 1 else x[0]
    model(x)
    for variable in model.trainable_variables:
        variable.assign(0.5 * random.normal(size=variable.shape))
    for variable in model.non_trainable_variables:
        if "moving" in variable.path:
            variable.assign(0.5 + random.uniform(size=variable.shape))
    return model, x


def _labels(model, x):
    outputs = model(x, training=False)
    return example_networks.LIKELIHOOD.sample(
        outputs, tf.constant([3, 4], tf.int64)
    )


def _measured(model, x, y, by, **kwargs):
    return keras_fisher.fisher_trace(
        model,
        x,
        y,
        estimator="empirical",
        likelihood=example_networks.LIKELIHOOD,
        by=by,
        **kwargs,
    )


class _Spy(per_example.Recording):
    """Remembers which variables the last recording did in a loop."""

    slow_paths: list[str]

    def __init__(self, layer, *args, **kwargs):
        super().__init__(layer, *args, **kwargs)
        paths = [variable.path for variable in layer.trainable_variables]
        _Spy.slow_paths = [paths[i] for i in self.slow]


@pytest.fixture(autouse=True)
def _spy(monkeypatch):
    monkeypatch.setattr(per_example, "Recording", _Spy)


def _assert_as_in_a_loop(model, x, tolerance) -> list[str]:
    """Compares with a loop over examples.

    Returns:
        Paths of the variables that were done example by example.
    """
    y = _labels(model, x)
    state = networks.state_of(model)
    expected = networks.squared_norms(model, x, example_networks.LIKELIHOOD, y)
    by_variable = _measured(model, x, y, "variable")
    by_example = _measured(model, x, y, "example")
    total = expected.mean(axis=0).sum()
    np.testing.assert_allclose(
        list(by_variable.values()),
        expected.mean(axis=0),
        rtol=tolerance,
        # A key's bias in attention has no gradient but rounding errors.
        atol=1e-3 * tolerance * total,
        err_msg=str(list(by_variable)),
    )
    np.testing.assert_allclose(by_example, expected.sum(axis=1), rtol=tolerance)
    for variable, value in state:
        np.testing.assert_array_equal(variable, value)
    return _Spy.slow_paths


def _recording(model, x, passes=1, **kwargs):
    """What a recording says in a graph: `then(recording)`, run."""

    def run(then):
        layout = per_example.layout_for(model, x, False)

        @tf.function(autograph=False)
        def traced(x):
            return then(
                per_example.Recording(model, x, layout, passes=passes, **kwargs)
            )

        return traced(x)

    return run


_RECURRENT = ("lstm", "gru", "two_inputs")


@pytest.mark.few(2)
@pytest.mark.parametrize("name", cases.some_slow(networks.NETWORKS, _RECURRENT))
def test_common_layers_in_double_precision(name):
    model, x = networks.build(name)
    slow = _assert_as_in_a_loop(model, x, 1e-9)
    assert bool(slow) == (name in _RECURRENT)


@pytest.mark.few(5)
@pytest.mark.parametrize(
    "name",
    cases.some_slow(
        example_networks.FAST,
        ("conv2d_groups_strided", "conv3d_groups", "attention_of_two"),
    ),
)
def test_fast_norms_in_double_precision(name):
    model, x = _build(example_networks.FAST[name])
    assert _assert_as_in_a_loop(model, x, 1e-9) == []


@pytest.mark.parametrize(
    "name", cases.some_slow(example_networks.SLOW, ("unrolled_gru", "rnn"))
)
def test_slow_norms_in_double_precision(name):
    model, x = _build(example_networks.SLOW[name])
    slow = _assert_as_in_a_loop(model, x, 1e-9)
    # Older versions of Keras multiply matrices in another way.
    least = int(name != "time_major" or cases.has_keras("3.15"))
    assert least <= len(slow) <= len(model.trainable_variables)


@pytest.mark.parametrize(
    "name", ["conv2d_dilated_same", "einsum_heads", "class_token", "arithmetic"]
)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_single_precision(name, jit_compile):
    model, x = _build(example_networks.FAST[name], "float32")
    model.jit_compile = jit_compile
    _assert_as_in_a_loop(model, x, 1e-4)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "name",
    [
        "depthwise",
        "transposed",
        "batch_norm",
        pytest.param("conv2d_groups", marks=pytest.mark.slow),
        pytest.param("attention", marks=pytest.mark.slow),
    ],
)
def test_xla_in_double_precision(name):
    model, x = networks.build(name)
    model.jit_compile = True
    _assert_as_in_a_loop(model, x, 1e-9)


def test_xla_runs_the_loop_as_well():
    model, x = _build(example_networks.SLOW["weight_normalized"])
    model.jit_compile = True
    _assert_as_in_a_loop(model, x, 1e-9)


@pytest.mark.parametrize(
    "policy",
    [
        "mixed_float16",
        pytest.param("mixed_bfloat16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", ["conv2d", "layer_norm", "embedding"])
def test_16_bits_are_near_32(name, policy):
    model, x = networks.build(name, "float32")
    weights = model.get_weights()
    y = _labels(model, x)
    expected = _measured(model, x, y, "total")
    model, x = networks.build(name, policy)
    model.set_weights(weights)
    for variable in model.trainable_variables:
        assert variable.dtype == "float32"
    assert _measured(model, x, y, "total") == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_16_bits_hold_small_and_large_derivatives(scale):
    model, x = networks.build("dense", "mixed_float16")
    shape = (networks.BATCH, networks.CLASSES)
    cotangent = np.random.default_rng(0).normal(size=shape).astype("float32")

    def norms(factor):
        return _recording(model, x)(
            lambda recording: recording.squared_norms(
                tf.constant(factor * cotangent)
            )
        )

    ratio = np.sum(norms(scale)) / np.sum(norms(1.0)) / scale**2
    assert ratio == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize(
    "name",
    ["conv1d", "conv2d", "depthwise", "transposed", "shared", "embedding"],
)
@pytest.mark.parametrize(
    "passes", [pytest.param(2, marks=pytest.mark.slow), 50]
)
def test_several_passes_at_once_are_the_passes_alone(name, passes):
    """Also with the products that are kept for many passes."""
    model, x = networks.build(name)
    shape = (2, networks.BATCH, networks.CLASSES)
    cotangents = tf.constant(np.random.default_rng(0).normal(size=shape))
    together = _recording(model, x, passes=passes)(
        lambda recording: recording.squared_norms(*tf.unstack(cotangents))
    )
    for k in range(2):
        alone = _recording(model, x)(
            lambda recording, k=k: recording.squared_norms(cotangents[k])
        )
        np.testing.assert_allclose(together[k], alone[0], rtol=1e-12)


@pytest.mark.parametrize("rows, columns", [(2, 30), (30, 2)])
def test_gram_and_explicit_form(rows, columns):
    """The first shape is cheaper by Gram matrices, the second without."""
    model, x = _build(
        example_networks.stack(
            (rows, columns), example_networks.tanh(layers.Dense, columns)
        )
    )
    _assert_as_in_a_loop(model, x, 1e-9)
    forms = []
    _recording(model, x)(
        lambda recording: forms.append(recording._rules[0]._by_gram)
    )
    assert forms == [rows < columns]


def test_memory_does_not_grow_as_batch_times_parameters():
    """No tensor of the graph holds a gradient of each example."""
    keras.config.set_dtype_policy("float32")
    model = keras.Sequential(
        [
            keras.Input((300,)),
            layers.Dense(200, activation="tanh"),
            layers.Reshape((8, 5, 5)),
            layers.Conv2D(150, 3, activation="tanh"),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    batch = 64
    x = tf.zeros([batch, 300])
    sizes = []

    def largest(recording):
        recording.squared_norms(tf.ones([batch, 3]))
        for operation in recording.outputs.graph.get_operations():
            for output in operation.outputs:
                if output.shape.is_fully_defined():
                    sizes.append(output.shape.num_elements())

    _recording(model, x)(largest)
    kernel = 300 * 200
    assert max(sizes) < batch * kernel / 10, f"{max(sizes)} entries"


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["dropout", "lstm"])
def test_training_mode_keeps_the_random_numbers(name):
    """Dropout's mask is that of one call on the whole batch."""
    model, x = networks.build(name)
    if name == "lstm":
        model = keras.Sequential(
            [*model.layers[:1], layers.Dropout(0.4), *model.layers[1:]]
        )
        model(x)
    y = _labels(model, x)
    measured = _measured(model, x, y, "total", training=True)
    each = [np.array([i]) for i in range(networks.BATCH)]
    expected = networks.brute_force_trace(
        model, x, example_networks.LIKELIHOOD, y, each
    )
    assert measured == pytest.approx(expected, rel=1e-9)


class Jitter(layers.Layer):
    """Adds noise, in inference as well."""

    def __init__(self):
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(1)

    def call(self, x):
        noise = keras.random.normal(
            keras.ops.shape(x), dtype=x.dtype, seed=self.seed_generator
        )
        return x + 0.3 * noise


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_noise_before_what_is_done_one_by_one_is_that_of_the_batch(mode):
    """An LSTM's gradients are those of the one call, with its noise."""
    model, x = networks.build("lstm")
    model = keras.Sequential([*model.layers[:1], Jitter(), *model.layers[1:]])
    model(x)
    y = _labels(model, x)
    measured = _measured(model, x, y, "total", training=mode == "training")
    each = [np.array([i]) for i in range(networks.BATCH)]
    expected = networks.brute_force_trace(
        model, x, example_networks.LIKELIHOOD, y, each
    )
    assert measured == pytest.approx(expected, rel=1e-9)


def test_other_noise_in_another_call_is_no_mixing_of_examples():
    model, x = networks.build("lstm")
    noisy = keras.Sequential([Jitter(), model])
    noisy(x)
    per_example.check_alone(noisy, x)
    mixing = keras.Sequential([example_networks.MixExamples(), model])
    mixing(x)
    with pytest.raises(ValueError, match="depend on the other examples"):
        per_example.check_alone(mixing, x)


def test_batch_normalization_in_training_mode_is_refused():
    model, x = networks.build("batch_norm")
    y = _labels(model, x)
    with pytest.raises(ValueError, match='estimator="batch"') as error:
        _measured(model, x, y, "total", training=True)
    assert "moving_mean" in str(error.value)
    # Frozen, it is like any other layer.
    model.layers[1].trainable = False
    _measured(model, x, y, "total", training=True)


def test_a_layer_that_mixes_examples_is_refused():
    model, x = _build(
        example_networks.stack(
            (4,),
            example_networks.DENSE,
            example_networks.MixExamples,
            example_networks.ACTIVE,
        )
    )
    with pytest.raises(ValueError, match="depend on the other examples"):
        _measured(model, x, _labels(model, x), "total")


def test_a_variable_without_effect_has_no_gradient():
    class Idle(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(3,), name="w")

        def call(self, x):
            return x

    model, x = _build(example_networks.stack((4,), Idle))
    by_variable = _measured(model, x, _labels(model, x), "variable")
    values = {path.rpartition("/")[2]: v for path, v in by_variable.items()}
    assert values["w"] == 0 < values["kernel"]


def test_a_wrong_rule_is_found_and_not_used(monkeypatch):
    """What the graph is read as is checked against backpropagation."""
    model, x = networks.build("dense")
    correct = norms.Products._gram

    monkeypatch.setattr(
        norms.Products,
        "_gram",
        lambda *arguments: 1.01 * correct(*arguments),
    )
    assert len(_assert_as_in_a_loop(model, x, 1e-9)) == 2


class TwoViews(layers.Layer):
    """Runs two views of the batch as one, but for examples switched off."""

    def __init__(self, examples_on):
        super().__init__()
        self.examples_on = tf.constant(examples_on, "float64")

    def build(self, shape):
        self.dense = layers.Dense(4)
        self.dense.build(shape)

    def call(self, x):
        both = self.dense(tf.concat([x, 2 * x], axis=0))
        one, two = tf.split(both, 2)
        # Examples find themselves by their last input.
        share = tf.gather(self.examples_on, tf.cast(x[:, -1:], tf.int32))
        return share * tf.tanh(one) * two


@pytest.mark.few(2)
@pytest.mark.parametrize("examples_on", np.eye(networks.BATCH).tolist())
@pytest.mark.parametrize("others", [0.0, 1.0])
def test_no_example_hides_what_is_wrong_for_others(examples_on, others):
    keras.config.set_dtype_policy("float64")
    # One alone is on, or all but one.
    on = [abs(others - one) for one in examples_on]
    inputs = keras.Input((4,))
    x = layers.Add()([TwoViews(on)(inputs), layers.Dense(4)(inputs)])
    model = keras.Model(inputs, layers.Dense(3)(x))
    x = np.random.default_rng(0).normal(size=(networks.BATCH, 4))
    x[:, -1] = np.arange(networks.BATCH)
    slow = _assert_as_in_a_loop(model, tf.constant(x), 1e-10)
    assert len(slow) == 2, slow


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 20, 128, 1000])
def test_choices_hold_each_example_without_each_other_one(size):
    choices = per_example._separating(size).T
    assert choices.shape[1] <= 2 * np.log2(size) + 1
    for i in range(size):
        without = (choices[i] & ~choices).any(axis=1)
        assert without.sum() == size - 1 and not without[i]


def test_examples_to_compare_cover_the_variables():
    norms = np.array([[9.0, 0.0, 0.0], [1.0, 2.0, 0.0], [1.0, 1.0, 0.0]])
    assert per_example._representative(norms) == [0, 1]
    assert per_example._representative(np.zeros([2, 2])) == [0]
    assert len(per_example._representative(np.eye(9))) == 4


class _Counting(layers.Layer):
    """Hands on what it gets, and counts how often it is called."""

    calls = 0

    def call(self, x):
        _Counting.calls += 1
        return x


def test_more_labels_are_no_more_to_trace():
    x = np.random.default_rng(0).normal(size=(4, 3, 2)).astype("float32")
    calls = []
    for classes in (3, 8):
        model = keras.Sequential(
            [
                keras.Input((3, 2)),
                _Counting(),
                layers.GRU(2),  # whose variables are done one by one
                layers.Dense(classes),
            ]
        )
        _Counting.calls = 0
        keras_fisher.fisher_trace(
            model, x, estimator="exact", likelihood="categorical"
        )
        calls.append(_Counting.calls)
    assert calls[0] == calls[1], calls
