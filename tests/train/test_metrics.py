import io
import json
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

from cfpp.train import metrics


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    with mock.patch.object(metrics.time, "monotonic") as monotonic:
        monotonic.return_value = 100.0
        yield monotonic


def test_progress_off_a_terminal_is_a_line_a_log(clock):
    out = io.StringIO()
    progress = metrics.Progress("stage", 100, 0, out)
    for step in range(1, 21):
        progress.step(step)
        clock.return_value += 0.5
    assert progress.log(20, 0.25) == 2.0
    assert out.getvalue() == "stage: step 20/100, loss 0.25, 2 steps/s, 0:40 left\n"


def test_what_is_done_between_steps_is_no_time_of_theirs(clock):
    progress = metrics.Progress("stage", 100, 0, io.StringIO())
    progress.step(1)
    with progress.paused():
        clock.return_value += 60
    clock.return_value += 10
    assert progress.log(20, 0.25) == 2.0


def test_progress_on_a_terminal_rewrites_one_line(clock):
    out = Terminal()
    progress = metrics.Progress("stage", 10_000, 0, out)
    progress.step(1)
    clock.return_value += 1.0
    progress.log(1, 123.0)
    progress.step(2)  # too soon to be shown
    clock.return_value += 1.0
    progress.step(3)
    progress.say("done")
    lines = out.getvalue().split("\r")
    assert lines[:2] == ["", "stage: step 1/10000"]
    assert lines[2].startswith("stage: step 1/10000, loss 123, 1 steps/s, 2:46:39 left")
    assert lines[3].startswith("stage: step 3/10000, loss 123")
    assert lines[4].isspace() and lines[5] == "done\n"


def test_a_restarted_file_has_each_step_once_in_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "a": 1.0}\nnonsense\n{"step": 4, "a": 2.0}\n{"step": 3')
    writer = metrics.Writer(tmp_path, 3)
    writer.write_scalars(4, {"a": np.float32(3)})
    rows = [json.loads(line) for line in path.read_text().splitlines()]  # before it is closed
    assert rows == [{"step": 2, "a": 1.0}, {"step": 4, "a": 3.0}]
    writer.write_images(4, {"picture": np.zeros((1, 4, 4, 3), np.uint8)})
    writer.close()


def test_scalars_reach_tensorboard(tmp_path):
    pytest.importorskip("tensorflow")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.util import tensor_util

    writer = metrics.Writer(tmp_path, 0)
    writer.write_scalars(5, {"loss": 0.5})
    writer.write_images(5, {"samples": np.zeros((1, 4, 4, 3), np.uint8)})
    writer.write_texts(0, {"parameters": "none"})
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Tensors("loss")
    assert event.step == 5 and tensor_util.make_ndarray(event.tensor_proto) == 0.5
    assert "samples" in events.Tags()["tensors"]


def test_importing_cfpp_imports_no_tensorflow():
    script = (
        "import importlib, pkgutil, sys, cfpp\n"
        "for module in pkgutil.walk_packages(cfpp.__path__, 'cfpp.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
        "print([name for name in ('tensorflow', 'tensorboard') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
