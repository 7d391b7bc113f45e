"""The networks that are timed on GPUs, in PyTorch.

The same layers as in Keras, with as many weights: `workers/steps_torch.py` has
those that are timed on CPUs, too.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from workers import steps_torch


class _Bottleneck(nn.Module):
    """Three convolutions beside a shortcut, as `keras.applications` has it."""

    def __init__(self, inputs: int, filters: int, stride: int, projects: bool):
        super().__init__()
        self.long = nn.Sequential(
            nn.Conv2d(inputs, filters, 1, stride),
            _normalization(filters),
            nn.ReLU(),
            nn.Conv2d(filters, filters, 3, padding=1),
            _normalization(filters),
            nn.ReLU(),
            nn.Conv2d(filters, 4 * filters, 1),
            _normalization(4 * filters),
        )
        self.short = nn.Identity()
        if projects:
            self.short = nn.Sequential(
                nn.Conv2d(inputs, 4 * filters, 1, stride),
                _normalization(4 * filters),
            )

    def forward(self, x):
        return functional.relu(self.long(x) + self.short(x))


def _normalization(filters: int) -> nn.Module:
    return nn.BatchNorm2d(filters, eps=1.001e-5, momentum=0.01)


def resnet50() -> nn.Module:
    """ResNet-50 of `keras.applications`, with 1000 logits."""
    modules = [
        nn.Conv2d(3, 64, 7, 2, 3),
        _normalization(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for filters, count, stride in [
        (64, 3, 1),
        (128, 4, 2),
        (256, 6, 2),
        (512, 3, 2),
    ]:
        for block in range(count):
            first = block == 0
            modules.append(
                _Bottleneck(inputs, filters, stride if first else 1, first)
            )
            inputs = 4 * filters
    return nn.Sequential(
        *modules,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(inputs, 1000),
    )


class _Wide(nn.Module):
    """Twice normalization, ReLU and convolution, beside a shortcut."""

    def __init__(self, inputs: int, filters: int, stride: int):
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.long = nn.Sequential(
            nn.Conv2d(inputs, filters, 3, stride, 1, bias=False),
            nn.BatchNorm2d(filters),
            nn.ReLU(),
            nn.Conv2d(filters, filters, 3, padding=1, bias=False),
        )
        self.short = None
        if inputs != filters:
            self.short = nn.Conv2d(inputs, filters, 1, stride, bias=False)

    def forward(self, x):
        y = self.first(x)
        if self.short is not None:
            x = self.short(y)
        return x + self.long(y)


def wide_resnet() -> nn.Module:
    """WideResNet-16-8."""
    blocks, inputs = [], 16
    for filters, stride in [(128, 1), (256, 2), (512, 2)]:
        blocks += [_Wide(inputs, filters, stride), _Wide(filters, filters, 1)]
        inputs = filters
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        *blocks,
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(inputs, 10),
    )


NETWORKS = {
    "SimpleCNN": steps_torch.NETWORKS["SimpleCNN 32x32x3"],
    "VGG11": steps_torch.NETWORKS["VGG11 32x32x3"],
    "ResNet-50": resnet50,
    "WideResNet-16-8": wide_resnet,
    "Transformer": steps_torch.NETWORKS["Transformer 64 tokens"],
    "MLP": steps_torch.NETWORKS["MLP 784-512-512-512-10"],
}


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def made(name: str, device: str, layout: torch.memory_format) -> nn.Module:
    """A network in training mode, of whichever batch size is in its name."""
    torch.manual_seed(0)
    name = name.partition(",")[0]
    return NETWORKS[name]().to(device, memory_format=layout)
