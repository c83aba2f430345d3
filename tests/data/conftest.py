"""Small datasets for the tests, recorded once."""

import ml_collections
import pytest

from cfpp.data import sources
from tests.data.small import make_config


@pytest.fixture(scope="session")
def arena_config(tmp_path_factory) -> ml_collections.ConfigDict:
    """Twelve arena episodes of 16 frames (and 64 for testing), prepared."""
    config = make_config(tmp_path_factory.mktemp("arena"))
    sources.prepare(config)
    return config.lock()
