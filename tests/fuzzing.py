"""How random cases are drawn and tried."""

from __future__ import annotations

import hypothesis
from hypothesis import strategies as st
import keras
import pytest
from random_networks import Network

from keras_fisher import FisherPenalty
from keras_fisher import GradientPenalty
from keras_fisher import InputGradientPenalty
from keras_fisher import UniformLabelPenalty

PENALTIES = (
    FisherPenalty,
    GradientPenalty,
    UniformLabelPenalty,
    InputGradientPenalty,
)
PATTERNS = ("kernel", "bias$", "gamma|beta", "dense", "embedding", ".")
EVEN = st.booleans()


def try_cases(check, cases, few, many, record_property, is_long):
    """Runs `check` on a few of the cases, or many; tells their number."""
    count = 0

    @hypothesis.settings(
        max_examples=many if is_long else few,
        derandomize=not is_long,
        print_blob=is_long,
        database=None,
        deadline=None,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases)
    def run(case):
        nonlocal count
        count += 1
        if count % 20 == 0:
            keras.utils.clear_session()  # and collect what is not freed
        if not is_long and hasattr(case, "mode"):
            case = case._replace(mode="eager")  # nothing to compile
        check(case)

    try:
        run()
    finally:
        record_property("random_cases", count)


few_or_many = pytest.mark.parametrize(
    "is_long",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["few", "many"],
)


@st.composite
def random_penalties(
    draw, network: Network, kinds=PENALTIES, schedule=False, methods=True
):
    kinds = [
        kind
        for kind in kinds
        if not (kind is InputGradientPenalty and network.is_integer)
        and not (kind is UniformLabelPenalty and network.family == "gaussian")
    ]
    # The loops do not know how to bound.
    options = {"bound": None}
    if schedule:
        options["every"] = draw(st.sampled_from((1, 2, 2, 3, 4)))
        options["reuse"] = draw(EVEN)
        options["start"] = draw(st.sampled_from((0, 0, 1, 2)))
        length = draw(st.sampled_from((None, None, 1, 3)))
        if length is not None:
            options["stop"] = options["start"] + length
    if draw(EVEN):
        options["fraction"] = draw(st.sampled_from((0.01, 0.3, 0.5, 0.8)))
    if draw(EVEN):
        options["micro_batch_size"] = draw(st.sampled_from((1, 2, 3, 4)))
    if methods and draw(st.integers(0, 3)) == 3:
        options["method"] = "finite_difference"
    if draw(st.integers(0, 2)) == 2:
        options["exclude"] = [draw(st.sampled_from(PATTERNS))]
    kind = draw(st.sampled_from(kinds))
    return kind(draw(st.sampled_from((0.5, 0.03, 2.0))), **options)


def modes(graph: int, xla: int):
    """Eagerly, but in a graph or with XLA this many times out of 40."""
    return st.sampled_from(
        ("eager",) * (40 - graph - xla) + ("graph",) * graph + ("xla",) * xla
    )
