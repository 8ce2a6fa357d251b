"""The files of a run directory (`Run`), and runs/journal.jsonl, a line for each start and end of a stage of any run.

A command with the directory of an earlier run continues that run. Files get their final names only when complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import yaml

from recipe.errors import UserError
from recipe.run import metric_rows as metrics
from recipe.run.files import (
    RECORD_BYTES_MAX,
    at_once,
    disk_errors,
    display_path,
    exclusive_lock,
    file_name,
    opened,
    portable_path,
    read_file,
    write_atomically,
)
from recipe.run.records import RECORDS, AnyRecord, EvaluationRecord, Record, TimingRecord, from_json, now, to_json

JOURNAL = Path("runs", "journal.jsonl")  # below the current directory, also for run directories elsewhere
RECORD_NAMES = {kind: name for name, kind in RECORDS.items()}


class Run:
    """The files of one run directory. Nothing is created until something is written."""

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
        self.json_file = self.directory / "recipe.json"
        self.notebook = self.directory / "inference.ipynb"  # executed
        self.hangs = self.directory / "hang"  # stacks of hung processes, one file each
        self.lock_file = self.directory / "lock"

    def write(self, record: Record) -> None:
        write_atomically(self.record_file(type(record)), to_json(record))

    def read(self, kind: type[AnyRecord]) -> AnyRecord | None:
        path = self.record_file(kind)
        return self.read_record(path, kind) if os.path.lexists(path) else None

    def record_file(self, kind: type[Record]) -> Path:
        return self.records / f"{RECORD_NAMES[kind]}.json"

    def content(self, path: Path, bytes_max: int = RECORD_BYTES_MAX) -> bytes:
        """The bytes of a file of the run. Raises `UserError` as `files.opened` does."""
        return read_file(path, display_path(path), bytes_max, self.directory)

    def check_readable(self, path: Path, bytes_max: int = RECORD_BYTES_MAX) -> None:
        """Raise the `UserError` of `content` without reading. An absent file is fine."""
        if os.path.lexists(path):
            with opened(path, display_path(path), bytes_max, self.directory):
                pass

    def onnx_file(self, variant: str) -> Path:
        """The exported model. `variant` is fp32, fp16 or int8."""
        return self.directory / "onnx" / f"model-{file_name(variant, 'the variant')}.onnx"

    def predictions_file(self, protocol: str) -> Path:
        """The predictions for every validation image by one protocol."""
        return self.predictions / f"{file_name(protocol, 'the protocol')}.npz"

    def patch_file(self, sha256: str) -> Path:
        return self.records / "patches" / f"{file_name(sha256[:16], 'the patch')}.patch"

    def timing_file(self, machine: str) -> Path:
        return self.timing / f"{file_name(machine, 'the machine')}.json"

    def write_timing(self, record: TimingRecord) -> None:
        write_atomically(self.timing_file(record.machine), to_json(record))

    def write_other_evaluation(self, record: EvaluationRecord) -> None:
        """Store an evaluation of exported or published weights."""
        name = file_name(record.protocol.name, "the protocol")
        write_atomically(self.other_evaluations / f"{name}.json", to_json(record))

    def read_all(self, directory: Path, kind: type[AnyRecord]) -> list[AnyRecord]:
        return [self.read_record(path, kind) for path in sorted(directory.glob("*.json"))]

    def read_record(self, path: Path, kind: type[AnyRecord]) -> AnyRecord:
        return from_json(self.content(path), kind, display_path(path))

    def write_config(self, pinned: Mapping[str, Any]) -> None:
        write_atomically(self.config, yaml.safe_dump(dict(pinned), sort_keys=False).encode())

    def read_config(self) -> dict[str, Any] | None:
        """The pinned configuration, or None before training."""
        if not os.path.lexists(self.config):
            return None
        where, content = display_path(self.config), self.content(self.config)
        try:
            text = content.decode()
            values = plain_yaml(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
        if "${" in text:
            raise UserError(f"{where} contains '${{': a pinned configuration is plain values")
        if not isinstance(values, dict) or not isinstance(values.get("name"), str):
            raise UserError(f"{where} is not a configuration with a name")
        return values

    def metric_rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl as `recipe.run.metric_rows.Row`. Raises `UserError` for other lines."""
        if not os.path.lexists(self.metrics):
            return []
        where = display_path(self.metrics)
        with opened(self.metrics, where, metrics.BYTES_MAX, self.directory) as lines:
            return [msgspec.structs.asdict(row) for row in metrics.read_rows(lines, where)]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run for one writer. Raises `UserError` at once if it is locked."""
        self.directory_exists()
        with exclusive_lock(self.lock_file, "in use", "run_dir"):
            yield

    def directory_exists(self) -> None:
        with disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)

    def archive(self) -> Path:
        """Rename the directory to the first free `<name>.old-<n>`, unless another process writes to it."""
        with self.lock():
            number = 1
            while (archived := self.directory.with_name(f"{self.directory.name}.old-{number}")).exists():
                number += 1
            self.directory.rename(archived)
        return archived


def plain_yaml(text: str) -> Any:
    """Parse YAML of plain JSON values. Raises `ValueError` for dates, NaN and aliases, which can expand without end."""
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
        raise ValueError("it has an alias, which a pinned configuration never has")
    values = yaml.safe_load(text)
    try:
        json.dumps(values, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"it has a value that JSON cannot represent: {error}") from error
    return values


# ---- the journal of all runs ------------------------------------------------------------------------


def append_to_journal(run: Run, stage: str, event: str, **facts: Any) -> None:
    """Append one event of a stage of `run`. Raises `DiskError` if that fails."""
    run_and_place = {"run": portable_path(run.directory), "place": place_of(run.directory)}
    row = {"time": now(), **run_and_place, "stage": stage, "event": event, **facts}
    with disk_errors(JOURNAL):
        JOURNAL.parent.mkdir(parents=True, exist_ok=True)
        with open(JOURNAL, "a", opener=at_once) as handle:
            handle.write(json.dumps(row) + "\n")


def place_of(directory: Path) -> str:
    """A hash that distinguishes directories with the same portable path, without naming them."""
    return hashlib.sha256(os.fsencode(os.path.realpath(directory))).hexdigest()[:16]
