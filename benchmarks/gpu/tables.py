"""Makes the tables of what `card.py` and `train.py` found on GPUs.

Needs only the standard library. Writes `gpu.md` and `gpu.json` from the files
of one or several runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
import json
import math
from pathlib import Path
import statistics
from typing import Any

PLAIN, PENALIZED, TENTH = "keras.Model", "FP every 1", "FP every 10"
_MODES = {
    "tf32": "float32, products in TF32 (TensorFlow's default on such cards)",
    "mixed_bfloat16": "mixed_bfloat16",
    "float32": "float32, products in float32",
}


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def worst(errors: Iterable[float]) -> float:
    """The largest error; of results that are NaN it is infinite."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def name_parts(name: str) -> dict[str, str]:
    """Parts of the name of a program."""
    network, mode, *rest = name.split("/")
    *side, plan, kind = rest
    return {
        "network": network,
        "mode": mode,
        "side": "/".join(side),
        "plan": plan,
        "kind": kind,
    }


class Block:
    """Seconds of the sides that took turns: of one network, in one mode.

    A side of which a program was left out has none: of a part of its steps
    alone nothing is known of it.
    """

    def __init__(
        self,
        seconds: dict[str, list[float]],
        shares: dict[str, float],
        left_out: Iterable[str] = (),
    ):
        programs = [n for n in seconds if not _is_torch(n)]
        first = name_parts(programs[0])
        self.network, self.mode = first["network"], first["mode"]
        self.sides: dict[str, list[float]] = {}
        self.programs: dict[str, list[str]] = {}
        for name in seconds:
            if name in programs:
                side = name_parts(name)["side"]
                self.programs.setdefault(side, []).append(name)
            else:
                self.sides[name] = seconds[name]
        missing = {n for n in left_out if n.endswith("/timed")} - {*seconds}
        for side, names in self.programs.items():
            prefix = f"{self.network}/{self.mode}/{side}/"
            if any(name.startswith(prefix) for name in missing):
                continue
            parts = [(shares.get(n, 1.0), seconds[n]) for n in names]
            # Steps that are Keras's own have no program.
            rest = 1 - sum(share for share, _ in parts)
            if rest > 1e-6:
                plain = [n for n in names if name_parts(n)["side"] == PLAIN]
                plain = plain or [
                    n for n in programs if name_parts(n)["side"] == PLAIN
                ]
                if not plain:
                    continue
                parts.append((rest, seconds[plain[0]]))
            self.sides[side] = [
                sum(share * value for (share, _), value in zip(parts, values))
                for values in zip(*(values for _, values in parts))
            ]

    def ratios(self, side: str, base: str) -> list[float]:
        """Of a side to another one, turn by turn."""
        return [a / b for a, b in zip(self.sides[side], self.sides[base])]


def _is_torch(name: str) -> bool:
    return name.startswith("PyTorch")


def spread(values: list[float], form: str) -> str:
    """Median and quartiles."""
    if len(values) < 2:
        return form.format(values[0])
    low, middle, high = statistics.quantiles(values, method="inclusive")
    return f"{form.format(middle)} ({form.format(low)}–{form.format(high)})"


def blocks(found: dict[str, Any]) -> list[Block]:
    """All that took turns, but for blocks without a program of ours.

    Those have PyTorch's sides at most, which do not say what network they are.
    """
    shares = {n: p["share"] for n, p in found["programs"].items()}
    left_out = [what for what, _ in found["left out"]]
    return [
        Block(seconds, shares, left_out)
        for seconds in found["blocks"]
        if not all(map(_is_torch, seconds))
    ]


def times(found: dict[str, Any]) -> str:
    """A table of step times for each mode."""
    parts = []
    for mode, title in _MODES.items():
        mine = [b for b in blocks(found) if b.mode == mode]
        if not mine:
            continue
        rows = []
        for block in mine:
            for side in block.sides:
                rows.append(_row(found, block, side))
        columns = ["network", "side", "ms a step", "× plain", "memory, GB"]
        parts.append(f"## Steps, {title}\n\n{table(columns, rows)}")
    return "\n\n".join(parts)


def _row(found: dict[str, Any], block: Block, side: str) -> list[str]:
    is_torch = _is_torch(side)
    base = "PyTorch plain" if is_torch else PLAIN
    ratio = ""
    if base in block.sides:
        ratio = spread(block.ratios(side, base), "{:.2f}")
    if is_torch:
        peer = found["peers"].get(f"{block.network}/{block.mode}/{side}", {})
        memory = peer.get("memory", 0)
    else:
        memory = max(
            found["programs"][n]["memory"]["all"] for n in block.programs[side]
        )
    milliseconds = [1000 * value for value in block.sides[side]]
    return [
        f"{block.network}, {batch_size(found, block)}",
        side,
        spread(milliseconds, "{:.2f}"),
        ratio,
        f"{memory / 1e9:.2f}",
    ]


def batch_size(found: dict[str, Any], block: Block) -> int:
    names = next(iter(block.programs.values()))
    return found["programs"][names[0]]["batch_size"]


def summary(found: dict[str, Any]) -> str:
    """Ratios in short, beside what was aimed at."""
    rows = []
    for block in blocks(found):
        sides = block.sides
        if PENALIZED not in sides or PLAIN not in sides:
            continue
        row = [block.network, block.mode]
        for side in (PENALIZED, TENTH, "FP fraction 1/8"):
            row.append(
                f"{statistics.median(block.ratios(side, PLAIN)):.2f}"
                if side in sides
                else ""
            )
        for side in ("PyTorch FP", "PyTorch FP compiled"):
            row.append(
                f"{statistics.median(block.ratios(side, PENALIZED)):.2f}"
                if side in sides
                else ""
            )
        rows.append(row)
    columns = ["network", "mode", "FP every 1, × plain (aim 3.1)"]
    columns += ["every 10 (1.3)", "fraction 1/8 (1.35)"]
    columns += ["PyTorch FP, × FP (1.3)", "compiled PyTorch FP, × FP"]
    return f"## Summary\n\n{table(columns, rows)}"


