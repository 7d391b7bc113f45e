"""The networks of the experiments."""

import functools
import math

import keras
import numpy as np
import pytest

from keras_fisher import FisherModel
from keras_fisher import fisher_trace
from keras_fisher import likelihoods
from keras_fisher.applications import VGG11
from keras_fisher.applications import DenseNet
from keras_fisher.applications import ResNet
from keras_fisher.applications import WideResNet

_DenseNetBC = functools.partial(DenseNet, bottleneck=True, reduction=0.5)
# The shallowest network of every kind, with the smallest image worth running.
_SMALL = {
    "vgg11": (VGG11, (32, 32, 1)),
    "resnet": (functools.partial(ResNet, depth=8), (8, 8, 1)),
    "wide_resnet": (
        functools.partial(WideResNet, depth=10, widen_factor=2, dropout=0.3),
        (8, 8, 1),
    ),
    "dense_net": (functools.partial(DenseNet, depth=7), (8, 8, 1)),
    "dense_net_bc": (functools.partial(_DenseNetBC, depth=10), (8, 8, 1)),
}
_NORMALIZED = [name for name in _SMALL if name != "vgg11"]
_FUNCTIONS = [VGG11, ResNet, WideResNet, DenseNet]


def _small(name, classes=4):
    network, input_shape = _SMALL[name]
    return network(input_shape, classes)


