"""Labels are redrawn by the content of an example."""

import noisy_data
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher.datasets import add_label_noise
from keras_fisher.datasets import load


@pytest.fixture(scope="module")
def signals(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("data")
    examples = load("mnist1d", "train", data_dir=data_dir).batch(4000)
    # From memory, since the tests read them over and over.
    return tf.data.Dataset.from_tensor_slices(examples.get_single_element())


def _fates(dataset):
    """Returns the label and mask of each example by its content."""
    return {
        (x.tobytes(), int(target["true_label"])): (
            int(target["label"]),
            bool(target["is_noisy"]),
        )
        for x, target, *_ in dataset.as_numpy_iterator()
    }


@pytest.mark.few(1)
@pytest.mark.parametrize("rate", [0.1, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_noisy_share_is_as_stated(signals, rate, seed):
    noisy = add_label_noise(signals, rate, noisy_data.CLASSES, seed)
    _, is_noisy, _ = noisy_data.columns(noisy.batch(4000), batched=True)
    expected = rate * (1 - 1 / noisy_data.CLASSES)
    error = np.sqrt(expected * (1 - expected) / len(is_noisy))
    share = is_noisy.mean()
    assert abs(share - expected) < 3 * error, (
        f"{share:.4f} of {len(is_noisy)} noisy, expected {expected:.4f} "
        f"with standard error {error:.4f}"
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("rate", [0, 0.0])
def test_rate_zero_changes_nothing(signals, rate):
    noisy = add_label_noise(signals, rate, noisy_data.CLASSES)
    label, is_noisy, true = noisy_data.columns(noisy.batch(4000), batched=True)
    np.testing.assert_array_equal(label, true)
    assert not is_noisy.any(), f"{is_noisy.sum()} noisy"


def test_rates_in_half_precision_are_the_nearest_there(signals):
    half = np.float16(0.4)
    found = [
        [y["label"].numpy() for _, y in add_label_noise(signals, rate, 10)]
        for rate in (half, float(half))
    ]
    np.testing.assert_array_equal(*found)


def test_rate_one_draws_every_class_equally_often_for_every_class(signals):
    noisy = add_label_noise(signals, 1, noisy_data.CLASSES)
    label, _, true = noisy_data.columns(noisy.batch(4000), batched=True)
    counts = np.zeros((noisy_data.CLASSES, noisy_data.CLASSES))
    np.add.at(counts, (true, label), 1)
    expected = counts.sum(axis=1, keepdims=True) / noisy_data.CLASSES
    statistic = ((counts - expected) ** 2 / expected).sum()
    # Chi-squared with 90 degrees of freedom exceeds 137.2 once in a thousand.
    assert statistic < 137.2, f"chi-squared {statistic:.1f}"


def test_drawn_label_is_independent_of_the_decision_to_redraw(signals):
    noisy = add_label_noise(signals, noisy_data.RATE, noisy_data.CLASSES)
    label, is_noisy, true = noisy_data.columns(noisy.batch(4000), batched=True)
    offset = (label - true)[is_noisy] % noisy_data.CLASSES
    counts = np.bincount(offset, minlength=noisy_data.CLASSES)[1:]
    expected = counts.mean()
    statistic = ((counts - expected) ** 2 / expected).sum()
    # Chi-squared with 8 degrees of freedom exceeds 26.1 once in a thousand.
    assert statistic < 26.1, f"chi-squared {statistic:.1f} from {counts}"


def test_mask_marks_exactly_the_labels_that_changed(signals):
    noisy = add_label_noise(signals, noisy_data.RATE, noisy_data.CLASSES)
    label, is_noisy, true = noisy_data.columns(noisy.batch(4000), batched=True)
    np.testing.assert_array_equal(is_noisy, label != true)
    assert 0 < is_noisy.sum() < len(is_noisy)
    assert (label.min(), label.max()) == (0, noisy_data.CLASSES - 1)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "pipeline",
    [
        lambda data: noisy_data.add(data).shuffle(4000),
        lambda data: noisy_data.add(data.shuffle(4000)),
        lambda data: noisy_data.add(data.batch(128)).unbatch(),
        lambda data: noisy_data.add(data.batch(77)).unbatch(),
        lambda data: noisy_data.add(data.shuffle(4000).batch(128)).unbatch(),
        lambda data: noisy_data.add(data.repeat(2)),
        lambda data: noisy_data.add(data.cache().prefetch(2)),
        lambda data: noisy_data.add(data.shard(2, 1)).concatenate(
            noisy_data.add(data.shard(2, 0))
        ),
        lambda data: data.interleave(
            lambda *pair: noisy_data.add(tf.data.Dataset.from_tensors(pair)),
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
    expected = _fates(noisy_data.add(data))
    fates = _fates(pipeline(data))
    assert len(expected) == 1000
    assert fates.keys() == expected.keys()
    different = sum(fates[key] != expected[key] for key in expected)
    assert different == 0, f"{different} of {len(expected)} differ"


def test_fates_are_the_same_in_every_process_and_version():
    label, is_noisy, _ = noisy_data.columns(
        add_label_noise(noisy_data.small(20), 0.5, noisy_data.CLASSES)
    )
    assert label.tolist() == [
        *(2, 1, 6, 2, 4, 5, 6, 7, 8, 6),
        *(0, 1, 8, 0, 6, 5, 3, 7, 8, 5),
    ]
    assert np.flatnonzero(is_noisy).tolist() == [
        *(0, 2, 3, 9),
        *(12, 13, 14, 16, 19),
    ]


def test_elements_keep_their_order():
    noisy = noisy_data.add(noisy_data.small())
    index = [int(x[0]) for x, _ in noisy]
    assert index == list(range(200))


def test_larger_rate_keeps_the_noise_of_a_smaller_one(signals):
    some, more = (
        noisy_data.columns(
            add_label_noise(signals, rate, noisy_data.CLASSES).batch(4000), True
        )
        for rate in (0.2, 0.6)
    )
    was_noisy = some[1]
    np.testing.assert_array_equal(some[0][was_noisy], more[0][was_noisy])
    assert more[1].sum() > was_noisy.sum() > 0


@pytest.mark.few(1)
@pytest.mark.parametrize("seed", [1, -1, 2**63, -(2**200), np.int64(7)])
def test_another_seed_draws_independently(signals, seed):
    first, second = (
        noisy_data.columns(
            add_label_noise(signals, 0.5, noisy_data.CLASSES, s).batch(4000),
            True,
        )
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
            return x, tf.one_hot(y, noisy_data.CLASSES, dtype=dtype)
        return x, tf.cast(y, dtype)

    expected, is_noisy, _ = noisy_data.columns(
        noisy_data.add(noisy_data.small())
    )
    dataset = noisy_data.small().map(written)
    if batch_size:
        dataset = dataset.batch(batch_size)
    noisy = noisy_data.add(dataset)
    label, mask, true = noisy_data.columns(
        noisy, batched=batch_size is not None
    )
    assert label.dtype == true.dtype == dtype
    assert label.shape == true.shape
    if one_hot:
        np.testing.assert_array_equal(label.sum(axis=-1), 1)
        label = label.argmax(axis=-1)
    np.testing.assert_array_equal(label, expected)
    np.testing.assert_array_equal(mask, is_noisy)


@pytest.mark.few(1)
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
    dataset = noisy_data.small()
    if column:
        dataset = dataset.map(lambda x, y: (x, y[tf.newaxis]))
    dataset = batch(dataset)
    x, target = noisy_data.add(dataset).element_spec
    assert (x, target["true_label"]) == dataset.element_spec
    assert target["label"] == dataset.element_spec[1]
    assert target["is_noisy"] == tf.TensorSpec(label_shape, tf.bool)


@pytest.mark.parametrize("batch_size", [None, 64])
def test_label_columns_meet_the_same_fate(batch_size):
    expected, is_noisy, _ = noisy_data.columns(
        noisy_data.add(noisy_data.small())
    )
    dataset = noisy_data.small().map(lambda x, y: (x, y[tf.newaxis]))
    if batch_size:
        dataset = dataset.batch(batch_size)
    label, mask, _ = noisy_data.columns(
        noisy_data.add(dataset), batch_size is not None
    )
    assert label.shape == (200, 1)
    np.testing.assert_array_equal(label[:, 0], expected)
    np.testing.assert_array_equal(mask, is_noisy)


@pytest.mark.parametrize("batch_size", [None, 64])
def test_sample_weight_passes_through_and_decides_nothing(batch_size):
    dataset = noisy_data.small()
    if batch_size:
        dataset = dataset.batch(batch_size)
    expected = noisy_data.columns(
        noisy_data.add(dataset), batch_size is not None
    )
    weighted = dataset.map(lambda x, y: (x, y, 0.5 * x[..., 0]))
    noisy = noisy_data.add(weighted)
    for actual, wanted in zip(
        noisy_data.columns(noisy, batch_size is not None), expected, strict=True
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
    dataset = noisy_data.small().map(lambda x, y: (nest(x), y))
    single = noisy_data.columns(noisy_data.add(dataset))
    batched = noisy_data.columns(
        noisy_data.add(dataset.batch(64)), batched=True
    )
    for actual, expected in zip(batched, single, strict=True):
        np.testing.assert_array_equal(actual, expected)
    share = single[1].mean()
    assert 0.2 < share < 0.5, f"{share} noisy: the inputs decide nothing"


def test_ragged_inputs_decide_alike_in_and_out_of_batches():
    dataset = noisy_data.small().map(
        lambda x, y: (tf.range(1 + tf.cast(x[0], tf.int32) % 5), y)
    )
    single = noisy_data.columns(noisy_data.add(dataset))
    batched = noisy_data.columns(
        noisy_data.add(dataset.ragged_batch(64)), batched=True
    )
    for actual, expected in zip(batched, single, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_every_part_of_an_input_decides():
    dataset = noisy_data.small()
    plain, changed_x, moved = (
        noisy_data.columns(noisy_data.add(dataset.map(change)))[1]
        for change in (
            lambda x, y: ((tf.constant("ab"), tf.constant("c"), x), y),
            lambda x, y: ((tf.constant("ab"), tf.constant("c"), x + 1), y),
            lambda x, y: ((tf.constant("a"), tf.constant("bc"), x), y),
        )
    )
    assert (plain != changed_x).any(), "the last leaf does not count"
    assert (plain != moved).any(), "the bounds between leaves do not count"


def test_label_is_part_of_the_content():
    dataset = noisy_data.small()
    first, second = (
        noisy_data.columns(
            noisy_data.add(dataset.map(lambda x, y, k=k: (x, (y + k) % 10)))
        )[1]
        for k in (0, 1)
    )
    assert (first != second).any(), "y does not count"
