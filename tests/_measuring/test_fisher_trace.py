"""Tr(F) of any model on any data."""

from __future__ import annotations

import gc
import weakref

import enumeration
import keras
from keras import layers
import networks
import numpy as np
import pytest
import tensorflow as tf

import keras_fisher
from keras_fisher._common import random_draws
from keras_fisher._measuring import fisher_trace
from keras_fisher.likelihoods import Categorical


@pytest.mark.parametrize("estimator", ["monte_carlo", "exact"])
def test_parts_sum_to_the_total(estimator):
    model, x = networks.build("attention")
    x = x.numpy()

    def trace(by):
        return keras_fisher.fisher_trace(
            model,
            x,
            estimator=estimator,
            by=by,
            likelihood="categorical",
            seed=3,
        )

    total = trace("total")
    assert sum(trace("layer").values()) == pytest.approx(total, rel=1e-12)
    assert sum(trace("variable").values()) == pytest.approx(total, rel=1e-12)
    assert np.mean(trace("example")) == pytest.approx(total, rel=1e-12)
    paths = [variable.path for variable in model.trainable_variables]
    assert list(trace("variable")) == paths
    assert set(trace("layer")) == {p.rpartition("/")[0] for p in paths}


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "num_samples", [1, 3, pytest.param(70, marks=pytest.mark.slow)]
)
def test_the_same_seed_gives_the_same_figure_in_any_batches(num_samples):
    model, _ = enumeration.classifier(3)
    x = np.random.default_rng(2).normal(size=(11, 3))

    def trace(x, **kwargs):
        return keras_fisher.fisher_trace(
            model,
            x,
            by="example",
            likelihood="categorical",
            num_samples=num_samples,
            seed=7,
            **kwargs,
        )

    whole = trace(x)
    dataset = tf.data.Dataset.from_tensor_slices(x).batch(3)
    for other in (trace(x, batch_size=4), trace(dataset)):
        np.testing.assert_allclose(other, whole, rtol=1e-12)


