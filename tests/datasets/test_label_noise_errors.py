"""What `add_label_noise` refuses, and when it looks."""

import noisy_data
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher.datasets import add_label_noise


@pytest.mark.parametrize(
    "rate", [-0.1, 1.1, float("nan"), float("inf"), "0.4", None, True]
)
def test_rate_outside_zero_to_one_is_an_error(rate):
    with pytest.raises(ValueError, match="`rate` must be") as error:
        add_label_noise(noisy_data.small(), rate, noisy_data.CLASSES)
    assert f"rate={rate!r}" in str(error.value)


@pytest.mark.parametrize("num_classes", [1, 0, -3, 10.0, None])
def test_fewer_than_two_classes_are_an_error(num_classes):
    with pytest.raises(ValueError, match="`num_classes` must be") as error:
        add_label_noise(noisy_data.small(), noisy_data.RATE, num_classes)
    assert f"num_classes={num_classes!r}" in str(error.value)


@pytest.mark.parametrize("seed", [0.5, None, "0"])
def test_seed_that_is_not_an_integer_is_an_error(seed):
    with pytest.raises(ValueError, match="`seed` must be") as error:
        add_label_noise(
            noisy_data.small(), noisy_data.RATE, noisy_data.CLASSES, seed
        )
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
        noisy_data.add(noisy_data.small().map(change))


def test_arrays_are_an_error_that_says_how_to_make_a_data_set():
    with pytest.raises(ValueError, match=r"tuple.*from_tensor_slices"):
        noisy_data.add((np.zeros((3, 2)), np.zeros(3, int)))


@pytest.mark.parametrize(
    "label",
    [
        lambda y: tf.cast(y, tf.float32),
        lambda y: tf.one_hot(y, noisy_data.CLASSES - 1),
        lambda y: tf.one_hot(y, noisy_data.CLASSES, dtype=tf.int32),
        lambda y: tf.strings.as_string(y),
        lambda y: y > 4,
        lambda y: tf.reshape(y, [1, 1, 1]),
        lambda y: tf.stack([y, y]),
    ],
    ids=["real", "9 of 10", "int one-hot", "text", "bool", "rank 3", "two"],
)
@pytest.mark.parametrize("batch_size", [None, 50])
def test_labels_of_another_kind_are_an_error(label, batch_size):
    dataset = noisy_data.small().map(lambda x, y: (x[tf.newaxis], label(y)))
    if batch_size:
        dataset = dataset.batch(batch_size, drop_remainder=True)
    with pytest.raises(ValueError, match=r"Received: y=TensorSpec\(") as error:
        noisy_data.add(dataset)
    assert "num_classes=10" in str(error.value)


def test_dtype_too_small_for_the_classes_is_an_error():
    dataset = noisy_data.small().map(lambda x, y: (x, tf.cast(y, tf.uint8)))
    with pytest.raises(ValueError, match="a dtype that holds every class"):
        add_label_noise(dataset, noisy_data.RATE, 257)
    assert add_label_noise(dataset, noisy_data.RATE, 256)


def test_structured_labels_are_an_error():
    dataset = noisy_data.small().map(lambda x, y: (x, {"label": y}))
    with pytest.raises(ValueError, match="one dense tensor of known rank"):
        noisy_data.add(dataset)


def test_noise_upon_noise_is_an_error():
    with pytest.raises(ValueError, match=r"carry noise already.*Received"):
        noisy_data.add(noisy_data.add(noisy_data.small()))


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
    if shift < 0 and view(noisy_data.small()).element_spec[1].dtype == tf.uint8:
        shift = 255
    dataset = view(noisy_data.small(classes=1).map(lambda x, y: (x, y + shift)))
    with pytest.raises(ValueError, match=r"must be in \[0, 10\)") as error:
        noisy_data.add(dataset)
    assert "Received in the first element: " in str(error.value)


@pytest.mark.parametrize("label", [[0.5, 0.5], [0.0, 0.0], [1.0, 1.0]])
def test_floating_point_label_that_is_not_one_hot_is_an_error(label):
    dataset = tf.data.Dataset.from_tensors((np.zeros(3), label))
    with pytest.raises(ValueError, match="must be one-hot"):
        add_label_noise(dataset, noisy_data.RATE, 2)


@pytest.mark.parametrize("batch_size", [None, 20])
@pytest.mark.parametrize("one_hot", [False, True])
def test_later_bad_label_is_an_error_when_it_is_read(batch_size, one_hot):
    def written(x, y):
        y = tf.where(x[0] < 100, y, 10)
        return x, tf.one_hot(y, noisy_data.CLASSES) if one_hot else y

    dataset = noisy_data.small().map(written)
    if batch_size:
        dataset = dataset.batch(batch_size)
    noisy = iter(noisy_data.add(dataset))
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

    noisy_data.add(view(noisy_data.small().map(count)))
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
    _, _, true = noisy_data.columns(noisy_data.add(dataset))
    assert true.tolist() == [0, 1, 2]


def test_check_of_the_first_element_leaves_the_shuffled_order_alone():
    def order(prepare):
        tf.random.set_seed(5)
        dataset = prepare(noisy_data.small().shuffle(200, seed=3))
        return [[int(x[0]) for x, *_ in dataset] for _ in range(2)]

    assert order(noisy_data.add) == order(lambda dataset: dataset)


@pytest.mark.parametrize("view", [lambda d: d.take(0), lambda d: d.repeat()])
def test_empty_and_endless_data_sets_are_accepted(view):
    noisy = noisy_data.add(view(noisy_data.small(10)))
    count = sum(1 for _ in noisy.take(25))
    assert count == (0 if noisy.cardinality() == 0 else 25)


def test_noise_can_be_added_inside_a_graph():
    @tf.function
    def noisy_labels():
        return noisy_data.add(noisy_data.small()).reduce(
            np.int64(0), lambda n, e: n + tf.cast(e[1]["is_noisy"], tf.int64)
        )

    expected = noisy_data.columns(noisy_data.add(noisy_data.small()))[1].sum()
    assert int(noisy_labels()) == expected > 0
