"""What a run tells: `metrics.jsonl`, TensorBoard, and one line on the screen."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import numpy as np
from absl import logging
from etils import epath

from cfpp import paths
from cfpp.errors import how_to_install
from cfpp.parallel import hosts


def writer(workdir: epath.PathLike, first_step: int) -> "Writer":
    """A `Writer` in the first process; in the others one that does nothing."""
    return Writer(workdir, first_step) if hosts.is_first() else _Silence()


class Writer:
    """Writes to `metrics.jsonl` and, where TensorFlow is installed, to TensorBoard.

    `metrics.jsonl` has one JSON object a line: {"step": 20, "loss": 0.1, ...}. The methods are
    those of `clu.metric_writers.MetricWriter`, which is no base class of this one because its
    module imports TensorFlow.
    """

    def __init__(self, workdir: epath.PathLike, first_step: int):
        """Opens both.

        Args:
          workdir: the working directory.
          first_step: rows of later steps, from a run that was interrupted, are removed.
        """
        workdir = epath.Path(workdir)
        path = workdir / "metrics.jsonl"
        self._path, self._rows = path, []
        if path.exists():
            self._rows = _rows_until(first_step, path.read_bytes().decode(errors="replace"))
            paths.replace_text(path, "".join(self._rows))
        self._tensorboard = _tensorboard(workdir / "tensorboard")

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes numbers by name; the row is in the file when this returns."""
        row = {"step": step} | {name: float(value) for name, value in scalars.items()}
        self._rows.append(json.dumps(row) + "\n")
        if paths.is_remote(self._path):  # an object in a bucket cannot grow
            self._path.write_text("".join(self._rows))
        else:
            with self._path.open("a") as file:
                file.write(self._rows[-1])
        logging.info("step %d: %s", step, row)
        if self._tensorboard:
            self._tensorboard.write_scalars(step, scalars)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes pictures by name, each `[N, H, W, 3]`, uint8 or float in 0 .. 1: TensorBoard.

        Videos have no method: clu's writer to TensorBoard leaves them out.
        """
        if self._tensorboard:
            self._tensorboard.write_images(step, images)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts by name: TensorBoard."""
        if self._tensorboard:
            self._tensorboard.write_texts(step, texts)

    def close(self) -> None:
        """Writes what is pending."""
        if self._tensorboard:
            self._tensorboard.close()


class _Silence:
    """Has a writer's methods, which do nothing."""

    def __getattr__(self, name: str):
        return lambda *_: None


def _rows_until(last_step: int, text: str) -> list[str]:
    rows = []
    for line in text.splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= last_step:
                rows.append(line)
        except (ValueError, TypeError, KeyError):
            continue  # not a whole row: its writer was killed
    return rows


def _tensorboard(folder: epath.Path):
    """Clu's writer to TensorBoard, in a thread of its own; None where TensorFlow is missing."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # which would be announced on stderr
    try:
        from clu import metric_writers  # imports TensorFlow: seconds, so only here
    except ImportError:
        logging.info("no TensorFlow, so no TensorBoard; %s", how_to_install("tensorboard"))
        return None
    return metric_writers.AsyncWriter(metric_writers.SummaryWriter(os.fspath(folder)))


class Progress:
    """One line that shows how far a run is: rewritten on a terminal, else printed now and then.

    `clu.periodic_actions.ReportProgress` is not used: its module imports TensorFlow, and it has no
    line that is rewritten.
    """

    SECONDS_BETWEEN_UPDATES = 0.2  # on a terminal

    def __init__(self, name: str, steps: int, first_step: int, out: TextIO | None = None):
        """Begins.

        Args:
          name: shown first.
          steps: at the end of the run.
          first_step: steps done before this start.
          out: where to write; if None, stdout in the first process and nowhere in others.
        """
        self.name, self._steps = name, steps
        self._out = out or (sys.stdout if hosts.is_first() else open(os.devnull, "w"))
        self._first_step, self._mark = first_step, None  # (step, time) of the last log
        self._rate = self._loss = None
        self._written, self._width = 0.0, 0

    def step(self, step: int) -> None:
        """Tells that a step has been started; shown on a terminal."""
        now = time.monotonic()
        if self._mark is None:
            self._mark = (self._first_step, now)  # after compilation
        if self._out.isatty() and now > self._written + self.SECONDS_BETWEEN_UPDATES:
            self._written = now
            self._rewrite(self._line(step))

    def log(self, step: int, loss: float) -> float:
        """Shows a step whose loss is known; returns the steps a second since the last log."""
        now = time.monotonic()
        self._rate = (step - self._mark[0]) / max(now - self._mark[1], 1e-9)
        self._mark, self._loss, self._written = (step, now), loss, now
        if self._out.isatty():
            self._rewrite(self._line(step))
        else:
            print(self._line(step), file=self._out, flush=True)
        return self._rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While open, time does not count as that of steps."""
        begin = time.monotonic()
        yield
        step, mark = self._mark
        self._mark = (step, mark + time.monotonic() - begin)

    def say(self, message: str, everywhere: bool = False) -> None:
        """Prints a line of its own; with `everywhere`, so do all other processes."""
        if self._width:
            self._rewrite("")
            self._out.write("\r")
            self._width = 0
        print(message, file=sys.stdout if everywhere else self._out, flush=True)

    def _line(self, step: int) -> str:
        line = f"{self.name}: step {step}/{self._steps}"
        if self._rate is not None:
            left = (self._steps - step) / self._rate
            line += f", loss {self._loss:.4g}, {self._rate:.3g} steps/s, {duration(left)} left"
        return line

    def _rewrite(self, line: str) -> None:
        self._out.write("\r" + line.ljust(self._width))
        self._out.flush()
        self._width = len(line)


def duration(seconds: float) -> str:
    """Minutes and seconds, as 2:03, or hours, as 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
