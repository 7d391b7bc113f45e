"""Accuracy on clean and noisy examples."""

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher._common import keras_layers
from keras_fisher._training import memorization
from keras_fisher.likelihoods import Bernoulli
from keras_fisher.likelihoods import Categorical

_MODES = ["eager", "graph", "xla"]
_DTYPES = ["float16", "bfloat16", "float32", "float64"]
_CLASSES = 4
# Several batches, the last one partial.
_BATCHES = (8, 8, 3)
_NAMES = ["clean_accuracy", "noisy_accuracy", "recovered_accuracy"]


def _rng(*entropy):
    return np.random.default_rng([2021, *entropy])


def _outputs(parts, *entropy):
    """Returns distinct scores that any dtype holds exactly."""
    scores = np.broadcast_to(np.arange(_CLASSES) - 1.5, (*parts, _CLASSES))
    return _rng(1, *entropy).permuted(scores, axis=-1)


def _targets(parts, mask_shape, *entropy, classes=_CLASSES):
    """Returns labels, a third of which are noisy, as class indices."""
    rng = _rng(2, *entropy)
    true = rng.integers(0, classes, parts)
    is_noisy = rng.random(mask_shape) < 0.4
    return {
        "label": rng.integers(0, classes, parts),
        "is_noisy": is_noisy,
        "true_label": true,
    }


def _accuracies(batches):
    """Returns the accuracies over batches of (correct, noisy, recovered).

    One example and one part after the other, as a person would count.
    """
    right = dict.fromkeys(_NAMES, 0)
    seen = dict.fromkeys(_NAMES, 0)
    for given, is_noisy, recovered in batches:
        for index in np.ndindex(*given.shape):
            noisy = bool(is_noisy[index[: is_noisy.ndim]])
            group = "noisy_accuracy" if noisy else "clean_accuracy"
            seen[group] += 1
            right[group] += bool(given[index])
            if noisy:
                seen["recovered_accuracy"] += 1
                right["recovered_accuracy"] += bool(recovered[index])
    return {
        name: right[name] / seen[name] if seen[name] else 0.0 for name in _NAMES
    }


def _winners(outputs):
    """Returns the class with the highest score, by sorting."""
    return np.argsort(outputs, axis=-1)[..., -1]


def _counted(y, outputs):
    predicted = _winners(outputs)
    return (
        predicted == y["label"],
        y["is_noisy"],
        predicted == y["true_label"],
    )


def _assert_accuracies(actual, expected, names=tuple(_NAMES)):
    assert set(actual) == set(names), set(actual)
    for name in names:
        difference = abs(float(actual[name]) - expected[name])
        assert difference < 1e-6, (
            f"{name} is {float(actual[name])}, expected {expected[name]}"
        )


_ENCODINGS = {
    "sparse": lambda index: index,
    "float": lambda index: index.astype("float32"),
    "uint8": lambda index: index.astype("uint8"),
    "column": lambda index: index[..., None],
    "one_hot": lambda index: np.eye(_CLASSES)[index],
    "soft": lambda index: 0.9 * np.eye(_CLASSES)[index] + 0.1 / _CLASSES,
}


def _encoded(y, encoding):
    encode = _ENCODINGS[encoding]
    return {
        "label": encode(y["label"]),
        "is_noisy": y["is_noisy"],
        "true_label": encode(y["true_label"]),
    }


def _updater(accuracy, likelihood, mode, *examples):
    """Returns `update_state`, compiled for batches of any size."""

    def update(y, outputs):
        return accuracy.update_state(y, outputs, likelihood)

    if mode == "eager":
        return update
    signature = [
        tf.nest.map_structure(
            lambda x: tf.TensorSpec([None, *x.shape[1:]], x.dtype), example
        )
        for example in examples
    ]
    return tf.function(
        update, input_signature=signature, jit_compile=mode == "xla"
    )


def _tensors(y):
    return {key: tf.constant(value) for key, value in y.items()}


# The parts of one example, and the share of them that its mask speaks of.
_LAYOUTS = {
    "batch": ((), ()),
    "tokens": ((3,), (3,)),
    "tokens_by_example": ((3,), ()),
    "pixels": ((2, 2), (2, 2)),
    "pixels_by_row": ((2, 2), (2,)),
    "pixels_by_example": ((2, 2), ()),
}


def _run(batches, likelihood, mode="eager", accuracy=None):
    """Yields the accuracies after each of (y, outputs)."""
    accuracy = accuracy or memorization.MemorizationAccuracy()
    batches = [(_tensors(y), outputs) for y, outputs in batches]
    update = _updater(accuracy, likelihood, mode, *batches[0])
    for y, outputs in batches:
        yield update(y, outputs)


