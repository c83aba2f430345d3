"""The report's pictures and videos."""

import math
from collections.abc import Callable

import numpy as np
from etils import epath

from cfpp import media
from cfpp.evaluate.table import Report

FRAMES_PER_SECOND = 6  # of the videos
VIDEO_COLUMNS = 4  # clips side by side and on top of each other in a video
VIDEO_PIXELS = 384  # about the height of a video
STRIP_PIXELS = 96  # about the height of a frame in the picture
STRIP_FRAMES = 12  # at most, in the picture


def comparison(report: Report) -> np.ndarray:
    """The picture that shows all rows over the same actions, uint8 `[H, W, 3]`."""
    settings = report.settings
    episode = _liveliest(report)
    shown = np.linspace(1, settings.frames, min(settings.frames, STRIP_FRAMES)).round().astype(int)
    indices = np.append(settings.context - 1, settings.context - 1 + shown)
    symbol = action_symbols(report.data, report.num_actions)
    heads = ["0\ngiven"]
    heads += [f"{frame}\n{symbol(action)}" for frame, action in zip(
        shown, report.actions[episode, indices[1:]], strict=True
    )]  # fmt: skip
    strips, before = [], ""
    for row in report.rows:
        note = "held-out episode"
        if row.passes is not None:
            note = f"{row.passes:g} pass{'es' * (row.passes != 1)} a frame"
            note += f", {row.figures['speed'].mean:.1f} frames/s"
        clip = row.video[episode, indices]
        strips.append(media.Strip(row.name, note, clip, apart=row.family != before))
        before = row.family
    scale = max(1, round(STRIP_PIXELS / report.rows[0].video.shape[2]))
    return media.film_strips(strips, heads, scale, "frame\naction", given=1)


def _liveliest(report: Report) -> int:
    """Of the episodes with the most different actions, the one in which most moves."""
    actions = report.actions[:, report.settings.context :]
    different = np.array([len(set(row.tolist())) for row in actions])
    motion = np.abs(np.diff(report.rows[0].video.astype(np.int16), axis=1)).mean((1, 2, 3, 4))
    return int(np.where(different == different.max(), motion, -1).argmax())


def action_symbols(data: str, num_actions: int) -> Callable[[int], str]:
    """How actions are written over the frames: arrows where their meaning is known.

    The 18 actions of the Atari console are in the emulator's order; ● is the fire button.
    """
    if not num_actions:
        return lambda action: ""
    table = [str(action) for action in range(num_actions)]
    if data == "arena":
        table = ["·", "↑", "↓", "←", "→"]
    elif data.startswith("atari:") and num_actions == 18:
        moves = ["↑", "→", "←", "↓", "↗", "↖", "↘", "↙"]
        table = ["·", "●", *moves, *(f"{move}●" for move in moves)]
    return lambda action: table[action]


def write_video(clips: np.ndarray, path: epath.Path) -> None:
    """Writes a video of clips `[E, T, H, W, 3]`: many side by side, then the next."""
    columns = min(VIDEO_COLUMNS, math.isqrt(len(clips)))
    at_once = columns * columns
    missing = -len(clips) % at_once
    clips = np.pad(clips, [(0, missing)] + [(0, 0)] * (clips.ndim - 1))
    pages = np.split(clips, len(clips) // at_once)
    video = np.concatenate([media.tile(page, columns) for page in pages])
    scale = max(1, round(VIDEO_PIXELS / video.shape[1]))
    media.write_mp4(path, video, FRAMES_PER_SECOND, scale)


_COLORS = {"real": "#181c24", "ar": "#3b6fd4", "ode": "#c2a000", "cd": "#e07b00", "dmd": "#1a9850",
           "base": "#9b59b6"}  # fmt: skip
# By steps.
_DASHES = {"": (2, 2), "1": (1, 1.2), "2": (), "2_first_4": (8, 1), "4": (5, 2), "48": ()}


def _figure(width: float, height: float, panels: int):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's settings
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e6e8ec", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def plot_by_frame(report: Report, path: epath.Path) -> None:
    """Draws balls intact and agent error over the frames, a line for each row."""
    figure, axes = _figure(12.5, 4.6, 2)
    frames = np.arange(1, report.settings.frames + 1)
    panels = (
        ("intact", "balls intact (%)", 100),
        ("agent_error", "agent error (pixels, square-root scale)", 1),
    )
    for axis, (key, label, unit) in zip(axes, panels, strict=True):
        for row in report.rows:
            _, _, steps = row.key.partition("_")
            values = row.by_frame[key]
            mean = unit * np.array([value.mean for value in values])
            error = unit * np.array([value.error for value in values])
            color, dashes = _COLORS[row.family], _DASHES[steps]
            width, order = (2.6, 2) if steps == "48" else (1.8, 3)
            axis.plot(
                frames, mean, color=color, dashes=dashes, lw=width, zorder=order, label=row.name
            )
            axis.fill_between(frames, mean - error, mean + error, color=color, alpha=0.1, lw=0)
        axis.set_xlabel("generated frame")
        axis.set_title(label, loc="left", fontsize=11, fontweight="bold")
        axis.set_xlim(1, report.settings.frames)
        axis.set_ylim(bottom=0)
        if key == "agent_error":
            axis.set_yscale("function", functions=(np.sqrt, np.square))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    _save(figure, path)


def plot_losses(report: Report, path: epath.Path) -> None:
    """Draws the loss curves of the jobs that have a log."""
    from matplotlib.ticker import LogLocator, NullFormatter

    jobs = [job for job in report.jobs if job.log]
    figure, axes = _figure(max(5.0, 3.1 * len(jobs)), 2.9, len(jobs))
    for axis, job in zip(axes, jobs, strict=True):
        steps = [row["step"] for row in job.log]
        for key, color in (("loss", "#3b6fd4"), ("critic_loss", "#e07b00")):
            if key in job.log[0]:
                label = key.replace("_", " ")
                axis.plot(steps, [row[key] for row in job.log], color=color, label=label)
        if "critic_loss" in job.log[0]:
            axis.legend(frameon=False, fontsize=8)
        if all(row["loss"] > 0 for row in job.log):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title(f"{job.name}: {job.stage}", loc="left", fontsize=10, fontweight="bold")
        axis.set_xlabel("step")
    _save(figure, path)


def _save(figure, path: epath.Path) -> None:
    with path.open("wb") as file:
        figure.savefig(file, format="png")
