"""Tests of `keras_fisher.datasets.add_label_noise`."""

import numpy as np
import pytest
import tensorflow as tf

from keras_fisher.datasets import add_label_noise
from keras_fisher.datasets import load

_RATE = 0.4
_CLASSES = 10


@pytest.fixture(scope="module")
def signals(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("data")
    examples = load("mnist1d", "train", data_dir=data_dir).batch(4000)
    # From memory, since the tests read them over and over.
    return tf.data.Dataset.from_tensor_slices(examples.get_single_element())


def _small(count=200, classes=_CLASSES):
    """Returns a data set whose example number i is ([i, -i], i % classes)."""
    index = np.arange(count, dtype=np.float32)
    x = np.stack([index, -index], axis=1)
    return tf.data.Dataset.from_tensor_slices((x, np.arange(count) % classes))


def _columns(dataset, batched=False):
    """Returns labels, noise flags and true labels as arrays."""
    join = np.concatenate if batched else np.stack
    targets = [target for _, target, *_ in dataset.as_numpy_iterator()]
    return tuple(
        join([target[key] for target in targets])
        for key in ("label", "is_noisy", "true_label")
    )


def _fates(dataset):
    """Returns the label and mask of each example by its content."""
    return {
        (x.tobytes(), int(target["true_label"])): (
            int(target["label"]),
            bool(target["is_noisy"]),
        )
        for x, target, *_ in dataset.as_numpy_iterator()
    }


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_noisy_share_is_as_stated(signals, rate, seed):
    noisy = add_label_noise(signals, rate, _CLASSES, seed)
    _, is_noisy, _ = _columns(noisy.batch(4000), batched=True)
    expected = rate * (1 - 1 / _CLASSES)
    error = np.sqrt(expected * (1 - expected) / len(is_noisy))
    share = is_noisy.mean()
    assert abs(share - expected) < 3 * error, (
        f"{share:.4f} of {len(is_noisy)} noisy, expected {expected:.4f} "
        f"with standard error {error:.4f}"
    )


@pytest.mark.parametrize("rate", [0, 0.0])
def test_rate_zero_changes_nothing(signals, rate):
    noisy = add_label_noise(signals, rate, _CLASSES)
    label, is_noisy, true = _columns(noisy.batch(4000), batched=True)
    np.testing.assert_array_equal(label, true)
    assert not is_noisy.any(), f"{is_noisy.sum()} noisy"


def test_rate_one_draws_every_class_equally_often_for_every_class(signals):
    noisy = add_label_noise(signals, 1, _CLASSES)
    label, _, true = _columns(noisy.batch(4000), batched=True)
    counts = np.zeros((_CLASSES, _CLASSES))
    np.add.at(counts, (true, label), 1)
    expected = counts.sum(axis=1, keepdims=True) / _CLASSES
    statistic = ((counts - expected) ** 2 / expected).sum()
    # Chi-squared with 90 degrees of freedom exceeds 137.2 once in a thousand.
    assert statistic < 137.2, f"chi-squared {statistic:.1f}"


def test_drawn_label_is_independent_of_the_decision_to_redraw(signals):
    noisy = add_label_noise(signals, _RATE, _CLASSES)
    label, is_noisy, true = _columns(noisy.batch(4000), batched=True)
    offset = (label - true)[is_noisy] % _CLASSES
    counts = np.bincount(offset, minlength=_CLASSES)[1:]
    expected = counts.mean()
    statistic = ((counts - expected) ** 2 / expected).sum()
    # Chi-squared with 8 degrees of freedom exceeds 26.1 once in a thousand.
    assert statistic < 26.1, f"chi-squared {statistic:.1f} from {counts}"


def test_mask_marks_exactly_the_labels_that_changed(signals):
    noisy = add_label_noise(signals, _RATE, _CLASSES)
    label, is_noisy, true = _columns(noisy.batch(4000), batched=True)
    np.testing.assert_array_equal(is_noisy, label != true)
    assert 0 < is_noisy.sum() < len(is_noisy)
    assert (label.min(), label.max()) == (0, _CLASSES - 1)


def _add(dataset):
    return add_label_noise(dataset, _RATE, _CLASSES)


@pytest.mark.parametrize(
    "pipeline",
    [
        lambda data: _add(data).shuffle(4000),
        lambda data: _add(data.shuffle(4000)),
        lambda data: _add(data.batch(128)).unbatch(),
        lambda data: _add(data.batch(77)).unbatch(),
        lambda data: _add(data.shuffle(4000).batch(128)).unbatch(),
        lambda data: _add(data.repeat(2)),
        lambda data: _add(data.cache().prefetch(2)),
        lambda data: _add(data.shard(2, 1)).concatenate(_add(data.shard(2, 0))),
        lambda data: data.interleave(
            lambda *pair: _add(tf.data.Dataset.from_tensors(pair)),
            cycle_length=4,
            num_parallel_calls=2,
            deterministic=False,
        ),
    ],
    ids=[
        "shuffled after",
        "shuffled before",
        "batched, last batch partial",
        "batched by 77",
        "shuffled and batched",
        "repeated",
        "cached",
        "sharded",
        "interleaved",
    ],
)
def test_example_meets_the_same_fate_in_every_pipeline(signals, pipeline):
    data = signals.take(1000)
    expected = _fates(_add(data))
    fates = _fates(pipeline(data))
    assert len(expected) == 1000
    assert fates.keys() == expected.keys()
    different = sum(fates[key] != expected[key] for key in expected)
    assert different == 0, f"{different} of {len(expected)} differ"


def test_fates_are_the_same_in_every_process_and_version():
    label, is_noisy, _ = _columns(add_label_noise(_small(20), 0.5, _CLASSES))
    assert label.tolist() == [
        *(2, 1, 6, 2, 4, 5, 6, 7, 8, 6),
        *(0, 1, 8, 0, 6, 5, 3, 7, 8, 5),
    ]
    assert np.flatnonzero(is_noisy).tolist() == [
        *(0, 2, 3, 9),
        *(12, 13, 14, 16, 19),
    ]


def test_elements_keep_their_order():
    noisy = _add(_small())
    index = [int(x[0]) for x, _ in noisy]
    assert index == list(range(200))


def test_larger_rate_keeps_the_noise_of_a_smaller_one(signals):
    some, more = (
        _columns(add_label_noise(signals, rate, _CLASSES).batch(4000), True)
        for rate in (0.2, 0.6)
    )
    was_noisy = some[1]
    np.testing.assert_array_equal(some[0][was_noisy], more[0][was_noisy])
    assert more[1].sum() > was_noisy.sum() > 0


@pytest.mark.parametrize("seed", [1, -1, 2**63, -(2**200), np.int64(7)])
def test_another_seed_draws_independently(signals, seed):
    first, second = (
        _columns(add_label_noise(signals, 0.5, _CLASSES, s).batch(4000), True)
        for s in (0, seed)
    )
    both = (first[1] & second[1]).mean()
    expected = 0.45**2
    error = np.sqrt(expected * (1 - expected) / len(first[1]))
    assert abs(both - expected) < 3 * error, (
        f"{both:.4f} noisy under both seeds, expected {expected:.4f} "
        f"with standard error {error:.4f}"
    )


@pytest.mark.parametrize(
    "dtype", ["uint8", "int32", "int64", "float16", "float32", "float64"]
)
@pytest.mark.parametrize("batch_size", [None, 64])
def test_integer_and_one_hot_labels_meet_the_same_fate(dtype, batch_size):
    one_hot = tf.as_dtype(dtype).is_floating

    def written(x, y):
        if one_hot:
            return x, tf.one_hot(y, _CLASSES, dtype=dtype)
        return x, tf.cast(y, dtype)

    expected, is_noisy, _ = _columns(_add(_small()))
    dataset = _small().map(written)
    if batch_size:
        dataset = dataset.batch(batch_size)
    noisy = _add(dataset)
    label, mask, true = _columns(noisy, batched=batch_size is not None)
    assert label.dtype == true.dtype == dtype
    assert label.shape == true.shape
    if one_hot:
        np.testing.assert_array_equal(label.sum(axis=-1), 1)
        label = label.argmax(axis=-1)
    np.testing.assert_array_equal(label, expected)
    np.testing.assert_array_equal(mask, is_noisy)


@pytest.mark.parametrize(
    ("batch", "label_shape"),
    [
        (lambda data: data, []),
        (lambda data: data.batch(64), [None]),
        (lambda data: data.batch(64, drop_remainder=True), [64]),
    ],
)
@pytest.mark.parametrize("column", [False, True])
def test_static_shapes_are_kept(batch, label_shape, column):
    dataset = _small()
    if column:
        dataset = dataset.map(lambda x, y: (x, y[tf.newaxis]))
    dataset = batch(dataset)
    x, target = _add(dataset).element_spec
    assert (x, target["true_label"]) == dataset.element_spec
    assert target["label"] == dataset.element_spec[1]
    assert target["is_noisy"] == tf.TensorSpec(label_shape, tf.bool)


@pytest.mark.parametrize("batch_size", [None, 64])
def test_label_columns_meet_the_same_fate(batch_size):
    expected, is_noisy, _ = _columns(_add(_small()))
    dataset = _small().map(lambda x, y: (x, y[tf.newaxis]))
    if batch_size:
        dataset = dataset.batch(batch_size)
    label, mask, _ = _columns(_add(dataset), batch_size is not None)
    assert label.shape == (200, 1)
    np.testing.assert_array_equal(label[:, 0], expected)
    np.testing.assert_array_equal(mask, is_noisy)


@pytest.mark.parametrize("batch_size", [None, 64])
def test_sample_weight_passes_through_and_decides_nothing(batch_size):
    dataset = _small()
    if batch_size:
        dataset = dataset.batch(batch_size)
    expected = _columns(_add(dataset), batch_size is not None)
    weighted = dataset.map(lambda x, y: (x, y, 0.5 * x[..., 0]))
    noisy = _add(weighted)
    for actual, wanted in zip(
        _columns(noisy, batch_size is not None), expected, strict=True
    ):
        np.testing.assert_array_equal(actual, wanted)
    for x, _, weight in noisy:
        np.testing.assert_array_equal(weight, 0.5 * x[..., 0])


@pytest.mark.parametrize(
    "nest",
    [
        lambda x: {"b": x, "a": tf.constant([1.0])},
        lambda x: (tf.constant(3), {"c": [x, x]}),
        lambda x: tf.strings.as_string(x),
        lambda x: {"text": tf.strings.reduce_join(tf.strings.as_string(x))},
        lambda x: tf.cast(x, tf.float16),
    ],
    ids=["dict", "nested", "strings", "one string", "half precision"],
)
def test_nested_inputs_of_any_type_decide_alike_in_and_out_of_batches(nest):
    dataset = _small().map(lambda x, y: (nest(x), y))
    single = _columns(_add(dataset))
    batched = _columns(_add(dataset.batch(64)), batched=True)
    for actual, expected in zip(batched, single, strict=True):
        np.testing.assert_array_equal(actual, expected)
    share = single[1].mean()
    assert 0.2 < share < 0.5, f"{share} noisy: the inputs decide nothing"


def test_ragged_inputs_decide_alike_in_and_out_of_batches():
    dataset = _small().map(
        lambda x, y: (tf.range(1 + tf.cast(x[0], tf.int32) % 5), y)
    )
    single = _columns(_add(dataset))
    batched = _columns(_add(dataset.ragged_batch(64)), batched=True)
    for actual, expected in zip(batched, single, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_every_part_of_an_input_decides():
    dataset = _small()
    plain, changed_x, moved = (
        _columns(_add(dataset.map(change)))[1]
        for change in (
            lambda x, y: ((tf.constant("ab"), tf.constant("c"), x), y),
            lambda x, y: ((tf.constant("ab"), tf.constant("c"), x + 1), y),
            lambda x, y: ((tf.constant("a"), tf.constant("bc"), x), y),
        )
    )
    assert (plain != changed_x).any(), "the last leaf does not count"
    assert (plain != moved).any(), "the bounds between leaves do not count"


def test_label_is_part_of_the_content():
    dataset = _small()
    first, second = (
        _columns(_add(dataset.map(lambda x, y, k=k: (x, (y + k) % 10))))[1]
        for k in (0, 1)
    )
    assert (first != second).any(), "y does not count"


@pytest.mark.parametrize(
    "rate", [-0.1, 1.1, float("nan"), float("inf"), "0.4", None, True]
)
def test_rate_outside_zero_to_one_is_an_error(rate):
    with pytest.raises(ValueError, match="`rate` must be") as error:
        add_label_noise(_small(), rate, _CLASSES)
    assert f"rate={rate!r}" in str(error.value)


@pytest.mark.parametrize("num_classes", [1, 0, -3, 10.0, None])
def test_fewer_than_two_classes_are_an_error(num_classes):
    with pytest.raises(ValueError, match="`num_classes` must be") as error:
        add_label_noise(_small(), _RATE, num_classes)
    assert f"num_classes={num_classes!r}" in str(error.value)


@pytest.mark.parametrize("seed", [0.5, None, "0"])
def test_seed_that_is_not_an_integer_is_an_error(seed):
    with pytest.raises(ValueError, match="`seed` must be") as error:
        add_label_noise(_small(), _RATE, _CLASSES, seed)
    assert f"seed={seed!r}" in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: x,
        lambda x, y: {"x": x, "y": y},
        lambda x, y: (x, y, y, y),
        lambda x, y: (x,),
    ],
)
def test_elements_that_are_not_pairs_are_an_error(change):
    with pytest.raises(ValueError, match=r"must be tuples \(x, y\).*Received"):
        _add(_small().map(change))


