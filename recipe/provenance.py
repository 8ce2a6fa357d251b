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
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import NamedTuple

from recipe.files import (
    CHECKOUT,
    ELSEWHERE,
    disk_errors,
    is_elsewhere,
    portable_path,
    printable,
    redact_paths,
    write_atomically,
)
from recipe.launcher import launched
from recipe.records import Hardware, Provenance, TreeState, now

PACKAGES = (
    "torch",
    "torchvision",
    "nvidia-nvimgcodec-cu13",
    "pillow",
    "simplejpeg",
    "numpy",
    "hydra-core",
    "omegaconf",
    "msgspec",
    "timm",
)
TYPED_WORDS = "RECIPE_TYPED_WORDS"  # environment variable; jobs inherit it
PATCHES = Path("records", "patches")  # below a stage's directory
NAMED_MAX = 50  # untracked files in a record
NO_GIT, GIT_REFUSED, NOT_OURS = "no git", "git refused", "not a repository of ours"  # states of the tree without commit
OWN_FILE = "recipe/__init__.py"  # every commit of this project has it
GIT_FILES = (
    "GIT_CONFIG_GLOBAL",
    "GIT_CONFIG_SYSTEM",
    "GIT_CONFIG_NOSYSTEM",
)  # the caller's variables that git is given
PLAIN, LINK, SUBMODULE = "100644", "120000", "160000"  # modes in a commit
LONGEST_REASON = 200
GIT_SECONDS = 60
ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTHONHASHSEED",
)
PLACES = {
    "data.raw_dir": "$RAW_DIR",
    "data.directory": "$DATA_DIR",
    "run_dir": "$RUN_DIR",
    "model.weights": "$WEIGHTS",
    "evaluation.weights": "$EVALUATED_WEIGHTS",
    "reference": "$REFERENCE",
    "reproduce": "$RECIPE",  # the verb and its flags
    "--run-dir": "$RUN_DIR",
    "--data-dir": "$DATA_DIR",
    "--raw-dir": "$RAW_DIR",
    "--weights": "$WEIGHTS",
}
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

    A process that this project starts has the `sys.argv` of its parent in Python's multiprocessing; a process of
    torchrun has no such parent.
    """
    script, *arguments = typed_words() or ["python"]
    words = " ".join([_program(script), *map(shown_argument, arguments, ["", *arguments])])
    launch = launched()
    if not launch.is_elastic or multiprocessing.parent_process() is not None:
        return printable(f"python {words}")
    nodes = launch.size // launch.local_size
    return printable(f"torchrun --nnodes={nodes} --nproc-per-node={launch.local_size} {words}")


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


def shown_argument(argument: str, before: str = "") -> str:
    """One word of a command for a shell; a place outside the checkout is a variable, or its last part.

    `before` is the word before it: a flag or a verb whose value it can be.
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


class NoCommitError(Exception):
    """Git cannot say which code this is; `tree` is what the records have in the place of a commit."""

    def __init__(self, state: str, reason: str | None = None) -> None:
        super().__init__(state)
        self.tree = TreeState(state=state, reason=reason)


class Committed(NamedTuple):
    """A file as a commit holds it."""

    mode: str
    object_id: str


