"""Checks and times exported programs on a GPU, beside PyTorch.

Needs JAX, NumPy and PyTorch, no TensorFlow. Every program's results are
compared with those that TensorFlow found for the same arguments; then the
steps of a network and those of PyTorch take turns on the card. What matters
most comes first, results are written as they come, what fails or does not fit
into the time is left out and named. `tables.py` makes the tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
import concurrent.futures
import json
from pathlib import Path
import subprocess
import sys
import time
import traceback
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import profiles
import runtime
import tables
import tolerances
import torch_peer
from workers import machine

PLAIN, PENALIZED, TENTH = tables.PLAIN, tables.PENALIZED, tables.TENTH
_EIGHTH = "FP fraction 1/8"
_ASKED = "name,driver_version,memory.total"
_TURN = 0.15  # seconds
_COMPILED = ["plain compiled", "FP compiled"]  # sides of PyTorch
_WARM_UP = 3


class Report:
    """What was found, written whenever something is added."""

    def __init__(self, path: Path, seconds: float):
        self._path, self._begin, self._seconds = path, time.time(), seconds
        self.found: dict[str, Any] = {
            "about": {},
            "checks": {},
            "programs": {},
            "blocks": [],
            "peers": {},
            "profiles": {},
            "left out": [],
        }

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._seconds - (time.time() - self._begin)

    def say(self, text: str) -> None:
        print(f"{time.time() - self._begin:6.1f} s  {text}", flush=True)

    def write(self) -> None:
        self._path.write_text(json.dumps(self.found, indent=1), "utf-8")

    def leave_out(self, what: str, why: str) -> None:
        self.found["left out"].append([what, why])
        self.say(f"left out: {what}: {why}")


def about() -> dict[str, str]:
    """The card and the versions."""
    found = {
        "python": sys.version.split()[0],
        "jax": runtime.jax.__version__,
        "numpy": runtime.np.__version__,
        "processor": machine.processor(),
        "device": str(runtime.jax.devices()[0].device_kind),
        "runtime": runtime.platform_version(),
    }
    try:
        asked = subprocess.run(
            ["nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
        found["card"] = asked.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["card"] = "none"
    return found


def key(described: dict[str, Any], mode: str) -> str:
    return described["name"].replace("/float32/", f"/{mode}/")


class Programs:
    """Compiles programs, several at once."""

    def __init__(self, report: Report, threads: int):
        self._report, self._threads = report, threads
        self._compiled: dict[str, runtime.Program] = {}
        self._failed: set[str] = set()

    def compile(
        self, jobs: Iterable[tuple[dict, str]], until: float
    ) -> dict[str, runtime.Program]:
        """Compiles programs as long as so many seconds are left.

        Args:
            jobs: Descriptions and modes, the most important first.
            until: Seconds that have to be left for what comes afterwards.

        Returns:
            Those of them that are compiled, by `key`.
        """
        jobs = {key(d, mode): (d, mode) for d, mode in jobs}
        missing = [
            k for k in jobs if k not in self._compiled and k not in self._failed
        ]
        pool = concurrent.futures.ThreadPoolExecutor(self._threads)
        futures = {pool.submit(self._one, *jobs[k], until): k for k in missing}
        for future in concurrent.futures.as_completed(futures):
            name = futures[future]
            try:
                program = future.result()
            except Exception as error:  # Whatever the compiler refuses.
                self._failed.add(name)
                self._report.leave_out(name, f"{error!r:.300}")
                continue
            if program is None:
                self._report.leave_out(name, "no time to compile")
                continue
            self._compiled[name] = program
            self._report.found["programs"][name] = {
                "share": program.described["share"],
                "batch_size": program.described["batch_size"],
                "compile_seconds": program.compile_seconds,
                "memory": program.memory,
                "statistics": runtime.statistics(program.optimized()),
            }
            self._report.say(f"compiled {name}: {program.compile_seconds:.1f}")
        pool.shutdown()
        self._report.write()
        return {k: self._compiled[k] for k in jobs if k in self._compiled}

    def compiled(self, sides: list[str]) -> dict[str, runtime.Program]:
        """All programs of some sides that are compiled to be timed."""
        return {
            name: program
            for side in sides
            for name, program in self._compiled.items()
            if program.described["side"] == side and name.endswith("/timed")
        }

    def _one(self, described, mode, until):
        if self._report.left < until:
            return None
        return runtime.Program(described, exact=mode == "float32")


def check(report: Report, name: str, program: runtime.Program) -> None:
    """Compares a program's results with those of TensorFlow."""
    program.begin(runtime.Arguments())
    program.step()
    errors = program.errors()
    program.end()
    worst = program.worst(errors)
    outputs = {
        result["name"]: errors[result["name"]]
        for result in program.described["results"]
        if result["feeds"] is None
    }
    report.found["checks"][name] = {
        "gradient": errors.get("gradient"),
        "worst": [worst, errors[worst]],
        "outputs": outputs,
    }
    gradient = errors.get("gradient")
    report.say(
        f"checked {name}: "
        + (f"gradient {gradient:.1e}, " if gradient is not None else "")
        + f"worst {errors[worst]:.1e} ({worst})"
    )


