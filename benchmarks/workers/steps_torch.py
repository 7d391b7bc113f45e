"""One side of `steps.py` in PyTorch, which runs this in its environment.

Reads one command a line, and answers each with a line of JSON: `first`, the
seconds to the end of the first step; `run <steps>`, the seconds of a step in
so many; `peak`, the most memory of this process before the model was
made and until now, in MB; `versions`. Networks for images train with the
channels first or last, whichever is faster.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from typing import Any

import machine
import numpy as np
import torch
from torch import nn
from torch.nn import functional

VOCABULARY, _WIDTH = 1000, 64
ALPHA = 0.1


class Same(nn.Module):
    """A convolution with stride and the "same" padding of TensorFlow."""

    def __init__(self, make, inputs: int, outputs: int, size: int, stride: int):
        super().__init__()
        self.convolution = make(inputs, outputs, size, stride)

    def forward(self, x):
        size = self.convolution.kernel_size[0]
        stride = self.convolution.stride[0]
        padding = []
        for length in reversed(x.shape[2:]):
            outputs = -(-length // stride)
            total = max((outputs - 1) * stride + size - length, 0)
            padding += [total // 2, total - total // 2]
        return self.convolution(functional.pad(x, padding))


def convolutions(plan, inputs: int) -> list[nn.Module]:
    """3x3 convolutions with ReLU; `"M"` pools."""
    modules = []
    for filters in plan:
        if filters == "M":
            modules.append(nn.MaxPool2d(2))
        else:
            modules += [nn.Conv2d(inputs, filters, 3, padding=1), nn.ReLU()]
            inputs = filters
    return modules


def signal_cnn() -> nn.Module:
    return nn.Sequential(
        Same(nn.Conv1d, 1, 64, 5, 2),
        nn.ReLU(),
        Same(nn.Conv1d, 64, 64, 3, 2),
        nn.ReLU(),
        Same(nn.Conv1d, 64, 64, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * 64, 10),
    )


def image_cnn() -> nn.Module:
    return nn.Sequential(
        *convolutions([32, 32, "M", 64, 64, "M"], 3),
        nn.Flatten(),
        nn.Linear(8 * 8 * 64, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def vgg11() -> nn.Module:
    plan = [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"]
    return nn.Sequential(
        *convolutions(plan, 3), nn.Flatten(), nn.Linear(512, 10)
    )


class Residual(nn.Module):
    """Two convolutions, with batch normalization, beside a short cut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.long = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.short = nn.Identity()
        if inputs != outputs:
            self.short = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x):
        return functional.relu(self.long(x) + self.short(x))


def resnet14() -> nn.Module:
    blocks, inputs = [], 16
    for filters, stride in [(16, 1), (32, 2), (64, 2)]:
        blocks += [
            Residual(inputs, filters, stride),
            Residual(filters, filters, 1),
        ]
        inputs = filters
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def mlp() -> nn.Module:
    sizes = [784, 512, 512, 512]
    modules = []
    for inputs, outputs in itertools.pairwise(sizes):
        modules += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*modules, nn.Linear(512, 10))


class Attention(nn.Module):
    """Self-attention, of operations that have a second derivative."""

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads
        self.inputs = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.outputs = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x):
        batch, time_, width = x.shape
        parts = self.inputs(x).view(batch, time_, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        mixed = scores.softmax(-1) @ value
        return self.outputs(mixed.transpose(1, 2).reshape(batch, time_, width))


class Transformer(nn.Module):
    """Two blocks of an encoder, normalized before each part."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, _WIDTH)
        self.positions = nn.Parameter(torch.randn(64, _WIDTH) * 0.02)
        self.attention, self.dense = nn.ModuleList(), nn.ModuleList()
        for _ in range(2):
            self.attention.append(
                nn.Sequential(nn.LayerNorm(_WIDTH), Attention(4))
            )
            self.dense.append(
                nn.Sequential(
                    nn.LayerNorm(_WIDTH),
                    nn.Linear(_WIDTH, 4 * _WIDTH),
                    nn.ReLU(),
                    nn.Linear(4 * _WIDTH, _WIDTH),
                )
            )
        self.normalization = nn.LayerNorm(_WIDTH)
        self.predictions = nn.Linear(_WIDTH, 10)

    def forward(self, x):
        x = self.tokens(x) + self.positions
        for attention, dense in zip(self.attention, self.dense):
            x = x + attention(x)
            x = x + dense(x)
        return self.predictions(self.normalization(x).mean(1))


NETWORKS = {
    "SimpleCNN 40x1": signal_cnn,
    "SimpleCNN 32x32x3": image_cnn,
    "VGG11 32x32x3": vgg11,
    "ResNet-14 32x32x3": resnet14,
    "MLP 784-512-512-512-10": mlp,
    "Transformer 64 tokens": Transformer,
}


class Side:
    """A model under training, with or without the Fisher Penalty."""

    def __init__(self, network: str, penalize: bool, saved: str):
        torch.manual_seed(0)
        batch = np.load(saved)
        x = torch.from_numpy(batch["x"])
        if x.dim() > 2:
            # Of Keras, with the channels last.
            x = x.movedim(-1, 1).contiguous()
        self._x, self._y = x, torch.from_numpy(batch["y"])
        self._network, self._penalize = network, penalize
        self._before = machine.peak()

    def _start(self, memory_format: torch.memory_format) -> None:
        model = NETWORKS[self._network]()
        if self._x.dim() == 4:
            model = model.to(memory_format=memory_format)
            self._x = self._x.contiguous(memory_format=memory_format)
        self._model = model
        self._optimizer = torch.optim.SGD(
            model.parameters(), lr=0.001, momentum=0.9
        )

    def _step(self) -> None:
        logits = self._model(self._x)
        loss = functional.cross_entropy(logits, self._y)
        if self._penalize:
            drawn = torch.multinomial(logits.detach().softmax(1), 1)[:, 0]
            gradients = torch.autograd.grad(
                functional.cross_entropy(logits, drawn),
                list(self._model.parameters()),
                create_graph=True,
            )
            loss = loss + ALPHA * sum(g.square().sum() for g in gradients)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._last = loss.detach()

    def _run(self, steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            self._step()
        float(self._last)
        return (time.perf_counter() - begin) / steps

    def _first(self) -> float:
        begin = time.perf_counter()
        self._start(torch.contiguous_format)
        self._step()
        first = time.perf_counter() - begin
        if self._x.dim() == 4:
            times = {}
            for layout in (torch.contiguous_format, torch.channels_last):
                self._start(layout)
                self._run(1)
                times[layout] = min(self._run(2) for _ in range(3))
            self._start(min(times, key=times.get))
        return first

    def answer(self, command: str) -> Any:
        """What to answer a command."""
        verb, _, argument = command.partition(" ")
        if verb == "first":
            return self._first()
        if verb == "run":
            return self._run(int(argument))
        if verb == "peak":
            return [self._before, machine.peak()]
        if verb == "versions":
            return machine.versions(["torch"])
        raise ValueError(f"Unknown command: {command}")


def main(network: str, penalize: str, saved: str) -> None:
    side = Side(network, penalize == "FP", saved)
    for line in sys.stdin:
        print(json.dumps(side.answer(line.strip())), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
