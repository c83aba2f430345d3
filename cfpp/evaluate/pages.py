"""The report's two pages, README.md and index.html."""

import html
from collections.abc import Iterable

from cfpp.evaluate import table
from cfpp.evaluate.table import Report
from cfpp.train.metrics import duration


def markdown(report: Report) -> str:
    """The text of README.md."""
    chosen = table.columns(report)
    heads = ["", "Passes a frame", *(f"{column.group} {column.title}" for column in chosen)]
    lines = [
        f"# cfpp on {report.data}",
        "",
        _introduction(report),
        "",
        "![The same actions in every row, frame by frame](comparison.png)",
        "",
        "| " + " | ".join(heads) + " |",
        "|---" + "|---:" * (len(heads) - 1) + "|",
    ]
    for row in report.rows:
        cells = [row.name, "" if row.passes is None else f"{row.passes:g}"]
        for column in chosen:
            mean, error = column.text(row.figures.get(column.key))
            cells.append(mean + (f" ± {error}" if error else ""))
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "## What the table shows",
        "",
        *(f"- **{found.topic}.** {found.text}" for found in table.findings(report)),
        "",
    ]
    lines += ["## What the columns mean", ""]
    lines += [f"- **{name}**: {meaning}" for name, meaning in _meanings(report)]
    if report.row("real").by_frame:
        lines += ["", "## Frame by frame", "", "![By frame](by_frame.png)"]
    lines += ["", "## Videos", "", "The same clips at the same place in each.", ""]
    lines += [f"- [{row.name}](videos/{row.key}.mp4)" for row in report.rows]
    lines += ["", "## How it was made", ""]
    head, *body = _job_table(report)
    lines += ["| " + " | ".join(head) + " |", "|---|---" + "|---:" * (len(head) - 2) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in body]
    lines += ["", *(f"- {line}" for line in _circumstances(report))]
    if any(job.log for job in report.jobs):
        lines += ["", "![Losses](loss.png)"]
    return "\n".join(lines) + "\n"


def _introduction(report: Report) -> str:
    settings = report.settings
    given = "one given frame" if settings.context == 1 else f"{settings.context} given frames"
    clips, error = f"{settings.episodes} held-out episodes", "mean ± standard error over episodes."
    if report.episodes < settings.clips:
        clips = f"{settings.episodes} held-out clips"
        error = (
            "mean ± standard error over clips. With the Fréchet distance's reference, as many "
            f"others, they are cut from {report.episodes} episodes, and parts of one are alike: "
            "errors, and the distance of real clips, are too small."
        )
    return (
        f"{clips} of {report.data}: from {given} and the episode's actions, each model continues "
        f"for {settings.frames} frames, on its own history. All rows start from the same frames, "
        f"take the same actions and the same seeds. Figures are {error}"
    )


def _job_table(report: Report) -> list[list[str]]:
    rows = [["Job", "Stage", "Steps", "Batch", "Time in steps (min:s)", "Steps/s", "Last loss"]]
    for job in report.jobs:
        cells = [job.name, job.stage, str(job.steps), str(job.batch_size), "", "", ""]
        if job.log:
            cells[4:] = [
                duration(job.seconds),
                f"{job.steps / job.seconds:.2f}",
                f"{job.log[-1]['loss']:.4g}",
            ]
        rows.append(cells)
    return rows


def _meanings(report: Report) -> list[tuple[str, str]]:
    named = [
        (f"{column.group} {'' if column.key == 'intact_1' else column.title}".strip(), column)
        for column in table.columns(report)
    ]
    passes = (
        "how often the network is evaluated for a frame after the first; the pass that remembers "
        "a finished frame rides on the first step of the next. The bidirectional base makes its "
        "passes over a block of frames at once, and cannot stream."
    )
    return [
        ("Passes a frame", passes),
        *((name, column.meaning) for name, column in named if column.meaning),
    ]


def _circumstances(report: Report) -> list[str]:
    trained = sum(job.seconds for job in report.jobs)
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    times = f"The evaluation took {duration(report.seconds)} (min:s)"
    if trained:
        times = f"The training steps took {duration(trained)} in all. " + times
    return [f"Machine: {report.machine}.", f"Versions: {versions}.", f"{times}."]


_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #181c24; --faded: #6a7280;
  --rule: #e2e5ea; --bar: #dbe9ff; --stripe: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --ink: #e8eaee; --faded: #949cab;
  --rule: #2c323c; --bar: #233a5e; --stripe: #1a1e25; } img { border-radius: 8px; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1280px; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.9rem; margin: 0 0 .5rem; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; }
