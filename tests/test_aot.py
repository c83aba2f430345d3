import dataclasses
import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

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
        ([STAGE1, "--topology=v9:2x2"], "--topology=v9:2x2: unknown; give a chip and a shape, as"),
        ([STAGE1, "--topology=v5p"], "--topology=v5p: unknown"),
        (["--topology=v5p:2x2x1"], "--config is missing"),
        ([STAGE1, "--config.modle.dim=1", "--topology=v5p:2x2x1"], "nearest is model.dim"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_meshes_of_a_sweep_divide(aot):
    from configs import stage1

    config = stage1.get_config("wan_1_3b")
    found = list(aot.meshes(config, 64))
    assert {"data": 1, "fsdp": 16, "context": 4, "tensor": 1} in found
    for sizes in found:
        assert sizes["fsdp"] * sizes["context"] * sizes["tensor"] == 64
        assert 1560 % sizes["context"] == 0 and 12 % sizes["tensor"] == 0
    assert len({tuple(sizes.values()) for sizes in found}) == len(found)


def report(aot, **fields):
    known = dict(
        mesh={"data": 1, "fsdp": 4, "context": 1, "tensor": 1}, fits=True, memory=2.0**34,
        peak=2.0**33, flops=2e12, compute_seconds=2.0, compile_seconds=3.0,
    )  # fmt: skip
    return aot.Report(**(known | fields))


def test_ranking(aot):
    slow = report(aot, communication_seconds=5.0)
    large = report(aot, fits=False, compute_seconds=1.0, peak=2.0**35)
    fast = report(aot, mesh={"data": 1, "fsdp": 2, "context": 2, "tensor": 1})
    rows = aot.rank([large, slow, fast]).splitlines()[2:]
    assert rows[0] == "| fsdp=2, context=2 | 50% | 2.00 | 0.00 |"
    assert rows[1].endswith("| 2.00 | 5.00 |")
    assert "200%, does not fit" in rows[2]


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
    assert "each device has 16" in aot.advice(config, report(aot, fits=False))
    config.model.remat = "none"
    assert "--config.model.remat=full" in aot.advice(config, report(aot, fits=False))


def test_a_sweep_without_meshes(aot, monkeypatch):
    from configs import stage1

    monkeypatch.setattr(aot.topology, "devices", lambda name: [None] * 7)
    config = stage1.get_config("wan_1_3b")
    with pytest.raises(UserError, match="no mesh of 7 chips divides"):
        aot.run(config, "v5e:7", None, True, None)


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
