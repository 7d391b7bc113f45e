"""What a package index shows, and what an import brings in."""

from __future__ import annotations

import configparser
import json
import pathlib
import re
import runpy
import subprocess
import sys

import setuptools

import keras_fisher

_ROOT = pathlib.Path(__file__).parents[1]
# Names under which packages of the extras are imported, where they differ.
_IMPORTED = {"scikit-learn": "sklearn", "keras-hub": "keras_hub"}
_LISTS_WHAT_AN_IMPORT_ADDS = """
import json, sys
import keras, tensorflow, tensorboard
before = set(sys.modules)
import keras_fisher
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def _setup() -> configparser.ConfigParser:
    setup = configparser.ConfigParser()
    setup.read(_ROOT / "setup.cfg")
    return setup


def _optional() -> set[str]:
    """What the extras of users install, by the names of imports."""
    extras = _setup()["options.extras_require"]
    lines = [
        line
        for extra in ("data", "hub", "plot")
        for line in extras[extra].splitlines()
        if line and not line.startswith("%")
    ]
    names = {re.match(r"[\w-]+", line)[0] for line in lines}
    return {_IMPORTED.get(name, name) for name in names}


def test_an_import_adds_no_optional_package():
    result = subprocess.run(
        [sys.executable, "-c", _LISTS_WHAT_AN_IMPORT_ADDS],
        capture_output=True,
        text=True,
        check=True,
        cwd=_ROOT,
    )
    added = {name.partition(".")[0] for name in json.loads(result.stdout)}
    assert "keras_fisher" in added
    assert {"matplotlib", "pandas", "sklearn", "keras_hub"} <= _optional()
    assert not added & _optional()


def test_every_folder_of_the_package_is_in_the_wheel():
    found = {
        "keras_fisher",
        *(
            f"keras_fisher.{name}"
            for name in setuptools.find_packages(str(_ROOT / "keras_fisher"))
        ),
    }
    folders = {
        ".".join(path.parent.relative_to(_ROOT).parts)
        for path in (_ROOT / "keras_fisher").rglob("*.py")
    }
    assert found == folders


def _passed_to_setup(monkeypatch) -> dict:
    passed = {}
    monkeypatch.setattr(setuptools, "setup", passed.update)
    runpy.run_path(str(_ROOT / "setup.py"))
    return passed


def test_links_on_an_index_lead_to_files_of_the_version(monkeypatch):
    address = "https://host.example/owner/name"
    monkeypatch.setenv("REPOSITORY_URL", address + "/")
    version = keras_fisher.__version__
    readme = _passed_to_setup(monkeypatch)["long_description"]
    links = re.findall(r"\]\(([^)\s]+)\)", readme)
    ours = [link for link in links if link.startswith(address)]
    assert len(ours) > 10
    for link in links:
        assert re.match(r"https?://|#", link), link
    for link in ours:
        name = re.sub(rf"^{address}/(raw|blob)/v{version}/", "", link)
        assert (_ROOT / name.partition("#")[0]).exists(), link


def test_without_an_address_the_readme_stays_as_it_is(monkeypatch):
    monkeypatch.delenv("REPOSITORY_URL", raising=False)
    assert _passed_to_setup(monkeypatch) == {}
