"""The notebooks: run from top to bottom, and kept as they should be."""

import os
import pathlib
import re

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = re.search(r'url="https://github\.com/(.+)"', (ROOT / "setup.py").read_text())[1]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


@pytest.mark.slow
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
