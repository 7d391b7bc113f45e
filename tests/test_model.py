"""`FisherModel` behaves as a Keras model, and measures what it says."""

from __future__ import annotations

import itertools

import cases
import keras
import networks
import numpy as np
import pytest
import tensorflow as tf

import keras_fisher
from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher import GradientPenalty
from keras_fisher import InputGradientPenalty
from keras_fisher import UniformLabelPenalty
from keras_fisher import likelihoods
from keras_fisher.datasets import add_label_noise

_RANDOM = np.random.default_rng(0)
_X = _RANDOM.normal(size=(50, 6)).astype("float32")
_Y = _RANDOM.integers(0, 3, size=50)
_LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _network(outputs=3, dropout=True, batch_norm=True, activation=None):
    keras.utils.set_random_seed(1)
    layers = [
        keras.Input((6,)),
        keras.layers.Dense(8),
        keras.layers.BatchNormalization() if batch_norm else None,
        keras.layers.Activation("tanh"),
        keras.layers.Dropout(0.3, seed=5) if dropout else None,
        keras.layers.Dense(outputs, activation=activation),
    ]
    return keras.Sequential([layer for layer in layers if layer is not None])


def _compile(model, loss=_LOSS, optimizer=None, **kwargs):
    if optimizer is None:
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    kwargs.setdefault("metrics", ["accuracy"])
    model.compile(optimizer, loss, **kwargs)
    return model


def _fit(model, epochs=2, **kwargs):
    return model.fit(
        _X, _Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, **kwargs
    )


def _weights(model):
    return [v.numpy() for v in model.trainable_variables]


def _assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


# Nothing changes for those who do not ask for it.


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
    plain = _compile(_network(), **options)
    history = _fit(plain)
    model = FisherModel(_network(), trace_every=None)
    _compile(model, **options)
    same = _fit(model)
    _assert_equal(model.model.get_weights(), plain.get_weights())
    assert same.history == history.history
    assert model.evaluate(_X, _Y, verbose=0) == plain.evaluate(
        _X, _Y, verbose=0
    )


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("trace_every", [1, 3])
def test_measuring_changes_no_bit_of_the_weights(trace_every, jit):
    plain = _compile(_network(dropout=not jit), jit_compile=jit)
    history = _fit(plain)
    model = FisherModel(_network(dropout=not jit), trace_every=trace_every)
    _compile(model, jit_compile=jit)
    same = _fit(model)
    for a, b in zip(model.model.get_weights(), plain.get_weights()):
        if jit:  # XLA fuses the two functions differently.
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(a, b)
    for name, values in history.history.items():
        np.testing.assert_allclose(same.history[name], values, rtol=1e-4)


@pytest.mark.parametrize("penalty", [None, 0.1])
def test_predictions_are_the_wrapped_models(penalty):
    model = _compile(FisherModel(_network(), penalty))
    _fit(model, epochs=1)
    np.testing.assert_array_equal(
        model.predict(_X, verbose=0), model.model.predict(_X, verbose=0)
    )


def test_loss_and_metrics_in_the_logs_are_without_the_penalty():
    """With learning rate 0, so that both see the same weights."""
    options = dict(optimizer=keras.optimizers.SGD(0.0))
    plain = _fit(_compile(_network(dropout=False), **options)).history
    model = FisherModel(_network(dropout=False), FisherPenalty(1000.0))
    logs = _fit(_compile(model, optimizer=keras.optimizers.SGD(0.0))).history
    assert sorted(set(logs) - set(plain)) == [
        "fisher_nonfinite",
        "fisher_penalty",
        "fisher_trace",
    ]
    for name, values in plain.items():
        np.testing.assert_allclose(logs[name], values, rtol=1e-5)
    assert min(logs["fisher_penalty"]) > 1


# The numbers.


