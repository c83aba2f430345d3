import dataclasses
import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from cfpp import paths
from cfpp.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
STAGE1 = "--config=configs/stage1.py"


@pytest.fixture(scope="module")
def aot():
    """The module, without the environment that its import sets up for this process."""
    before = dict(os.environ)
    module = importlib.import_module("cfpp.aot")
    os.environ.clear()
    os.environ.update(before)
    return module


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "cfpp.aot", *arguments], capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([STAGE1], "--topology is missing; give a slice such as v5p:4x4x4"),
        ([STAGE1, "--workdir=x"], "Unknown command line flag 'workdir'"),
        ([STAGE1, "--topology=v9:2x2"], "--topology=v9:2x2: unknown; give a chip, one of v5e, v5p"),
        (["--topology=v5p:2x2x1"], "--config is missing"),
        ([STAGE1, "--config.modle.dim=1", "--topology=v5p:2x2x1"], "nearest is model.dim"),
        ([STAGE1, "--topology=v5e:2x2", "--sweep", "--mesh=fsdp=4"], "give one of the two"),
        ([STAGE1, "--topology=v5e:2x2", "--mesh=fsdp=2,contxt=2"], "'contxt=2' is none of data=N"),
        ([STAGE1, "--topology=v5e:2x2", "--json=no/such/out.json"], "no/such is not a directory"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("topology", "right"),
    [
        ("v5p", "2x2x1, 2x2x2, 2x2x4, 2x4x4, and three multiples of 4, small ones first, up to"),
        ("v5p:4x4x6", "three multiples of 4"),
        ("v5p:8x4x4", "small ones first"),
        ("v5p:16x16x28", "up to 16x16x24"),
        ("v5e:2x2x2", "slices of v5e are 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ("v6e:100x100", "slices of v6e are 2x2"),
    ],
)
def test_slices_that_do_not_exist(aot, topology, right):
    with pytest.raises(UserError, match=f"--topology={topology}: unknown; .*{right}"):
        aot.topology.devices(topology)


@pytest.mark.parametrize("name", ["v5e:4x8", "v5p:2x2x1", "v5p:4x4x12", "v5p:8x8x8", "tpu7x:4x4x8"])
def test_slices_that_exist(aot, name):
    assert aot.topology.chip(name).memory > 0


def test_the_compiler_is_missing(aot, monkeypatch):
    monkeypatch.setattr(aot.topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"; pip install -c constraints.txt -e '\.\[tpu\]' in"):
        aot.topology.devices("v5e:2x2")


def sweep(aot, module, argument, devices):
    config = importlib.import_module(f"configs.{module}").get_config(argument)
    return list(aot.meshes(config, aot.checks.build_stage(config), devices))


def test_meshes_of_a_sweep_divide(aot):
    found = sweep(aot, "stage1", "wan_1_3b", 64)
    assert {"data": 1, "fsdp": 16, "context": 4, "tensor": 1} in found
    assert {"data": 2, "fsdp": 8, "context": 4, "tensor": 1} in found
    for sizes in found:
        assert sizes["data"] * sizes["fsdp"] * sizes["context"] * sizes["tensor"] == 64
        assert 1560 % sizes["context"] == 0 and 12 % sizes["tensor"] == 0
    assert len({tuple(sizes.values()) for sizes in found}) == len(found)


def test_meshes_of_a_sweep_divide_every_network(aot):
    """The 12 heads of 1.3B by 3, the 40 of the real score not."""
    tensors = lambda argument: {m["tensor"] for m in sweep(aot, "stage3", argument, 48)}
    assert tensors("wan_1_3b") == {1, 2, 3, 4}
    assert tensors("wan_1_3b,teacher=14b") == {1, 2, 4}


def report(aot, **fields):
    known = dict(
        mesh={"data": 1, "fsdp": 4, "context": 1, "tensor": 1}, memory=2.0**34, fits=True,
        peak=2.0**33, flops=2e12, compute_seconds=2.0, compile_seconds=3.0,
    )  # fmt: skip
    return aot.Report(**(known | fields))


def test_ranking(aot):
    slow = report(aot, communication_seconds=5.0)
    large = report(aot, fits=False, compute_seconds=1.0, peak=2.0**35)
    fast = report(aot, mesh={"data": 1, "fsdp": 2, "context": 2, "tensor": 1})
    failed = aot.Report({"data": 1, "fsdp": 4, "context": 1, "tensor": 1}, 2.0**34, error="why")
    rows = aot.rank([failed, large, slow, fast]).splitlines()[2:]
    assert rows[0] == "| fsdp=2, context=2 | 50% | 2.00 | 0.00 |"
    assert rows[1].endswith("| 2.00 | 5.00 |")
    assert "200%, does not fit" in rows[2]
    assert rows[3] == "| fsdp=4 | cannot be compiled | | |"


def test_what_does_not_fit(aot):
    from configs import stage1

    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 146.83G of 95.74G hbm. Exceeded hbm capacity by 51.09G.\n\n"
        "  Largest program allocations in hbm:\n\n  1. Size: 60.00G\n"
        '     Operator: op_name="jit(step)/softmax" source_file="x.py"\n'
        "     Shape: f32[1,12,65520,65520]{3,2,1,0:T(8,128)}\n     Unpadded size: 59.98G\n"
        "  2. Size: 30.00G\n     Shape: bf16[7,9]{1,0}\n"
    )
    brief = "the total memory required for HLO temporaries (1.08T) exceeds available HBM (15.75G)."
    assert aot._exhausted(brief, 0.0) == (1.08 * 2**40, ())
    peak, largest = aot._exhausted(message, 0.0)
    assert peak == 146.83 * 2**30
    assert largest == ("60.00G f32[1,12,65520,65520] jit(step)/softmax", "30.00G bf16[7,9] ")
    shown = aot.show(report(aot, fits=False, peak=peak, largest=largest))
    assert "does not fit" in shown and "60.00G f32[1,12,65520,65520]" in shown
    config = stage1.get_config("wan_1_3b")
    advice = aot.advice(config, report(aot, fits=False))
    assert "--config.accumulate=16" in advice and "each device has 16" in advice
    config.accumulate = 16
    assert "accumulate" not in aot.advice(config, report(aot, fits=False))
    config.model.remat = "none"
    assert "--config.model.remat=full" in aot.advice(config, report(aot, fits=False))