def block(
    report: Report,
    programs: dict[str, runtime.Program],
    peer: torch_peer.Peer | None,
    rounds: int,
) -> None:
    """Times programs of one network and PyTorch's sides in turns.

    Args:
        report: Takes the seconds of a step, of each turn.
        programs: By key, all of one network and mode.
        peer: Has its sides loaded.
        rounds: Turns of each.
    """
    make, turns = runtime.Arguments(), {}
    for name, program in programs.items():
        try:
            program.begin(make)
            program.run(_WARM_UP)
            turns[name] = program.run
        except Exception as error:  # As of too little memory.
            program.end()
            report.leave_out(name, f"{error!r:.300}")
    make.clear()
    if not turns:
        # PyTorch's sides alone compare with nothing.
        if peer:
            peer.clear()
        return
    for side in peer.loaded if peer else ():
        turns[f"PyTorch {side}"] = lambda steps, s=side: peer.run(s, steps)
    counts = {k: max(2, int(_TURN / run(2)) + 1) for k, run in turns.items()}
    seconds = {k: [] for k in turns}
    for _ in range(rounds):
        for name, run in turns.items():
            seconds[name].append(run(counts[name]))
    for program in programs.values():
        program.end()
    if peer:
        peer.clear()
    report.found["blocks"].append(seconds)
    report.write()
    for name, values in seconds.items():
        median = sorted(values)[len(values) // 2]
        report.say(f"timed {name}: {1000 * median:.3f} ms")


class Session:
    """All that is done on a card.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: argparse.Namespace):
        self._options = options
        output = Path(options.output)
        output.mkdir(parents=True, exist_ok=True)
        self._report = Report(output / "gpu.json", options.seconds)
        self._programs = Programs(self._report, options.threads)
        self._described = list(runtime.descriptions(Path(options.programs)))
        known = [*dict.fromkeys(d["network"] for d in self._described)]
        known = options.networks or known
        self._networks = [n for n in known if ", large" not in n]
        self._large_networks = [n for n in known if ", large" in n]
        self._peer = None if options.no_torch else torch_peer.Peer()

    def _jobs(self, kind: str, mode: str, sides, networks=None) -> list:
        precision = "float32" if mode == "tf32" else mode
        networks = self._networks if networks is None else networks
        return [
            (d, mode)
            for side in sides
            for network in networks
            for d in self._described
            if d["side"] == side
            and d["kind"] == kind
            and d["precision"] == precision
            and d["network"] == network
            # Is Keras's own, and another reading of two variables.
            and not (d["plan"] == "plain" and side != PLAIN)
        ]

    def _sides(self) -> list[str]:
        return [*dict.fromkeys(d["side"] for d in self._described)]

    def run(self) -> None:
        """Everything, the most important first."""
        found = about()
        versions = {
            f"{k} (exported)": v
            for k, v in self._described[0]["versions"].items()
        }
        commits = {d["commit"] for d in self._described}
        found |= {**versions, "commit": ", ".join(sorted(commits))}
        found |= self._about_torch()
        self._report.found["about"] = found
        self._report.say(str(found))
        for part in self._options.parts:
            try:
                getattr(self, f"_{part}")()
            except Exception:  # The other parts may well work.
                self._report.leave_out(part, traceback.format_exc())
            self._report.write()

    def _about_torch(self) -> dict[str, str]:
        """Its versions; it is left out if it does not run here."""
        if self._peer is None:
            return {}
        try:
            found = self._peer.about()
        except RuntimeError as error:
            self._report.leave_out("PyTorch", str(error))
            self._peer.end()
            self._peer = None
            return {}
        return {f"PyTorch {k}": v for k, v in found.items()}

    def wrong(self) -> list[str]:
        """Checked programs whose results are off."""
        return tolerances.wrong(self._report.found["checks"])

    def _smoke(self) -> None:
        jobs = self._jobs("checked", "float32", [PENALIZED], ["SimpleCNN"])
        compiled = self._programs.compile(jobs, 0)
        for name, program in compiled.items():
            check(self._report, name, program)
        if not compiled:
            raise SystemExit("Not even the smallest program runs here.")

    def _check(self) -> None:
        jobs = self._jobs("checked", "float32", [PENALIZED])
        kinked = [n for n in self._networks if tolerances.needs_float64(n)]
        jobs += self._jobs("checked", "float64", [PENALIZED], kinked)
        jobs += self._jobs("checked", "float32", self._sides(), ["SimpleCNN"])
        self._checked(jobs)

    def _check_all(self) -> None:
        for mode in ("float32", "float64", "mixed_bfloat16"):
            self._checked(self._jobs("checked", mode, self._sides()))

    def _checked(self, jobs: list) -> None:
        until = self._options.reserve
        for name, program in self._programs.compile(jobs, until).items():
            if name in self._report.found["checks"]:
                continue
            try:
                check(self._report, name, program)
            except Exception as error:  # Others may well run.
                self._report.leave_out(name, f"{error!r:.300}")

    def _core(self) -> None:
        sides = [PENALIZED, PLAIN, TENTH, _EIGHTH]
        self._timed("tf32", sides, self._options.reserve)

    def _large(self) -> None:
        sides = [PENALIZED, PLAIN, TENTH, _EIGHTH]
        self._timed("tf32", sides, 20, self._large_networks)

    def _bfloat16(self) -> None:
        self._timed("mixed_bfloat16", [PENALIZED, PLAIN], 20)

    def _full_float32(self) -> None:
        self._timed("float32", [PENALIZED, PLAIN], 20)

    def _others(self) -> None:
        known = (PENALIZED, TENTH, _EIGHTH)
        sides = [s for s in self._sides() if s not in known]
        self._timed("tf32", sides, 20)

    def _timed(
        self, mode: str, sides: list[str], until: float, networks=None
    ) -> None:
        networks = self._networks if networks is None else networks
        jobs = self._jobs("timed", mode, sides, networks)
        compiled = self._programs.compile(jobs, until)
        while self._options.after and not Path(self._options.after).exists():
            time.sleep(0.5)
        for network in networks:
            mine = {
                k: p
                for k, p in compiled.items()
                if p.described["network"] == network
            }
            if mine:
                has_peer = PENALIZED in sides
                peers = self._options.torch_sides if has_peer else []
                self._in_turns(mine, mode, peers)

    def _in_turns(
        self,
        programs: dict[str, runtime.Program],
        mode: str,
        torch_sides: list[str],
    ) -> None:
        """Times programs of one network, beside PyTorch's sides if any."""
        first = next(iter(programs.values())).described
        network = first["network"]
        if self._report.left < 15:
            self._report.leave_out(f"{network}/{mode}", "no time")
            return
        peer = self._peer if torch_sides else None
        try:
            if peer:
                batch = first["arguments"][:2]
                self._load(network, mode, batch, torch_sides)
            block(self._report, programs, peer, self._options.rounds)
        except Exception as error:  # Other networks may well run.
            self._report.leave_out(f"{network}/{mode}", f"{error!r:.300}")
            if peer:
                self._peer.end()
                self._peer = torch_peer.Peer()

    def _load(
        self, network: str, mode: str, batch: list, sides: list[str]
    ) -> None:
        for side in sides:
            found = self._peer.load(network, mode, side, batch)
            name = f"{network}/{mode}/PyTorch {side}"
            self._report.found["peers"][name] = found
            if "error" in found:
                self._report.leave_out(name, found["error"])

    def _profile(self) -> None:
        """Profiles the core of what is compiled, first of all networks."""
        compiled = self._programs.compiled([PLAIN, PENALIZED, _EIGHTH, TENTH])
        make = runtime.Arguments()
        for name, program in compiled.items():
            if self._report.left < 5:
                break
            program.begin(make)
            program.run(2)
            found = profiles.profiled(program.run, steps=3)
            program.end()
            make.clear()
            self._report.found["profiles"][name] = found
            self._report.say(f"profiled {name}: {found['milliseconds']:.3f} ms")
            self._report.write()

    def _optimized(self) -> None:
        compiled = self._programs.compiled([PENALIZED, PLAIN, _EIGHTH])
        profiles.archive(
            Path(self._options.output) / "optimized.tar.gz",
            {name: program.optimized() for name, program in compiled.items()},
        )

    def _compiled_torch(self) -> None:
        """PyTorch's compiled sides, beside ours once more."""
        if self._peer is None:
            self._report.leave_out("compiled_torch", "no PyTorch")
            return
        for network in self._networks:
            if self._report.left < 60:
                self._report.leave_out(f"{network}/compiled", "no time")
                continue
            jobs = self._jobs("timed", "tf32", [PENALIZED, PLAIN], [network])
            compiled = self._programs.compile(jobs, 30)
            if compiled:
                self._in_turns(compiled, "tf32", _COMPILED)


_PARTS = ("smoke", "core", "bfloat16", "large", "profile", "optimized", "check")
_MORE = ("others", "full_float32", "compiled_torch", "check_all")


def main() -> None:
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=470.0, help="Time for everything.")
    add("--reserve", type=float, default=150.0, help="Not for compiling first.")
    add("--rounds", type=int, default=5, help="Turns of each side.")
    add("--threads", type=int, default=8, help="Programs compiled at once.")
    add("--networks", nargs="*", help="Which networks; all by default.")
    add(
        "--parts",
        nargs="*",
        default=_PARTS,
        choices=_PARTS + _MORE,
        help="In this order.",
    )
    add("--after", help="Nothing is timed before this file exists.")
    add("--no_torch", action="store_true", help="Without PyTorch.")
    add("--torch_sides", nargs="*", default=["plain", "FP"], help="Which.")
    session = Session(parser.parse_args())
    session.run()
    wrong = session.wrong()
    print("\n".join(["Off by more than rounding:", *wrong] if wrong else []))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
