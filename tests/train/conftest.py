import contextlib

import pytest

from tests.train import fake


@pytest.fixture(autouse=True)
def _fake_stage():
    with contextlib.ExitStack() as stack:
        for patch in fake.patches():
            stack.enter_context(patch)
        yield
