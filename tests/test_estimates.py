"""An Estimate is a float with its error."""

from __future__ import annotations

import copy
import pickle

import numpy as np

from keras_fisher import estimates


def test_an_estimate_is_a_float_with_an_error():
    estimate = estimates.Estimate(331.0, 1.5)
    assert isinstance(estimate, float)
    assert estimate == 331.0
    assert estimate / 2 == 165.5
    assert type(estimate / 2) is float
    assert f"{estimate:.1f}" == "331.0"
    assert repr(estimate) == "331 ± 1.5"
    assert repr(estimates.Estimate(2.0)) == "2"
    again = pickle.loads(pickle.dumps(estimate))
    assert again == estimate
    assert again.standard_error == 1.5


def test_estimates_are_an_array_with_errors():
    values = estimates.Estimates([1.0, 2.0], [0.1, 0.2])
    np.testing.assert_array_equal(values.standard_error, [0.1, 0.2])
    assert values.sum() == 3.0
    for again in (pickle.loads(pickle.dumps(values)), copy.deepcopy(values)):
        np.testing.assert_array_equal(again, values)
        np.testing.assert_array_equal(again.standard_error, [0.1, 0.2])
    # Of what is computed from them, the error is not known.
    assert (2 * values).standard_error is None
    assert values[:1].standard_error is None
