"""Which code ran, by which command, on what: read from git, the process and the machine.

The state of the tree is taken at the start *and* at the end of a stage, since an edit in between would otherwise pass
for the code that produced the result (the trap of dvc#11058). Device facts are handed in by `distributed`,
so that this module needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from recipe.records import Hardware, Provenance, TreeState
from recipe.run import CHECKOUT, now, recorded_path, without_paths, write_atomically

PACKAGES = (
    "torch",
    "torchvision",
    "nvidia-nvimgcodec-cu13",
    "pillow",
    "numpy",
    "hydra-core",
    "omegaconf",
    "msgspec",
    "timm",
)
TYPED_WORDS = "RECIPE_TYPED_WORDS"  # environment variable; jobs inherit it
PATCHES = Path("records", "patches")  # below a stage's directory
NAMED_MAX = 50  # untracked files in a record
ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTHONHASHSEED",
)
PLACES = {"data.raw_dir": "$RAW_DIR", "data.directory": "$DATA_DIR", "model.weights": "$WEIGHTS"}
ENVIRONMENT_PREFIXES = ("NCCL_", "TORCH_NCCL_")
SOURCES = ("recipe/**/*.py", "recipe/**/*.j2", "conf/**/*.yaml", "*.py", "constraints.txt")


class Stage:
    """Watches one stage from its start to its end; `finish` gives its provenance.

    `outputs` is the stage's own directory: the run's, or the data set's. `command` is what repeats the stage, where it
    is not this process's command line (a notebook's kernel).
    """

    def __init__(self, outputs: Path, command: str | None = None) -> None:
        self.outputs = outputs
        self.command = command
        self.started = now()
        self.clock = time.perf_counter()
        self.tree = tree_state(outputs)
        self.source = source_sha256()

    def finish(self, hardware: Hardware, device_versions: dict[str, str] | None = None) -> Provenance:
        """The provenance of everything since the start, on this hardware."""
        return Provenance(
            command=self.command or command(),
            commit=commit(),
            tree_at_start=self.tree,
            tree_at_end=tree_state(self.outputs),
            source_sha256=self.source,
            source_sha256_at_end=source_sha256(),
            started=self.started,
            seconds=round(time.perf_counter() - self.clock, 3),
            hardware=hardware,
            versions=versions() | (device_versions or {}),
            environment=environment(),
        )


def command() -> str:
    """The command as typed, with other people's paths and machines taken out.

    Workers that this project starts inherit `sys.argv`; a worker of torchrun is told by its environment and by having
    no parent in Python's multiprocessing.
    """
    script, *arguments = typed_words() or ["python"]
    words = " ".join([_program(script), *(shown_argument(argument) for argument in arguments)])
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    if processes is None or multiprocessing.parent_process() is not None:
        return _printable(f"python {words}")
    nodes = int(os.environ["WORLD_SIZE"]) // int(processes)
    return _printable(f"torchrun --nnodes={nodes} --nproc-per-node={processes} {words}")


def _program(script: str) -> str:
    """What follows `python`; the verbs are a module, also where they were called by their installed command."""
    is_verb = Path(script).parts[-2:] == ("recipe", "__main__.py") or Path(script).name == "recipe"
    return "-m recipe" if is_verb else shlex.quote(Path(script).name)


def remember_typed_words() -> None:
    """Keep the command line for where `sys.argv` is another's: in a job that a launcher of Hydra has sent to Slurm."""
    os.environ[TYPED_WORDS] = json.dumps(sys.argv)


def typed_words() -> list[str]:
    """The command line as typed, script first."""
    remembered = os.environ.get(TYPED_WORDS)
    return sys.argv if remembered is None else [str(word) for word in json.loads(remembered)]


def shown_argument(argument: str) -> str:
    """One word of a command for a shell; a place outside the checkout is a variable, or its last part."""
    key, equals, value = argument.partition("=")
    value = value.strip("'\"")  # which Hydra would take off
    if equals and (value.startswith("~") or recorded_path(value).startswith("...")):
        if key in PLACES:
            return f'{key}="{PLACES[key]}"'
        return shlex.quote(f"{key}=.../{Path(value).name}")
    return shlex.quote(without_paths(argument))


