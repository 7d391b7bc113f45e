"""Flags of quick runs, for every test."""

from absl import flags
import experiments
import pytest


@pytest.fixture(autouse=True)
def _flags(tmp_path):
    flags.FLAGS(["test", *experiments.QUICK, f"--output_dir={tmp_path}"])
    yield
    flags.FLAGS.unparse_flags()