def _trainable(model):
    return sum(math.prod(weight.shape) for weight in model.trainable_weights)


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("network", "published"),
    [
        (functools.partial(ResNet, depth=20), "0.27"),
        (functools.partial(ResNet, depth=32), "0.46"),
        (functools.partial(ResNet, depth=44), "0.66"),
        (functools.partial(ResNet, depth=56), "0.85"),
        (functools.partial(ResNet, depth=110), "1.7"),
        (functools.partial(WideResNet, depth=40, widen_factor=2), "2.2"),
        (functools.partial(WideResNet, depth=40, widen_factor=4), "8.9"),
        (functools.partial(WideResNet, depth=16, widen_factor=8), "11.0"),
        (functools.partial(WideResNet, depth=28, widen_factor=10), "36.5"),
        (functools.partial(DenseNet, depth=40, growth_rate=12), "1.0"),
        (functools.partial(_DenseNetBC, depth=100, growth_rate=12), "0.8"),
        pytest.param(
            functools.partial(_DenseNetBC, depth=250, growth_rate=24),
            "15.3",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_network_has_as_many_million_parameters_as_published(
    network, published
):
    count = _trainable(network((32, 32, 3), 10))
    decimals = len(published.partition(".")[2])
    assert f"{count / 1e6:.{decimals}f}" == published, f"{count} parameters"


@pytest.mark.parametrize(
    ("input_shape", "classes", "pooled", "total"),
    [
        ((32, 32, 3), 10, 1, 9_225_610),
        ((64, 64, 3), 200, 2 * 2, 9_630_280),
        ((33, 96, 1), 4, 1 * 3, 9_225_476),
    ],
)
def test_vgg_has_the_parameters_counted_by_hand(
    input_shape, classes, pooled, total
):
    channels = input_shape[-1]
    expected = (
        (9 * channels * 64 + 64)
        + (9 * 64 * 128 + 128)
        + (9 * 128 * 256 + 256)
        + (9 * 256 * 256 + 256)
        + (9 * 256 * 512 + 512)
        + 3 * (9 * 512 * 512 + 512)
        + (pooled * 512 * classes + classes)
    )
    count = VGG11(input_shape, classes).count_params()
    assert count == expected == total, f"{count} parameters"


@pytest.mark.parametrize(
    ("depth", "channels", "classes", "total"),
    [(8, 1, 4, 74_612), (20, 3, 10, 269_722), (26, 3, 100, 372_788)],
)
def test_resnet_has_the_parameters_counted_by_hand(
    depth, channels, classes, total
):
    n = (depth - 2) // 6
    # Two parameters of batch normalization a filter.
    expected = (
        (9 * channels * 16 + 2 * 16)
        + 2 * n * (9 * 16 * 16 + 2 * 16)
        + (9 * 16 * 32 + 2 * 32)
        + (2 * n - 1) * (9 * 32 * 32 + 2 * 32)
        + (9 * 32 * 64 + 2 * 64)
        + (2 * n - 1) * (9 * 64 * 64 + 2 * 64)
        + (64 * classes + classes)
    )
    model = ResNet((8, 8, channels), classes, depth=depth)
    count = _trainable(model)
    assert count == expected == total, f"{count} parameters"
    # As many statistics as parameters of batch normalization.
    statistics = 2 * (16 + 2 * n * (16 + 32 + 64))
    assert model.count_params() == expected + statistics


@pytest.mark.parametrize(
    ("depth", "widen_factor", "classes", "total"),
    [(10, 1, 10, 77_850), (10, 2, 4, 302_932), (16, 4, 10, 2_748_890)],
)
def test_wide_resnet_has_the_parameters_counted_by_hand(
    depth, widen_factor, classes, total
):
    n = (depth - 4) // 6
    expected, before = 9 * 3 * 16, 16
    for filters in (16 * widen_factor, 32 * widen_factor, 64 * widen_factor):
        # Batch normalization comes before the convolutions.
        expected += (2 + 9 * filters) * before
        expected += (2 * n - 1) * (2 + 9 * filters) * filters
        if filters != before:
            expected += before * filters
        before = filters
    expected += 2 * before + (before * classes + classes)
    model = WideResNet(
        (8, 8, 3), classes, depth=depth, widen_factor=widen_factor
    )
    count = _trainable(model)
    assert count == expected == total, f"{count} parameters"


@pytest.mark.parametrize(
    ("depth", "growth_rate", "bottleneck", "reduction", "first", "total"),
    [
        (7, 12, False, 1.0, 16, 12_826),
        (13, 5, False, 0.3, 16, 7_890),
        (16, 12, True, 1.0, 16, 52_882),
        (10, 12, True, 0.5, 24, 20_902),
        (16, 7, True, 0.5, 14, 15_690),
    ],
)
def test_dense_net_has_the_parameters_counted_by_hand(
    depth, growth_rate, bottleneck, reduction, first, total
):
    n = (depth - 4) // (6 if bottleneck else 3)
    wide = 4 * growth_rate
    expected, channels = 9 * 3 * first, first
    for block in (1, 2, 3):
        for _ in range(n):
            if bottleneck:
                expected += (2 + wide) * channels
                expected += (2 + 9 * growth_rate) * wide
            else:
                expected += (2 + 9 * growth_rate) * channels
            channels += growth_rate
        if block < 3:
            kept = math.floor(reduction * channels)
            expected += (2 + kept) * channels
            channels = kept
    expected += 2 * channels + (channels * 10 + 10)
    model = DenseNet(
        (8, 8, 3),
        10,
        depth=depth,
        growth_rate=growth_rate,
        bottleneck=bottleneck,
        reduction=reduction,
    )
    count = _trainable(model)
    assert count == expected == total, f"{count} parameters"


def test_transition_keeps_at_least_one_channel():
    model = DenseNet((8, 8, 1), 3, depth=7, growth_rate=1, reduction=0.01)
    assert model.get_layer("transition1_pool").output.shape == (None, 4, 4, 1)


def test_vgg_has_the_layers_of_the_paper():
    kinds = [type(layer).__name__ for layer in VGG11((32, 32, 3), 10).layers]
    assert kinds == [
        "InputLayer",
        *("Conv2D", "MaxPooling2D"),
        *("Conv2D", "MaxPooling2D"),
        *("Conv2D", "Conv2D", "MaxPooling2D"),
        *("Conv2D", "Conv2D", "MaxPooling2D"),
        *("Conv2D", "Conv2D", "MaxPooling2D"),
        *("Flatten", "Dense"),
    ]


@pytest.mark.parametrize("name", _NORMALIZED)
def test_normalized_convolutions_are_initialized_by_the_rule_of_he(name):
    convolutions = [
        layer
        for layer in _small(name).layers
        if isinstance(layer, keras.layers.Conv2D)
    ]
    for layer in convolutions:
        initializer = layer.kernel_initializer
        assert isinstance(initializer, keras.initializers.HeNormal), layer.name
        assert not layer.use_bias, layer.name
    last = convolutions[-1].get_weights()[0]
    deviation = math.sqrt(2 / math.prod(last.shape[:-1]))
    np.testing.assert_allclose(last.std(), deviation, rtol=0.1)


def test_vgg_starts_without_a_fisher_explosion():
    x = np.random.normal(size=(4, 32, 32, 3)).astype("float32")
    likelihood = likelihoods.Categorical(from_logits=True)
    trace = fisher_trace(
        VGG11((32, 32, 3), 10), x, estimator="batch", likelihood=likelihood
    )
    assert 0 < float(trace) < 100, f"Tr(F) is {trace}"


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_strided_block_adds_what_it_computes_to_the_pixels_it_keeps(size):
    model = ResNet((*size, 3), 10, depth=8)
    x = np.random.normal(size=(2, *size, 16)).astype("float32")
    kept = x[:, ::2, ::2]

    first = model.get_layer("stage2_block1_shortcut_pool")
    last = model.get_layer("stage2_block1_shortcut_pad")
    shortcut = keras.Model(first.input, last.output).predict(x, verbose=0)
    np.testing.assert_array_equal(shortcut[..., :16], kept)
    np.testing.assert_array_equal(shortcut[..., 16:], np.zeros_like(kept))

    # With ones in the middle, the convolution sums over the same pixels.
    first = model.get_layer("stage2_block1_conv1_pad")
    last = model.get_layer("stage2_block1_conv1")
    kernel = np.zeros(last.kernel.shape)
    kernel[1, 1] = 1
    last.kernel.assign(kernel)
    sums = keras.Model(first.input, last.output).predict(x, verbose=0)
    expected = np.broadcast_to(kept.sum(-1, keepdims=True), sums.shape)
    np.testing.assert_allclose(sums, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("widen_factor", "projections"), [(1, 2), (2, 3)])
def test_wide_resnet_projects_where_the_channels_change(
    widen_factor, projections
):
    model = WideResNet((8, 8, 3), 10, depth=16, widen_factor=widen_factor)
    names = [layer.name for layer in model.layers if "shortcut" in layer.name]
    stages = range(4 - projections, 4)
    assert names == [f"stage{stage}_block1_shortcut" for stage in stages]


@pytest.mark.parametrize(("dropout", "count"), [(0, 0), (0.3, 6)])
def test_wide_resnet_drops_features_in_every_block(dropout, count):
    model = WideResNet((8, 8, 1), 4, widen_factor=1, dropout=dropout)
    rates = [
        layer.rate
        for layer in model.layers
        if isinstance(layer, keras.layers.Dropout)
    ]
    assert rates == [dropout] * count


@pytest.mark.parametrize("name", _SMALL)
@pytest.mark.parametrize(
    ("input_shape", "classes"),
    [((64, 64, 3), 200), ((37, 45, 1), 1)],
)
def test_network_takes_images_of_many_shapes(name, input_shape, classes):
    network, _ = _SMALL[name]
    model = network(input_shape, classes)
    assert model.input_shape == (None, *input_shape)
    assert model.output_shape == (None, classes)


@pytest.mark.parametrize(
    ("name", "input_shape"),
    [
        ("resnet", (1, 1, 1)),
        ("wide_resnet", (1, 1, 1)),
        ("dense_net", (4, 4, 1)),
        ("dense_net_bc", (4, 5, 2)),
    ],
)
def test_network_takes_the_smallest_images(name, input_shape):
    network, _ = _SMALL[name]
    x = np.random.normal(size=(2, *input_shape))
    outputs = network(input_shape, 3).predict(x, verbose=0)
    assert outputs.shape == (2, 3)
    assert np.all(np.isfinite(outputs))


@pytest.mark.parametrize("name", _SMALL)
def test_network_is_made_of_layers_of_keras(name):
    for operation in _small(name).operations:
        kind = type(operation)
        assert getattr(keras.layers, kind.__name__, None) is kind, operation
        assert kind is not keras.layers.Lambda, operation


@pytest.mark.parametrize("name", _SMALL)
def test_network_is_the_same_whatever_data_format_keras_is_set_to(name):
    expected = [layer.output.shape for layer in _small(name).layers]
    data_format = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    try:
        model = _small(name)
    finally:
        keras.config.set_image_data_format(data_format)
    assert [layer.output.shape for layer in model.layers] == expected


@pytest.mark.parametrize("name", _SMALL)
def test_outputs_are_logits_unless_an_activation_is_given(name):
    network, input_shape = _SMALL[name]
    model = network(input_shape, 3)
    assert model.layers[-1].activation is keras.activations.linear
    assert model.name == name.removesuffix("_bc")
    model = network(input_shape, 3, activation="softmax", name="net")
    assert model.layers[-1].activation is keras.activations.softmax
    assert model.name == "net"


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "name", ["vgg11", "resnet", "wide_resnet", "dense_net_bc"]
)
def test_measured_and_penalized_network_trains_and_is_saved(tmp_path, name):
    network = _small(name)
    x = np.random.normal(size=(8, *network.input_shape[1:])).astype("float32")
    model = FisherModel(network, 0.01, trace_every=1, seed=0)
    model.compile(
        keras.optimizers.SGD(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    before = network.get_weights()
    logs = model.fit(x, np.arange(8) % 4, batch_size=4, verbose=0).history
    for key in ("loss", "fisher_trace", "fisher_penalty"):
        assert np.isfinite(logs[key][0]) and logs[key][0] > 0, f"{key}: {logs}"
    after = network.get_weights()
    for weight, old, new in zip(network.weights, before, after):
        assert np.all(np.isfinite(new)), weight.path
        assert np.any(new != old), f"{weight.path} did not train"

    network.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    outputs = network.predict(x, verbose=0)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), outputs)
    assert (outputs.std(axis=0) > 0).all(), "outputs ignore the inputs"


@pytest.mark.parametrize("function", _FUNCTIONS)
@pytest.mark.parametrize(
    "input_shape",
    [(40, 1), (2, 8, 8, 3), (None, 32, 3), (32, 0, 3), (32.0, 32, 3), 32, None],
)
def test_input_shape_that_is_no_image_is_an_error(function, input_shape):
    match = r"must be \(height, width, channels\) for images, of positive"
    with pytest.raises(ValueError, match=match) as error:
        function(input_shape, 10)
    assert f"input_shape={input_shape!r}" in str(error.value)


@pytest.mark.parametrize(
    ("function", "input_shape", "message"),
    [
        (
            VGG11,
            (31, 32, 3),
            "at least 32 pixels high and wide, to be pooled 5",
        ),
        (VGG11, (64, 8, 3), "at least 32 pixels high and wide, to be pooled 5"),
        (DenseNet, (3, 8, 1), "at least 4 pixels high and wide, to be pooled "),
    ],
)
def test_image_too_small_for_the_network_is_an_error(
    function, input_shape, message
):
    with pytest.raises(ValueError, match=message) as error:
        function(input_shape, 10)
    assert f"input_shape={input_shape!r}" in str(error.value)


@pytest.mark.parametrize("function", _FUNCTIONS)
@pytest.mark.parametrize("classes", [0, 2.0, None, True])
def test_number_of_classes_is_checked_in_every_network(function, classes):
    with pytest.raises(ValueError, match="an integer of at least 1") as error:
        function((32, 32, 3), classes)
    assert f"classes={classes!r}" in str(error.value)


@pytest.mark.parametrize(
    ("network", "depth", "rule", "valid"),
    [
        (ResNet, 21, "6n + 2", "20 and 26"),
        (ResNet, 2, "6n + 2", "8 and 14"),
        (ResNet, -4, "6n + 2", "8 and 14"),
        (ResNet, 20.0, "6n + 2", "8 and 14"),
        (WideResNet, 44, "6n + 4", "40 and 46"),
        (WideResNet, 9, "6n + 4", "10 and 16"),
        (WideResNet, None, "6n + 4", "10 and 16"),
        (DenseNet, 41, "3n + 4", "40 and 43"),
        (DenseNet, 4, "3n + 4", "7 and 10"),
        (_DenseNetBC, 43, "6n + 4", "40 and 46"),
        (_DenseNetBC, "100", "6n + 4", "10 and 16"),
    ],
)
def test_depth_that_stages_cannot_share_is_an_error(
    network, depth, rule, valid
):
    with pytest.raises(ValueError, match="`depth` must be") as error:
        network((32, 32, 3), 10, depth=depth)
    message = str(error.value)
    assert rule in message
    assert f"depth={depth!r}" in message
    assert f"next valid depths are {valid}" in message


@pytest.mark.parametrize(
    ("function", "name", "value", "allowed"),
    [
        (WideResNet, "widen_factor", 0, "an integer of at least 1"),
        (WideResNet, "widen_factor", 1.5, "an integer of at least 1"),
        (WideResNet, "dropout", 1.0, r"a number in \[0, 1\)"),
        (WideResNet, "dropout", -0.1, r"a number in \[0, 1\)"),
        (WideResNet, "dropout", math.nan, r"a number in \[0, 1\)"),
        (WideResNet, "dropout", None, r"a number in \[0, 1\)"),
        (DenseNet, "growth_rate", 0, "an integer of at least 1"),
        (DenseNet, "growth_rate", "12", "an integer of at least 1"),
        (DenseNet, "reduction", 0, r"a number in \(0, 1\]"),
        (DenseNet, "reduction", 1.5, r"a number in \(0, 1\]"),
        (DenseNet, "reduction", math.nan, r"a number in \(0, 1\]"),
    ],
)
def test_argument_out_of_range_is_an_error(function, name, value, allowed):
    with pytest.raises(
        ValueError, match=f"`{name}` must be {allowed}"
    ) as error:
        function((32, 32, 3), 10, **{name: value})
    assert f"{name}={value!r}" in str(error.value)
