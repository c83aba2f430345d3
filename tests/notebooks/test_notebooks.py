"""The notebooks: run from top to bottom, and kept as they should be."""

import json
import math
import os
import pathlib
import re

import nbclient
import nbformat
import pytest

from cfpp.train import jobs
from configs import quickstart

ROOT = pathlib.Path(__file__).parent.parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = re.search(r'url="https://github\.com/(.+)"', (ROOT / "setup.py").read_text())[1]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


@pytest.mark.slow(100)
def test_runs_from_top_to_bottom(notebook, path, monkeypatch, tmp_path):
    if path.stem == "pods_without_a_pod":
        pytest.importorskip("libtpu")
    monkeypatch.setenv("SMOKE", "1")
    monkeypatch.setenv("WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiles faster
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert "error" not in printed, printed
    if path.stem == "colab_tpu_quickstart":
        check_quickstart(tmp_path / "run")


def check_quickstart(workdir):
    """Nothing was replaced: data, four stages, their evaluation; and the same command again."""
    config, report = quickstart.get_config("smoke"), workdir / "report"
    results = json.loads((report / "results.json").read_text())
    assert [job["name"] for job in results["jobs"]] == list(config.jobs)
    keys = [row["key"] for row in results["rows"]]
    assert {"real", "ar_48", "cd_1", "dmd_2", "base_48"} <= {*keys} and len(keys) == 15
    for row in results["rows"]:
        assert (report / "videos" / f"{row['key']}.mp4").stat().st_size > 0
        assert all(math.isfinite(figure["mean"]) for figure in row["figures"].values())
    written = (report / "index.html").stat().st_mtime
    jobs.run(config.lock(), str(workdir))
    assert (report / "index.html").stat().st_mtime == written


def test_has_no_outputs(notebook, path):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or not (cell.outputs or cell.execution_count), path


def test_names_the_repository_of_setup_py(notebook, path):
    badge = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{path.name}"
    assert f"]({badge})" in notebook.cells[0].source
    assert f'REPOSITORY = "https://github.com/{REPOSITORY}"' in notebook.cells[2].source


def test_links_lead_somewhere(notebook, path):
    for cell in notebook.cells:
        for target in re.findall(r"\]\(([^):]+)\)", cell.source):
            assert (path.parent / target).exists(), target
