"""Run: the known files of a run directory, and the few ways in which files are written.

A result is a directory: naming it again continues it. Every file gets its final name only when it is complete.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import yaml

from recipe import metrics
from recipe.errors import DiskError, UserError, how_to_continue
from recipe.files import RECORD_BYTES_MAX, at_once, file_name, opened, read_file
from recipe.records import (
    AnyRecord,
    EnergyRecord,
    EvaluationRecord,
    Fingerprint,
    InferenceRecord,
    JournalRecord,
    PreprocessingRecord,
    PublicationRecord,
    Record,
    ReproductionRecord,
    SeedsRecord,
    SerializationRecord,
    TimingRecord,
    TrainingRecord,
    from_json,
    to_json,
)

JOURNAL = Path("runs", "journal.jsonl")
CHECKOUT = Path(__file__).resolve().parent.parent
ELSEWHERE = "..."  # stands for the folders of a place outside the checkout
RECORD_FILES: dict[type[Record], str] = {
    PreprocessingRecord: "preprocessing.json",
    TrainingRecord: "training.json",
    EnergyRecord: "energy.json",
    EvaluationRecord: "evaluation.json",
    SerializationRecord: "serialization.json",
    InferenceRecord: "inference.json",
    Fingerprint: "fingerprint.json",
    JournalRecord: "journal.json",
    SeedsRecord: "seeds.json",
    ReproductionRecord: "reproduction.json",
    PublicationRecord: "publication.json",
}


# A slash where a path can begin (not in a word or a URL; behind a colon a single one), and folders behind it.
ABSOLUTE_PATH = re.compile(r"(?:(?<=file:)//+|(?<![\w.$}:/])/+|(?<=:)/(?!/))(?:[\w.+@%~-]+/+)+")


class Run:
    """The files of one run, by name. Nothing is created until something is written."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.config = self.directory / "config.yaml"
        self.records = self.directory / "records"
        self.metrics = self.directory / "metrics.jsonl"
        self.predictions = self.directory / "predictions"
        self.checkpoints = self.directory / "checkpoints"
        self.figures = self.directory / "figures"
        self.tensorboard = self.directory / "tensorboard"
        self.timing = self.records / "timing"  # one file per machine
        self.other_evaluations = self.records / "evaluations"  # one file per protocol
        self.document = self.directory / "recipe.md"
        self.twin = self.directory / "recipe.json"
        self.notebook = self.directory / "inference.ipynb"  # executed
        self.hangs = self.directory / "hang"  # stacks of processes that stood still, one file per process
        self.lock_file = self.directory / "lock"

    def write(self, record: Record) -> None:
        """Store a record under its known name."""
        write_atomically(self.records / RECORD_FILES[type(record)], to_json(record))

    def read(self, kind: type[AnyRecord]) -> AnyRecord | None:
        """The stored record of this kind, or None where the stage has not run."""
        path = self.records / RECORD_FILES[kind]
        return from_json(self.content(path), kind, shown_path(path)) if os.path.lexists(path) else None

    def content(self, path: Path, bytes_max: int = RECORD_BYTES_MAX) -> bytes:
        """The bytes of one of the run's files; raises `UserError` for a link that leaves the run, and for what never
        ends: the run may come from a stranger.
        """
        return read_file(path, shown_path(path), bytes_max, self.directory)

    def require_readable(self, path: Path, bytes_max: int = RECORD_BYTES_MAX) -> None:
        """Raise the `UserError` of `content`, and read nothing; an absent file is none."""
        if os.path.lexists(path):
            with opened(path, shown_path(path), bytes_max, self.directory):
                pass

    def onnx_file(self, variant: str) -> Path:
        """The exported model of a variant: fp32, fp16 or int8."""
        return self.directory / "onnx" / f"model-{file_name(variant, 'the variant')}.onnx"

    def predictions_file(self, protocol: str) -> Path:
        """What was predicted for every image by this protocol."""
        return self.predictions / f"{file_name(protocol, 'the protocol')}.npz"

    def patch_file(self, sha256: str) -> Path:
        """What a stage's tree had beyond its commit."""
        return self.records / "patches" / f"{file_name(sha256[:16], 'the patch')}.patch"

    def timing_file(self, machine: str) -> Path:
        """The latencies of one machine."""
        return self.timing / f"{file_name(machine, 'the machine')}.json"

    def write_timing(self, record: TimingRecord) -> None:
        """Store the latencies of one machine; those of others stay."""
        write_atomically(self.timing_file(record.machine), to_json(record))

    def write_other_evaluation(self, record: EvaluationRecord) -> None:
        """Store an evaluation of something else than the run's own network in torch."""
        name = file_name(record.protocol.name, "the protocol")
        write_atomically(self.other_evaluations / f"{name}.json", to_json(record))

    def read_all(self, directory: Path, kind: type[AnyRecord]) -> list[AnyRecord]:
        """Every record of a folder, in the order of the files' names."""
        return [from_json(self.content(path), kind, shown_path(path)) for path in sorted(directory.glob("*.json"))]

    def write_config(self, pinned: Mapping[str, Any]) -> None:
        """Pin the configuration: later stages read this file and compose nothing but their own group."""
        write_atomically(self.config, yaml.safe_dump(dict(pinned), sort_keys=False).encode())

    def read_config(self) -> dict[str, Any] | None:
        """The pinned configuration, or None where nothing was trained yet."""
        if not os.path.lexists(self.config):
            return None
        where, content = shown_path(self.config), self.content(self.config)
        try:
            text = content.decode()
            values = plain_yaml(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
        if "${" in text:
            raise UserError(f"{where} holds '${{': a pinned configuration is plain values")
        if not isinstance(values, dict) or not isinstance(values.get("name"), str):
            raise UserError(f"{where} holds no configuration with a name")
        return values

    def metric_rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl, in order, as `recipe.metrics.Row` has them; raises `UserError` for any other."""
        if not os.path.lexists(self.metrics):
            return []
        where = shown_path(self.metrics)
        with opened(self.metrics, where, metrics.BYTES_MAX, self.directory) as lines:
            return [msgspec.structs.asdict(row) for row in metrics.read_rows(lines, where)]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One writer per run directory; a second one is refused at once."""
        self.directory_exists()
        with locked(self.lock_file, "in use", "run_dir"):
            yield

    def directory_exists(self) -> None:
        """Create the directory; stop with one sentence where that cannot be."""
        with disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)

    def move_aside(self) -> Path:
        """Rename the directory to the first free `<name>.old-<n>`; nothing is ever deleted."""
        number = 1
        while (aside := self.directory.with_name(f"{self.directory.name}.old-{number}")).exists():
            number += 1
        self.directory.rename(aside)
        return aside


