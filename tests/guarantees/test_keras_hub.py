"""Tasks of KerasHub train in a `FisherModel` as they do by themselves."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import training

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty

hub = pytest.importorskip("keras_hub")

_RANDOM = np.random.default_rng(0)


def _vit():
    return hub.models.ViTImageClassifier(
        hub.models.ViTBackbone(
            image_shape=(32, 32, 3),
            patch_size=8,
            num_layers=1,
            num_heads=2,
            hidden_dim=8,
            mlp_dim=16,
        ),
        num_classes=3,
        preprocessor=hub.models.ViTImageClassifierPreprocessor(
            hub.layers.ViTImageConverter(image_size=(32, 32), scale=1 / 255)
        ),
    )


def _images(size=40):
    return _RANDOM.integers(0, 255, (8, size, size, 3)).astype("uint8")


def _resnet():
    return hub.models.ResNetImageClassifier(
        hub.models.ResNetBackbone(
            image_shape=(32, 32, 3),
            input_conv_filters=[64],
            input_conv_kernel_sizes=[3],
            stackwise_num_filters=[64],
            stackwise_num_blocks=[1],
            stackwise_num_strides=[1],
            block_type="basic_block",
        ),
        num_classes=3,
        preprocessor=hub.models.ResNetImageClassifierPreprocessor(
            hub.layers.ResNetImageConverter(image_size=(32, 32), scale=1 / 255)
        ),
    )


def _bert():
    """On token ids: strings need TensorFlow Text."""
    return hub.models.BertTextClassifier(
        hub.models.BertBackbone(
            vocabulary_size=20,
            num_layers=1,
            num_heads=2,
            hidden_dim=8,
            intermediate_dim=16,
            max_sequence_length=6,
        ),
        num_classes=3,
        dropout=0.0,
    )


def _tokens():
    tokens = _RANDOM.integers(1, 20, (8, 6))
    return {
        "token_ids": tokens,
        "segment_ids": np.zeros_like(tokens),
        "padding_mask": np.ones_like(tokens, bool),
    }


def _gpt2():
    return hub.models.GPT2CausalLM(
        hub.models.GPT2Backbone(
            vocabulary_size=20,
            num_layers=1,
            num_heads=2,
            hidden_dim=8,
            intermediate_dim=16,
            max_sequence_length=6,
            dropout=0.0,
        )
    )


def _next_tokens():
    tokens = _RANDOM.integers(1, 20, (8, 7))
    x = {
        "token_ids": tokens[:, :-1],
        "padding_mask": np.ones((8, 6), bool),
    }
    return x, tokens[:, 1:]


_LABELS = np.arange(8) % 3
_TASKS = {
    "ViT": (_vit, lambda: (_images(), _LABELS)),
    "ResNet": (_resnet, lambda: (_images(50), _LABELS)),
    "BERT": (_bert, lambda: (_tokens(), _LABELS)),
    "GPT-2": (_gpt2, _next_tokens),
}


def _compiled(model):
    return training.compiled(
        model,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        keras.optimizers.SGD(0.01),
    )


@pytest.mark.parametrize("name", _TASKS)
def test_raw_data_train_the_task_as_they_do_without(name):
    make, data = _TASKS[name]
    x, y = data()
    tasks = []
    for _ in range(2):
        keras.utils.set_random_seed(0)
        tasks.append(make())
    model = _compiled(FisherModel(tasks[0], trace_every=1))
    _compiled(tasks[1])
    # The task does not shuffle what it preprocesses.
    options = dict(batch_size=4, epochs=2, verbose=0)
    if getattr(tasks[1], "preprocessor", None) is None:
        options["shuffle"] = False
    history = model.fit(x, y, **options).history
    expected = tasks[1].fit(x, y, **options).history
    np.testing.assert_allclose(history["loss"], expected["loss"], 1e-5)
    assert history["fisher_trace"][-1] > 0
    for a, b in zip(tasks[0].get_weights(), tasks[1].get_weights()):
        np.testing.assert_allclose(a, b, 1e-4, 1e-6)
    np.testing.assert_allclose(
        model.predict(x, verbose=0), tasks[1].predict(x, verbose=0), 1e-3, 1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", _TASKS)
def test_the_penalty_trains_it(name):
    make, data = _TASKS[name]
    x, y = data()
    model = _compiled(FisherModel(make(), FisherPenalty(1.0)))
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert history["fisher_ratio"][-1] > 0
    assert history["fisher_nonfinite"][-1] == 0


@pytest.mark.slow
def test_lora_trains_what_it_adds():
    task = _bert()
    task.backbone.enable_lora(2)
    x, y = _tokens(), _LABELS
    model = _compiled(FisherModel(task, FisherPenalty(1.0, every=2)))
    before = [np.array(v) for v in task.non_trainable_variables[:3]]
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0).history
    assert history["fisher_trace"][-1] > 0
    for v, old in zip(task.non_trainable_variables[:3], before):
        np.testing.assert_array_equal(v, old)
