"""runs/journal.jsonl: one line for each stage started and ended, appended to by all runs of this directory."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from recipe.run.directory import Run
from recipe.run.files import at_once, disk_errors, portable_path
from recipe.run.records import now

JOURNAL = Path("runs", "journal.jsonl")  # below the current directory, also for runs elsewhere


def append_to_journal(run: Run, stage: str, event: str, **facts: Any) -> None:
    """Append one event of a stage of `run`; raises `DiskError` if that fails."""
    run_and_place = {"run": portable_path(run.directory), "place": place_of(run.directory)}
    row = {"time": now(), **run_and_place, "stage": stage, "event": event, **facts}
    with disk_errors(JOURNAL):
        JOURNAL.parent.mkdir(parents=True, exist_ok=True)
        with open(JOURNAL, "a", opener=at_once) as handle:
            handle.write(json.dumps(row) + "\n")


def place_of(directory: Path) -> str:
    """A hash that distinguishes directories with the same portable path, without naming them."""
    return hashlib.sha256(os.fsencode(os.path.realpath(directory))).hexdigest()[:16]