def test_arrays_are_an_error_that_says_how_to_make_a_data_set():
    with pytest.raises(ValueError, match=r"tuple.*from_tensor_slices"):
        _add((np.zeros((3, 2)), np.zeros(3, int)))


@pytest.mark.parametrize(
    "label",
    [
        lambda y: tf.cast(y, tf.float32),
        lambda y: tf.one_hot(y, _CLASSES - 1),
        lambda y: tf.one_hot(y, _CLASSES, dtype=tf.int32),
        lambda y: tf.strings.as_string(y),
        lambda y: y > 4,
        lambda y: tf.reshape(y, [1, 1, 1]),
        lambda y: tf.stack([y, y]),
    ],
    ids=["real", "9 of 10", "int one-hot", "text", "bool", "rank 3", "two"],
)
@pytest.mark.parametrize("batch_size", [None, 50])
def test_labels_of_another_kind_are_an_error(label, batch_size):
    dataset = _small().map(lambda x, y: (x[tf.newaxis], label(y)))
    if batch_size:
        dataset = dataset.batch(batch_size, drop_remainder=True)
    with pytest.raises(ValueError, match=r"Received: y=TensorSpec\(") as error:
        _add(dataset)
    assert "num_classes=10" in str(error.value)


def test_dtype_too_small_for_the_classes_is_an_error():
    dataset = _small().map(lambda x, y: (x, tf.cast(y, tf.uint8)))
    with pytest.raises(ValueError, match="a dtype that holds every class"):
        add_label_noise(dataset, _RATE, 257)
    assert add_label_noise(dataset, _RATE, 256)