def git(*arguments: str, given: bytes = b"") -> bytes:
    """What git prints about this checkout; raises `NoCommitError` where it has no answer."""
    settings = {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_NO_REPLACE_OBJECTS": "1"}
    return _git("-c", "core.fsmonitor=false", *arguments, folder=CHECKOUT, settings=settings, given=given)


def _git(
    *arguments: str, folder: Path, settings: dict[str, str], given: bytes = b"", accepted: Sequence[int] = (0,)
) -> bytes:
    """Run git without the caller's GIT_* variables, which could name another repository, index or setting.

    Those that name the user's files of settings stay: `safe.directory` may stand in one.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_") or name in GIT_FILES}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=kept | settings,
            input=given,
            capture_output=True,
            timeout=GIT_SECONDS,
            check=False,
        )
    except OSError:
        raise NoCommitError(NO_GIT) from None
    except subprocess.TimeoutExpired:
        raise NoCommitError(GIT_REFUSED, f"it gave no answer for {GIT_SECONDS} seconds") from None
    if done.returncode in accepted:
        return done.stdout
    reason = _reason(done.stderr) or f"it ended with {done.returncode}"
    if "not a git repository" in reason and not os.path.lexists(folder / ".git"):
        raise NoCommitError(NO_GIT)
    raise NoCommitError(GIT_REFUSED, reason)


def _reason(complaint: bytes) -> str:
    """The first line that says what went wrong, without the paths of this machine."""
    lines = [line for line in printable(os.fsdecode(complaint)).splitlines() if line.strip()]
    first = next((line for line in lines if line.startswith(("fatal: ", "error: "))), "".join(lines[:1]))
    without_quoted = re.sub(r"'.*/.*'", "'...'", re.sub(r"^(fatal|error): ", "", first))
    return re.sub(r"(?<![\w.])/.*", "...", without_quoted)[:LONGEST_REASON]


def commit() -> str | None:
    """The commit that is checked out; None where git cannot say."""
    try:
        return _head()
    except NoCommitError:
        return None


def _head() -> str:
    """The commit that is checked out, in a repository that is this checkout's own."""
    top = Path(os.fsdecode(git("rev-parse", "--show-toplevel").removesuffix(b"\n")))
    if top.resolve() != CHECKOUT.resolve():
        raise NoCommitError(NOT_OURS)
    head = git("rev-parse", "--revs-only", "HEAD").decode().strip()
    if not head:
        raise NoCommitError(NO_GIT)  # nothing was committed yet
    return head


def committed_files(revision: str | None = None) -> dict[str, Committed]:
    """Name -> file, of a commit of this project: the one that is checked out, or `revision`."""
    head = _head()
    found = {}
    for entry in git("ls-tree", "-r", "-z", "--full-tree", revision or head).split(b"\0")[:-1]:
        facts, _, name = entry.partition(b"\t")
        mode, _, object_id = facts.decode().split()
        found[os.fsdecode(name)] = Committed(mode, object_id)
    if OWN_FILE not in found:
        raise NoCommitError(NOT_OURS)
    return found


def contents(object_ids: Sequence[str]) -> list[bytes]:
    """The bytes of several files, from git's objects."""
    rest = git("cat-file", "--batch", given="".join(f"{object_id}\n" for object_id in object_ids).encode())
    found = []
    while rest:
        header, _, rest = rest.partition(b"\n")
        if b" blob " not in header:
            raise NoCommitError(GIT_REFUSED, "it has not all of the commit's files")
        size = int(header.split()[-1])
        found.append(rest[:size])
        rest = rest[size + 1 :]
    return found


def tree_state(outputs: Path) -> TreeState:
    """Compare the working tree with its commit; what differs is kept as a patch, named by its hash.

    The stage's own outputs do not count. Untracked files do not make the tree *modified*, but those that are source
    are part of the patch, so that the commit and the patch together are the code that ran.
    """
    try:
        committed = committed_files()
        modified = _modified(committed)
        untracked = [name for name in _untracked(committed) if not _is_inside(name, outputs)]
        patch_sha256 = _keep_patch(outputs, committed, modified, untracked)
    except NoCommitError as error:
        return error.tree
    if not (modified or untracked):
        return TreeState(state="clean")
    return TreeState(
        state="modified" if modified else "untracked",
        untracked=[printable(name) for name in untracked[:NAMED_MAX]],
        untracked_files=len(untracked),
        patch_sha256=patch_sha256,
    )


def modified_files(outside: Sequence[str] = ()) -> list[str]:
    """Files of the checkout that are not as committed, and new source files; raises `NoCommitError`. Writes nothing."""
    committed = committed_files()
    found = _modified(committed) + _new_sources(committed)
    return [printable(name) for name in found if not any(Path(name).is_relative_to(place) for place in outside)]


def _modified(committed: Mapping[str, Committed]) -> list[str]:
    """Files whose content is not the committed one, or that are gone.

    They are compared here and not by `git status`, which settings, filters and marks in the index can make blind.
    """
    return sorted(
        name
        for name, (mode, object_id) in committed.items()
        if mode != SUBMODULE and _object_id(_content(CHECKOUT / name), object_id) != object_id
    )


def _object_id(content: bytes | None, like: str) -> str | None:
    """The name that git gives to this content, in the kind of hash that the repository has."""
    if content is None:
        return None
    digest = hashlib.new("sha1" if len(like) == 40 else "sha256", b"blob %d\0" % len(content))
    digest.update(content)
    return digest.hexdigest()


def _content(path: Path) -> bytes | None:
    """What git would store of a file: its bytes, or where a link points; None for what is not a file."""
    try:
        if path.is_symlink():
            return os.fsencode(os.readlink(path))
        return path.read_bytes() if path.is_file() else None
    except OSError:
        return None


def _untracked(committed: Mapping[str, Committed]) -> list[str]:
    """Files that are not in the commit: sources, and whatever git does not ignore."""
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split(b"\0")[:-1]
    there = {name for name in map(os.fsdecode, listed) if os.path.lexists(CHECKOUT / name)}
    return sorted({name for name in there if name.rstrip("/") not in committed} | set(_new_sources(committed)))


def _new_sources(committed: Mapping[str, Committed]) -> list[str]:
    return [name for name in _source_names() if name not in committed]


def _source_names() -> list[str]:
    return [path.relative_to(CHECKOUT).as_posix() for path in source_files()]


def _is_inside(name: str, directory: Path) -> bool:
    return (CHECKOUT / name).is_relative_to(directory.absolute())


def _keep_patch(
    outputs: Path, committed: Mapping[str, Committed], modified: list[str], untracked: list[str]
) -> str | None:
    """Write the difference to the commit beside the records; None where no source differs."""
    new = sorted({*untracked} & {*_source_names()})
    if not (modified or new):
        return None
    patch = _patch(committed, modified, new)
    digest = hashlib.sha256(patch).hexdigest()
    target = outputs / PATCHES / f"{digest[:16]}.patch"
    if not target.exists():
        write_atomically(target, patch)
    return digest


def _patch(committed: Mapping[str, Committed], modified: list[str], new: list[str]) -> bytes:
    """The difference as `git apply` takes it, of two folders and without any setting of the user."""
    before = contents([committed[name].object_id for name in modified])
    with disk_errors(Path(gettempdir())), TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        for side in ("a", "b"):
            (folder / side).mkdir()
        for name, content in zip(modified, before, strict=True):
            _write_side(folder / "a" / name, content, committed[name].mode)
        for name in (*modified, *new):
            if (now := _content(CHECKOUT / name)) is not None:
                _write_side(folder / "b" / name, now, _mode(name, committed))
        settings = {name: str(folder) for name in ("HOME", "XDG_CONFIG_HOME")}
        settings |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1"}
        settings |= {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
        words = ("diff", "--no-index", "--no-prefix", "--no-renames", "--binary", "--full-index", "a", "b")
        return _git(*words, folder=folder, settings=settings, accepted=(0, 1))


def _mode(name: str, committed: Mapping[str, Committed]) -> str:
    """Of a file as it is now; the right to execute does not count, since not every file system has it."""
    if (CHECKOUT / name).is_symlink():
        return LINK
    was = committed[name].mode if name in committed else PLAIN
    return PLAIN if was == LINK else was


def _write_side(path: Path, content: bytes, mode: str) -> None:
    """A file as git has it, in one of the two folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == LINK:
        path.symlink_to(os.fsdecode(content))
    else:
        path.write_bytes(content)
        path.chmod(0o644 if mode == PLAIN else 0o755)


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
    return {printable(name): printable(redact_paths(os.environ[name])) for name in names}


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
