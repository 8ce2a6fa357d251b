"""Provenance of a stage: the commit, the working tree at start and end, the patch between them, and the source hash.

The working tree is read at the start *and* at the end of a stage. Otherwise an edit in between would be recorded as the
code that produced the result (dvc#11058). Needs no torch.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import NamedTuple

from recipe.run import environment
from recipe.run.files import CHECKOUT, disk_errors, printable, write_atomically
from recipe.run.records import Hardware, Provenance, TreeState, now

SOURCES = ("recipe/**/*.py", "recipe/**/*.j2", "conf/**/*.yaml", "*.py", "constraints.txt")
PATCHES = Path("records", "patches")  # in a stage's directory
UNTRACKED_NAMES_MAX = 50  # in a record
NO_GIT, GIT_REFUSED, NOT_OURS = "no git", "git refused", "not a repository of ours"  # states of a tree without commit
OWN_FILE = "recipe/__init__.py"  # in every commit of this project
GIT_FILES = ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM")  # variables that git is given
GIT_SECONDS = 60
REASON_LENGTH_MAX = 200
PLAIN, SYMLINK, SUBMODULE = "100644", "120000", "160000"  # modes in a commit


class Stage:
    """A running stage. `finish` returns its provenance.

    `outputs` is the stage's own directory: that of the run or the data set. `command` is recorded in place of the
    command line of this process, such as that of a notebook's kernel.
    """

    def __init__(self, outputs: Path, command: str | None = None) -> None:
        self.outputs = outputs
        self.command = command
        self.started = now()
        self.clock = time.perf_counter()
        self.tree = tree_state(outputs)
        self.source = source_sha256()

    def finish(self, hardware: Hardware, device_versions: dict[str, str] | None = None) -> Provenance:
        """The provenance from the start until now, on this hardware."""
        return Provenance(
            command=self.command or environment.command(),
            commit=commit(),
            tree_at_start=self.tree,
            tree_at_end=tree_state(self.outputs),
            source_sha256=self.source,
            source_sha256_at_end=source_sha256(),
            started=self.started,
            seconds=round(time.perf_counter() - self.clock, 3),
            hardware=hardware,
            versions=environment.versions() | (device_versions or {}),
            environment=environment.variables(),
        )


# ---- the source -------------------------------------------------------------------------------------


def source_files() -> list[Path]:
    """The files of the checkout that can change a result, sorted."""
    return sorted(path for path in {path for pattern in SOURCES for path in CHECKOUT.glob(pattern)} if path.is_file())


def source_sha256() -> str:
    """The hash of the source files. It identifies the code if its commit was squashed, rebased or not fetched."""
    return sha256_of_sources((_name(path), path.read_bytes()) for path in source_files())


def sha256_of_sources(files: Iterable[tuple[str, bytes]]) -> str:
    """SHA-256 over the sorted names and contents of source files."""
    digest = hashlib.sha256()
    for name, content in files:
        digest.update(os.fsencode(f"{name} {hashlib.sha256(content).hexdigest()}\n"))  # a file name can have any bytes
    return digest.hexdigest()


def _name(path: Path) -> str:
    return path.relative_to(CHECKOUT).as_posix()


# ---- git --------------------------------------------------------------------------------------------


class NoCommitError(Exception):
    """Git cannot identify the code. `tree` is recorded instead of a commit."""

    def __init__(self, state: str, reason: str | None = None) -> None:
        super().__init__(state)
        self.tree = TreeState(state=state, reason=reason)


class CommittedFile(NamedTuple):
    mode: str
    object_id: str


def git(
    *arguments: str,
    given: bytes = b"",
    folder: Path | None = None,
    settings: Mapping[str, str] | None = None,
    accepted: Sequence[int] = (0,),
) -> bytes:
    """The output of git in the checkout, or in `folder`. Raises `NoCommitError` if it fails.

    GIT_* variables of the caller are removed, since they could name another repository or index. Those of the user's
    configuration files stay: `safe.directory` may be set there.
    """
    folder = folder or CHECKOUT
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_") or name in GIT_FILES}
    own = {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_NO_REPLACE_OBJECTS": "1"}
    try:
        done = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", *arguments],
            cwd=folder,
            env=kept | own | dict(settings or {}),
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
    reason = _first_error(done.stderr) or f"it ended with {done.returncode}"
    if "not a git repository" in reason and not os.path.lexists(folder / ".git"):
        raise NoCommitError(NO_GIT)
    raise NoCommitError(GIT_REFUSED, reason)


def _first_error(output: bytes) -> str:
    """The first line of an error, without paths of this machine."""
    lines = [line for line in printable(os.fsdecode(output)).splitlines() if line.strip()]
    first = next((line for line in lines if line.startswith(("fatal: ", "error: "))), "".join(lines[:1]))
    without_quoted = re.sub(r"'.*/.*'", "'...'", re.sub(r"^(fatal|error): ", "", first))
    return re.sub(r"(?<![\w.])/.*", "...", without_quoted)[:REASON_LENGTH_MAX]


def commit() -> str | None:
    """The commit that is checked out. None if git cannot identify it."""
    try:
        return _head()
    except NoCommitError:
        return None


def _head() -> str:
    top = Path(os.fsdecode(git("rev-parse", "--show-toplevel").removesuffix(b"\n")))
    if top.resolve() != CHECKOUT.resolve():
        raise NoCommitError(NOT_OURS)
    head = git("rev-parse", "--revs-only", "HEAD").decode().strip()
    if not head:
        raise NoCommitError(NO_GIT)  # nothing was committed yet
    return head


def committed_files(revision: str | None = None) -> dict[str, CommittedFile]:
    """Name -> file of a commit of this project, by default HEAD."""
    head = _head()
    files = {}
    for entry in git("ls-tree", "-r", "-z", "--full-tree", revision or head).split(b"\0")[:-1]:
        description, _, name = entry.partition(b"\t")
        mode, _, object_id = description.decode().split()
        files[os.fsdecode(name)] = CommittedFile(mode, object_id)
    if OWN_FILE not in files:
        raise NoCommitError(NOT_OURS)
    return files


def contents(files: Iterable[CommittedFile]) -> list[bytes]:
    """The bytes of committed files, without filters and line-end conversion."""
    rest = git("cat-file", "--batch", given="".join(f"{file.object_id}\n" for file in files).encode())
    blobs = []
    while rest:
        header, _, rest = rest.partition(b"\n")
        if b" blob " not in header:
            raise NoCommitError(GIT_REFUSED, "it has not all of the commit's files")
        size = int(header.split()[-1])
        blobs.append(rest[:size])
        rest = rest[size + 1 :]
    return blobs


# ---- the working tree -------------------------------------------------------------------------------


def tree_state(outputs: Path) -> TreeState:
    """Compare the working tree with its commit. The difference is kept as a patch, named by its hash.

    The stage's own outputs do not count. Untracked files do not make the tree *modified*, but untracked source files
    are part of the patch, so that the commit and the patch together are the code that ran.
    """
    try:
        committed = committed_files()
        modified, sources = _modified(committed), _new_sources(committed)
        paths = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split(b"\0")[:-1]
        names = {name for name in map(os.fsdecode, paths) if name.rstrip("/") not in committed}
        present = {name for name in names if os.path.lexists(CHECKOUT / name)} | set(sources)
        untracked = sorted(name for name in present if not (CHECKOUT / name).is_relative_to(outputs.absolute()))
        sources = [name for name in sources if name in untracked]
        patch = _patch(committed, modified, sources) if modified or sources else None
    except NoCommitError as error:
        return error.tree
    if not (modified or untracked):
        return TreeState(state="clean")
    return TreeState(
        state="modified" if modified else "untracked",
        untracked=[printable(name) for name in untracked[:UNTRACKED_NAMES_MAX]],
        untracked_files=len(untracked),
        patch_sha256=None if patch is None else _keep(patch, outputs),
    )


def modified_files(outside: Sequence[str] = ()) -> list[str]:
    """Files that differ from the commit, and new source files. Writes nothing. Raises `NoCommitError`."""
    committed = committed_files()
    names = _modified(committed) + _new_sources(committed)
    return [printable(name) for name in names if not any(Path(name).is_relative_to(place) for place in outside)]


def _modified(committed: Mapping[str, CommittedFile]) -> list[str]:
    """Files whose content is not the committed one, or that are missing.

    Settings, filters and marks in the index can hide them from `git status`.
    """
    return sorted(
        name
        for name, (mode, object_id) in committed.items()
        if mode != SUBMODULE and _object_id(_content(name), object_id) != object_id
    )


def _new_sources(committed: Mapping[str, CommittedFile]) -> list[str]:
    return [name for name in map(_name, source_files()) if name not in committed]


def _object_id(content: bytes | None, like: str) -> str | None:
    """The object name of this content, by the hash function of the repository."""
    if content is None:
        return None
    return hashlib.new("sha1" if len(like) == 40 else "sha256", b"blob %d\0" % len(content) + content).hexdigest()


def _content(name: str) -> bytes | None:
    """The content that git would store: the bytes of a file or the target of a link. None for others."""
    path = CHECKOUT / name
    try:
        if path.is_symlink():
            return os.fsencode(os.readlink(path))
        return path.read_bytes() if path.is_file() else None
    except OSError:
        return None


def _keep(patch: bytes, outputs: Path) -> str:
    """Write the patch beside the records and return its hash."""
    digest = hashlib.sha256(patch).hexdigest()
    target = outputs / PATCHES / f"{digest[:16]}.patch"
    if not target.exists():
        write_atomically(target, patch)
    return digest


def _patch(committed: Mapping[str, CommittedFile], modified: list[str], new: list[str]) -> bytes:
    """The difference to the commit for `git apply`, from two folders and without the user's configuration."""
    before = contents(committed[name] for name in modified)
    with disk_errors(Path(gettempdir())), TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        for side in ("a", "b"):
            (folder / side).mkdir()
        for name, content in zip(modified, before, strict=True):
            _write_file(folder / "a" / name, content, committed[name].mode)
        for name in (*modified, *new):
            if (now_there := _content(name)) is not None:
                # The executable bit is taken from the commit, since some file systems do not have it.
                mode = committed[name].mode if name in committed else PLAIN
                mode = SYMLINK if (CHECKOUT / name).is_symlink() else PLAIN if mode == SYMLINK else mode
                _write_file(folder / "b" / name, now_there, mode)
        settings = {name: str(folder) for name in ("HOME", "XDG_CONFIG_HOME")}
        settings |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1"}
        settings |= {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
        words = ("diff", "--no-index", "--no-prefix", "--no-renames", "--binary", "--full-index", "a", "b")
        return git(*words, folder=folder, settings=settings, accepted=(0, 1))


def _write_file(path: Path, content: bytes, mode: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == SYMLINK:
        path.symlink_to(os.fsdecode(content))
    else:
        path.write_bytes(content)
        path.chmod(0o644 if mode == PLAIN else 0o755)
