"""The sides of PyTorch, in a process of their own beside that of JAX.

Reads one command a line, a list in JSON, and answers with a line of JSON:
`["load", network, precision, side, batch]` makes a model, runs it a few times
and tells its memory and its number of parameters; `["run", side, steps]` the
seconds of a step; `["clear"]` gives up all models; `["about"]` tells versions.
"""

from __future__ import annotations

import contextlib
import gc
import json
from pathlib import Path
import sys
import time
from typing import Any

sys.path += [
    str(Path(__file__).resolve().parents[1]),
    str(Path(__file__).resolve().parents[1] / "workers"),
]

import arrays
import torch
from torch.nn import functional
import torch_networks
from workers.steps_torch import ALPHA

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_WARM_UP = 3


class Side:
    """A model under training.

    Args:
        network: Name of the network.
        precision: `"float32"`, `"tf32"` or `"mixed_bfloat16"`.
        side: `"plain"` or `"FP"`, with `" compiled"` behind for
            `torch.compile`, or `" NCHW"` for channels that come first.
        batch: Descriptions of the batch, as programs have them.
    """

    def __init__(self, network: str, precision: str, side: str, batch: list):
        self._tf32 = precision != "float32"
        self._bfloat16 = precision == "mixed_bfloat16"
        x, y = (torch.from_numpy(arrays.made(a)).to(_DEVICE) for a in batch)
        kind, _, how = side.partition(" ")
        layout = torch.channels_last
        if how == "NCHW":
            layout = torch.contiguous_format
        if x.dim() == 4:
            x = x.movedim(-1, 1).contiguous(memory_format=layout)
        self._x, self._y = x, y.long()
        self.model = torch_networks.made(network, _DEVICE, layout)
        self._optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.001, momentum=0.9
        )
        compiled = how == "compiled"
        self._step = {
            "plain": self._plain,
            "FP": self._functional if compiled else self._penalized,
        }[kind]
        self._called = self.model
        if compiled and kind == "plain":
            self._called = torch.compile(self.model)
        elif compiled:
            self._untracked()
            self._gradients = torch.compile(self._gradients)

    def _untracked(self) -> None:
        # `torch.func` refuses to update the statistics of normalizations.
        for module in self.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.track_running_stats = False
                module.running_mean = module.running_var = None
                module.num_batches_tracked = None

    def _autocast(self):
        if not self._bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(_DEVICE, torch.bfloat16)

    def _loss(self, logits, y):
        return functional.cross_entropy(logits.float(), y)

    def _apply(self, loss) -> None:
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()

    def _plain(self) -> None:
        with self._autocast():
            logits = self._called(self._x)
        self._apply(self._loss(logits, self._y))

    def _penalized(self) -> None:
        with self._autocast():
            logits = self.model(self._x)
        loss = self._loss(logits, self._y)
        gradients = torch.autograd.grad(
            self._loss(logits, _drawn(logits)),
            list(self.model.parameters()),
            create_graph=True,
        )
        self._apply(loss + ALPHA * sum(g.square().sum() for g in gradients))

    def _objective(self, parameters, x, y):
        def run(parameters):
            with self._autocast():
                return torch.func.functional_call(self.model, parameters, x)

        logits, pull = torch.func.vjp(run, parameters)
        drawn = _drawn(logits)
        hot = functional.one_hot(drawn, logits.shape[-1])
        errors = (logits.float().softmax(-1) - hot) / len(x)
        (gradients,) = pull(errors.to(logits.dtype))
        norm = sum(g.square().sum() for g in gradients.values())
        return self._loss(logits, y) + ALPHA * norm

    def _gradients(self, parameters, x, y):
        return torch.func.grad(self._objective)(parameters, x, y)

    def _functional(self) -> None:
        parameters = dict(self.model.named_parameters())
        values = {k: v.detach() for k, v in parameters.items()}
        found = self._gradients(values, self._x, self._y)
        for name, parameter in parameters.items():
            parameter.grad = found[name]
        self._optimizer.step()

    def run(self, steps: int) -> float:
        """The seconds of a step, in so many."""
        torch.backends.cuda.matmul.allow_tf32 = self._tf32
        torch.backends.cudnn.allow_tf32 = self._tf32
        torch.backends.cudnn.benchmark = True
        begin = time.perf_counter()
        for _ in range(steps):
            self._step()
        _wait()
        return (time.perf_counter() - begin) / steps


def _drawn(logits: torch.Tensor) -> torch.Tensor:
    probabilities = logits.detach().float().softmax(-1)
    return torch.multinomial(probabilities, 1)[:, 0]


def _wait() -> None:
    if _DEVICE == "cuda":
        torch.cuda.synchronize()


def _freed() -> int:
    """Gives back what nobody uses; the bytes that others use."""
    gc.collect()  # A side refers to itself, by its step.
    if _DEVICE != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


class Sides:
    """All that is loaded, and the answers to commands."""

    def __init__(self):
        self._sides: dict[str, Side] = {}

    def load(self, network, precision, side, batch) -> dict[str, Any]:
        if not self._sides:
            # Libraries keep workspaces from their first use on, which are not
            # the first side's alone.
            Side(network, precision, "plain", batch).run(1)
        before = _freed()
        begin = time.perf_counter()
        made = Side(network, precision, side, batch)
        made.run(1)
        first = time.perf_counter() - begin
        if _DEVICE == "cuda":
            # By now cuDNN has tried its algorithms, with workspaces of theirs.
            torch.cuda.reset_peak_memory_stats()
        made.run(_WARM_UP)
        self._sides[side] = made
        peak = 0
        if _DEVICE == "cuda":
            peak = torch.cuda.max_memory_allocated() - before
        return {
            "first": first,
            "memory": peak,
            "parameters": torch_networks.parameters(made.model),
        }

    def run(self, side: str, steps: int) -> float:
        return self._sides[side].run(steps)

    def clear(self) -> None:
        self._sides.clear()
        _freed()

    def about(self) -> dict[str, Any]:
        name = _DEVICE
        if _DEVICE == "cuda":
            name = torch.cuda.get_device_name()
        return {
            "torch": torch.__version__,
            "device": name,
            "cudnn": torch.backends.cudnn.version(),
        }

    def answer(self, line: str) -> Any:
        """What to answer a command; what went wrong as `{"error": ...}`."""
        verb, *arguments = json.loads(line)
        try:
            return getattr(self, verb)(*arguments)
        except Exception as error:  # Of whatever cannot be compiled or stored.
            return {"error": f"{type(error).__name__}: {str(error)[:500]}"}


def main() -> None:
    # Compilers print what they like; answers alone go to the caller.
    replies, sys.stdout = sys.stdout, sys.stderr
    sides = Sides()
    for line in sys.stdin:
        print(json.dumps(sides.answer(line)), file=replies, flush=True)


if __name__ == "__main__":
    main()
