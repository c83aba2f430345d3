"""Closed forms are float64; the networks of the library are float32."""

import jax
import pytest


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield
