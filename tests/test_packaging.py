"""What a package index shows, and what an import brings in."""

from __future__ import annotations

import configparser
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
# TensorFlow and Keras import some of them themselves, where they are.
_IMPORTS_WITHOUT = """
import sys
import keras, tensorflow, tensorboard
for name in [*sys.modules]:
    if name.partition(".")[0] in sys.argv[1:]:
        del sys.modules[name]
sys.modules |= dict.fromkeys(sys.argv[1:])
import keras_fisher
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


def test_an_import_needs_no_optional_package():
    assert {"matplotlib", "pandas", "sklearn", "keras_hub"} <= _optional()
    for names, is_there in ((_optional(), True), ({"numpy"}, False)):
        result = subprocess.run(
            [sys.executable, "-c", _IMPORTS_WITHOUT, *names],
            capture_output=True,
            text=True,
            cwd=_ROOT,
        )
        assert (result.returncode == 0) == is_there, result.stderr


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
