"""The job runs on a work directory, and its report is complete, well-formed and true."""

import errno
import html.parser
import itertools
import json
import pathlib
import types

import imageio_ffmpeg
import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image

from cfpp.data import sources
from cfpp.errors import UserError
from cfpp.evaluate import __main__ as command_line
from cfpp.evaluate import job, measure, metrics, models, pictures, probe, report, table
from cfpp.models.network import Network
from cfpp.train import stored, workdirs
from configs import quickstart, stage0, stage1, stage2, stage3
from tests import tiny

SETTINGS = dict(episodes=6, frames=4, starts=2, samples=8, probe_steps=2)
STAGES = {"bidirectional": stage0, "ar_diffusion": stage1, "dmd": stage3}


@pytest.fixture
def workdir(tmp_path):
    """A quickstart's work directory whose stages look finished, and its data."""
    config = quickstart.get_config("smoke")
    config.evaluate.update(SETTINGS)
    for name in config.jobs:
        config[name].data.directory = str(tmp_path / "data")
        folder = tmp_path / name
        (folder / "checkpoints" / str(config[name].steps)).mkdir(parents=True)
        workdirs.write_config(config[name], folder)
        rows = [{"step": step, "loss": 1 / step, "steps_per_second": 2.0} for step in (1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    workdirs.write_config(config, tmp_path)
    sources.prepare(config.stage0.data)
    return tmp_path


def frozen(context, actions, rng):
    """A "model" that repeats the last given frame."""
    for _ in range(actions.shape[1] - context.shape[1]):
        yield context[:, -1:]


def freeze(monkeypatch):
    """Makes that the model of every row. Returns the keys of rows by the call that loads them."""
    calls = []

    def load(rows):
        calls.append([row.key for row in rows])
        return [models.Model(frozen, 1, row.steps) for row in rows]

    monkeypatch.setattr(models, "load", load)
    return calls


class Links(html.parser.HTMLParser):
    """Collects the files that a page shows, and checks that its tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.files, self.rows = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.files += [value for name, value in attrs if name in ("src", "href")]
        self.rows += tag == "tr"
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_of_a_quickstart(workdir, monkeypatch, capsys):
    loaded = freeze(monkeypatch)
    config = workdirs.read_config(workdir)
    assert not job.is_reported(config, workdir)
    job.run(workdir, measure.Settings(**config.evaluate))
    folder = workdir / "report"
    assert job.is_reported(config, workdir)
    results = json.loads((folder / "results.json").read_text())
    partial = results | {"jobs": results["jobs"][:-1]}  # evaluated before the last stage was there
    (folder / "results.json").write_text(json.dumps(partial))
    assert not job.is_reported(config, workdir)
    stage = config.copy_and_resolve_references().unlock()
    del stage.jobs  # a single one may have an evaluation too
    single = results | {"jobs": [{"name": workdir.name}]}
    (folder / "results.json").write_text(json.dumps(single))
    assert job.is_reported(stage, workdir) and not job.is_reported(config, workdir)
    (folder / "results.json").write_text(json.dumps(results))
    assert job.is_reported(config, workdir)
    with config.unlocked():
        config.evaluate.episodes = 5
    assert not job.is_reported(config, workdir)
    assert str(folder) in capsys.readouterr().out

    results = json.loads((folder / "results.json").read_text())
    keys = [row["key"] for row in results["rows"]]
    few = [f"{stage}_{steps}" for stage in ("ar", "cd", "dmd") for steps in (1, 2, 4, "2_first_4")]
    assert keys == ["real", "ar_48", *few, "base_48"]
    assert loaded == [keys[1:6], keys[6:10], keys[10:14], keys[14:]]  # each stage once
    for row in results["rows"]:
        figures, by_frame = row["figures"], row["by_frame"]
        assert [len(column) for column in by_frame.values()] == [SETTINGS["frames"]] * 2
        assert by_frame["agent_error"][-1] == figures["agent_error"]
        assert [by_frame["intact"][i - 1] for i in (1, 4)] == [
            figures[f"intact_{i}"] for i in (1, 4)
        ]
    real, fake = results["rows"][0]["figures"], results["rows"][1]["figures"]
    assert real["agent_error"]["mean"] < 0.1 and real["intact_4"]["mean"] == 1
    assert real["allowed"]["mean"] == 1
    assert fake["agent_error"]["mean"] > 0.5 and fake["allowed"]["mean"] == 0
    assert fake["directions"]["mean"] == 1 > real["directions"]["mean"]
    assert fake["intact_1"]["mean"] == 1 and "intact_9" not in fake
    assert fake["speed"]["mean"] > 0 and "speed" not in real
    assert "directions" not in results["rows"][-1]["figures"]
    assert results["real_score"] == "causal"
    assert [job["seconds_in_steps"] for job in results["jobs"]] == [1.0] * 4

    page = Links()
    page.feed((folder / "index.html").read_text())
    assert not page.open
    assert all((folder / file).is_file() for file in page.files)
    assert page.rows == 2 + len(keys) + 1 + 4
    readme = (folder / "README.md").read_text()
    for row in results["rows"]:
        assert f"| {row['name']} |" in readme and f"(videos/{row['key']}.mp4)" in readme
        path = folder / "videos" / f"{row['key']}.mp4"
        assert (
            imageio_ffmpeg.count_frames_and_secs(str(path))[0] == 2 * 5
        )  # of six clips, four at once
    for name in ("comparison.png", "by_frame.png", "loss.png"):
        Image.open(folder / name).verify()
        assert f"({name})" in readme
    assert "the causal AR teacher of stage 1" in readme


def test_single_stage_and_flags(workdir, monkeypatch):
    freeze(monkeypatch)
    flags = [f"--{name}={value}" for name, value in SETTINGS.items() if name != "episodes"]
    command_line.main([f"--workdir={workdir / 'stage2'}", "--episodes=4", *flags])
    results = json.loads((workdir / "stage2" / "report" / "results.json").read_text())
    assert [row["key"] for row in results["rows"]] == [
        "real",
        "cd_1",
        "cd_2",
        "cd_4",
        "cd_2_first_4",
    ]
    assert results["settings"]["episodes"] == 4 and results["real_score"] is None


@pytest.mark.parametrize("num_actions", [18, 0])
def test_other_worlds_leave_out_the_physics(tmp_path, num_actions):
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (4, 5, 64, 64, 3)).astype(np.uint8)
    actions = rng.integers(0, 18, (4, 5)).astype(np.int32)
    settings = measure.Settings(**SETTINGS)
    scale = np.ones(32)
    episodes = [{"video": v, "actions": a} for v, a in zip(video, actions, strict=True)]
    told = probe.train(episodes, num_actions, 1) if num_actions else None
    yardstick = measure.Yardstick(
        settings, video, 4, actions, None, np.zeros(0, int), told, scale,
        measure.features.windows(video, scale),
    )  # fmt: skip
    rows = [job.real_row(yardstick)]
    figures = rows[0].figures | {"speed": metrics.Figure(100.0, 1.0)}
    rows.append(table.Result("dmd_2", "Student", 2, figures, video, {}))
    written = table.Report(
        data="atari:Boxing",
        settings=settings,
        episodes=4,
        rows=rows,
        actions=actions,
        num_actions=num_actions,
        starts=0,
        jobs=[],
        real_score="bidirectional",
        perfect_directions=None,
        seconds=1.0,
        machine="M",
        versions={},
    )
    report.write(written, tmp_path / "report")
    readme = (tmp_path / "report" / "README.md").read_text()
    assert ("Action accuracy" in readme) == (num_actions > 0)
    assert "the bidirectional base of stage 0" in readme
    assert "6 held-out clips of atari" in readme and "are cut from 4 episodes, and parts" in readme
    assert not any(word in readme for word in ("intact", "Agent error", "Directions", "loss.png"))
    assert not (tmp_path / "report" / "by_frame.png").exists()


def test_verdicts_need_two_standard_errors():
    def result(key, mean, error):
        figures = {"frechet": metrics.Figure(mean, error), "speed": metrics.Figure(1.0, 0.0)}
        return table.Result(key, key, 1, figures, np.zeros((2, 5, 32, 32, 3), np.uint8), {})

    def stage_3(mean):
        rows = [result("real", 1.0, 0.1), result("cd_2", 20.0, 3.0), result("dmd_2", mean, 4.0)]
        written = table.Report(
            "arena", measure.Settings(), 64, rows, np.zeros((2, 5), int), 5, 8, [], "causal", None,
            1.0, "M", {},
        )  # fmt: skip
        return next(found.text for found in table.findings(written) if "Stage 3 at" in found.topic)

    assert "(better)" in stage_3(9.0)
    assert "(no clear difference)" in stage_3(11.0)
    assert "(worse)" in stage_3(31.0)


# ---------------------------------------------------------------------------------------- faults


def test_a_last_checkpoint_that_is_not_whole_does_not_count(workdir, monkeypatch):
    """In a bucket it has its name before all of it is there."""
    monkeypatch.setattr("orbax.checkpoint.utils.is_checkpoint_finalized", lambda path: False)
    with pytest.raises(UserError, match="no stage has finished"):
        models.find_stages(workdir / "stage1")


def test_nothing_to_evaluate(workdir, tmp_path):
    with pytest.raises(UserError, match=r"nowhere has no config.json; give the --workdir"):
        models.find_stages(tmp_path / "nowhere")
    config = workdirs.read_config(workdir)
    for name in config.jobs[1:]:
        (workdir / name / "checkpoints" / str(config[name].steps)).rmdir()
    assert [folder.name for folder in models.find_stages(workdir)] == ["stage0"]
    (workdir / "stage0" / "checkpoints" / str(config.stage0.steps)).rmdir()
    with pytest.raises(UserError, match="no stage has finished"):
        models.find_stages(workdir)
    with pytest.raises(UserError, match="no stage has finished"):
        models.find_stages(workdir / "stage1")


def test_settings_out_of_range(workdir):
    least = {"episodes": 1, "frames": 0, "context": 0, "samples": -1, "seed": -1}
    for name, value in least.items():
        with pytest.raises(UserError, match=f"evaluate.{name} is {value}; it must be at least"):
            measure.Settings(**{name: value})
    with pytest.raises(UserError, match="must be less than 2"):
        measure.Settings(seed=2**32)
    with pytest.raises(UserError, match="test split of arena has"):
        job.run(workdir / "stage1", measure.Settings(episodes=100))
    with pytest.raises(UserError, match="stage1 exists and is not overwritten; choose another"):
        job.run(workdir / "stage1", measure.Settings(), workdir / "stage1")


def test_too_few_windows_for_a_covariance():
    with pytest.raises(UserError, match=r"evaluate\.episodes is 2 and evaluate\.frames 2: too few"):
        measure.Settings(episodes=2, frames=2)
    measure.Settings(episodes=3, frames=2)
    measure.Settings(episodes=2, frames=3)


def test_a_report_elsewhere(workdir, tmp_path, monkeypatch, capsys):
    freeze(monkeypatch)
    out, sizes = tmp_path / "elsewhere", [f"--{name}={n}" for name, n in SETTINGS.items()]
    command_line.main([f"--workdir={workdir / 'stage0'}", f"--out={out}", *sizes])
    assert f"the report is in {out}\n" in capsys.readouterr().out
    assert (out / "index.html").exists() and not (workdir / "stage0/report").exists()


def test_clips_that_fill_no_page_are_shown_too(tmp_path):
    clips = np.full((5, 3, 32, 32, 3), 200, np.uint8)  # two by two at once
    pictures.write_video(clips, tmp_path / "five.mp4")
    assert imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "five.mp4"))[0] == 6


def test_an_old_report_outlives_a_new_one_that_cannot_be_written(workdir, monkeypatch):
    freeze(monkeypatch)
    job.run(workdir / "stage1", measure.Settings(**SETTINGS))
    folder = workdir / "stage1" / "report"
    old = {path: path.read_bytes() for path in folder.glob("**/*") if path.is_file()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report.pages, "html_page", full)
    with pytest.raises(UserError, match="the report cannot be written"):
        job.run(workdir / "stage1", measure.Settings(**SETTINGS))
    assert {path: path.read_bytes() for path in folder.glob("**/*") if path.is_file()} == old
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["videos"]


def test_report_that_cannot_be_written(workdir, monkeypatch):
    freeze(monkeypatch)
    (workdir / "stage1" / "report").write_text("in the way")
    monkeypatch.setattr(measure, "prepare", None)  # it is told before anything takes minutes
    with pytest.raises(UserError, match="the report cannot be written"):
        job.run(workdir / "stage1", measure.Settings(**SETTINGS))


# ---------------------------------------------------------------------------------------- models


def store(monkeypatch, config, params=None):
    """Makes that the model of every work directory; by default nothing is ever asked of it."""
    network = Network.create(config.model, config.pattern)
    if params is None:
        monkeypatch.setattr(Network, "for_inference", lambda network, params: params)
    model = types.SimpleNamespace(network=lambda: network, config=config, load=lambda: params)
    monkeypatch.setattr(stored, "find", lambda path: model)


@pytest.mark.parametrize("stage", STAGES)
def test_models_generate(stage, monkeypatch):
    config = STAGES[stage].get_config("smoke")
    config.model.update(
        {"dim": 32, "ffn_dim": 32, "heads": 1, "layers": 1, "height": 16, "width": 16}
    )
    config.data.frames = 3
    params = tiny.params(Network.create(config.model, config.pattern))
    store(monkeypatch, config, params)
    job = ml_collections.ConfigDict({"stage": stage})
    row = models.find_rows({pathlib.Path("first"): job, pathlib.Path("last"): job})[-1]
    assert row.workdir.name == "last"
    (model,) = models.load([row])
    assert model.passes == row.steps
    context = np.random.default_rng(0).integers(0, 256, (2, 1, 16, 16, 3)).astype(np.uint8)
    actions = np.random.default_rng(0).integers(0, 5, (2, 6)).astype(np.int32)
    video = model.generate(context, actions, jax.random.key(0))
    assert video.shape == (2, 5, 16, 16, 3) and video.dtype == np.uint8
    # Other actions later leave earlier frames (blocks, for the base) as they are.
    actions[:, 5] = (actions[:, 5] + 1) % 5
    other = model.generate(context, actions, jax.random.key(0))
    np.testing.assert_array_equal(other[:, :4], video[:, :4])
    rate = models.speed(model, context[0], actions[0, :1])
    assert rate.mean > 0


def test_an_undistilled_teacher_takes_the_schedule_of_its_student(monkeypatch):
    teacher, student = stage1.get_config("smoke"), stage2.get_config("smoke")
    teacher.shift, student.positions = 3.0, (1000.0, 125.0)
    teacher.guidance = 2.0  # which a student has distilled
    store(monkeypatch, teacher)
    folders = pathlib.Path("stage1"), pathlib.Path("stage2")
    for trained, levels in (
        ([teacher], [1, 0.75]),  # 3 sigma / (1 + 2 sigma) at a half
        ([teacher, student], [1, 4 / 11]),  # 4 sigma / (1 + 3 sigma) at an eighth
    ):
        rows = models.find_rows(dict(zip(folders, trained, strict=False)))
        (row,) = (row for row in rows if row.key == "ar_2")
        rollout = models.load([row])[0].stream.args[0]
        np.testing.assert_allclose(rollout.sampler.sigmas[:, :2], [levels] * 2, rtol=1e-6)
        assert rollout.sampler.last.tolist() == [1, 1] and rollout.guidance == 2.0


def test_a_base_of_single_frames_continues_none(monkeypatch):
    config = stage0.get_config("smoke")
    config.data.frames = 1
    store(monkeypatch, config)
    (row,) = models.find_rows({pathlib.Path("x"): config})
    with pytest.raises(UserError, match=r"^x has learned single frames and can continue none$"):
        models.load([row])


def test_speed_of_long_pieces(monkeypatch):
    """A second each, of 40 frames."""
    clock = itertools.count()
    monkeypatch.setattr(models.time, "perf_counter", lambda: float(next(clock)))

    def pieces(context, actions, rng):
        for _ in range(1, actions.shape[1], 40):
            yield np.zeros((1, 40, 2, 2, 3), np.uint8)

    model = models.Model(pieces, 40, 1)
    rate = models.speed(model, np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1, np.int32))
    assert rate.mean == 40.0
