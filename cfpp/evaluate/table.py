"""What a report holds: the rows and columns of its table, and what these show, in words.

Everything that the words say is computed from the figures. A difference is called one only where
it is larger than twice its standard error.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cfpp.data import arena
from cfpp.evaluate import metrics
from cfpp.evaluate.measure import ByFrame, Settings, intact_frames


class Result(NamedTuple):
    """A row of the table.

    Attributes:
      key: short, fit for file names; 'real' for the real clips.
      name: for people.
      passes: network passes a frame, after the first; None for real clips.
      figures: by column.
      video: uint8 `[E, context + frames, H, W, 3]`.
      by_frame: see `measure.figures`; empty but in the arena.
    """

    key: str
    name: str
    passes: float | None
    figures: dict[str, metrics.Figure]
    video: np.ndarray
    by_frame: ByFrame

    @property
    def family(self) -> str:
        """What the rows of one model share, such as 'cd'."""
        return self.key.split("_")[0]


class Job(NamedTuple):
    """A finished stage: what was trained, and its `metrics.jsonl` as a list of dicts."""

    name: str
    stage: str
    steps: int
    batch_size: int
    log: list[dict[str, float]]

    @property
    def seconds(self) -> float:
        """Time spent in training steps: without compiling, saving and sampling."""
        last, total = 0, 0.0
        for row in self.log:
            total += (row["step"] - last) / row["steps_per_second"]
            last = row["step"]
        return total


class Report(NamedTuple):
    """All that the report tells.

    Attributes:
      data: name of the data source.
      settings: of the evaluation.
      episodes: that its clips, with the Frechet distance's reference, are cut from.
      rows: the real clips first.
      actions: int32 `[E, context + frames]`.
      num_actions: of the world.
      starts: how many there were to sample directions from.
      jobs: the stages, in the order of training.
      real_score: which score stage 3 took for the real one ('causal' or 'bidirectional'); None
        where there is no stage 3.
      perfect_directions: the `directions` that a perfect sampler is expected to score; None where
        they are not measured.
      seconds: that the evaluation took.
      machine: in words.
      versions: of Python and packages.
    """

    data: str
    settings: Settings
    episodes: int
    rows: Sequence[Result]
    actions: np.ndarray
    num_actions: int
    starts: int
    jobs: Sequence[Job]
    real_score: str | None
    perfect_directions: float | None
    seconds: float
    machine: str
    versions: dict[str, str]

    def row(self, key: str) -> Result | None:
        """The row of that key, None where there is none."""
        return next((row for row in self.rows if row.key == key), None)


# The schedules that students and undistilled teachers share: how their rows' keys end, and words.
SCHEDULES = {
    "1": "at 1 step",
    "2": "at 2 steps",
    "4": "at 4 steps",
    "2_first_4": "at 2 steps, with 4 for the first frame",
}

# What is compared by each of them: a topic, the models after it, and before it the first that is
# there.
COMPARED = (
    ("Stage 2", ("cd", "ode"), ("ar",)),
    ("Stage 3", ("dmd",), ("cd", "ode")),
    ("All distillation", ("dmd",), ("ar",)),
)


class Column(NamedTuple):
    """A column of the table.

    Attributes:
      key: of the figure.
      group, title: heading in two parts; the group may span several columns.
      better: 'more' or 'less', or '' where it is not a quality.
      percent: whether the figure is a share.
      digits: after the point.
      meaning: for the reader.
    """

    key: str
    group: str
    title: str
    better: str
    percent: bool
    digits: int
    meaning: str

    def number(self, value: float) -> str:
        """A value in the column's unit."""
        value = value * 100 if self.percent else value
        return f"{value:.{self.digits}f}" if abs(value) < 1e5 else f"{value:.1e}"

    def text(self, figure: metrics.Figure | None) -> tuple[str, str]:
        """Mean and standard error, or two empty texts."""
        if figure is None:
            return "", ""
        error = "" if math.isnan(figure.error) else self.number(figure.error)
        return self.number(figure.mean), error


def columns(report: Report) -> list[Column]:
    """The columns that the report's rows have figures for."""
    settings = report.settings
    last = settings.frames
    table = [
        Column(
            "speed", "Frames", "per second", "", False, 1,
            "frames generated per second for one viewer (batch 1), compilation not counted, of one "
            "short stream: it varies with whatever else the machine does.",
        ),
        Column(
            "agent_error", "Agent error", f"px at frame {last}", "less", False, 2,
            f"distance of the agent in frame {last} from where the actions have brought it, in "
            "pixels.",
        ),
        *(
            Column(
                f"intact_{frame}", "Balls intact (%)", f"at frame {frame}", "more", True, 1,
                "" if frame != 1 else
                "share of the two balls that are there, once, round, sharp and bright.",
            )
            for frame in intact_frames(settings)
        ),
        Column(
            "allowed", "Allowed", "transitions (%)", "more", True, 1,
            "share of the steps from a frame to the next in which everything is intact, the agent "
            "obeys and each ball goes where physics can take it.",
        ),
        Column(
            "turns", "Turns", "of balls (%)", "", True, 1,
            "how often a ball turns where no wall can have turned it, of those that can be "
            f"followed through three frames. In the world it is {arena.KICK_PROBABILITY:.0%}.",
        ),
        Column(
            "directions", "Directions", "TV distance", "less", False, 3,
            f"total-variation distance of the balls' first directions from their true "
            f"probabilities (1/4 each), from {settings.samples} samples of each of "
            f"{report.starts} starts; a ball that is lost or stands still counts as wrong. With "
            f"so few samples a perfect model is expected to score "
            f"{report.perfect_directions or 0:.3f}. Its error is over starts. The bidirectional "
            "base is left out: it has to make a whole block for one frame.",
        ),
        Column(
            "frechet", "Fréchet", "distance", "less", False, 1,
            "distance between the distributions of what moves, and how it looks, in these clips "
            "and in other held-out real ones; features of a fixed random convolution over 3 "
            "frames, in units of their real spread. Real clips do not score 0, because they are "
            "finitely many. Its error is by the jackknife.",
        ),
        Column(
            "action_accuracy", "Action", "accuracy (%)", "more", True, 1,
            "share of the steps in which a network trained on real clips tells the action that "
            "was given. Some steps look alike, so real clips do not reach 100.",
        ),
    ]  # fmt: skip
    return [column for column in table if any(column.key in row.figures for row in report.rows)]