@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("encoding", ["sparse", "column", "one_hot"])
def test_accuracies_are_those_of_counting(encoding, mode, layout):
    parts, mask = _LAYOUTS[layout]
    batches, counted = [], []
    for n, size in enumerate(_BATCHES):
        y = _targets((size, *parts), (size, *mask), n)
        outputs = _outputs((size, *parts), n)
        counted.append(_counted(y, outputs))
        batches.append((_encoded(y, encoding), tf.constant(outputs)))
    running = list(_run(batches, Categorical(), mode))
    for n, accuracies in enumerate(running, start=1):
        _assert_accuracies(accuracies, _accuracies(counted[:n]))
    # All three have something to tell, and none of it by chance the same.
    assert len({float(value) for value in running[-1].values()}) == 3
    assert all(0 < float(value) < 1 for value in running[-1].values())


@pytest.mark.parametrize("encoding", _ENCODINGS)
@pytest.mark.parametrize("dtype", _DTYPES)
def test_neither_labels_nor_outputs_need_a_certain_dtype(dtype, encoding):
    y, outputs = _targets((50,), (50,)), _outputs((50,))
    for is_noisy in (bool, "int32", "float32"):
        target = _encoded(y, encoding)
        target["is_noisy"] = target["is_noisy"].astype(is_noisy)
        (accuracies,) = _run([(target, tf.cast(outputs, dtype))], Categorical())
        assert all(value.dtype == tf.float32 for value in accuracies.values())
        _assert_accuracies(accuracies, _accuracies([_counted(y, outputs)]))


@pytest.mark.parametrize(
    "likelihood", [None, Categorical(), Categorical(False)], ids=str
)
def test_softmax_does_not_change_the_accuracies(likelihood):
    y, outputs = _targets((50,), (50,)), _outputs((50,))
    for scores in (tf.constant(outputs), tf.nn.softmax(outputs)):
        (accuracies,) = _run([(y, scores)], likelihood)
        _assert_accuracies(accuracies, _accuracies([_counted(y, outputs)]))


@pytest.mark.parametrize("layout", ["batch", "tokens", "tokens_by_example"])
@pytest.mark.parametrize("encoding", ["sparse", "one_hot"])
def test_accuracies_are_those_of_weighted_keras_metrics(encoding, layout):
    parts, mask = _LAYOUTS[layout]
    accuracy = memorization.MemorizationAccuracy()
    kind = {
        "sparse": keras.metrics.SparseCategoricalAccuracy,
        "one_hot": keras.metrics.CategoricalAccuracy,
    }[encoding]
    peers = {name: kind() for name in _NAMES}
    for n, size in enumerate(_BATCHES):
        index = _targets((size, *parts), (size, *mask), n)
        y = _encoded(index, encoding)
        outputs = tf.constant(_outputs((size, *parts), n))
        (accuracies,) = _run([(y, outputs)], Categorical(), accuracy=accuracy)
        noisy = y["is_noisy"].reshape(
            y["is_noisy"].shape + (1,) * (len(parts) - len(mask))
        )
        noisy = np.broadcast_to(noisy, (size, *parts))
        for name, label, weight in [
            ("clean_accuracy", "label", ~noisy),
            ("noisy_accuracy", "label", noisy),
            ("recovered_accuracy", "true_label", noisy),
        ]:
            peers[name].update_state(
                y[label], outputs, sample_weight=weight.astype("float32")
            )
        _assert_accuracies(
            accuracies,
            {name: float(peer.result()) for name, peer in peers.items()},
        )


# Exact in any dtype; the boundary itself counts as no, as in Keras.
_PROBABILITIES = np.array([0.0, 0.125, 0.5, 0.625, 0.875, 1.0])


def _binary(size, last, *entropy):
    """Returns targets and probabilities, with an axis for the outputs."""
    y = _targets((size, *last), (size,), *entropy, classes=2)
    p = _rng(3, *entropy).choice(_PROBABILITIES, (size, *last))
    predicted = np.where(p > 0.5, 1, 0)
    counted = (
        predicted == y["label"],
        y["is_noisy"],
        predicted == y["true_label"],
    )
    return y, p, counted


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("last", [(1,), (3,), (2, 1)], ids=str)
@pytest.mark.parametrize("from_logits", [True, False])
def test_binary_accuracies_are_those_of_counting(from_logits, last, mode):
    batches, counted = [], []
    for n, size in enumerate(_BATCHES):
        y, p, count = _binary(size, last, n, 2)
        outputs = 2 * p - 1 if from_logits else p
        batches.append((y, tf.constant(outputs)))
        counted.append(count)
    running = list(_run(batches, Bernoulli(from_logits), mode))
    for n, accuracies in enumerate(running, start=1):
        _assert_accuracies(accuracies, _accuracies(counted[:n]))
    # All three have something to tell, and none of it by chance the same.
    assert len({float(value) for value in running[-1].values()}) == 3


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("from_logits", [True, False])
def test_binary_labels_may_lack_the_last_axis(from_logits, dtype):
    y, p, counted = _binary(50, (1,))
    y = {key: value.reshape(50) for key, value in y.items()}
    outputs = tf.cast(2 * p - 1 if from_logits else p, dtype)
    (accuracies,) = _run([(y, outputs)], Bernoulli(from_logits))
    _assert_accuracies(accuracies, _accuracies([counted]))