p.lead { color: var(--faded); max-width: 62rem; } li { margin: .3rem 0; max-width: 68rem; }
img { max-width: 100%; display: block; margin: 1.2rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .42rem .7rem; text-align: right; white-space: nowrap; }
th { font-weight: 600; border-bottom: 1px solid var(--rule); vertical-align: bottom; }
th.group { border-bottom: 0; text-align: center; padding-bottom: 0; }
th.sub { font-weight: 400; color: var(--faded); }
th:first-child, td:first-child { text-align: left; }
table.main td:first-child { position: sticky; left: 0; background: var(--paper); }
tr.new td { border-top: 1px solid var(--rule); }
tr.real td, table.main tr.real td:first-child { background-color: var(--stripe); }
td small { color: var(--faded); }
td.bar { background: linear-gradient(to right, var(--bar) var(--share), transparent var(--share))
  0 50% / 100% 72% no-repeat; }
dt { font-weight: 600; margin-top: .6rem; } dd { margin: 0; color: var(--faded); max-width: 62rem; }
.videos { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr));
  gap: 1.2rem; }
figure { margin: 0; } figcaption { font-size: .9rem; margin-bottom: .35rem; }
video { width: 100%; border-radius: 6px; image-rendering: pixelated; background: #000; }
"""


def html_page(report: Report) -> str:
    """The text of index.html."""
    escape = html.escape
    videos = "".join(
        f"<figure><figcaption>{escape(row.name)}</figcaption>"
        f'<video src="videos/{row.key}.mp4" autoplay muted loop playsinline controls></video>'
        "</figure>\n"
        for row in report.rows
    )
    meanings = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(meaning)}</dd>\n"
        for name, meaning in _meanings(report)
    )
    sections = [
        f"<h1>cfpp on {escape(report.data)}</h1>",
        f'<p class="lead">{escape(_introduction(report))}</p>',
        '<img src="comparison.png" alt="The same actions in every row, frame by frame">',
        _html_table(report),
        "<h2>What the table shows</h2>",
        _html_list(
            f"<b>{escape(found.topic)}.</b> {escape(found.text)}"
            for found in table.findings(report)
        ),
    ]
    if report.row("real").by_frame:
        sections += ["<h2>Frame by frame</h2>", '<img src="by_frame.png" alt="By frame">']
    sections += [
        "<h2>Videos</h2><p>The same clips at the same place in each.</p>",
        f'<div class="videos">{videos}</div>',
        "<h2>What the columns mean</h2>",
        f"<dl>{meanings}</dl>",
        "<h2>How it was made</h2>",
        _html_rows(_job_table(report)),
        _html_list(map(escape, _circumstances(report))),
    ]
    if any(job.log for job in report.jobs):
        sections.append('<img src="loss.png" alt="Losses">')
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>cfpp on {escape(report.data)}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _html_table(report: Report) -> str:
    chosen = table.columns(report)
    groups, subs, spans = [], [], {}
    for column in chosen:
        spans[column.group] = spans.get(column.group, 0) + 1
    for group, span in {"Passes": 1, **spans}.items():
        groups.append(f'<th class="group" colspan="{span}">{html.escape(group)}</th>')
    arrows = {"more": " ↑", "less": " ↓", "": ""}
    subs.append('<th class="sub">a frame</th>')
    subs += [
        f'<th class="sub">{html.escape(column.title)}{arrows[column.better]}</th>'
        for column in chosen
    ]
    lines = []
    before = None
    for row in report.rows:
        kind = "real" if row.key == "real" else "new" if row.family != before else ""
        before = row.family
        cells = [f"<td>{html.escape(row.name)}</td>"]
        cells.append("<td></td>" if row.passes is None else f"<td>{row.passes:g}</td>")
        for column in chosen:
            figure = row.figures.get(column.key)
            mean, error = column.text(figure)
            error = f" <small>± {error}</small>" if error else ""
            bar = ""
            if figure is not None and column.percent:
                bar = f' class="bar" style="--share: {100 * figure.mean:.1f}%"'
            cells.append(f"<td{bar}>{mean}{error}</td>")
        lines.append(f'<tr class="{kind}">{"".join(cells)}</tr>')
    return (
        '<div class="scroll"><table class="main">\n'
        f"<tr><th class='group'></th>{''.join(groups)}</tr>\n<tr><th></th>{''.join(subs)}</tr>\n"
        + "\n".join(lines)
        + "\n</table></div>"
    )


def _html_rows(rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head, *body = rows
    text = "\n".join(line(cells, "td") for cells in body)
    return f'<div class="scroll"><table>\n{line(head, "th")}\n{text}\n</table></div>'


def _html_list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{line}</li>\n" for line in lines) + "</ul>"
