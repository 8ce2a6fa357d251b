"""The command line, the versions, the environment variables and the machine of a stage. Needs no torch."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path

from recipe.run.files import ELSEWHERE, is_elsewhere, portable_path, printable, redact_paths
from recipe.run.launcher import launched
from recipe.run.records import Hardware

PACKAGES = (
    *("torch", "torchvision", "nvidia-nvimgcodec-cu13", "pillow", "simplejpeg"),
    *("numpy", "hydra-core", "omegaconf", "msgspec", "timm"),
)
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY"),
    *("GOMP_SPINCOUNT", "CUBLAS_WORKSPACE_CONFIG", "PYTHONHASHSEED"),
)
VARIABLE_PREFIXES = ("NCCL_", "TORCH_NCCL_")
TYPED_WORDS = "RECIPE_TYPED_WORDS"  # environment variable that jobs inherit
PLACES = {  # setting, verb or flag -> the shell variable that replaces its path
    "data.raw_dir": "$RAW_DIR",
    "data.directory": "$DATA_DIR",
    "run_dir": "$RUN_DIR",
    "model.weights": "$WEIGHTS",
    "evaluation.weights": "$EVALUATED_WEIGHTS",
    "reference": "$REFERENCE",
    "reproduce": "$RECIPE",
    "--run-dir": "$RUN_DIR",
    "--data-dir": "$DATA_DIR",
    "--raw-dir": "$RAW_DIR",
    "--weights": "$WEIGHTS",
}


def command() -> str:
    """The command line as typed, without paths outside the checkout.

    Processes that this project starts have `sys.argv` of their parent from Python's multiprocessing. A process of
    torchrun has no such parent.
    """
    script, *arguments = typed_words() or ["python"]
    is_verb = Path(script).parts[-2:] == ("recipe", "__main__.py") or Path(script).name == "recipe"
    program = "-m recipe" if is_verb else shlex.quote(Path(script).name)
    words = " ".join([program, *map(shown_argument, arguments, ["", *arguments])])
    launch = launched()
    if not launch.is_elastic or multiprocessing.parent_process() is not None:
        return printable(f"python {words}")
    nodes = launch.size // launch.local_size
    return printable(f"torchrun --nnodes={nodes} --nproc-per-node={launch.local_size} {words}")


def remember_typed_words() -> None:
    """Keep the command line for Slurm jobs of a Hydra launcher, which have another `sys.argv`."""
    os.environ[TYPED_WORDS] = json.dumps(sys.argv)


def typed_words() -> list[str]:
    """The command line as typed, script first."""
    remembered = os.environ.get(TYPED_WORDS)
    return sys.argv if remembered is None else [str(word) for word in json.loads(remembered)]


def shown_argument(argument: str, before: str = "") -> str:
    """A word of a command line, quoted for a shell. A path outside the checkout becomes a variable or its last part.

    `before` is the preceding word: the flag or verb that this may be the value of.
    """
    key, equals, value = argument.partition("=")
    if not equals:
        key, value = before, argument
    place = PLACES.get(key.lstrip("+"))
    is_outside = value.startswith("~") or is_elsewhere(portable_path(value.strip("'\"")))
    if place and is_outside:
        return f'{key}="{place}"' if equals else f'"{place}"'
    if equals and is_outside:
        return shlex.quote(f"{key}={ELSEWHERE}/{Path(value).name}")
    return shlex.quote(redact_paths(argument))


def versions() -> dict[str, str]:
    """Python and the packages that can change a result."""
    packages = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            packages[package] = "not installed"
    return packages


def variables() -> dict[str, str]:
    """The environment variables of the allow list. Others are never recorded."""
    names = (name for name in sorted(os.environ) if name in VARIABLES or name.startswith(VARIABLE_PREFIXES))
    return {printable(name): printable(redact_paths(os.environ[name])) for name in names}


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """The cores that this process may use: fewer than the machine has in a container or under `taskset`."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(**accelerator: str | int | float | None) -> Hardware:
    """Processor, usable cores and memory, with the facts of the accelerator that are given."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(
        processor=processor_name(),
        cores=usable_cores(),
        memory_gib=round(memory_bytes / 2**30, 1),
        **accelerator,  # type: ignore[arg-type]
    )
