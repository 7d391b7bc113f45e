"""Tests of `keras_fisher.datasets.normalize` and `augment`."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher.datasets import add_label_noise
from keras_fisher.datasets import augment
from keras_fisher.datasets import normalize

_SIDE = 8


def _numbered(count):
    """Returns images whose every pixel is another number from 1 on."""
    pixels = np.arange(1, _SIDE * _SIDE + 1, dtype=np.float32)
    image = pixels.reshape(1, _SIDE, _SIDE, 1)
    return np.repeat(image, count, axis=0)


def _dataset(x):
    return tf.data.Dataset.from_tensor_slices((x, np.arange(len(x))))


def _images(dataset):
    return np.stack([x for x, *_ in dataset.as_numpy_iterator()])


def _expected(image, down, right, flip, padding, mode="constant"):
    """Returns what numpy makes of a shift and of a flip."""
    border = [(padding, padding), (padding, padding), (0, 0)]
    image = np.pad(image, border, mode)
    rows = slice(padding + down, padding + down + _SIDE)
    columns = slice(padding + right, padding + right + _SIDE)
    image = image[rows, columns]
    return image[:, ::-1] if flip else image


def _draws(images, padding, mode="constant"):
    """Returns the shift and the flip behind each of `_numbered`'s images."""
    candidates = {
        _expected(image, down, right, flip, padding, mode).tobytes(): (
            down,
            right,
            flip,
        )
        for image in _numbered(1)
        for down in range(-padding, padding + 1)
        for right in range(-padding, padding + 1)
        for flip in (False, True)
    }
    return np.array([candidates[image.tobytes()] for image in images])


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("cifar10", [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
        ("cifar100", [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
        ("tiny_imagenet", [0.4802, 0.4481, 0.3975], [0.2770, 0.2691, 0.2821]),
    ],
)
@pytest.mark.parametrize("batch_size", [None, 4])
def test_normalize_is_what_numpy_computes(name, mean, std, batch_size):
    x = np.random.default_rng(0).random((6, 5, 4, 3), np.float32)
    dataset = _dataset(x)
    if batch_size:
        dataset = dataset.batch(batch_size)
    normalized = normalize(dataset, name)
    assert normalized.element_spec == dataset.element_spec
    if batch_size:
        normalized = normalized.unbatch()
    expected = (x.astype(np.float64) - mean) / std
    np.testing.assert_allclose(_images(normalized), expected, atol=1e-6)
    assert [int(y) for _, y in normalized] == list(range(6))


def test_statistics_of_the_images_give_mean_0_and_std_1():
    x = np.random.default_rng(0).random((50, 6, 6, 2)) * [1, 0.2] + [0, 0.5]
    statistics = x.mean((0, 1, 2)), x.std((0, 1, 2))
    normalized = _images(normalize(_dataset(x.astype(np.float32)), statistics))
    np.testing.assert_allclose(normalized.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normalized.std((0, 1, 2)), 1, rtol=1e-5)


def test_normalize_keeps_half_precision():
    dataset = _dataset(np.ones((2, 4, 4, 3), np.float16))
    normalized = normalize(dataset, "cifar10")
    assert normalized.element_spec == dataset.element_spec
    assert np.isfinite(_images(normalized)).all()


@pytest.mark.parametrize(
    "statistics",
    [
        ([0.5], [0.2]),
        ([0.5, 0.5, 0.5], [0.2, 0.2]),
        ([0.5, 0.5, 0.5], [0.2, 0, 0.2]),
        ([0.5, 0.5, 0.5], [0.2, float("nan"), 0.2]),
        (0.5, 0.2),
        ([0.5, 0.5, 0.5],),
        None,
    ],
)
def test_statistics_that_do_not_fit_are_an_error(statistics):
    dataset = _dataset(np.ones((2, 4, 4, 3), np.float32))
    with pytest.raises(ValueError, match=r"one number for each channel"):
        normalize(dataset, statistics)


def test_unknown_statistics_are_an_error_that_lists_the_known():
    dataset = _dataset(np.ones((2, 4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="'mnist1d'") as error:
        normalize(dataset, "mnist1d")
    known = "['cifar10', 'cifar100', 'fashion_mnist', 'tiny_imagenet']"
    assert known in str(error.value)


def test_normalize_wants_floating_point_images():
    dataset = _dataset(np.ones((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"uint8.*Load them with"):
        normalize(dataset, "cifar10")


@pytest.mark.parametrize("step", [augment, lambda d: normalize(d, "cifar10")])
@pytest.mark.parametrize(
    "dataset",
    [
        np.ones((2, 4, 4, 3), np.float32),
        tf.data.Dataset.from_tensors(np.ones((4, 4, 3), np.float32)),
        tf.data.Dataset.from_tensors((np.ones((40, 1), np.float32), 0)),
        tf.data.Dataset.from_tensors(({"a": np.ones((4, 4, 3))}, 0)),
    ],
    ids=["array", "no tuple", "signal", "dict"],
)
def test_elements_without_an_image_are_an_error(step, dataset):
    with pytest.raises(ValueError, match=r"(?s)Received: .* with `"):
        step(dataset)


@pytest.mark.parametrize(
    ("batch_size", "mode"), [(None, "constant"), (32, "reflect")]
)
def test_augment_draws_every_shift_and_flips_half(batch_size, mode):
    count, padding = 2000, 2
    dataset = _dataset(_numbered(count))
    if batch_size:
        dataset = dataset.batch(batch_size)
    dataset = augment(dataset, padding=padding, fill_mode=mode)
    if batch_size:
        dataset = dataset.unbatch()
    # Any image that is no shift or flip is a KeyError.
    draws = _draws(_images(dataset), padding, mode)
    # Every place is as likely: 5 x 5 x 2, with five standard deviations.
    _, counts = np.unique(draws, axis=0, return_counts=True)
    mean = count / 50
    assert len(counts) == 50
    error = np.abs(counts - mean).max() / np.sqrt(mean)
    assert error < 5, f"off by {error} standard deviations"
    # The three draws are independent of each other and of the one before.
    correlations = np.corrcoef(np.hstack([draws[1:], draws[:-1]]).T)
    error = np.abs(correlations - np.eye(6)).max()
    assert error < 5 / np.sqrt(count), f"correlations {correlations}"


def test_augment_touches_no_more_than_it_is_told_to():
    x = _numbered(50)
    unchanged = augment(_dataset(x), padding=0, flip=False)
    np.testing.assert_array_equal(_images(unchanged), x)
    shifted = _draws(_images(augment(_dataset(x), padding=1, flip=False)), 1)
    assert not shifted[:, 2].any()
    flipped = _draws(_images(augment(_dataset(x), padding=0)), 0)
    assert 10 < flipped[:, 2].sum() < 40


def test_augment_leaves_labels_weights_and_noise_alone():
    x, y = _numbered(20), np.arange(20) % 4
    weights = np.linspace(0, 1, 20)
    dataset = tf.data.Dataset.from_tensor_slices((x, y, weights))
    dataset = add_label_noise(dataset, 0.5, 4)
    for batched in (dataset, dataset.batch(7)):
        augmented = augment(batched)
        assert augmented.element_spec == batched.element_spec
        assert augmented.cardinality() == batched.cardinality()
        for (_, *expected), (_, *rest) in zip(batched, augmented):
            tf.nest.map_structure(np.testing.assert_array_equal, rest, expected)


@pytest.mark.parametrize("batch_size", [None, 16])
def test_draws_are_new_in_each_epoch_and_the_same_in_each_program(batch_size):
    def epochs(seed):
        dataset = _dataset(_numbered(48))
        if batch_size:
            dataset = dataset.batch(batch_size)
        dataset = augment(dataset, seed=seed)
        return [_images(dataset) for _ in range(3)]

    first, again, other = epochs(1), epochs(1), epochs(2)
    np.testing.assert_array_equal(first, again)
    different = [*first, *other]
    for i, images in enumerate(different):
        for others in different[:i]:
            assert not np.array_equal(images, others)


def test_repeat_draws_anew_before_and_after():
    x = _numbered(10)
    for dataset in (
        augment(_dataset(x)).repeat(2),
        augment(_dataset(x).repeat(2)),
    ):
        first, second = np.split(_images(dataset), 2)
        assert not np.array_equal(first, second)


def test_draws_do_not_depend_on_what_else_runs():
    x = np.random.default_rng(0).random((200, 16, 16, 3), np.float32)
    dataset = _dataset(x).cache().shuffle(200, seed=3)
    one_thread = tf.data.Options()
    one_thread.threading.private_threadpool_size = 1
    one_thread.autotune.enabled = False
    one = _images(augment(dataset).with_options(one_thread))
    dataset = _dataset(x).cache().shuffle(200, seed=3)
    many = _images(augment(dataset).prefetch(tf.data.AUTOTUNE))
    np.testing.assert_array_equal(one, many)


def test_fit_sees_other_images_in_each_epoch():
    seen = []

    class Spy(keras.Model):
        def call(self, x):
            tf.py_function(lambda x: seen.append(x.numpy()), [x], [])
            return tf.reduce_mean(x, axis=(1, 2))

    train = augment(_dataset(_numbered(8))).batch(8)
    model = Spy()
    model.compile("sgd", "mse")
    model.fit(train, epochs=3, shuffle=False, verbose=0)
    assert len(seen) == 3
    assert not np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[1], seen[2])


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_augment_keeps_dtype_and_unknown_sizes(dtype):
    spec = tf.TensorSpec((None, None, 1), dtype)
    sizes = [(5, 6, 1), (7, 4, 1)]
    dataset = tf.data.Dataset.from_generator(
        lambda: ((np.ones(size, dtype), 0) for size in sizes),
        output_signature=(spec, tf.TensorSpec((), tf.int32)),
    )
    augmented = augment(dataset)
    assert augmented.element_spec == dataset.element_spec
    assert [x.shape for x, _ in augmented] == sizes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(padding=-1), "padding=-1"),
        (dict(padding=1.5), r"padding=1\.5"),
        (dict(padding=True), "padding=True"),
        (dict(fill_mode="wrap"), "fill_mode='wrap'"),
        (dict(padding=_SIDE, fill_mode="reflect"), f"padding={_SIDE}"),
        (dict(seed=0.5), r"seed=0\.5"),
        (dict(seed=2**63), f"seed={2**63}"),
    ],
)
def test_argument_out_of_range_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        augment(_dataset(_numbered(2)), **arguments)