def plain_yaml(text: str) -> Any:
    """YAML that JSON could hold too; raises `ValueError` for aliases, dates and what is not finite.

    A file from a stranger could else grow without end (aliases of aliases), or stop whoever hashes its values.
    """
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
        raise ValueError("it repeats a part of itself by an alias, which a pinned configuration never does")
    values = yaml.safe_load(text)
    try:
        json.dumps(values, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"it holds what is no plain value: {error}") from error
    return values


@contextmanager
def locked(file: Path, busy: str, key: str) -> Iterator[None]:
    """Hold `file` alone; a second process is refused at once, and so is a file system without locks.

    `busy` says what the other one does with the folder, `key` which setting chooses another.
    """
    with disk_errors(file):
        handle = file.open("a")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{shown_path(file.parent)} is {busy} by another process; wait for it or give another {key}"
            ) from None
        except OSError as error:
            raise UserError(
                f"the file system of {shown_path(file.parent)} cannot lock files ({error.strerror}); give a {key} on "
                "another one"
            ) from error
        yield


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name, flush to the disk, rename: the final name never holds half a file."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_sibling(path) as temporary:
            with temporary.open("wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)


@contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; whatever is left under it is removed."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a full, read-only or vanished disk says into one sentence with exit code 74."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        hint = f"free some space, then {how_to_continue()}" if error.errno == errno.ENOSPC else "give another place"
        raise DiskError(f"cannot write {shown_path(path)}: {reason}; {hint}") from error


def append_to_journal(run: Run, stage: str, event: str, **facts: Any) -> None:
    """One line in `runs/journal.jsonl` for each stage started and ended: the journal of experiments.

    It lies below the current directory wherever the run itself lies: one journal for all experiments.
    """
    run_and_place = {"run": recorded_path(run.directory), "place": place_of(run.directory)}
    row = {"time": now(), **run_and_place, "stage": stage, "event": event, **facts}
    with disk_errors(JOURNAL):
        JOURNAL.parent.mkdir(parents=True, exist_ok=True)
        with open(JOURNAL, "a", opener=at_once) as handle:
            handle.write(json.dumps(row) + "\n")


def place_of(directory: Path) -> str:
    """Tells directories apart whose recorded paths are alike, without naming them."""
    return hashlib.sha256(os.fsencode(os.path.realpath(directory))).hexdigest()[:16]


def now() -> str:
    """UTC, to the second, ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def shown_path(path: str | Path) -> str:
    """A path for a person at this machine: relative to the checkout or to here where it lies inside, else as it is."""
    recorded = recorded_path(path)
    return printable(str(path)) if is_elsewhere(recorded) else recorded


def recorded_path(path: str | Path) -> str:
    """A path as a record may show it: relative to the checkout or to here, else its last part alone."""
    absolute = Path(os.path.normpath(Path(path).absolute()))
    for base in (CHECKOUT, Path.cwd()):
        if absolute.is_relative_to(base):
            return printable(str(absolute.relative_to(base)) or ".")
    return printable(str(Path(ELSEWHERE, *absolute.parts[1:][-1:])))


def is_elsewhere(recorded: str) -> bool:
    """Whether a recorded path is of a place outside the checkout, which a command cannot name."""
    return Path(recorded).parts[:1] == (ELSEWHERE,)


def printable(name: str) -> str:
    """The name of a file with bytes that are not UTF-8 as \\xff: records and documents hold text only."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def without_paths(text: str) -> str:
    """Text with every absolute path cut to its last part: records hold no path, host or user name."""
    return ABSOLUTE_PATH.sub(".../", text.replace(f"{CHECKOUT}/", ""))