@pytest.mark.parametrize("from_logits", [True, False])
def test_binary_accuracies_are_those_of_weighted_keras_metrics(from_logits):
    y, p, _ = _binary(50, (1,))
    outputs = 2 * p - 1 if from_logits else p
    (accuracies,) = _run([(y, tf.constant(outputs))], Bernoulli(from_logits))
    expected = {}
    for name, label, weight in [
        ("clean_accuracy", "label", ~y["is_noisy"]),
        ("noisy_accuracy", "label", y["is_noisy"]),
        ("recovered_accuracy", "true_label", y["is_noisy"]),
    ]:
        peer = keras.metrics.BinaryAccuracy(
            threshold=0.0 if from_logits else 0.5
        )
        peer.update_state(
            y[label], outputs, sample_weight=weight.astype("float32")
        )
        expected[name] = float(peer.result())
    _assert_accuracies(accuracies, expected)


def test_one_output_is_a_probability_unless_said_otherwise():
    # What Keras assumes of `metrics=["accuracy"]`.
    y, p, counted = _binary(50, (1,))
    (accuracies,) = _run([(y, tf.constant(p))], None)
    _assert_accuracies(accuracies, _accuracies([counted]))
    logits = np.array([[0.25], [-0.25]])
    y = {"label": np.array([1, 0]), "is_noisy": np.array([False, False])}
    shares = [
        float(next(_run([(y, tf.constant(logits))], likelihood))[_NAMES[0]])
        for likelihood in (None, Bernoulli(False), Bernoulli(True))
    ]
    assert shares == [0.5, 0.5, 1.0], shares


@pytest.mark.parametrize("encoding", ["column", "one_hot"])
def test_mask_may_be_a_column_as_the_labels_may(encoding):
    y, outputs = _targets((50,), (50,)), _outputs((50,))
    target = _encoded(y, encoding)
    target["is_noisy"] = y["is_noisy"][:, None]
    (accuracies,) = _run([(target, tf.constant(outputs))], Categorical())
    _assert_accuracies(accuracies, _accuracies([_counted(y, outputs)]))


def test_mask_of_binary_labels_may_be_a_column():
    y, p, counted = _binary(50, (1,))
    y["is_noisy"] = y["is_noisy"][:, None]
    (accuracies,) = _run([(y, tf.constant(p))], Bernoulli(False))
    _assert_accuracies(accuracies, _accuracies([counted]))


@pytest.mark.parametrize("mode", _MODES)
def test_without_true_labels_there_is_nothing_to_recover(mode):
    batches, counted = [], []
    for n, size in enumerate(_BATCHES):
        y, outputs = _targets((size,), (size,), n), _outputs((size,), n)
        counted.append(_counted(y, outputs))
        del y["true_label"]
        batches.append((y, tf.constant(outputs)))
    *_, accuracies = _run(batches, Categorical(), mode)
    _assert_accuracies(accuracies, _accuracies(counted), _NAMES[:2])


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("noisy", [False, True])
def test_group_without_an_example_has_accuracy_zero(noisy, mode):
    y, outputs = _targets((20,), (20,)), _outputs((20,))
    y["is_noisy"] = np.full(20, noisy)
    y["label"] = _winners(outputs)
    *_, accuracies = _run([(y, tf.constant(outputs))], Categorical(), mode)
    recovered = np.mean(y["true_label"] == y["label"])
    assert 0 < recovered < 1
    expected = (0, 1, recovered) if noisy else (1, 0, 0)
    _assert_accuracies(accuracies, dict(zip(_NAMES, expected)))