def test_structured_labels_are_an_error():
    dataset = _small().map(lambda x, y: (x, {"label": y}))
    with pytest.raises(ValueError, match="one dense tensor of known rank"):
        _add(dataset)


def test_noise_upon_noise_is_an_error():
    with pytest.raises(ValueError, match=r"carry noise already.*Received"):
        _add(_add(_small()))


@pytest.mark.parametrize(
    "view",
    [
        lambda data: data,
        lambda data: data.batch(20),
        lambda data: data.cache().shuffle(100).batch(20).prefetch(1),
        lambda data: data.map(lambda x, y: (x, tf.cast(y, tf.uint8))),
    ],
)
@pytest.mark.parametrize("shift", [-1, 10])
def test_label_out_of_range_is_an_error_at_once_within_easy_reach(view, shift):
    if shift < 0 and view(_small()).element_spec[1].dtype == tf.uint8:
        shift = 255
    dataset = view(_small(classes=1).map(lambda x, y: (x, y + shift)))
    with pytest.raises(ValueError, match=r"must be in \[0, 10\)") as error:
        _add(dataset)
    assert "Received in the first element: " in str(error.value)


@pytest.mark.parametrize("label", [[0.5, 0.5], [0.0, 0.0], [1.0, 1.0]])
def test_floating_point_label_that_is_not_one_hot_is_an_error(label):
    dataset = tf.data.Dataset.from_tensors((np.zeros(3), label))
    with pytest.raises(ValueError, match="must be one-hot"):
        add_label_noise(dataset, _RATE, 2)