def git(*arguments: str, accepted: tuple[int, ...] = (0,)) -> str | None:
    """The output of a git command in the checkout, or None where it fails or there is no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    # Names and patches may hold any bytes: escaped, they come back out as they were.
    return done.stdout.decode("utf-8", "surrogateescape") if done.returncode in accepted else None


def commit() -> str | None:
    """The commit that is checked out."""
    found = git("rev-parse", "HEAD")
    return found.strip() if found is not None else None


def tree_state(outputs: Path) -> TreeState:
    """Compare the working tree with its commit; what differs is kept as a patch, named by its hash.

    The stage's own outputs do not count. Untracked files do not make the tree *modified*, but those that are source
    are part of the patch, so that the commit and the patch together are the code that ran.
    """
    status = git("status", "--porcelain", "--untracked-files=all", "--no-renames", "-z", "--", ".")
    if status is None or commit() is None:
        return TreeState(state="no git")
    lines = status.split("\0")[:-1]  # unlike lines, these quote no name
    untracked = sorted(line[3:] for line in lines if line.startswith("??") and not _is_inside(line[3:], outputs))
    is_modified = any(not line.startswith("??") for line in lines)
    if not (is_modified or untracked):
        return TreeState(state="clean")
    return TreeState(
        state="modified" if is_modified else "untracked",
        untracked=[_printable(name) for name in untracked[:NAMED_MAX]],
        untracked_files=len(untracked),
        patch_sha256=_keep_patch(outputs, untracked),
    )


def modified_files(outside: Sequence[str] = ()) -> list[str] | None:
    """Files of the checkout that are not as committed, and new source files; None without git. Writes nothing."""
    status = git("status", "--porcelain", "--untracked-files=all", "--no-renames", "-z", "--", ".")
    if status is None or commit() is None:
        return None
    sources = {path.relative_to(CHECKOUT).as_posix() for path in source_files()}
    found = [(line[:2], line[3:]) for line in status.split("\0")[:-1]]
    return [
        _printable(name)
        for state, name in found
        if (state != "??" or name in sources) and not any(Path(name).is_relative_to(place) for place in outside)
    ]


def _printable(name: str) -> str:
    """Bytes that are no UTF-8 as \\xff: JSON holds text only."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _is_inside(name: str, directory: Path) -> bool:
    return (CHECKOUT / name).is_relative_to(directory.absolute())


def _keep_patch(outputs: Path, untracked: list[str]) -> str | None:
    """Write the difference to the commit beside the records; None where no source differs."""
    sources = {path.relative_to(CHECKOUT).as_posix() for path in source_files()}
    new = [
        git("diff", "--no-index", "--binary", "--", os.devnull, name, accepted=(0, 1)) or ""
        for name in untracked
        if name in sources
    ]
    patch = "".join([git("diff", "--binary", "HEAD", "--", ".") or "", *new]).encode("utf-8", "surrogateescape")
    if not patch:
        return None
    digest = hashlib.sha256(patch).hexdigest()
    target = outputs / PATCHES / f"{digest[:16]}.patch"
    if not target.exists():
        write_atomically(target, patch)
    return digest


def source_files() -> list[Path]:
    """The files whose content can change a result, sorted."""
    found = {path for pattern in SOURCES for path in CHECKOUT.glob(pattern)}
    return sorted(path for path in found if path.is_file())


def source_sha256() -> str:
    """Identifies the code where a commit was squashed, rebased or lies beyond a shallow clone."""
    digest = hashlib.sha256()
    for path in source_files():
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(os.fsencode(f"{path.relative_to(CHECKOUT).as_posix()} {content}\n"))  # a name may be any bytes
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Python and the packages that can change a result."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def environment() -> dict[str, str]:
    """The white list of environment variables that change a run; nothing else is ever recorded."""
    names = (name for name in sorted(os.environ) if name in ENVIRONMENT or name.startswith(ENVIRONMENT_PREFIXES))
    return {_printable(name): _printable(without_paths(os.environ[name])) for name in names}


def processor_name() -> str:
    """The processor's own name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """The cores that this process may use; a container or `taskset` can grant fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine(**accelerator: str | int | float | None) -> Hardware:
    """Processor, usable cores and memory, joined with the facts of the accelerator that `distributed` found."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(
        processor=processor_name(),
        cores=usable_cores(),
        memory_gib=round(memory_bytes / 2**30, 1),
        **accelerator,  # type: ignore[arg-type]
    )