@pytest.mark.few(1)
@pytest.mark.parametrize("estimator", ["monte_carlo", "exact", "batch"])
@pytest.mark.parametrize("dtype", ["float32", enumeration.slow("float64")])
def test_xla_agrees(estimator, dtype):
    model, x = networks.build("conv2d", dtype)
    traces = []
    for jit_compile in (False, True):
        model.jit_compile = jit_compile
        traces.append(
            keras_fisher.fisher_trace(
                model,
                x,
                estimator=estimator,
                by="variable",
                likelihood="categorical",
                num_samples=2,
                seed=0,
            )
        )
    rtol = 1e-5 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(
        list(traces[0].values()), list(traces[1].values()), rtol=rtol
    )


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "policy",
    [
        "mixed_float16",
        pytest.param("mixed_bfloat16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("estimator", ["exact", "batch"])
def test_16_bits_are_near_32(policy, estimator):
    def trace(policy):
        model, x = networks.build("conv1d", policy)
        return model, lambda: keras_fisher.fisher_trace(
            model,
            tf.cast(x, "float32"),
            estimator=estimator,
            likelihood="categorical",
            num_samples=200,
            seed=0,
        )

    model, expected = trace("float32")
    other, measured = trace(policy)
    other.set_weights(model.get_weights())
    # Nearly all of the labels drawn are the same.
    assert measured() == pytest.approx(expected(), rel=0.03)


def test_batch_holds_with_batch_normalization_in_training_mode():
    """B ‖ĝ‖² by the expectation over labels, with the batch's statistics."""
    model, x = networks.build("batch_norm")
    with tf.GradientTape(persistent=True) as tape:
        outputs = model(x, training=True)
        log_p = tf.unstack(tf.reshape(tf.nn.log_softmax(outputs), [-1]))
    expected = sum(
        np.exp(entry)
        * sum(
            np.sum(np.square(g))
            for g in tape.gradient(entry, model.trainable_variables)
        )
        for entry in log_p
    ) / len(x)
    trace = keras_fisher.fisher_trace(
        model,
        x,
        estimator="batch",
        likelihood="categorical",
        training=True,
        num_samples=600,
        seed=0,
    )
    z = (trace - expected) / trace.standard_error
    assert abs(z) < 4, f"{trace} is {z:.1f} errors from {expected}"


def test_takes_what_the_compiled_model_says():
    model, x = enumeration.classifier(3, "softmax")
    loss = keras.losses.SparseCategoricalCrossentropy()
    model.compile("sgd", loss)
    expected = keras_fisher.fisher_trace(
        model, x, estimator="exact", likelihood=Categorical(from_logits=False)
    )
    assert keras_fisher.fisher_trace(model, x, estimator="exact") == expected
    wrapped = keras_fisher.FisherModel(model, likelihood="categorical")
    other = keras_fisher.FisherModel(model)
    other.compile("sgd", loss)
    assert keras_fisher.fisher_trace(
        other, x, estimator="exact"
    ) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="trainable"):
        model.trainable = False
        keras_fisher.fisher_trace(wrapped, x)


def test_empirical_takes_labels_with_noise_flags_and_from_data_sets():
    model, x = enumeration.classifier(3)
    y = np.arange(5) % 3
    arguments = dict(estimator="empirical", likelihood="categorical")
    expected = keras_fisher.fisher_trace(model, x, y, **arguments)
    masked = {"label": y, "is_noisy": y > 1}
    assert keras_fisher.fisher_trace(model, x, masked, **arguments) == expected
    dataset = tf.data.Dataset.from_tensor_slices((x, y, np.ones(5))).batch(2)
    assert keras_fisher.fisher_trace(
        model, dataset, **arguments
    ) == pytest.approx(expected, rel=1e-12)


def test_dicts_and_lists_of_inputs():
    model, x = networks.build("two_inputs")
    arguments = dict(estimator="batch", likelihood="categorical", seed=0)
    trace = keras_fisher.fisher_trace(model, x, **arguments)
    listed = keras_fisher.fisher_trace(
        keras.Model([model.input["a"], model.input["b"]], model.output),
        [x["a"], x["b"]],
        **arguments,
    )
    assert trace == pytest.approx(listed, rel=1e-12)


def test_changes_nothing_and_needs_no_built_model():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = layers.BatchNormalization()
            self.drop = layers.Dropout(0.5)
            self.dense = layers.Dense(3)

        def call(self, x, training=False):
            return self.dense(self.drop(self.norm(x), training=training))

    model = Net()
    x = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    arguments = dict(estimator="batch", likelihood="categorical", seed=0)
    first = keras_fisher.fisher_trace(model, x, training=True, **arguments)
    state = [v.numpy() for v in model.variables]
    again = keras_fisher.fisher_trace(model, x, training=True, **arguments)
    assert again == first
    for variable, value in zip(model.variables, state):
        np.testing.assert_array_equal(variable, value)


def test_follows_weights_and_what_is_trainable():
    model, x = enumeration.classifier(3)

    def layers_of_trace():
        return keras_fisher.fisher_trace(
            model, x, estimator="exact", by="layer", likelihood="categorical"
        )

    before = layers_of_trace()
    model.layers[-1].bias.assign([1.0, 2.0, 3.0])
    assert layers_of_trace() != before
    model.layers[-1].trainable = False
    assert len(layers_of_trace()) == len(before) - 1
    model.layers[-1].trainable = True
    assert len(layers_of_trace()) == len(before)


def test_a_measured_model_is_not_kept_alive():
    model, x = enumeration.classifier(3)
    keras_fisher.fisher_trace(model, x, likelihood="categorical")
    reference = weakref.ref(model)
    del model
    keras.utils.clear_session(free_memory=False)
    gc.collect()
    assert reference() is None


def test_many_batches_show_a_progress_bar(capsys):
    model, x = enumeration.classifier(3)
    arguments = dict(likelihood="categorical", batch_size=1)
    keras_fisher.fisher_trace(model, x, verbose=1, **arguments)
    assert "5/5" in capsys.readouterr().out
    keras_fisher.fisher_trace(model, x, verbose=0, **arguments)
    assert capsys.readouterr().out == ""


def test_variables_that_share_a_path_are_told_apart():
    class Twins(keras.Model):
        def __init__(self):
            super().__init__()
            self.a = layers.Dense(3, name="twin")
            self.b = layers.Dense(3, name="twin")

        def call(self, x):
            return self.b(self.a(x))

    model = Twins()
    x = np.ones([4, 3], "float32")
    model(x)
    paths = {v.path for v in model.trainable_variables}
    by_variable = keras_fisher.fisher_trace(
        model, x, by="variable", likelihood="categorical"
    )
    assert len(paths) == 2 < len(by_variable) == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(estimator="fisher"), "`estimator` must be one of"),
        (dict(by="layers"), "`by` must be one of"),
        (dict(num_samples=0), "`num_samples` must be an integer of at least 1"),
        (dict(estimator="batch", by="example"), "no gradients of single"),
        (dict(estimator="empirical"), "no `y` was given"),
        (dict(likelihood="auto"), "not compiled"),
        (dict(batch_size=0), "`batch_size` must be an integer of at least 1"),
        (dict(verbose=3), "`verbose` must be"),
        (dict(seed=1.5), "`seed` must be an integer"),
    ],
)
def test_bad_arguments(arguments, message):
    model, x = enumeration.classifier(3)
    with pytest.raises(ValueError, match=message):
        keras_fisher.fisher_trace(
            model, x, **{"likelihood": "categorical", **arguments}
        )


