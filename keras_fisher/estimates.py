"""Figures with their standard errors."""

from __future__ import annotations

from typing import TYPE_CHECKING
from typing import Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Self


class Estimate(float):
    """A number with its standard error; otherwise a float.

    Attributes:
        standard_error: Standard deviation of the Monte-Carlo error: of what
            another seed would change, with the same data and parameters. 0.0
            for figures without a random part, NaN where nothing is known.

    Args:
        value: The number.
        standard_error: As above.

    Example:
    ```pycon
    >>> trace = keras_fisher.Estimate(331.0, standard_error=1.5)
    >>> trace, 2 * trace, trace.standard_error
    (331 ± 1.5, 662.0, 1.5)
    ```
    """

    standard_error: float

    def __new__(cls, value: float, standard_error: float = 0.0) -> Self:
        self = super().__new__(cls, value)
        self.standard_error = float(standard_error)
        return self

    def __getnewargs__(self) -> tuple[float, float]:
        return float(self), self.standard_error

    def __repr__(self) -> str:
        if self.standard_error == 0:
            return f"{float(self):.6g}"
        return f"{float(self):.4g} ± {self.standard_error:.2g}"

    __str__ = __repr__


class Estimates(np.ndarray):
    """A vector of numbers with their standard errors; otherwise an array.

    Attributes:
        standard_error: Array of the same shape, as of `Estimate`.

    Args:
        values: Array or list.
        standard_error: As above, of the same shape.

    Example:
    >>> shares = keras_fisher.Estimates([1.0, 2.0], standard_error=[0.1, 0.2])
    >>> float(shares.sum()), shares.standard_error.tolist()
    (3.0, [0.1, 0.2])
    """

    standard_error: np.ndarray | None

    def __new__(
        cls, values: npt.ArrayLike, standard_error: npt.ArrayLike | None
    ) -> Self:
        self = np.asarray(values).view(cls)
        self.standard_error = (
            None if standard_error is None else np.asarray(standard_error)
        )
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Estimates, (np.array(self), self.standard_error)

    def __deepcopy__(self, memo: Any) -> Self:
        del memo  # arrays hold nothing that others do
        return type(self)(np.array(self), self.standard_error)

    def __array_finalize__(self, other: np.ndarray | None) -> None:
        # Of what is computed from it, the errors are not known.
        self.standard_error = None