@pytest.mark.parametrize("field, value", [("data.text_tokens", 0), ("draws", 0)])
def test_what_could_not_be_trained_is_not_compiled(aot, field, value):
    config = importlib.import_module("configs.stage1").get_config("wan_1_3b")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=f"{field} is 0"):
        aot.run(config, "v5p:2x2x1", None, False, None)


def test_a_sweep_without_meshes(aot, monkeypatch):
    from configs import stage1

    monkeypatch.setattr(aot.topology, "devices", lambda name: [None] * 7)
    config = stage1.get_config("wan_1_3b")
    with pytest.raises(UserError, match="no mesh of 7 chips divides"):
        aot.run(config, "v5e:2x4", None, True, None)


def test_a_sweep_outlives_a_mesh_that_cannot_be_compiled(aot, monkeypatch, tmp_path, capsys):
    """The file has every mesh as soon as it is done."""
    from configs import stage1

    out, written = tmp_path / "out.json", []

    def compile_step(config, name):
        if out.exists():
            written.append(len(json.loads(out.read_text())))
        if config.mesh.tensor == 2:
            raise ValueError("Mosaic failed\nmore of it")
        return report(aot, mesh=dict(config.mesh))

    monkeypatch.setattr(aot.topology, "devices", lambda name: [None] * 4)
    monkeypatch.setattr(aot, "compile_step", compile_step)
    config = stage1.get_config("wan_1_3b")
    aot.run(config, "v5e:2x2", None, True, str(out))
    rows = json.loads(out.read_text())
    assert written == list(range(1, len(rows)))
    failed = [row for row in rows if row["mesh"]["tensor"] == 2]
    assert failed and len(failed) < len(rows)
    assert all(row["error"] == "Mosaic failed" and not row["fits"] for row in failed)
    shown = capsys.readouterr().out
    assert shown.count(": cannot be compiled: Mosaic failed\n") == len(failed)
    assert shown.count("| cannot be compiled |") == len(failed)