@pytest.mark.parametrize(
    "penalty, mode",
    cases.in_turns(
        [
            *cases.FISHER_PENALTIES,
            GradientPenalty(0.3),
            UniformLabelPenalty(0.3, every=2),
            InputGradientPenalty(0.3),
        ],
        name=cases.name_of_penalty,
    ),
)
def test_fit_equals_a_loop_with_the_pure_functions(penalty, mode):
    """Another implementation of the schedule, with plain SGD."""
    dropout = mode != "xla"
    model = FisherModel(_network(dropout=dropout), penalty, seed=4)
    _compile(
        model,
        optimizer=keras.optimizers.SGD(0.1),
        jit_compile=mode == "xla",
        run_eagerly=mode == "eager",
        steps_per_execution=3,
    )
    logs = model.fit(
        _X[:48], _Y[:48], batch_size=8, epochs=2, shuffle=False, verbose=0
    ).history

    reference = _network(dropout=dropout)
    seed = keras.random.SeedGenerator(4)
    likelihood = likelihoods.Categorical()
    probe = FisherPenalty(0.0)
    stored = [np.zeros(v.shape) for v in reference.trainable_variables]
    trace, value, step = None, 0.0, 0
    for _ in range(2):
        for begin in range(0, 48, 8):
            x, y = _X[begin : begin + 8], _Y[begin : begin + 8]
            fresh = bool(penalty.is_fresh(step))
            measure = step % 10 == 0 or (fresh and penalty.measures_trace)
            with tf.GradientTape(persistent=True) as tape:
                forward = (penalty if fresh else probe).forward(
                    reference, tf.constant(x), seed=seed
                )
                loss = _LOSS(y, forward.outputs)
                if fresh:
                    term = penalty(forward, likelihood, y, seed=seed)
                    value = term.value
                if measure and not (fresh and penalty.measures_trace):
                    term_of_trace = probe(forward, likelihood, seed=seed)
                elif measure:
                    term_of_trace = term
            if measure:
                trace = np.sum(term_of_trace.traces)
            variables = [v.value for v in reference.trainable_variables]
            gradients = tape.gradient(loss, variables)
            if fresh:
                stored = [
                    0.0 if g is None else g
                    for g in tape.gradient(term.value, variables)
                ]
            if fresh or (penalty.stores_gradient and penalty.is_active(step)):
                gradients = [g + p for g, p in zip(gradients, stored)]
            for v, g in zip(reference.trainable_variables, gradients):
                v.assign_sub(0.1 * g)
            step += 1
        np.testing.assert_allclose(
            logs["fisher_trace"].pop(0), trace, rtol=3e-3
        )
        np.testing.assert_allclose(
            logs["fisher_penalty"].pop(0), value, rtol=3e-3
        )
    for a, b in zip(_weights(model.model), _weights(reference)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "jit, steps",
    [
        (True, 7),
        *(
            pytest.param(jit, steps, marks=pytest.mark.slow)
            for jit, steps in [
                *[(False, 1), (False, 3), (False, 7)],
                *[(True, 1), (True, 3)],
            ]
        ),
    ],
)
def test_every_measured_step_reaches_callbacks_with_its_number(steps, jit):
    seen = []

    class Record(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            measured = self.model.measurements
            seen.extend(zip(measured.step, measured.trace_by_variable.sum(1)))

    def run(steps, jit):
        seen.clear()
        model = FisherModel(
            _network(dropout=False),
            FisherPenalty(0.1, every=5),
            trace_every=2,
            seed=3,
        )
        _compile(model, steps_per_execution=steps, jit_compile=jit)
        history = _fit(model, callbacks=[Record()]).history
        np.testing.assert_allclose(seen[-1][1], history["fisher_trace"][-1])
        return list(seen)

    measured, expected = run(steps, jit), run(1, False)
    numbers = [0, 2, 4, 5, 6, 8, 10, 12]
    assert [n for n, _ in measured] == [n for n, _ in expected] == numbers
    np.testing.assert_allclose(
        [t for _, t in measured], [t for _, t in expected], rtol=1e-3
    )


def test_measurements_name_every_variable():
    model = FisherModel(_network(), 0.1, trace_every=1)
    assert model.measurements.step.shape == (0,)
    _fit(_compile(model))
    measured = model.measurements
    assert measured.trace_by_variable.shape == (1, 6)
    assert measured.penalty.shape == (1,)
    np.testing.assert_allclose(
        measured.penalty, 0.1 * measured.trace_by_variable.sum(1) / 2
    )  # the last batch has two examples


@pytest.mark.parametrize("steps", [1, 4])
def test_steps_that_measure_nothing_are_not_waited_for(steps):
    """Their tensors are never looked at."""
    penalty = FisherPenalty(0.1, every=6, start=6)
    model = FisherModel(_network(), penalty, trace_every=None)
    _compile(model, steps_per_execution=steps)
    looked_at = []

    class Tensors(dict):
        def items(self):
            looked_at.append(True)
            return super().items()

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            call = self.model.train_function._last_call
            call.tensors = Tensors(call.tensors)
            found = self.model.measurements
            assert len(found) == 4
            numbers.extend(found.step)

    numbers = []
    _fit(model, callbacks=[Look()])  # 14 steps in two epochs
    assert numbers == [6, 12]
    # Once for each of them, and once where the epoch ended earlier than the
    # host could know.
    assert len(looked_at) <= 2 + (steps > 1)


def test_observed_steps_are_those_that_a_run_has_measured():
    penalty = FisherPenalty(0.1, every=3, start=2, stop=9)
    model = _compile(FisherModel(_network(), penalty, trace_every=5))
    assert np.flatnonzero(model.observed(np.arange(14))).tolist() == [
        *(0, 2, 5, 8, 10),
    ]
    nothing = FisherModel(_network(), trace_every=None)
    assert not nothing.observed(np.arange(14)).any()
    assert nothing.measurements.step.shape == (0,)


def test_measurements_go_on_where_a_callback_sets_the_step():
    numbers = []

    class Rewind(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            numbers.extend(self.model.measurements.step)

        def on_epoch_end(self, epoch, logs=None):
            self.model.optimizer.iterations.assign(3)

    model = _compile(FisherModel(_network(), trace_every=4))
    _fit(model, callbacks=[Rewind()])
    assert numbers == [0, 4, 4, 8]


def test_the_size_of_the_batch_is_measured():
    sizes = []

    class Record(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            sizes.extend(self.model.measurements.batch_size)

    model = FisherModel(_network(), trace_every=3)
    _fit(_compile(model, steps_per_execution=2), 1, callbacks=[Record()])
    assert sizes == [8, 8, 2]


class _CountingPenalty(FisherPenalty):
    """Counts how often it is traced."""

    def __init__(self):
        super().__init__(0.1)
        self.count = 0

    def labels(self, *args, **kwargs):
        self.count += 1
        return super().labels(*args, **kwargs)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_is_traced_once(jit, masked):
    # TensorFlow would trace it twice if it created variables.
    penalty = _CountingPenalty()
    model = _compile(FisherModel(_network(), penalty), jit_compile=jit)
    data = tf.data.Dataset.from_tensor_slices((_X, _Y))
    if masked:
        data = add_label_noise(data, 0.4, num_classes=3, seed=0)
    model.fit(data.batch(10), epochs=2, verbose=0)
    assert penalty.count == 1


def test_train_step_can_be_called_in_a_loop_of_ones_own():
    model = _compile(FisherModel(_network(), FisherPenalty(0.1, every=2)))
    step = tf.function(model.train_step, autograph=False)
    batch = tf.constant(_X[:8]), tf.constant(_Y[:8])
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
    }


def test_train_on_batch():
    model = _compile(FisherModel(_network(), 0.1))
    logs = model.train_on_batch(_X[:8], _Y[:8], return_dict=True)
    assert logs["fisher_penalty"] > 0
    assert np.isfinite(logs["fisher_trace"])


def test_before_the_first_measurement_the_trace_is_not_a_number():
    penalty = FisherPenalty(0.1, start=100)
    model = _compile(FisherModel(_network(), penalty, trace_every=None))
    logs = _fit(model, epochs=1).history
    assert np.isnan(logs["fisher_trace"][0])
    assert logs["fisher_penalty"] == [0.0]


def test_penalties_that_say_nothing_of_the_trace_log_none_by_themselves():
    model = _compile(FisherModel(_network(), "gradient", trace_every=None))
    assert "fisher_trace" not in _fit(model, epochs=1).history


@pytest.mark.parametrize("accumulate", [None, 2])
def test_accumulated_batches_share_the_penalty(accumulate):
    """α (b/B) for each, so that the expected penalty stays."""
    optimizer = keras.optimizers.SGD(
        0.0, gradient_accumulation_steps=accumulate
    )
    model = FisherModel(_network(batch_norm=False, dropout=False), 0.3, seed=4)
    _compile(model, optimizer=optimizer)
    model.train_on_batch(_X[:8], _Y[:8])
    measured = model.measurements
    np.testing.assert_allclose(
        measured.penalty,
        0.3 * measured.trace_by_variable.sum(1) / (8 * (accumulate or 1)),
    )


# Precision.


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("network", ["dense", "conv2d", "batch_norm"])
def test_trace_in_half_precision_is_close_to_single_precision(policy, network):
    y = np.arange(networks.BATCH) % networks.CLASSES

    def mean_trace(policy):
        model, x = networks.build(network, policy)
        model = FisherModel(model, 0.01, trace_every=1, seed=2)
        _compile(model, optimizer=keras.optimizers.SGD(0.0))
        traces = []
        for _ in range(100):
            model.train_on_batch(x, y)
            traces.append(model.measurements.trace_by_variable.sum())
        if policy == "mixed_float16":
            scale = float(model.optimizer.dynamic_scale)
            assert scale >= 2.0**15, f"the loss scale collapsed to {scale}"
        return np.mean(traces)

    half, single = mean_trace(policy), mean_trace("float32")
    assert abs(half / single - 1) < 0.03, (half, single)


def test_mixed_float16_trains_and_keeps_its_loss_scale():
    keras.config.set_dtype_policy("mixed_float16")
    model = _compile(FisherModel(_network(), 0.1))
    logs = model.fit(
        _X[:48], _Y[:48], batch_size=8, epochs=20, shuffle=False, verbose=0
    ).history
    scale = float(model.optimizer.dynamic_scale)
    assert scale >= 2.0**13, f"the loss scale collapsed to {scale}"
    steps = int(model.optimizer.iterations)
    assert steps >= 118, f"{120 - steps} of 120 steps were skipped"
    assert np.mean(logs["loss"][-3:]) < 0.9 * logs["loss"][0]


def test_float64_is_measured_in_float64():
    keras.config.set_dtype_policy("float64")
    model = _compile(FisherModel(_network(), 0.1, trace_every=1))
    _fit(model, epochs=1)
    assert model.measurements.trace_by_variable.dtype == np.float64
    assert model.state.fisher_trace.dtype == "float64"


# Wrapped models of all kinds.


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = keras.layers.Dense(8, activation="tanh")
        self.drop = keras.layers.Dropout(0.3, seed=5)
        self.out = keras.layers.Dense(3)

    def call(self, x, training=None):
        return self.out(self.drop(self.hidden(x), training=training))


class WithoutTrainingArgument(keras.Model):
    def __init__(self):
        super().__init__()
        self.out = keras.layers.Dense(3)

    def call(self, x):
        return self.out(x)


@pytest.mark.parametrize(
    "make", [Subclassed, WithoutTrainingArgument, lambda: _unbuilt()]
)
@pytest.mark.parametrize("jit", [False, True])
def test_wraps_models_that_are_not_built_yet(make, jit):
    model = FisherModel(make(), FisherPenalty(0.1, every=2), seed=1)
    history = _fit(_compile(model, jit_compile=jit, steps_per_execution=2))
    assert np.all(np.isfinite(history.history["fisher_penalty"]))


def _unbuilt():
    return keras.Sequential([keras.layers.Dense(3)])


@pytest.mark.slow
def test_wraps_models_of_keras_applications():
    network = keras.applications.MobileNet(
        input_shape=(32, 32, 3), weights=None, classes=4, alpha=0.25
    )
    model = FisherModel(network, FisherPenalty(0.01, fraction=0.5))
    loss = keras.losses.SparseCategoricalCrossentropy()
    _compile(model, loss)
    x = _RANDOM.normal(size=(4, 32, 32, 3))
    history = model.fit(x, np.arange(4), batch_size=4, verbose=0).history
    assert history["fisher_penalty"][0] > 0
    assert isinstance(model.likelihood, likelihoods.Categorical)
    assert not model.likelihood.from_logits


def test_wraps_models_with_several_inputs():
    model, x = networks.build("two_inputs", "float32")
    y = np.arange(networks.BATCH) % networks.CLASSES
    for fraction in (1.0, 0.5):
        wrapped = _compile(FisherModel(model, FisherPenalty(fraction=fraction)))
        history = wrapped.fit(x, y, batch_size=3, verbose=0).history
        assert history["fisher_penalty"][0] > 0


def test_frozen_layers_are_no_parameters():
    network = _network(dropout=False)
    network.layers[0].trainable = False
    before = network.layers[0].get_weights()
    penalty = FisherPenalty(0.1, every=2)
    model = _compile(FisherModel(network, penalty, trace_every=1))
    _fit(model)
    _assert_equal(network.layers[0].get_weights(), before)
    assert model.measurements.trace_by_variable.shape == (1, 4)


def test_layers_can_be_frozen_and_unfrozen_between_fits():
    network = _network(dropout=False)
    model = FisherModel(network, FisherPenalty(0.1, every=2), trace_every=1)
    for trainable, variables in ((True, 6), (False, 4), (True, 6)):
        network.layers[0].trainable = trainable
        _fit(_compile(model))
        assert model.measurements.trace_by_variable.shape == (1, variables)


@pytest.mark.parametrize(
    "loss, outputs, activation",
    [
        (keras.losses.BinaryCrossentropy(from_logits=True), 1, None),
        ("binary_crossentropy", 1, "sigmoid"),
        ("mse", 1, None),
        ("sparse_categorical_crossentropy", 3, "softmax"),
    ],
)
def test_likelihood_is_inferred_from_the_loss(loss, outputs, activation):
    network = _network(outputs, activation=activation)
    model = _compile(FisherModel(network, 0.1), loss)
    y = _Y if outputs == 3 else (_Y > 0).astype("float32")[:, None]
    logs = model.fit(_X, y, batch_size=8, verbose=0).history
    assert logs["fisher_penalty"][0] > 0
    expected = likelihoods.get(loss)
    assert repr(model.likelihood) == repr(expected)


def test_a_given_likelihood_frees_the_loss():
    model = FisherModel(_network(), 0.1, likelihood="categorical")
    _compile(model, lambda y, z: keras.ops.mean(z**2, axis=-1))
    assert _fit(model).history["fisher_penalty"][0] > 0


def test_auxiliary_losses_and_weights_are_no_part_of_the_penalty():
    def penalties(**kwargs):
        network = _network(dropout=False)
        network.layers[0].kernel_regularizer = keras.regularizers.L2(
            kwargs.pop("decay", 0.0)
        )
        model = FisherModel(network, 0.1, seed=3)
        _compile(model, optimizer=keras.optimizers.SGD(0.0))
        return _fit(model, **kwargs).history["fisher_penalty"]

    expected = penalties()
    weights = np.linspace(0, 9, 50)
    for options in (
        dict(decay=0.1),
        dict(sample_weight=weights),
        dict(class_weight={0: 9.0, 1: 0.1, 2: 0.0}),
    ):
        np.testing.assert_array_equal(penalties(**options), expected)


# Saving and resuming.

_SAVED_PENALTIES = [
    FisherPenalty(0.3, fraction=0.5, micro_batch_size=2, start=3),
    GradientPenalty(0.3, every=3),
    *cases.slow(
        [
            None,
            FisherPenalty(0.3),
            FisherPenalty(0.3, every=10),
            FisherPenalty(0.3, method="finite_difference", exclude=["bias"]),
            UniformLabelPenalty(0.3),
            InputGradientPenalty(0.3),
        ]
    ),
]


@pytest.mark.parametrize("penalty", _SAVED_PENALTIES, ids=str)
def test_two_and_two_epochs_through_a_file_equal_four(penalty, tmp_path):
    def fresh():
        keras.utils.clear_session()
        return _compile(FisherModel(_network(), penalty, seed=2))

    whole = fresh()
    expected = _fit(whole, epochs=4).history
    half = fresh()
    first = _fit(half, epochs=2).history
    path = tmp_path / "model.keras"
    half.save(path)
    loaded = keras.models.load_model(path)
    assert repr(loaded.penalty) == repr(penalty)
    assert int(loaded.optimizer.iterations) == 14
    second = _fit(loaded, epochs=2).history
    for name in expected:
        np.testing.assert_array_equal(
            first[name] + second[name], expected[name], err_msg=name
        )
    _assert_equal(loaded.get_weights(), whole.get_weights())


@pytest.mark.parametrize(
    "likelihood",
    [
        likelihoods.Categorical(from_logits=True),
        likelihoods.Bernoulli(from_logits=True),
        likelihoods.Gaussian(2.0),
        "auto",
    ],
    ids=str,
)
def test_likelihoods_survive_a_file(likelihood, tmp_path):
    model = FisherModel(_network(), 0.1, likelihood=likelihood)
    _compile(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert repr(loaded.likelihood) == repr(model.likelihood)
    assert isinstance(loaded.likelihood, likelihoods.Likelihood)
    assert loaded.jit_compile == model.jit_compile
    assert loaded.trace_every == 10


def test_subclassed_models_survive_a_file(tmp_path):
    model = _compile(FisherModel(Subclassed(), 0.1, seed=2))
    _fit(model, epochs=1)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(
        tmp_path / "model.keras", custom_objects={"Subclassed": Subclassed}
    )
    np.testing.assert_array_equal(
        loaded.predict(_X, verbose=0), model.predict(_X, verbose=0)
    )
    _fit(loaded, epochs=1)


def test_weights_resume_in_a_new_model(tmp_path):
    penalty = FisherPenalty(0.3, every=10)
    whole = _compile(FisherModel(_network(), penalty, seed=2))
    expected = _fit(whole, epochs=2).history
    half = _compile(FisherModel(_network(), penalty, seed=2))
    _fit(half, epochs=1)
    half.save_weights(tmp_path / "half.weights.h5")
    again = _compile(FisherModel(_network(), penalty, seed=7))
    again.optimizer.build(again.trainable_variables)
    again.load_weights(tmp_path / "half.weights.h5")
    second = _fit(again, epochs=1).history
    assert second["loss"] == expected["loss"][1:]
    _assert_equal(_weights(again.model), _weights(whole.model))


def test_weights_load_into_a_model_with_another_penalty(tmp_path):
    plain = _compile(FisherModel(_network(), None))
    _fit(plain)
    plain.save_weights(tmp_path / "plain.weights.h5")
    other = _compile(FisherModel(_network(), FisherPenalty(0.1, every=10)))
    other.load_weights(tmp_path / "plain.weights.h5")
    _assert_equal(_weights(other.model), _weights(plain.model))
    _fit(other)


def test_backup_and_restore_resumes(tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    penalty = FisherPenalty(0.3, every=10)
    whole = _compile(FisherModel(_network(), penalty, seed=2))
    _fit(whole, epochs=4)

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    killed = _compile(FisherModel(_network(), penalty, seed=2))
    with pytest.raises(KeyboardInterrupt):
        _fit(killed, epochs=4, callbacks=[backup(), Interrupt()])
    again = _compile(FisherModel(_network(), penalty, seed=99))
    history = _fit(again, epochs=4, callbacks=[backup()])
    assert len(history.history["loss"]) == 2
    _assert_equal(again.get_weights(), whole.get_weights())


# Noise flags.


def _noisy(batch_size, weights=False):
    data = (_X, _Y) + ((np.linspace(0, 2, 50),) if weights else ())
    data = tf.data.Dataset.from_tensor_slices(data)
    data = add_label_noise(data, 0.5, 3, seed=1)
    return data.batch(batch_size)


@pytest.mark.parametrize("batch_size", [7, *cases.slow([1, 50])])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(
    "options", [dict(trace_every=None), dict(penalty=0.1)], ids=["plain", "fp"]
)
def test_noisy_and_clean_accuracy_equal_those_of_predict(
    batch_size, weights, options
):
    network = _network(dropout=False, batch_norm=False)
    model = FisherModel(network, **options)
    _compile(model, optimizer=keras.optimizers.SGD(0.0))
    data = _noisy(batch_size, weights)
    logs = model.fit(data, epochs=2, verbose=0, validation_data=data).history
    evaluated = model.evaluate(data, return_dict=True, verbose=0)

    targets = next(iter(_noisy(50)))[1]
    predicted = model.predict(_X, verbose=0).argmax(axis=1)
    noisy = targets["is_noisy"].numpy()
    given, true = targets["label"].numpy(), targets["true_label"].numpy()
    assert 0 < noisy.sum() < 50
    expected = {
        "clean_accuracy": np.mean((predicted == given)[~noisy]),
        "noisy_accuracy": np.mean((predicted == given)[noisy]),
        "recovered_accuracy": np.mean((predicted == true)[noisy]),
    }
    for name, value in expected.items():
        for epoch in (0, 1):
            for found in (
                logs[name][epoch],
                logs[f"val_{name}"][epoch],
                evaluated[name],
            ):
                np.testing.assert_allclose(found, value, rtol=1e-6)
    np.testing.assert_allclose(
        logs["accuracy"], np.mean(predicted == given), rtol=1e-6
    )


def test_noise_flags_as_arrays_with_weights_and_a_split():
    targets = {k: v.numpy() for k, v in next(iter(_noisy(50)))[1].items()}
    model = _compile(FisherModel(_network(), 0.1))
    logs = model.fit(
        _X,
        targets,
        sample_weight=np.linspace(0, 2, 50),
        validation_split=0.2,
        batch_size=8,
        verbose=0,
    ).history
    assert {"noisy_accuracy", "val_noisy_accuracy"} <= set(logs)


def test_plain_targets_have_no_noise_in_their_logs():
    model = _compile(FisherModel(_network()))
    model.fit(_noisy(8), verbose=0)
    assert "noisy_accuracy" not in _fit(model, epochs=1).history
    assert "noisy_accuracy" not in model.evaluate(
        _X, _Y, return_dict=True, verbose=0
    )


# Bad input.


@pytest.mark.parametrize("every", [0, -1, 2.5, True])
def test_bad_trace_every_is_refused(every):
    with pytest.raises(ValueError, match="trace_every"):
        FisherModel(_network(), trace_every=every)


def test_only_models_are_wrapped():
    with pytest.raises(ValueError, match=r"keras\.Model.*Dense"):
        FisherModel(keras.layers.Dense(3))


def test_models_with_their_own_step_are_refused():
    class Own(Subclassed):
        def train_step(self, data):
            return {}

    with pytest.raises(ValueError, match="train_step"):
        FisherModel(Own())


def test_unknown_losses_are_refused_by_compile():
    model = FisherModel(_network(), 0.1)
    with pytest.raises(ValueError, match="hinge"):
        _compile(model, "hinge")
    with pytest.raises(ValueError, match="No likelihood"):
        _compile(model, None)
    _compile(FisherModel(_network(), trace_every=None), "hinge")


@pytest.mark.parametrize("label", [-1, 3])
@pytest.mark.parametrize("jit", [False, True])
def test_labels_out_of_range_are_refused_before_a_step(label, jit):
    model = _compile(FisherModel(_network(), "gradient"), jit_compile=jit)
    y = np.append(_Y[:-1], label)
    before = _weights(model.model)
    for targets in (y, {"label": y, "is_noisy": y > 0}):
        with pytest.raises(ValueError, match=rf"0 to 2.*{label}"):
            model.fit(_X, targets, verbose=0)
    _assert_equal(_weights(model.model), before)


def test_frozen_models_are_refused_by_compile():
    network = _network()
    network.trainable = False
    with pytest.raises(ValueError, match=r"No variable.*trainable=False"):
        _compile(FisherModel(network, 0.1))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_outputs_that_are_no_probabilities_are_refused_before_a_step(
    jit, eager
):
    network = _network()
    before = _weights(network)
    model = _compile(
        FisherModel(network, 0.1),
        "sparse_categorical_crossentropy",
        jit_compile=jit and not eager,
        run_eagerly=eager,
    )
    with pytest.raises(ValueError, match="from_logits=True"):
        _fit(model)
    _assert_equal(_weights(network), before)


def test_layers_without_second_derivative_point_to_finite_differences():
    def model(method):
        network = keras.Sequential(
            [
                keras.Input((4, 4, 1)),
                keras.layers.Conv2D(3, 2),
                keras.layers.UpSampling2D(2, interpolation="bicubic"),
                keras.layers.Flatten(),
                keras.layers.Dense(3),
            ]
        )
        return _compile(FisherModel(network, FisherPenalty(0.1, method=method)))

    x = _RANDOM.normal(size=(8, 4, 4, 1))
    with pytest.raises(ValueError, match=r"finite_difference.*ResizeBicubic"):
        model("exact").fit(x, _Y[:8], verbose=0)
    history = model("finite_difference").fit(x, _Y[:8], verbose=0).history
    assert history["fisher_penalty"][0] > 0


def test_variables_without_gradient_are_refused():
    class Careless(Subclassed):
        def __init__(self):
            super().__init__()
            self.unused = keras.layers.Dense(3, name="unused")

        def call(self, x, training=None):
            self.unused(x)
            return super().call(x, training=training)

    with pytest.raises(ValueError, match=r"no gradient.*unused"):
        _fit(_compile(FisherModel(Careless(), 0.1)))


def test_public_names():
    for name in (
        "FisherModel",
        "FisherPenalty",
        "GradientPenalty",
        "UniformLabelPenalty",
        "InputGradientPenalty",
    ):
        assert getattr(keras_fisher, name).__doc__


@pytest.mark.parametrize("steps_per_execution", [1, 4])
def test_a_step_that_accumulates_gradients_is_measured_once(
    steps_per_execution,
):
    seen = []

    class Steps(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.extend(self.model.measurements.step.tolist())

    model = FisherModel(_network(), 0.1, trace_every=1)
    _compile(
        model,
        optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
        steps_per_execution=steps_per_execution,
    )
    _fit(model, epochs=1, callbacks=[Steps()])
    assert seen == [0, 1, 2, 3]  # of seven batches


@pytest.mark.parametrize("mode", ["graph", "xla", "eager"])
@pytest.mark.parametrize("steps", [1, 2])
def test_no_step_is_counted_where_data_of_unknown_length_end(mode, steps):
    """Else the steps at which a penalty is fresh might never come."""
    x, y = tf.random.normal([12, 4]), tf.zeros([12], tf.int32)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    data = data.filter(lambda x, y: True)
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model = FisherModel(network, FisherPenalty(0.1, every=4, start=3))
    model.compile(
        "adam",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        run_eagerly=mode == "eager",
        jit_compile=mode == "xla",
        steps_per_execution=steps,
    )
    logs = model.fit(data, epochs=3, verbose=0).history
    assert int(model.optimizer.iterations) == 9
    first, second, third = logs["fisher_penalty"]
    assert first == 0 and second > 0 and third not in (0, second)
