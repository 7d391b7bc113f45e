"""The PyTorch sides of `traces.py`, which runs this in their environment.

Reads one command a line, and answers each with a line of JSON: `versions`;
`run <side>`, which measures Tr(F) once and tells the seconds and the value;
`peak`, the most memory this process has had, in MB; `cpu`, the seconds it has
kept processors busy.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import copy
import json
import sys
import time
from typing import Any
import warnings

from backpack import backpack
from backpack import extend
from backpack import extensions
import machine
from nngeometry.layercollection import LayerCollection
from nngeometry.metrics import FIM
from nngeometry.metrics import FIM_MonteCarlo
from nngeometry.object import PMatImplicit
import numpy as np
import torch
from torch import nn

_PACKAGES = ("torch", "backpack-for-pytorch", "nngeometry", "opt_einsum")
_Measurement = Callable[[], float]


def network(weights: list[np.ndarray]) -> nn.Sequential:
    """SimpleCNN for images of 32x32 pixels, with weights of Keras."""
    layers = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 8 * 64, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    weighted = [layer for layer in layers if hasattr(layer, "weight")]
    for layer, kernel, bias in zip(weighted, weights[::2], weights[1::2]):
        if len(kernel) == 8 * 8 * 64:
            # Features are flattened with the channels first here.
            kernel = kernel.reshape(8, 8, 64, -1).transpose(2, 0, 1, 3)
            kernel = kernel.reshape(8 * 8 * 64, -1)
        outputs_first = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
        kernel = np.ascontiguousarray(kernel.transpose(outputs_first))
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(kernel))
            layer.bias.copy_(torch.from_numpy(bias))
    return layers


def load(path: str) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """The network and the batch that `traces.py` saved."""
    saved = np.load(path)
    names = sorted(name for name in saved if name.startswith("weight"))
    images = np.ascontiguousarray(saved["x"].transpose(0, 3, 1, 2))
    return (
        network([saved[name] for name in names]),
        torch.from_numpy(images),
        torch.from_numpy(saved["y"]),
    )


def drawn(logits: torch.Tensor) -> torch.Tensor:
    """Labels that the model would give."""
    return torch.multinomial(logits.detach().softmax(dim=1), 1)[:, 0]


def gradient(model, x, y) -> _Measurement:
    parameters = list(model.parameters())

    def measure():
        loss = nn.functional.cross_entropy(model(x), y)
        torch.autograd.grad(loss, parameters)
        return loss.item()

    return measure


def backpack_side(extension: type, field: str, draws: bool) -> Callable:
    """Sums what an extension of BackPACK leaves at the parameters.

    Args:
        extension: Computes parts of Tr(F).
        field: Where it leaves them.
        draws: Whether it needs drawn labels and the loss summed up, not the
            mean loss with any labels.
    """

    def make(model, x, y):
        extend(model)
        loss_function = extend(
            nn.CrossEntropyLoss(reduction="sum" if draws else "mean")
        )

        def measure():
            model.zero_grad()
            logits = model(x)
            loss = loss_function(logits, drawn(logits) if draws else y)
            with backpack(extension()):
                loss.backward()
            parts = [getattr(p, field).sum() for p in model.parameters()]
            return sum(parts).item() / (len(x) if draws else 1)

        return measure

    return make


def torch_func(model, x, y) -> _Measurement:
    del y
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, image, gumbel):
        logits = torch.func.functional_call(model, parameters, (image[None],))
        # The largest is a draw from the softmax; it saves a forward pass.
        label = (logits.detach() + gumbel).argmax(dim=1)
        return nn.functional.cross_entropy(logits, label)

    def squared_norm(image, gumbel):
        gradients = torch.func.grad(loss)(parameters, image, gumbel)
        return sum(g.square().sum() for g in gradients.values())

    def measure():
        gumbel = -torch.empty(len(x), 10).exponential_().log()
        return torch.func.vmap(squared_norm)(x, gumbel).mean().item()

    return measure


def nngeometry_side(fisher: Callable) -> Callable:
    """The trace of `PMatImplicit`, which leaves out what it does not need."""

    def make(model, x, y):
        del y
        layers = LayerCollection.from_model(model)

        def measure():
            matrix = fisher(
                model,
                (x,),
                PMatImplicit,
                "classif_logits",
                layer_collection=layers,
            )
            return matrix.trace().item()

        return measure

    return make


_SIDES = {
    "PyTorch gradient": gradient,
    "BackPACK BatchL2Grad": backpack_side(
        extensions.BatchL2Grad, "batch_l2", draws=True
    ),
    "BackPACK DiagGGNExact": backpack_side(
        extensions.DiagGGNExact, "diag_ggn_exact", draws=False
    ),
    "torch.func": torch_func,
    "NNGeometry FIM_MonteCarlo": nngeometry_side(FIM_MonteCarlo),
    "NNGeometry FIM": nngeometry_side(FIM),
}


def answer(command: str, loaded: tuple, made: dict[str, _Measurement]) -> Any:
    """What to answer a command; keeps the sides it makes in `made`."""
    verb, _, name = command.partition(" ")
    if verb == "versions":
        return machine.versions(_PACKAGES)
    if verb == "peak":
        return machine.peak()
    if verb == "cpu":
        return time.process_time()
    if name not in made:
        # Libraries leave hooks in their models, so each gets its own.
        made[name] = _SIDES[name](*copy.deepcopy(loaded))
    begin = time.perf_counter()
    value = made[name]()
    return {"seconds": time.perf_counter() - begin, "value": value}


def main(path: str) -> None:
    # As BackPACK wants it.
    warnings.filterwarnings("ignore", message="Full backward hook")
    torch.manual_seed(0)
    loaded, made = load(path), {}
    for line in sys.stdin:
        # Whatever the libraries print must not mix with the answers.
        with contextlib.redirect_stdout(sys.stderr):
            reply = answer(line.strip(), loaded, made)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
