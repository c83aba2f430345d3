"""Compiles a training step for a TPU slice that is not at hand, and tells what it would take.

python -m cfpp.aot --config=configs/stage3.py:wan_1_3b --topology=v5p:4x4x4
python -m cfpp.aot --config=configs/stage1.py:wan_1_3b --topology=v5e:8x8 --mesh=fsdp=16,context=4
python -m cfpp.aot --config=configs/stage1.py:wan_1_3b --topology=v5p:4x4x4 --sweep

It is the step that training runs, compiled by the TPU's own compiler (the extra `tpu`) on any
machine; nothing is executed and no data or parent model is needed. Per device it tells memory
against the chip's, arithmetic and communication, and the least time that these take at the chip's
nominal rates. `--sweep` compiles every mesh that the models divide over, and ranks them; it tries
`data` up to 2 and `tensor` up to 4.

Operations count matrix products and kernels, recomputation included; loops whose length is random,
which leave stage 3's denoising early, count as one turn.
"""

import dataclasses
import itertools
import json
import re
import time
from collections.abc import Iterator

from absl import app, flags, logging

from cfpp import command_line, paths
from cfpp.errors import UserError, exit_on_user_error, first_line
from cfpp.parallel import topology

topology.prepare_environment()

import jax  # noqa: E402
import ml_collections  # noqa: E402

from cfpp import stages  # noqa: E402
from cfpp.data import pipeline  # noqa: E402
from cfpp.parallel import compiled, mesh  # noqa: E402
from cfpp.train import checks, program  # noqa: E402

flags.DEFINE_string("topology", None, "The slice, such as v5p:4x4x4 or v5e:16x16.")
flags.DEFINE_string("mesh", None, "Sizes as fsdp=16,context=4; otherwise those of the config.")
flags.DEFINE_string("json", None, "A file to write the figures to, anew after every mesh.")
flags.DEFINE_bool("sweep", False, "Compile every mesh and rank them.")

LARGEST = {"data": 2, "tensor": 4}  # tried by a sweep
ROWS = 8  # of collectives and buffers printed

