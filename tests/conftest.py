"""Tests compile many small programs and run each for a moment: compile fast, run slow."""

import gc
import importlib.util
import os
import pathlib
import signal
import sys

import hypothesis
import jax

# A shell that starts the tests in the background has them ignore Ctrl-C, and their programs too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Threads of XLA's pool. On a machine of two cores it has two, and what waits in them for others, as
# collectives between processes and simulated warpgroups do, can take the place of these for ever.
os.environ.setdefault("NPROC", "16")
jax.config.update("jax_disable_most_optimizations", True)
# XLA's newer emitters of fusions for the CPU take half of the time that programs of tests compile.
# JAX 0.11's XLA has no others, and ends at a flag that it does not know.
if jax.__version_info__ < (0, 11):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

# Always the same examples, so that a change is what breaks a test. HYPOTHESIS_PROFILE=default draws
# new ones.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# Or imageio forks a process with JAX's threads in it, which may hang.
os.environ.setdefault("IMAGEIO_FFMPEG_NO_PREVENT_SIGINT", "1")

# Tracing makes objects by the million, and hardly a cycle that would have to be collected.
gc.set_threshold(100_000, 50, 50)


def pytest_collection_finish():
    """What is imported by now stays."""
    gc.freeze()


def pytest_collection_modifyitems(items):
    """The longest first, so that no worker goes on long after the others have ended."""
    seconds = lambda item: sum(sum(mark.args) for mark in item.iter_markers("slow"))
    items.sort(key=lambda item: -seconds(item))


# The TPU's compiler where `make test` puts it, for a plain `pytest` and the processes that tests
# start. Whatever finds it there looks for TPUs first, unless it is told not to.
LIBTPU = pathlib.Path(sys.prefix, "libtpu")
if LIBTPU.exists() and importlib.util.find_spec("libtpu") is None:
    sys.path.append(str(LIBTPU))
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (path, str(LIBTPU))))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