@pytest.mark.parametrize("batch_size", [None, 20])
@pytest.mark.parametrize("one_hot", [False, True])
def test_later_bad_label_is_an_error_when_it_is_read(batch_size, one_hot):
    def written(x, y):
        y = tf.where(x[0] < 100, y, 10)
        return x, tf.one_hot(y, _CLASSES) if one_hot else y

    dataset = _small().map(written)
    if batch_size:
        dataset = dataset.batch(batch_size)
    noisy = iter(_add(dataset))
    good = 100 // (batch_size or 1)
    read = [next(noisy) for _ in range(good)]
    with pytest.raises(tf.errors.InvalidArgumentError, match="abels must be"):
        next(noisy)
    assert len(read) == good


@pytest.mark.parametrize(
    "view",
    [
        lambda data: data,
        lambda data: data.cache(),
        lambda data: data.shuffle(200),
        lambda data: data.prefetch(10).batch(1),
    ],
)
def test_check_of_the_first_element_reads_no_more_than_that(view):
    read = []

    def count(x, y):
        tf.numpy_function(read.append, [y], [])
        return x, y

    _add(view(_small().map(count)))
    assert 1 <= len(read) <= 2, f"{len(read)} examples read"


def test_check_of_the_first_element_uses_up_no_generator():
    elements = iter([([0.0], 0), ([1.0], 1), ([2.0], 2)])
    dataset = tf.data.Dataset.from_generator(
        lambda: elements,
        output_signature=(
            tf.TensorSpec([1], tf.float32),
            tf.TensorSpec([], tf.int32),
        ),
    )
    _, _, true = _columns(_add(dataset))
    assert true.tolist() == [0, 1, 2]


def test_check_of_the_first_element_leaves_the_shuffled_order_alone():
    def order(prepare):
        tf.random.set_seed(5)
        dataset = prepare(_small().shuffle(200, seed=3))
        return [[int(x[0]) for x, *_ in dataset] for _ in range(2)]

    assert order(_add) == order(lambda dataset: dataset)


@pytest.mark.parametrize("view", [lambda d: d.take(0), lambda d: d.repeat()])
def test_empty_and_endless_data_sets_are_accepted(view):
    noisy = _add(view(_small(10)))
    count = sum(1 for _ in noisy.take(25))
    assert count == (0 if noisy.cardinality() == 0 else 25)


def test_noise_can_be_added_inside_a_graph():
    @tf.function
    def noisy_labels():
        return _add(_small()).reduce(
            np.int64(0), lambda n, e: n + tf.cast(e[1]["is_noisy"], tf.int64)
        )

    expected = _columns(_add(_small()))[1].sum()
    assert int(noisy_labels()) == expected > 0