Config = ml_collections.ConfigDict


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled step takes, per device; sizes in bytes.

    Attributes:
      mesh: sizes by axis.
      memory: the chip's.
      fits: whether the compiler found room for it; without room, only `peak` is known besides
        `largest` or `traced`.
      error: why the step could not be compiled at all, which leaves all else unknown.
      arguments: state and batch. The state is donated: the new one takes its place.
      temporaries: all else that lives at the same time.
      peak: the sum, with the program itself.
      largest: where it does not fit, the largest buffers, as the compiler tells them.
      traced: where it does not tell them, the largest arrays of the program before compilation.
      flops: operations of a step.
      compute_seconds, communication_seconds: the least time for these at the nominal rates.
      collectives: what is exchanged, largest first.
      compile_seconds: what the compiler took.
    """

    mesh: dict[str, int]
    memory: float
    fits: bool = False
    error: str = ""
    peak: float = 0.0
    flops: float = 0.0
    compute_seconds: float = 0.0
    compile_seconds: float = 0.0
    arguments: float = 0.0
    temporaries: float = 0.0
    communication_seconds: float = 0.0
    collectives: tuple[compiled.Collective, ...] = ()
    largest: tuple[str, ...] = ()
    traced: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """The least time that a step takes."""
        return max(self.compute_seconds, self.communication_seconds)


def compile_step(config: Config, name: str) -> Report:
    """Compiles the training step of a stage for a topology such as 'v5p:4x4x4'.

    Raises:
      UserError: the configuration, the topology or the mesh cannot be.
    """
    chip, devices = topology.chip(name), topology.devices(name)
    stage = checks.build_stage(config)
    device_mesh = mesh.create(config.mesh, devices)
    given = program.parent_shapes(stage, config)
    with program.tracing(config, given):
        programs = program.create(stage, config, given, device_mesh)
        begin = time.perf_counter()
        traced = programs.step.trace(programs.state, pipeline.batch_shapes(config, programs.batch))
    flops = compiled.flops(traced.jaxpr.jaxpr) / len(devices)
    figures = {
        "mesh": dict(device_mesh.shape),
        "memory": chip.memory,
        "flops": flops,
        "compute_seconds": flops / chip.rate,
    }
    try:
        step = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "hbm" not in str(error).lower():
            raise
        seconds = time.perf_counter() - begin
        peak, largest = _exhausted(str(error), chip.memory)
        arrays = () if largest else compiled.arrays(traced.jaxpr.jaxpr, len(devices))[:ROWS]
        return Report(
            **figures,
            peak=peak,
            largest=largest,
            traced=tuple(map(_described, arrays)),
            compile_seconds=seconds,
        )
    seconds = time.perf_counter() - begin
    memory = step.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    exchanged = compiled.collectives(step.as_text(), device_mesh)
    received = sum(row.received * row.times for row in exchanged)
    return Report(
        **figures,
        fits=True,
        arguments=arguments,
        temporaries=temporaries,
        peak=arguments + temporaries + fresh + memory.generated_code_size_in_bytes,
        communication_seconds=received / chip.links,
        collectives=tuple(exchanged),
        compile_seconds=seconds,
    )


def _exhausted(message: str, memory: float) -> tuple[float, tuple[str, ...]]:
    """The bytes that a step would take, and its largest buffers, from the compiler's refusal.

    Where it sees early that there is no room, it tells no buffers.
    """
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}
    used = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT]?)", message)
    peak = float(used.group(1)) * units[used.group(2)] if used else memory
    sizes = re.findall(r"Size: ([\d.]+[KMGT]?)(.*?)(?=Size:|\Z)", message, re.DOTALL)
    rows = []
    for size, detail in sizes[:ROWS]:
        shape = re.search(r"Shape: (\w+\[[\d,]*\])", detail)
        origin = re.search(r'op_name="([^"]*)"', detail)
        rows.append(
            " ".join([size, shape.group(1) if shape else "", origin.group(1) if origin else ""])
        )
    return peak, tuple(rows)


def _described(array: compiled.Array) -> str:
    times = f"{array.count} x " if array.count > 1 else ""
    return f"{times}{_gib(array.nbytes)} {array.shape} {array.origin}"


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def meshes(config: Config, stage: stages.Stage, devices: int) -> Iterator[dict[str, int]]:
    """The meshes over which a stage and its parents divide, up to the `LARGEST` sizes."""
    models = (config.model, *(parent.model for parent in stage.parents.values()))
    models = [mesh.divided(model) for model in models]
    divides = lambda axis, ways: not any(model[axis][0] % ways for model in models)
    tensors = [size for size in range(1, LARGEST["tensor"] + 1) if divides("tensor", size)]
    contexts = [size for size in range(1, devices + 1) if divides("context", size)]
    repeats = range(1, LARGEST["data"] + 1)
    for tensor, context, data in itertools.product(tensors, contexts, repeats):
        fsdp, left = divmod(devices, tensor * context * data)
        if left or not fsdp or config.batch_size % (data * fsdp * config.accumulate):
            continue
        yield {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}


def advice(config: Config, report: Report) -> str:
    """What to change where a step does not fit."""
    options = []
    if config.model.remat == "none":
        options.append("--config.model.remat=full")
    ways = report.mesh["data"] * report.mesh["fsdp"]
    clips = config.batch_size // (ways * config.accumulate)
    if clips > 1:
        options.append(
            f"up to --config.accumulate={config.batch_size // ways}, parts of the batch one after "
            f"another, or a smaller --config.batch_size (each device has {clips} clips at once)"
        )
    options.append("a larger context in --mesh, or more chips")
    return "; ".join(options)


def show(report: Report) -> str:
    """A report as text."""
    sizes = ", ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    if report.error:
        return f"mesh {sizes}: cannot be compiled: {report.error}"
    share = f"{report.peak / report.memory:.0%} of {_gib(report.memory)}"
    lines = [f"mesh {sizes}: " + ("fits" if report.fits else "does not fit")]
    if not report.fits:
        told = "largest arrays before compilation, of each device if all divide them"
        what = "largest buffers" if report.largest else told
        lines.append(f"  memory         {_gib(report.peak)} needed, {share}; {what}:")
        lines += [f"                 {row}" for row in report.largest or report.traced]
    else:
        lines.append(
            f"  memory         arguments {_gib(report.arguments)}, temporaries "
            f"{_gib(report.temporaries)}, peak {_gib(report.peak)}: {share}"
        )
    lines.append(
        f"  arithmetic     {report.flops / 1e12:.1f} TFLOP: at least {report.compute_seconds:.2f} s"
    )
    if report.fits:
        total = sum(row.received * row.times for row in report.collectives)
        lines.append(
            f"  communication  {_gib(total)}: at least {report.communication_seconds:.2f} s"
        )
        for row in report.collectives[:ROWS]:
            shape, *more = row.shape.split("+")
            lines.append(
                f"    {_gib(row.received * row.times):>11} = {row.times:5} x "
                f"{row.received / 2**20:.2f} MiB, {row.kind} over {' and '.join(row.axes)}, {shape}"
                + (f" and {len(more)} more" if more else "")
            )
    lines.append(f"  compiled in    {report.compile_seconds:.0f} s")
    return "\n".join(lines)


def rank(reports: list[Report]) -> str:
    """A table of the meshes of a sweep, the fastest that fits first."""
    order = lambda report: (not report.fits, report.error, report.seconds, report.peak)
    ordered = sorted(reports, key=order)
    lines = ["| mesh | peak, of memory | arithmetic, s | communication, s |", "|---|---|---|---|"]
    for report in ordered:
        sizes = ", ".join(f"{axis}={size}" for axis, size in report.mesh.items() if size > 1)
        if report.error:
            lines.append(f"| {sizes} | cannot be compiled | | |")
            continue
        share = f"{report.peak / report.memory:.0%}" + ("" if report.fits else ", does not fit")
        talk = f"{report.communication_seconds:.2f}" if report.fits else ""
        lines.append(f"| {sizes} | {share} | {report.compute_seconds:.2f} | {talk} |")
    return "\n".join(lines)


def run(config: Config, name: str, sizes: str | None, sweep: bool, out: str | None) -> None:
    """Compiles and prints what the flags ask for.

    Raises:
      UserError: the configuration, the topology, the mesh or the file cannot be.
    """
    if "jobs" in config:
        raise UserError(f"--config has several jobs, {', '.join(config.jobs)}; give one stage's")
    config = config.copy_and_resolve_references()
    checks.validate(config)
    stage = checks.build_stage(config)
    checks.check_pattern(config)
    devices = topology.devices(name)
    print(f"{config.stage} on {name}, {len(devices)} devices")
    tried = [mesh.sizes(sizes) if sizes else dict(config.mesh)]
    if sweep:
        tried = list(meshes(config, stage, len(devices)))
        if not tried:
            raise UserError(
                f"no mesh of {len(devices)} chips divides config.batch_size {config.batch_size} by "
                "data and fsdp and the models by context and tensor"
            )
    reports = []
    for axes in tried:
        config.mesh = axes
        try:
            report = compile_step(config, name)
        except Exception as error:
            if not sweep:
                raise
            # One mesh must not lose what the others took hours for.
            memory = topology.chip(name).memory
            report = Report(dict(config.mesh), memory, error=first_line(error))
        reports.append(report)
        print(show(report), flush=True)
        if not report.fits and not report.error:
            print(f"  to change      {advice(config, report)}")
        if out:
            _write(out, reports)
    if sweep:
        print("\n" + rank(reports))


def _write(path: str, reports: list[Report]) -> None:
    """Writes reports so that at any time the file has those of before or these."""
    rows = [dataclasses.asdict(report) for report in reports]
    paths.replace_text(path, json.dumps(rows, indent=1) + "\n")


def parse(argv: list[str]) -> list[str]:
    """Parses the command line, for `absl.app`.

    Raises:
      UserError: a mistake in it.
    """
    left_over = command_line.parse(argv)
    if not flags.FLAGS.topology:
        raise UserError("--topology is missing; give a slice such as v5p:4x4x4 or v5e:16x16")
    topology.chip(flags.FLAGS.topology)
    if flags.FLAGS.mesh and flags.FLAGS.sweep:
        raise UserError("--mesh names one mesh and --sweep tries all; give one of the two")
    if flags.FLAGS.mesh:
        mesh.sizes(flags.FLAGS.mesh)
    if flags.FLAGS.json:
        paths.check_file(flags.FLAGS.json)
    return left_over


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    del argv
    logging.set_verbosity(logging.WARNING)
    values = flags.FLAGS
    run(values.config, values.topology, values.mesh, values.sweep, values.json)


if __name__ == "__main__":
    with exit_on_user_error():
        app.run(main, flags_parser=parse)
