"""Whole runs of real stages by `cfpp.main`: several processes and devices, and random ends."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent

pytestmark = pytest.mark.slow(200)


def results(out, *command):
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(out.read_text())


def test_the_smoke_quickstart_on_8_devices_loses_as_on_one(tmp_path):
    """A loss is a mean of many terms, summed in another order, by networks that differ likewise."""
    found = results(tmp_path / "found.json", "-m", "tests.parallel.smoke", tmp_path)
    alone, divided = found["one device"], found["two processes of four devices"]
    assert [len(losses) for losses in alone.values()] == [4, 6, 4, 2]
    for stage, losses in divided.items():
        assert losses == pytest.approx(alone[stage], rel=1e-4), stage


def test_runs_that_are_killed_end_as_if_they_were_not(tmp_path):
    out = tmp_path / "survive.json"
    options = ["--kills=2", "--terminations=1", "--pace=0.5", f"--out={out}"]
    found = results(out, "benchmarks/survive.py", *options)
    for name, limit in {"on the same mesh": 0.0, "on other meshes": 1e-5}.items():
        run = found["runs"][name]
        assert sorted(hit["signal"] for hit in run["hits"]) == ["SIGKILL"] * 2 + ["SIGTERM"]
        assert max(run["model"], run["losses"]) <= limit, name