def checks(found: dict[str, Any]) -> str:
    """How far results are from those of TensorFlow."""
    rows = []
    for name, check in found["checks"].items():
        parts = name_parts(name)
        gradient = check["gradient"]
        rows.append(
            [
                *(parts["network"], parts["mode"]),
                f"{parts['side']}, {parts['plan']}",
                "" if gradient is None else f"{gradient:.1e}",
                f"{_of_outputs(check):.1e}",
            ]
        )
    columns = ["network", "precision", "step", "gradient"]
    columns.append("loss, Tr(F), penalty")
    title = "## Distance from TensorFlow's results, relative"
    note = (
        "TensorFlow computed them without XLA, on a CPU. In float32 a ReLU "
        "near zero may round to the other side; in float64 none does."
    )
    return f"{title}\n\n{note}\n\n{table(columns, sorted(rows))}"


def _of_outputs(check: dict[str, Any]) -> float:
    """How far what a step returns is off."""
    outputs = check.get("outputs", check.get("scalars", {}))
    return worst(outputs.values() or [check["worst"][1]])


def profile(found: dict[str, Any]) -> str:
    """Where the time of a step goes."""
    rows = [
        [
            name_parts(name)["network"],
            f"{name_parts(name)['side']}, {name_parts(name)['plan']}",
            f"{p['milliseconds']:.2f}",
            f"{p['products']:.2f}",
            f"{p['kernels']:.0f}",
        ]
        for name, p in found["profiles"].items()
        if name_parts(name)["mode"] == "tf32"
    ]
    columns = ["network", "step", "ms on the device"]
    columns += ["in products and convolutions", "kernels"]
    return f"## Kernels of a step, TF32\n\n{table(columns, rows)}"


_KINDS = {
    "convolutions": lambda kind: kind.startswith("__cudnn$conv"),
    "products": lambda kind: "cublas" in kind,
    "Triton": lambda kind: kind == "fusion triton",
    "other fusions": lambda kind: kind in ("fusion kLoop", "fusion kInput"),
    "copies": lambda kind: kind == "copy",
}


def compiled(found: dict[str, Any]) -> str:
    """What XLA has made of the steps."""
    rows = []
    for name, program in found["programs"].items():
        parts = name_parts(name)
        if parts["kind"] != "timed":
            continue
        counts = program["statistics"].items()
        rows.append(
            [
                *(parts["network"], parts["mode"]),
                f"{parts['side']}, {parts['plan']}",
                *(
                    str(sum(n for kind, n in counts if matches(kind)))
                    for matches in _KINDS.values()
                ),
                f"{program['memory']['temporary'] / 1e9:.2f}",
            ]
        )
    columns = ["network", "mode", "step", *_KINDS, "temporary, GB"]
    title = "## What XLA made of the steps"
    return f"{title}\n\n{table(columns, sorted(rows))}"


def without(found: dict[str, Any], mode: str, why: str) -> None:
    """Leaves out of a run what it found in a mode."""
    for part in ("programs", "peers", "profiles", "checks"):
        found[part] = {
            name: value
            for name, value in found[part].items()
            if f"/{mode}/" not in name
        }
    found["blocks"] = [
        block
        for block in found["blocks"]
        if not any(f"/{mode}/" in name for name in block)
    ]
    found["left out"].append([mode, why])


def about(found: dict[str, Any]) -> str:
    return "\n".join(f"- {k}: {v}" for k, v in found["about"].items())


def page(found: list[dict[str, Any]]) -> str:
    """The page of all runs."""
    parts = [
        "# Steps on GPUs",
        "The programs that TensorFlow compiles for `fit`, run by the XLA of "
        "JAX; written by `benchmarks/gpu/tables.py`. Sides of a network took "
        "turns: medians of the turns, and quartiles. Memory is what XLA has "
        "planned, and what PyTorch has allocated at most.",
    ]
    for number, run in enumerate(found, 1):
        parts.append(f"# Run {number}: {run['about']['device']}")
        parts.append(about(run))
        if run["blocks"]:
            parts += [summary(run), times(run)]
        if run["checks"]:
            parts.append(checks(run))
        if run["profiles"]:
            parts.append(profile(run))
        if run["blocks"]:
            parts.append(compiled(run))
        if run["left out"]:
            lines = [
                f"- {what}: {' '.join(why.split())[-200:]}"
                for what, why in run["left out"]
            ]
            parts.append("## Left out\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", help="Files `gpu.json` of runs.")
    parser.add_argument(
        "--output", default="benchmarks/results", help="Where tables go."
    )
    parser.add_argument(
        "--without",
        nargs=2,
        action="append",
        default=[],
        metavar=("MODE", "WHY"),
        help="A mode that is left out of the first run, and why.",
    )
    options = parser.parse_args()
    found = [json.loads(Path(run).read_text("utf-8")) for run in options.runs]
    for mode, why in options.without:
        without(found[0], mode, why)
    output = Path(options.output)
    (output / "gpu.json").write_text(json.dumps(found), "utf-8")
    (output / "gpu.md").write_text(page(found), "utf-8")


if __name__ == "__main__":
    main()