def test_a_file_is_left_as_it_is_until_there_are_figures(aot, tmp_path):
    (tmp_path / "old.json").write_text("old")
    (tmp_path / "new.json.tmp").write_text("another's")
    for name in ("old.json", "new.json"):
        paths.check_file(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"old.json", "new.json.tmp"}
    assert (tmp_path / "new.json.tmp").read_text() == "another's"
    assert (tmp_path / "old.json").read_text() == "old"
    with pytest.raises(UserError, match=f"{tmp_path} is a directory"):
        paths.check_file(tmp_path)


needs_compiler = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="needs the TPU compiler"
)

MINIATURE = [
    STAGE1,
    *(
        f"--config.model.{name}={value}"
        for name, value in {
            "dim": 64, "ffn_dim": 128, "heads": 4, "layers": 2, "frequency_dim": 16, "unroll": 1,
            "attention": "xla",
        }.items()
    ),
    "--config.optimizer.name=adamw",
    "--topology=v5e:2x2",
]  # fmt: skip


@needs_compiler
def test_a_mesh_that_does_not_multiply_is_one_line():
    done = command(*MINIATURE, "--mesh=fsdp=3")
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        "error: the mesh is data=1, fsdp=3, context=1, tensor=1; it does not multiply to 4 "
        "devices\n"
    )


@needs_compiler
def test_what_takes_the_room_is_told_where_the_compiler_does_not():
    """It sees at once that a batch of a million clips has no room, and says no more."""
    done = command(*MINIATURE, "--mesh=fsdp=4", "--config.batch_size=1048576")
    assert done.returncode == 0, done.stderr
    assert "does not fit" in done.stdout and "largest arrays before compilation" in done.stdout
    # What the 2 layers keep for the backward pass, a quarter of it on each of 4 devices.
    assert " 64.00 GiB f32[2,1048576,16,16,128] " in done.stdout


@pytest.mark.slow
@needs_compiler
def test_a_sweep_ends_in_a_ranking():
    """One clip: all chips divide it."""
    done = command(*MINIATURE, "--config.batch_size=1", "--sweep")
    assert done.returncode == 0, done.stderr
    meshes = {"context=4", "context=2, tensor=2", "tensor=4"}
    table = done.stdout.rpartition("\n\n")[2].splitlines()
    assert table[0].startswith("| mesh | peak") and len(table) == 2 + len(meshes)
    assert {row.split(" | ")[0][2:] for row in table[2:]} == meshes
    assert done.stdout.count(": fits") == len(meshes)


@pytest.mark.slow
@needs_compiler
def test_a_step_compiles_for_a_slice(tmp_path):
    """The whole command, on a stage in miniature whose tokens are divided."""
    done = command(*MINIATURE, "--mesh=fsdp=2,context=2", f"--json={tmp_path / 'out.json'}")
    assert done.returncode == 0, done.stderr
    assert "ar_diffusion on v5e:2x2, 4 devices" in done.stdout and ": fits" in done.stdout
    (found,) = json.loads((tmp_path / "out.json").read_text())
    assert found["fits"] and 0 < found["peak"] < found["memory"]
    assert {"all-to-all"} <= {row["kind"] for row in found["collectives"]}
    assert found.keys() == {field.name for field in dataclasses.fields(report_class())}


def report_class():
    return importlib.import_module("cfpp.aot").Report