class Finding(NamedTuple):
    """Something that the table shows: what it is about, and the figures."""

    topic: str
    text: str


def findings(report: Report) -> list[Finding]:
    """What the table shows, in words."""
    row = report.row
    real = row("real")
    quality = [column for column in columns(report) if column.better]
    telling = ("frechet", "action_accuracy")
    if real.by_frame:  # there are physics to be told by
        telling = ("agent_error", "intact_4", "allowed", "directions", "frechet")
    chief = [column for column in quality if column.key in telling]
    found = []

    imperfect = [
        f"{_label(column)} {_value(column, figure)}"
        for column in quality
        if (figure := real.figures.get(column.key))
        and figure.mean != (column.better == "more")  # neither all nor none
    ]
    text = f"Real clips, measured like all others, do not score better than {', '.join(imperfect)}."
    found.append(Finding("The ceiling", text))

    teacher, undistilled = row("ar_48"), row("ar_1")
    if teacher and undistilled:
        topic = "Fewer steps without distillation"
        found.append(Finding(topic, _compare(undistilled, teacher, chief)))
    for topic, afters, befores in COMPARED:
        for (schedule, words), after in itertools.product(SCHEDULES.items(), afters):
            one = row(f"{after}_{schedule}")
            others = (row(f"{before}_{schedule}") for before in befores)
            other = next(filter(None, others), None)
            if one and other:
                found.append(Finding(f"{topic} {words}", _compare(one, other, chief)))
    final = row("dmd_2_first_4") or row("dmd_2") or row("cd_2") or row("ode_2")
    if final and teacher:
        faster = final.figures["speed"].mean / teacher.figures["speed"].mean
        text = (
            f"{final.name}, less {teacher.name}, at {final.passes:g} instead of {teacher.passes:g} "
            f"network passes a frame and {faster:.1f} times the frames per second: "
            + _differences(final, teacher, quality)
        )
        found.append(Finding("The result", text))
    base = row("base_48")
    if base and teacher:
        found.append(Finding("The bidirectional base", _compare(base, teacher, chief)))
    if report.real_score:
        score = {
            "causal": "the causal AR teacher of stage 1, on the student's own history",
            "bidirectional": "the bidirectional base of stage 0",
        }[report.real_score]
        found.append(Finding("The real score", f"Stage 3 took it from {score}."))
    return found


def _label(column: Column) -> str:
    if column.key.startswith("intact"):
        return f"balls intact {column.title}"
    words = f"{column.group} {column.title}" if column.group != "Agent error" else column.group
    return words.replace(" (%)", "").replace(" TV", "").lower().replace("fréchet", "Fréchet")


def _value(column: Column, figure: metrics.Figure) -> str:
    mean, error = column.text(figure)
    unit = " %" * column.percent + " px" * (column.key == "agent_error")
    return mean + (f" ± {error}" if error else "") + unit


def _compare(one: Result, other: Result, chosen: Sequence[Column]) -> str:
    parts = []
    for column in chosen:
        if column.key in one.figures and column.key in other.figures:
            first, second = one.figures[column.key], other.figures[column.key]
            parts.append(
                f"{_label(column)} {_value(column, first)} against {_value(column, second)} "
                f"({_verdict(column, first, second)})"
            )
    return f"{one.name}, against {other.name}: " + "; ".join(parts) + "."


def _differences(one: Result, other: Result, chosen: Sequence[Column]) -> str:
    parts = [
        f"{_label(column)} "
        + _verdict(column, one.figures[column.key], other.figures[column.key], numbers=True)
        for column in chosen
        if column.key in one.figures and column.key in other.figures
    ]
    return "; ".join(parts) + "."


def _verdict(
    column: Column, first: metrics.Figure, second: metrics.Figure, numbers: bool = False
) -> str:
    """Whether the first figure is better, by the error of the (paired) difference."""
    gap = metrics.difference(first, second)
    if math.isnan(gap.error) or abs(gap.mean) <= 2 * gap.error:
        verdict = "no clear difference"
    else:
        verdict = "better" if (gap.mean > 0) == (column.better == "more") else "worse"
    if not numbers:
        return verdict
    sign = "+" if gap.mean >= 0 else "-"
    unit = " points" * column.percent + " px" * (column.key == "agent_error")
    error = "" if math.isnan(gap.error) else f" ± {column.number(gap.error)}"
    return f"{sign}{column.number(abs(gap.mean))}{error}{unit} ({verdict})"
