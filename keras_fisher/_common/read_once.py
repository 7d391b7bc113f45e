"""Attributes that a traced step has read, and would not see changed."""

from __future__ import annotations

from typing import Any


class ReadOnce:
    """Refuses what would be silently ignored: to assign an attribute again."""

    def _is_read_once(self, name: str) -> bool:
        """Whether an attribute keeps its first value."""
        raise NotImplementedError

    _instead: str  # what to do, in an error

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ and self._is_read_once(name):
            kind = type(self).__name__
            raise AttributeError(
                f"`{name}` of `{kind}` is set when it is made: steps that are "
                f"traced already would not see another value. Received: "
                f"{name}={value!r}. {self._instead}"
            )
        super().__setattr__(name, value)
