"""What `benchmarks/attention.py` measures."""

import pathlib

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    "platform, large, names",
    [
        ("cpu", False, {"reference", "xla", "tokamax"}),
        ("gpu", True, {"pallas_gpu", "cudnn", "tokamax"}),
        ("tpu", True, {"pallas_tpu", "splash", "tokamax"}),
    ],
)
def test_all_that_run_on_a_platform_are_measured(platform, large, names, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # its scripts import one another
    import attention

    assert set(attention.implementations(platform, large)) == names
