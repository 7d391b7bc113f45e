"""Asks pyright whether the types of all public names are known.

What Keras, TensorFlow and TFDS leave unknown stays so in what is derived from
their classes, and is not counted.
"""

from __future__ import annotations

import json
import subprocess
import sys

_COMMAND = ("-m", "pyright", "--verifytypes", "keras_fisher")
# The causes that are not ours: a base class without types, and what has it.
_FROM_ELSEWHERE = ("base class unknown", "metaclass unknown")


def unknown(report: dict) -> list[str]:
    """Messages on symbols whose types we have not said."""
    symbols = report["typeCompleteness"]["symbols"]
    derived = {
        symbol["name"].rpartition(".")[2]
        for symbol in symbols
        for found in symbol["diagnostics"]
        if any(text in found["message"] for text in _FROM_ELSEWHERE)
    }
    messages = []
    for symbol in symbols:
        for found in symbol["diagnostics"]:
            first, *rest = found["message"].splitlines()
            if found["severity"] != "error":
                continue
            if any(text in first for text in _FROM_ELSEWHERE):
                continue
            if any(f'"{name}' in "".join(rest) for name in derived):
                continue
            messages.append(f"{symbol['name']}: {first} {' '.join(rest)}")
    return messages


def main() -> int:
    """Prints what is unknown; the exit status says whether anything is."""
    done = subprocess.run(
        [sys.executable, *_COMMAND, "--ignoreexternal", "--outputjson"],
        capture_output=True,
        text=True,
        check=False,
    )
    messages = unknown(json.loads(done.stdout))
    print("\n".join(messages) or "All types of ours are known.")
    return bool(messages)


if __name__ == "__main__":
    sys.exit(main())
