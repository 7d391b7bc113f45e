"""What setup.cfg cannot say: where the links of README.md lead on an index.

A package index shows README.md without the files beside it. With
`REPOSITORY_URL` in the environment, like https://host/owner/name, its links
and pictures lead to the tag of the version there. Without, they stay as they
are, and work in the repository alone.
"""

import os
import pathlib
import re

import setuptools

_ROOT = pathlib.Path(__file__).parent
# A link to a file beside README.md, with or without `!` for a picture.
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+://|#)([^)\s]+)\)")


def _version() -> str:
    text = (_ROOT / "keras_fisher" / "__init__.py").read_text("utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


def _on_an_index(readme: str, repository: str) -> str:
    """README.md with links that need no files beside it."""
    tag = f"v{_version()}"

    def absolute(match: re.Match) -> str:
        picture, text, link = match.groups()
        kind = "raw" if picture else "blob"
        return f"{picture}[{text}]({repository}/{kind}/{tag}/{link})"

    return _LINK.sub(absolute, readme)


def _arguments() -> dict:
    repository = os.environ.get("REPOSITORY_URL", "").rstrip("/")
    if not repository:
        return {}
    readme = (_ROOT / "README.md").read_text("utf-8")
    return {
        "url": repository,
        "long_description": _on_an_index(readme, repository),
        "long_description_content_type": "text/markdown",
    }


setuptools.setup(**_arguments())
