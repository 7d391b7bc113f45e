"""Memory of PyTorch's sides on a card is that of the sides."""

from __future__ import annotations

import gc
import types
import weakref

import pytest

_WORKSPACE, _TRIAL, _MODEL, _STEP = 30, 500, 100, 50


class _Card:
    """Memory as PyTorch allocates it."""

    def __init__(self):
        self.allocated = self.peak = 0
        self.has_workspaces = False

    def allocate(self, size: int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    def use(self, size: int) -> None:
        """Memory that is given back at once."""
        self.allocate(size)
        self.allocated -= size

    def reset(self) -> None:
        self.peak = self.allocated


@pytest.fixture
def sides(gpu_script, monkeypatch):
    """The answers of the script, with sides that use memory alone."""
    card = _Card()
    cuda = types.SimpleNamespace(
        is_available=lambda: True,
        empty_cache=lambda: None,
        reset_peak_memory_stats=card.reset,
        max_memory_allocated=lambda: card.peak,
        memory_allocated=lambda: card.allocated,
    )
    torch, nn = types.ModuleType("torch"), types.ModuleType("torch.nn")
    torch.cuda, nn.functional = cuda, None
    networks = types.ModuleType("torch_networks")
    networks.parameters = lambda model: 0
    steps = types.ModuleType("workers.steps_torch")
    steps.ALPHA = 0.1
    stand_ins = {"torch": torch, "torch.nn": nn, "torch_networks": networks}
    stand_ins["workers.steps_torch"] = steps
    script = gpu_script("torch_worker", stand_ins)

    class Side:
        def __init__(self, *arguments):
            self.model, self._is_new = None, True
            self._step = self.run  # A cycle, as in the script.
            card.allocate(_MODEL)
            weakref.finalize(self, card.allocate, -_MODEL)

        def run(self, steps):
            gc.collect()  # As Python may at any time.
            if not card.has_workspaces:
                card.allocate(_WORKSPACE)
                card.has_workspaces = True
            card.use(_TRIAL if self._is_new else _STEP)
            self._is_new = False

    monkeypatch.setattr(script, "Side", Side)
    return script.Sides()


def _memory(sides, name: str) -> int:
    return sides.load("MLP", "tf32", name, [])["memory"]


def test_memory_is_without_what_libraries_keep_and_try(sides):
    assert _memory(sides, "plain") == _MODEL + _STEP
    assert _memory(sides, "FP") == _MODEL + _STEP


def test_memory_of_the_network_before_is_given_up(sides):
    for name in ("plain", "FP"):
        _memory(sides, name)
    sides.clear()
    for name in ("plain", "FP"):
        assert _memory(sides, name) == _MODEL + _STEP, name