def test_batch_without_a_group_leaves_its_accuracy_as_it_was():
    first, second = _targets((20,), (20,)), _targets((20,), (20,), 9)
    second["is_noisy"] = np.zeros(20, bool)
    outputs = _outputs((20,))
    batches = [(y, tf.constant(outputs)) for y in (first, second)]
    before, after = _run(batches, Categorical())
    for name in _NAMES[1:]:
        assert float(before[name]) == float(after[name]) > 0, name
    counted = [_counted(y, outputs) for y in (first, second)]
    _assert_accuracies(after, _accuracies(counted))


def test_memorized_and_recovered_labels_are_told_apart():
    # Predictions 0, 1, 2, 3, of which the last two are noisy.
    outputs = tf.eye(4)
    y = {
        "label": np.array([0, 0, 2, 0]),
        "is_noisy": np.array([False, False, True, True]),
        "true_label": np.array([0, 0, 1, 3]),
    }
    (accuracies,) = _run([(y, outputs)], Categorical())
    _assert_accuracies(accuracies, dict.fromkeys(_NAMES, 0.5))
    y["true_label"] = np.array([0, 0, 2, 3])
    (accuracies,) = _run([(y, outputs)], Categorical())
    _assert_accuracies(accuracies, dict(zip(_NAMES, (0.5, 0.5, 1.0))))


def test_batches_count_by_their_examples():
    # A mean of the three batches' accuracies would be two thirds.
    batches = []
    for size, right in [(8, True), (8, True), (1, False)]:
        y = _targets((size,), (size,), size)
        y["is_noisy"] = np.zeros(size, bool)
        outputs = _outputs((size,), size)
        y["label"] = (_winners(outputs) + (not right)) % _CLASSES
        batches.append((y, tf.constant(outputs)))
    *_, accuracies = _run(batches, Categorical())
    _assert_accuracies(accuracies, dict(zip(_NAMES, (16 / 17, 0, 0))))


@pytest.mark.parametrize("mode", _MODES)
def test_reset_forgets_all_examples(mode):
    accuracy = memorization.MemorizationAccuracy()
    batches, counted = [], []
    for n in range(2):
        y, outputs = _targets((8,), (8,), n), _outputs((8,), n)
        counted.append(_counted(y, outputs))
        batches.append((_tensors(y), tf.constant(outputs)))
    update = _updater(accuracy, Categorical(), mode, *batches[0])
    update(*batches[0])
    accuracy.reset_state()
    _assert_accuracies(update(*batches[1]), _accuracies(counted[1:]))
    _assert_accuracies(update(*batches[0]), _accuracies(counted))
    assert _accuracies(counted[1:]) != _accuracies(counted)


def test_instances_count_on_their_own():
    y, outputs = _targets((8,), (8,)), _outputs((8,))
    one, other = (memorization.MemorizationAccuracy() for _ in range(2))
    wrong = {**y, "label": (_winners(outputs) + 1) % _CLASSES}
    list(_run([(wrong, tf.constant(outputs))], None, accuracy=one))
    (accuracies,) = _run([(y, tf.constant(outputs))], None, accuracy=other)
    _assert_accuracies(accuracies, _accuracies([_counted(y, outputs)]))


def test_update_leaves_the_targets_as_they_were():
    y, outputs = _targets((8,), (8,)), _outputs((8,))
    tensors = _tensors(y)
    copy = dict(tensors)
    memorization.MemorizationAccuracy().update_state(
        tensors, tf.constant(outputs), Categorical()
    )
    assert tensors.keys() == copy.keys()
    assert all(tensors[key] is copy[key] for key in copy)


@pytest.mark.parametrize("mode", _MODES)
def test_positions_without_label_or_behind_a_mask_do_not_count(mode):
    y = _targets((8, 3), (8, 3))
    y["label"][_rng(5).random((8, 3)) < 0.3] = -1
    y["true_label"][_rng(6).random((8, 3)) < 0.3] = -1
    outputs, mask = _outputs((8, 3)), _rng(7).random((8, 3)) < 0.7
    predicted, noisy = _winners(outputs), y["is_noisy"]
    given = mask & (y["label"] != -1)
    true = mask & (y["true_label"] != -1)
    groups = {
        "clean_accuracy": (predicted == y["label"])[given & ~noisy],
        "noisy_accuracy": (predicted == y["label"])[given & noisy],
        "recovered_accuracy": (predicted == y["true_label"])[true & noisy],
    }
    accuracy = memorization.MemorizationAccuracy()

    def update(y, outputs, mask):
        return accuracy.update_state(
            y,
            keras_layers.with_mask(outputs, mask),
            Categorical(ignore_class=-1),
        )

    found = cases.compiled(update, mode)(
        _tensors(y), tf.constant(outputs), tf.constant(mask)
    )
    expected = {name: group.mean() for name, group in groups.items()}
    _assert_accuracies(found, expected)
