"""What a card gives is told of once, and rightly if something fails."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import types
from typing import ClassVar

import pytest

_PLAIN, _PENALIZED = "keras.Model", "FP every 1"


def _described(network, side=_PENALIZED, kind="timed", **more):
    plan = "plain" if side == _PLAIN else "fresh"
    precision = more.get("precision", "float32")
    return {
        "name": f"{network}/{precision}/{side}/{plan}/{kind}",
        "network": network,
        "side": side,
        "plan": plan,
        "kind": kind,
        "precision": precision,
        "share": 1.0,
        "batch_size": 8,
        "arguments": [{"name": "x"}, {"name": "y"}],
        "results": [{"name": "loss", "feeds": None}],
        "versions": {},
        "commit": "abc",
        **more,
    }


class _Program:
    """A program that takes no time, or too much memory if described so."""

    compile_seconds, memory = 0.0, {"all": 1}
    on_device: ClassVar[list[_Program]] = []

    def __init__(self, described, exact=False):
        self.described = described

    def begin(self, make):
        self.on_device.append(self)
        if self.described.get("is_too_large"):
            raise MemoryError("too large")

    def step(self):
        pass

    def run(self, steps):
        return 0.05

    def end(self):
        self.on_device[:] = [p for p in self.on_device if p is not self]

    def optimized(self):
        return ""

    def errors(self):
        loss = self.described.get("error_of_loss", 0.0)
        return {"loss": loss, "gradient": self.described["error"]}

    def worst(self, errors):
        return max(errors, key=errors.get)


class _Peer:
    """PyTorch, as the card sees it."""

    def __init__(self):
        self.loaded = []

    def about(self):
        return {"torch": "2"}

    def load(self, network, mode, side, batch):
        assert side not in self.loaded, side
        self.loaded.append(side)
        return {"memory": 1}

    def run(self, side, steps):
        return 0.05

    def clear(self):
        self.loaded = []

    def end(self):
        pass


@pytest.fixture
def card(gpu_script, monkeypatch, tmp_path):
    """Runs the script on some programs; what it found, and whether well."""
    runtime = types.ModuleType("runtime")

    def parser(description):
        result = argparse.ArgumentParser()
        result.add_argument("--programs", default=str(tmp_path))
        result.add_argument("--output", default=str(tmp_path))
        return result

    device = types.SimpleNamespace(device_kind="none")
    runtime.jax = types.SimpleNamespace(
        __version__="0", devices=lambda: [device]
    )
    runtime.np = types.SimpleNamespace(__version__="0")
    runtime.Program, runtime.Arguments, runtime.parser = _Program, dict, parser
    runtime.statistics = lambda text: {}
    runtime.platform_version = lambda: ""
    script = gpu_script(
        "card", {"runtime": runtime, "profiles": types.ModuleType("profiles")}
    )
    peer_of_script = script.torch_peer.Peer

    def run(described, *arguments, peer=_Peer):
        monkeypatch.setattr(script.torch_peer, "Peer", peer)
        runtime.descriptions = lambda directory: described
        monkeypatch.setattr(_Program, "on_device", [])
        monkeypatch.setattr(sys, "argv", ["card.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            script.main()
        found = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
        return found, not ended.value.code

    run.peer = peer_of_script
    return run


def _sides(block):
    return sorted(n.removeprefix("PyTorch ") for n in block if "Torch" in n)


def test_networks_that_have_no_large_batch_are_timed_once(card):
    described = [_described("ResNet-50"), _described("ResNet-50", _PLAIN)]
    found, _ = card(
        described,
        *("--networks", "ResNet-50", "--parts", "core", "large"),
    )
    assert len(found["blocks"]) == 1, found["blocks"]


def test_large_batches_are_timed_by_themselves(card):
    found, _ = card(
        [_described("MLP"), _described("MLP, large")],
        *("--parts", "core", "large"),
    )
    first, second = ("".join(block) for block in found["blocks"])
    assert "MLP/" in first and "MLP, large/" not in first, first
    assert "MLP, large/" in second and "MLP/" not in second, second


def test_a_network_that_does_not_fit_is_no_block(card):
    described = [
        _described("MLP", is_too_large=True),
        _described("VGG11"),
    ]
    found, _ = card(described, "--parts", "core")
    (block,) = found["blocks"]
    assert "VGG11/tf32/FP every 1/fresh/timed" in block, block
    # Of the network before nothing is loaded any more.
    assert _sides(block) == ["FP", "plain"], block
    left_out = [what for what, _ in found["left out"]]
    assert left_out == ["MLP/tf32/FP every 1/fresh/timed"], found["left out"]


def test_what_does_not_fit_leaves_its_memory_to_the_next(card, monkeypatch):
    seen = []
    monkeypatch.setattr(
        _Program, "run", lambda self, steps: seen.append([*self.on_device]) or 1
    )
    described = [
        _described("MLP", is_too_large=True),
        _described("MLP", _PLAIN),
    ]
    card(described, "--parts", "core", "--no_torch")
    assert [p.described["side"] for p in seen[0]] == [_PLAIN], seen[0]


def test_compiled_pytorch_has_its_own_sides_alone(card):
    described = [_described("MLP"), _described("MLP", _PLAIN)]
    found, _ = card(described, "--parts", "compiled_torch", "core")
    compiled, core = found["blocks"]
    assert _sides(compiled) == ["FP compiled", "plain compiled"]
    assert _sides(core) == ["FP", "plain"]


def test_without_pytorch_the_rest_is_timed(card, monkeypatch):
    # The process ends at once, as it does where PyTorch is missing.
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    described = [_described("MLP")]
    parts = ("compiled_torch", "core")
    found, is_well = card(described, "--parts", *parts, peer=card.peer)
    (_, reason), *others = found["left out"]
    assert "exit status 1" in reason, reason
    assert [what for what, _ in others] == ["compiled_torch"], others
    assert is_well and len(found["blocks"]) == 1, found["blocks"]


def test_pytorch_that_sees_no_card_is_left_out(card):
    class Refusing(card.peer):
        def __init__(self):
            self.loaded = []

        def _ask(self, *command):
            return {"error": "no driver"}

        def end(self):
            pass

    described = [_described("MLP")]
    found, is_well = card(described, "--parts", "core", peer=Refusing)
    assert found["left out"] == [["PyTorch", "no driver"]]
    assert is_well and len(found["blocks"]) == 1, found["blocks"]


def _checked(network, precision, error, side=_PENALIZED, **more):
    return _described(
        network, side, "checked", precision=precision, error=error, **more
    )


@pytest.mark.parametrize(
    "program, is_well",
    [
        pytest.param(_checked("MLP", "float32", 1e-6), True, id="rounding"),
        pytest.param(_checked("MLP", "float32", 1e-3), False, id="more"),
        pytest.param(
            _checked("VGG11", "float32", 0.007), True, id="a ReLU near zero"
        ),
        pytest.param(_checked("VGG11", "float32", 0.7), False, id="no penalty"),
        pytest.param(
            _checked("VGG11", "float32", 0.0, error_of_loss=0.05),
            False,
            id="wrong loss",
        ),
        pytest.param(
            _checked("VGG11", "float32", float("nan")), False, id="no number"
        ),
        pytest.param(_checked("VGG11", "float64", 0.007), False, id="float64"),
        pytest.param(
            _checked("MLP", "float32", 1e-4, "FP finite difference"),
            True,
            id="differences",
        ),
        pytest.param(
            _checked("MLP", "mixed_bfloat16", 0.7), True, id="bfloat16"
        ),
    ],
)
def test_results_are_wrong_if_they_are_off_by_more_than_is_known(
    card, capsys, program, is_well
):
    _, found = card([program], "--parts", "check_all", "--no_torch")
    assert found == is_well
    assert ("Off by more" in capsys.readouterr().out) != is_well


def test_no_precision_speaks_for_another_one(card, capsys):
    programs = [
        _checked("MLP", "float64", 1e-9),
        _checked("MLP", "float32", 0.7),
    ]
    _, is_well = card(programs, "--parts", "check_all", "--no_torch")
    assert not is_well
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == (
        "MLP/float32/FP every 1/fresh/checked: gradient 7.0e-01, not 1e-05"
    )


def test_float64_is_checked_where_float32_tells_little(card):
    programs = [
        _checked(network, precision, 0.0)
        for network in ("MLP", "VGG11")
        for precision in ("float32", "float64")
    ]
    found, _ = card(
        programs, "--parts", "check", "--no_torch", "--seconds", "1000"
    )
    checked = {tuple(name.split("/")[:2]) for name in found["checks"]}
    assert checked == {
        ("MLP", "float32"),
        ("VGG11", "float32"),
        ("VGG11", "float64"),
    }
