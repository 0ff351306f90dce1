"""How all tests are run. Nothing here reaches a network, and every run draws the same examples."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import pytest
from hypothesis import settings

settings.register_profile("fast", derandomize=True, deadline=None, max_examples=6)
settings.register_profile("thorough", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("fast")  # `make test-all` asks for the other


def pytest_configure(config: pytest.Config) -> None:
    """Fixtures, and the seconds of imports that they need, where tests are run: with ``-n`` that is
    in the workers alone.
    """
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.support.fixtures")