class OfFewExamples(keras.layers.Layer):
    def call(self, x):
        if x.shape[0] is not None and x.shape[0] > networks.BATCH:
            raise ValueError("There are too many for me.")
        return x


def test_what_a_layer_says_of_other_numbers_of_examples_is_heard():
    model = keras.Sequential([keras.Input((4,)), OfFewExamples()])
    model.add(keras.layers.Dense(3))
    x, y = np.ones([networks.BATCH, 4]), np.zeros(networks.BATCH, int)
    likelihood = keras_fisher.likelihoods.Categorical(from_logits=True)
    with pytest.raises(ValueError, match="too many for me"):
        keras_fisher.fisher_trace(model, x, y, likelihood=likelihood)


def test_bad_models_and_labels():
    model, x = enumeration.classifier(3)
    with pytest.raises(ValueError, match="are not: they range"):
        keras_fisher.fisher_trace(
            model, x, likelihood=Categorical(from_logits=False)
        )
    with pytest.raises(ValueError, match="labels have to be from 0 to 2"):
        keras_fisher.fisher_trace(
            model,
            x,
            np.full(5, 3),
            estimator="empirical",
            likelihood="categorical",
        )

    class Two(keras.Model):
        """How many outputs it has, no one knows before it is called."""

        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            return [self.dense(x), self.dense(x)]

    with pytest.raises(ValueError, match="several outputs"):
        keras_fisher.fisher_trace(Two(), x, likelihood="categorical")
    model.trainable = False
    with pytest.raises(ValueError, match="No variable of the model"):
        keras_fisher.fisher_trace(model, x, likelihood="categorical")


@pytest.mark.slow
def test_ten_thousand_examples_take_the_memory_of_a_batch():
    """And give the figure of one batch."""
    keras.config.set_dtype_policy("float32")
    model = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )
    random = np.random.default_rng(0)
    x = random.normal(size=(10_000, 16, 16, 3)).astype("float32")
    dataset = tf.data.Dataset.from_tensor_slices(x).batch(100)
    arguments = dict(likelihood="categorical", seed=0)
    keras_fisher.fisher_trace(model, dataset.take(5), **arguments)

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 2**20

    before = resident()
    trace = keras_fisher.fisher_trace(model, dataset, verbose=1, **arguments)
    growth = resident() - before
    assert growth < 60, f"{growth:.0f} MiB"
    whole = keras_fisher.fisher_trace(model, x, batch_size=5000, **arguments)
    assert trace == pytest.approx(whole, rel=1e-4)


