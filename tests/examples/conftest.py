"""What the tests of example scripts share."""

import pytest


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Shared by the tests, so that data are prepared once."""
    return tmp_path_factory.mktemp("data")
