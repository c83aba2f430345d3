"""What the TPU compiler makes of the attention kernels, beside JAX's splash attention.

python benchmarks/tpu_compile.py           # a few minutes; needs libtpu, but no TPU

Wan 2.1 1.3B's shapes: heads of 128, bfloat16, 21 frames of 1,560 tokens, teacher-forced and
frame-wise in training; one frame against a cache of 21 in the rollout. For each kernel and chip:

    bundles     instruction words that the compiler schedules for one visit of a pair of blocks,
                from the first to the last that uses a matrix unit
    matrix      the share of the matrix units' issue slots that these fill
    vmem_mib    on-chip memory, as the compiler allots it
    visits      pairs of blocks that a head visits; of them, `live` is the share of score entries
                that the mask lets through
    flops       needed by a head for the visible scores, counted by hand
    flops_per_bundle    the three together: flops / (visits * bundles)

A bundle takes a cycle or longer and a visit costs something besides, so this is no measurement of
time: the compiler gives no time for a kernel, and none is made up here. Splash attention has the
mask of `cfpp.attention.library`, which its kernels compute in every visit.

Writes `benchmarks/results/tpu_compile.json`.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

RESULTS = pathlib.Path(__file__).parent / "results"
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
FRAMES, TOKENS, HEAD_DIM = 21, 1560, 128
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}  # matrix products of each kernel


def schedules(directory: pathlib.Path) -> dict[str, dict]:
    """The bundles of each kernel whose schedule the compiler wrote into a directory."""
    found = {}
    for path in sorted(directory.glob("*-final_hlo-static-per-bundle-utilization.txt")):
        name = re.fullmatch(r"\d+-(.+)-\d+-final_hlo.*", path.name).group(1)
        _, units, capacity, _, *lines = path.read_text().splitlines()
        matrix = [name.strip() for name in units.split(",")].index("MXU")
        used = [int(line.split()[matrix]) for line in lines if line.strip()]
        if any(used):
            first = next(n for n, uses in enumerate(used) if uses)
            last = max(n for n, uses in enumerate(used) if uses)
            bundles = last - first + 1
            slots = bundles * int(capacity.split()[matrix])
            found[name] = {"bundles": bundles, "matrix": round(sum(used) / slots, 3)}
    return found


def compile_kernels(device, function, shapes, directory: pathlib.Path) -> dict[str, dict]:
    """Compiles a function for one device; bundles and memory of its kernels, by their kind."""
    import jax
    from jax.sharding import SingleDeviceSharding

    for path in directory.glob("*.txt"):
        path.unlink()
    sharding = SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
    program = jax.jit(function).lower(*arguments).compile().as_text()
    found = {}
    for name, schedule in schedules(directory).items():
        call = program[program.index(f"%{name} = ") :]
        memory = json.loads(re.search(r'"used_scoped_memory_configs":(\[.*?\])', call).group(1))
        vmem = sum(int(part["size"]) for part in memory if part["memory_space"] == "1")
        kind = re.search(r"forward|fwd|dq|dkv", name).group().replace("fwd", "forward")
        found[kind] = schedule | {"vmem_mib": round(vmem / 2**20, 2)}
    return found


def with_visits(kernels: dict[str, dict], mask, visits: int, entries: int) -> dict[str, dict]:
    """Adds what a head's mask asks for: `entries` scores are computed in `visits` visits."""
    visible = int(mask.sum()) * TOKENS**2
    for kind, kernel in kernels.items():
        flops = 2 * PRODUCTS[kind] * HEAD_DIM * visible
        kernel |= {
            "visits": visits,
            "live": round(visible / entries, 3),
            "flops": flops,
            "flops_per_bundle": round(flops / (visits * kernel["bundles"])),
        }
    return kernels


def examine(topology: str, directory: pathlib.Path) -> dict:
    """Compiles everything for a chip, in a process whose compiler writes into a directory."""
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=.*final.*"
    )
    from cfpp.parallel.topology import devices, prepare_environment

    prepare_environment()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from cfpp.attention import library, pallas_tpu
    from cfpp.attention.pattern import Pattern, teacher_forced_entries

    device = devices(topology)[0]
    compile_for = functools.partial(compile_kernels, device, directory=directory)
    results = {"device": device.device_kind}

    def gradient(attend):
        total = lambda *qkv: attend(*qkv).astype(jnp.float32).sum()
        return jax.grad(total, (0, 1, 2))

    entries = teacher_forced_entries(FRAMES)
    mask = Pattern().mask(entries, entries)
    x = (1, 1, 2 * FRAMES, TOKENS, HEAD_DIM), jnp.bfloat16
    kernels = compile_for(gradient(lambda *qkv: pallas_tpu.attend(*qkv, mask)[0]), [x] * 3)
    results["training"] = with_visits(kernels, mask, int(mask.sum()), int(mask.sum()) * TOKENS**2)

    cached = np.ones((1, FRAMES), bool)
    query, cache = (1, 1, 1, TOKENS, HEAD_DIM), (30, 1, 1, FRAMES, TOKENS, HEAD_DIM)
    kernels = compile_for(
        pallas_tpu.attend,
        [
            (query, jnp.bfloat16),
            *[(cache, jnp.bfloat16)] * 2,
            (cached.shape, bool),
            ((), jnp.int32),
        ],
    )
    results["rollout"] = with_visits(kernels, cached, FRAMES, FRAMES * TOKENS**2)

    for block in (512, 1024):
        splash = functools.partial(library.splash, mask=mask, block=block)
        kernels = compile_for(gradient(lambda *qkv, splash=splash: splash(*qkv)[0]), [x] * 3)
        start = np.arange(0, 2 * FRAMES * TOKENS, block)
        stop = np.minimum(start + block, 2 * FRAMES * TOKENS)
        parts = [np.arange(a // TOKENS, -(-b // TOKENS)) for a, b in zip(start, stop, strict=True)]
        visits = sum(mask[np.ix_(rows, columns)].any() for rows in parts for columns in parts)
        results[f"splash, blocks of {block}"] = with_visits(
            kernels, mask, int(visits), int(visits) * block**2
        )
    return results


def main() -> None:
    """Reads the command line, examines each chip in a process of its own, writes the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", help="only this one, printed, nothing written")
    topology = parser.parse_args().topology
    if topology:
        with tempfile.TemporaryDirectory() as directory:
            print(json.dumps(examine(topology, pathlib.Path(directory))))
        return
    results = {"date": datetime.date.today().isoformat(), "chips": {}}
    for topology in TOPOLOGIES:
        command = [sys.executable, __file__, f"--topology={topology}"]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results["chips"][topology] = json.loads(out.splitlines()[-1])
        print(topology, json.dumps(results["chips"][topology], indent=1))
    import jax

    results |= {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "tpu_compile.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
