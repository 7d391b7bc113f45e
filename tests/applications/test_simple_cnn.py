"""SimpleCNN."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_fisher.applications import SimpleCNN


def test_signal_network_has_the_parameters_counted_by_hand():
    # Length 40 becomes 20, 10, 5 with stride 2 and "same" padding.
    expected = (
        (5 * 1 * 64 + 64)
        + (3 * 64 * 64 + 64)
        + (3 * 64 * 64 + 64)
        + (5 * 64 * 10 + 10)
    )
    count = SimpleCNN((40, 1), 10).count_params()
    assert count == expected == 28_298, f"{count} parameters"


@pytest.mark.parametrize(
    ("input_shape", "classes", "pooled", "total"),
    [
        ((32, 32, 3), 10, 8 * 8, 591_274),
        ((8, 8, 1), 10, 2 * 2, 99_178),
        ((4, 4, 1), 2, 1 * 1, 73_570),
        ((9, 7, 2), 5, 2 * 1, 82_437),
    ],
)
def test_image_network_has_the_parameters_counted_by_hand(
    input_shape, classes, pooled, total
):
    channels = input_shape[-1]
    expected = (
        (3 * 3 * channels * 32 + 32)
        + (3 * 3 * 32 * 32 + 32)
        + (3 * 3 * 32 * 64 + 64)
        + (3 * 3 * 64 * 64 + 64)
        + (pooled * 64 * 128 + 128)
        + (128 * classes + classes)
    )
    count = SimpleCNN(input_shape, classes).count_params()
    assert count == expected == total, f"{count} parameters"


def test_signal_network_has_three_strided_convolutions():
    convolutions = [
        (layer.kernel_size, layer.strides, layer.filters, layer.padding)
        for layer in SimpleCNN((40, 1), 10).layers
        if isinstance(layer, keras.layers.Conv1D)
    ]
    assert convolutions == [
        ((5,), (2,), 64, "same"),
        ((3,), (2,), 64, "same"),
        ((3,), (2,), 64, "same"),
    ]


def test_image_network_has_the_layers_of_the_paper():
    kinds = [type(layer).__name__ for layer in SimpleCNN((8, 8, 1), 10).layers]
    assert kinds == [
        "InputLayer",
        *("Conv2D", "Conv2D", "MaxPooling2D"),
        *("Conv2D", "Conv2D", "MaxPooling2D"),
        *("Flatten", "Dense", "Dense"),
    ]


@pytest.mark.parametrize("input_shape", [(40, 1), (1, 1), (8, 8, 1), (4, 5, 3)])
def test_outputs_are_logits_that_depend_on_the_input(input_shape):
    keras.utils.set_random_seed(0)
    model = SimpleCNN(input_shape, 7)
    outputs = model.predict(
        np.random.normal(size=(16, *input_shape)), verbose=0
    )
    assert outputs.shape == (16, 7)
    assert outputs.min() < 0, f"smallest output {outputs.min()}"
    spread = outputs.std(axis=0)
    assert (spread > 0).all(), f"spread over inputs {spread}"
    assert model.layers[-1].activation is keras.activations.linear


@pytest.mark.parametrize(
    "input_shape", [[8, 8, 1], tf.TensorShape([8, 8, 1]), np.array([8, 8, 1])]
)
def test_input_shape_may_be_any_sequence_of_integers(input_shape):
    assert SimpleCNN(input_shape, 3).input_shape == (None, 8, 8, 1)


def test_activation_and_name_are_used():
    model = SimpleCNN((8, 8, 1), 3, activation="softmax", name="net")
    outputs = model.predict(np.ones((2, 8, 8, 1)), verbose=0)
    np.testing.assert_allclose(outputs.sum(axis=1), 1.0, rtol=1e-6)
    assert model.name == "net"
    assert SimpleCNN((8, 8, 1), 3).name == "simple_cnn"


@pytest.mark.parametrize("input_shape", [(40, 1), (8, 8, 1)])
def test_saved_model_gives_the_same_outputs(tmp_path, input_shape):
    model = SimpleCNN(input_shape, 10)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = np.random.default_rng(0).normal(size=(4, *input_shape))
    np.testing.assert_array_equal(
        loaded.predict(x, verbose=0), model.predict(x, verbose=0)
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("input_shape", [(40, 1), (8, 8, 1)])
def test_training_fits_a_batch(input_shape):
    keras.utils.set_random_seed(0)
    x = np.random.normal(size=(32, *input_shape))
    y = np.arange(32) % 4
    model = SimpleCNN(input_shape, 4)
    model.compile(
        keras.optimizers.Adam(3e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    losses = model.fit(x, y, epochs=60, verbose=0).history["loss"]
    assert losses[-1] < 0.1 * losses[0], f"{losses[0]} to {losses[-1]}"


def test_channels_come_last_whatever_keras_is_set_to():
    data_format = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    try:
        model = SimpleCNN((16, 8, 1), 10)
    finally:
        keras.config.set_image_data_format(data_format)
    assert model.get_layer("block2_pool").output.shape == (None, 4, 2, 64)


@pytest.mark.parametrize(
    "input_shape",
    [(), (40,), (2, 8, 8, 3), (None, 1), (8, 0, 1), (8.0, 8.0, 1.0), 40, None],
)
def test_input_shape_that_is_neither_signal_nor_image_is_an_error(input_shape):
    with pytest.raises(ValueError, match=r"\(length, channels\)") as error:
        SimpleCNN(input_shape, 10)
    assert f"input_shape={input_shape!r}" in str(error.value)


@pytest.mark.parametrize("input_shape", [(3, 8, 1), (8, 3, 1)])
def test_image_too_small_to_pool_twice_is_an_error(input_shape):
    with pytest.raises(ValueError, match="at least 4 pixels"):
        SimpleCNN(input_shape, 10)


@pytest.mark.parametrize("classes", [0, -1, 2.0, None, "10"])
def test_number_of_classes_that_is_not_positive_is_an_error(classes):
    with pytest.raises(
        ValueError, match="must be an integer of at least 1"
    ) as error:
        SimpleCNN((40, 1), classes)
    assert f"classes={classes!r}" in str(error.value)