class _TimeMajor(keras.layers.Layer):
    """Has time before the examples, as code for other libraries does."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(4, activation="tanh")

    def build(self, shape):
        self.dense.build((None, shape[-1]))

    def call(self, x):
        time = keras.ops.shape(x)[1]
        rows = keras.ops.reshape(
            keras.ops.transpose(x, (1, 0, 2)), (-1, x.shape[-1])
        )
        z = keras.ops.reshape(self.dense(rows), (time, -1, 4))
        return keras.ops.mean(z, axis=0)


@pytest.mark.few(1)
@pytest.mark.parametrize("first", [(1, 5), (12, 1)], ids=["batch", "time"])
def test_shapes_that_tell_too_little_decide_nothing(first):
    x = np.random.default_rng(0).normal(size=(12, 5, 3)).astype("float32")

    def trace(model, x):
        return keras_fisher.fisher_trace(
            model, x, likelihood="categorical", estimator="exact"
        )

    def model():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((None, 3))
        outputs = keras.layers.Dense(3)(_TimeMajor()(inputs))
        return keras.Model(inputs, outputs)

    one_by_one = model()
    expected = np.mean([trace(one_by_one, x[i : i + 1]) for i in range(12)])
    examples, length = first
    tried = model()
    trace(tried, x[:examples, :length])
    assert trace(tried, x) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_layer_in_half_precision_is_measured_as_such():
    x = np.random.default_rng(0).normal(size=(20, 7, 4)).astype("float32")

    def trace(policy):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((7, 4)),
                keras.layers.LSTM(5, dtype=policy),
                keras.layers.Dense(3, dtype="float32"),
            ]
        )
        return keras_fisher.fisher_trace(
            model, x, likelihood="categorical", estimator="exact"
        )

    expected = trace("float32")
    assert trace("mixed_bfloat16") == pytest.approx(expected, rel=0.02)


@pytest.mark.few(1)
@pytest.mark.parametrize("estimator", ["exact", "batch", "monte_carlo"])
def test_in_half_precision_small_gradients_are_scaled_up(estimator):
    x = np.random.default_rng(0).normal(size=(64, 16)).astype("float32")

    def trace(policy):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((16,)),
                keras.layers.Dense(32, "tanh", dtype=policy),
                keras.layers.Dense(3, dtype=policy),
            ]
        )
        weights = model.get_weights()
        weights[2] *= 0.01
        # A prediction that is all but certain.
        weights[3] = np.array([14.0, 0.0, 0.0])
        model.set_weights(weights)
        return keras_fisher.fisher_trace(
            model, x, likelihood="categorical", estimator=estimator
        )

    found = trace("mixed_float16")
    assert found == pytest.approx(trace("float32"), rel=0.02, abs=0)


@pytest.mark.parametrize("estimator", ["exact", "monte_carlo", "batch"])
def test_one_class_has_a_trace_of_zero(estimator):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    found = keras_fisher.fisher_trace(
        model, np.ones((5, 3)), likelihood="categorical", estimator=estimator
    )
    assert found == 0


def test_a_sixteenth_of_a_large_batch_has_a_second_draw():
    """The rows are not those of the seed that labels are drawn with."""
    seed = tf.constant([3, 0], tf.int64)
    for size, count in (5, 5), (100, 16), (320, 20), (330, 21):
        x = tf.range(size)
        longer, rows = fisher_trace._with_pairs(x, seed)
        np.testing.assert_array_equal(longer, [*x, *rows])
        assert len(set(rows.numpy())) == count == len(rows)
    assert rows.numpy().tolist() != list(
        random_draws.permutation(size, seed)[:count].numpy()
    )
