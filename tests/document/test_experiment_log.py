"""The experiment log: every stage of the runs of one name, also from a damaged log."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from recipe.document import experiment_log, figures
from recipe.document.experiment_log import NO_END, read_log, update_log_record
from recipe.document.render import write_document
from recipe.errors import DiskError
from recipe.run.directory import JOURNAL, Run, append_to_journal, place_of
from recipe.run.records import JournalRecord
from tests.builders.documents import HOSTILE, assert_tables_are_even, document, outside_code, section
from tests.builders.runs import write_run


def train(run: str, seed: int = 0, epochs: int = 2, name: str = "demo", **end: Any) -> None:
    """The two lines of a training; without `end` the first alone."""
    config = {"seed": seed, "optimization.epochs": epochs, "data.mean": [0.1, 0.2, 0.3]}
    append_to_journal(Run(run), "train", "started", name=name, config_sha256=f"{seed}-{epochs}", config=config)
    if end:
        append_to_journal(Run(run), "train", end.pop("event", "ended"), **end)


def entries(name: str = "demo", run: str = "runs/demo") -> list[tuple[Any, ...]]:
    found = read_log(JOURNAL, name, run, place_of(Path(run))).entries
    return [(entry.run, entry.stage, entry.outcome, entry.parent, entry.changed) for entry in found]


def test_runs_of_the_name_with_parent_change_and_outcome() -> None:
    train("runs/demo", validation_top1_accuracy=0.5)
    train("runs/other", name="other", validation_top1_accuracy=0.9)
    append_to_journal(Run("runs/demo"), "evaluate", "started", name="demo")
    append_to_journal(Run("runs/demo"), "evaluate", "ended", top1_accuracy=0.51)
    train("runs/demo-2", seed=1, epochs=3, event="stopped", step=7)
    train("runs/demo-2", seed=1, epochs=3)
    changed = ["optimization.epochs: 2 -> 3", "seed: 0 -> 1"]
    assert entries() == [
        ("runs/demo", "train", "ended", None, []),
        ("runs/demo", "evaluate", "ended", None, []),
        ("runs/demo-2", "train", "stopped", "runs/demo", changed),
        ("runs/demo-2", "train", NO_END, "runs/demo", changed),
    ]
    found = read_log(JOURNAL, "demo", "runs/demo").entries
    assert [entry.top1_accuracy for entry in found] == [0.5, 0.51, None, None]
    assert found[2].step == 7


def test_a_run_of_lines_without_a_name_is_found_by_its_folder() -> None:
    append_to_journal(Run("runs/demo"), "train", "started")
    append_to_journal(Run("runs/else"), "train", "started")
    assert entries() == [("runs/demo", "train", NO_END, None, [])]


def test_runs_outside_the_checkout_differ_by_their_place(tmp_path_factory: pytest.TempPathFactory) -> None:
    places = [str(tmp_path_factory.mktemp(name) / "run") for name in ("ours", "other", "named")]
    ours, other, named = places
    train(ours, seed=1)
    train(other, seed=2, name="other", validation_top1_accuracy=0.9)
    train(named, seed=3)
    append_to_journal(Run(ours), "train", "ended", validation_top1_accuracy=0.5)  # the others began meanwhile
    assert entries(run=ours) == [
        (".../run", "train", "ended", None, []),
        (".../run (2)", "train", NO_END, ".../run", ["seed: 1 -> 3"]),
    ]
    assert [entry.top1_accuracy for entry in read_log(JOURNAL, "demo", ".../run", place_of(Path(ours))).entries] == [
        *(0.5, None)
    ]
    assert entries("other", other) == [(".../run", "train", "ended", None, [])]
    text = JOURNAL.read_text()
    assert not [place for place in places if place in text or Path(place).parent.name in text]


def test_a_run_is_the_same_by_any_path_to_it_and_keeps_its_entries_where_it_is_moved(tmp_path: Path) -> None:
    Path("runs", "demo").mkdir(parents=True)
    Path("link").symlink_to("runs")
    for path in ("runs/demo", "link/demo", str(tmp_path / "runs" / "demo"), "runs/../runs/demo/"):
        append_to_journal(Run(path), "evaluate", "started")
        append_to_journal(Run("link/demo"), "evaluate", "ended")
    found = read_log(JOURNAL, None, "runs/demo", place_of(Path("link", "demo"))).entries
    assert [entry.outcome for entry in found] == ["ended"] * 4
    train("runs/demo")
    Path("runs", "demo").rename("moved")
    train("moved", epochs=3)
    assert entries(run="moved")[-1][:4] == ("moved", "train", NO_END, "runs/demo")


def test_lines_of_older_versions_have_no_place_and_are_read(tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = str(tmp_path_factory.mktemp("a") / "run")
    train("runs/demo", validation_top1_accuracy=0.5)
    train(outside, name="other", validation_top1_accuracy=0.5)
    rows = [json.loads(line) for line in JOURNAL.read_text().splitlines()]
    JOURNAL.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "place"}) + "\n" for row in rows))
    train("runs/demo", seed=1)
    assert [entry[:4] for entry in entries()] == [
        ("runs/demo", "train", "ended", None),
        ("runs/demo", "train", NO_END, "runs/demo"),
    ]
    assert entries(run=outside) == entries()  # `.../run` could have been any place of that name
    assert len(entries("other", outside)) == 1


BROKEN = [
    b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b'{"time": 1}', b"[" * 100_000, b'{"a":' * 50_000,
    b'{"time":"","run":"runs/demo","stage":"train","event":"started","config":{"a":{"b":1}}}',
    b'{"time":"","run":"runs/demo","stage":"train","event":"started","name":7}',
    b'{"time":"","run":"runs/demo","stage":"train","event":"ended","top1_accuracy":NaN}',
]  # fmt: skip


def test_lines_that_do_not_fit_are_counted_and_passed_over() -> None:
    train("runs/demo", validation_top1_accuracy=0.5)
    whole = JOURNAL.read_bytes()
    JOURNAL.write_bytes(b"\n".join([*BROKEN, whole, *BROKEN, b'{"time": "cut of']))
    found = read_log(JOURNAL, "demo", "runs/demo")
    assert [entry.outcome for entry in found.entries] == ["ended"]
    assert found.unreadable_lines == 2 * (len(BROKEN) - 1) + 1


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_are_read(seed: int) -> None:
    train("runs/demo", validation_top1_accuracy=0.5)
    generator = random.Random(seed)
    content = bytearray(JOURNAL.read_bytes() * 3)
    for _ in range(12):
        content[generator.randrange(len(content))] = generator.randrange(256)
    JOURNAL.write_bytes(content)
    read_log(JOURNAL, "demo", "runs/demo")


def test_a_hostile_line_breaks_no_page() -> None:
    settings = {HOSTILE: HOSTILE, "long": "x" * 100_000} | {f"key{number}": number for number in range(1000)}
    for config in ({}, settings):
        append_to_journal(Run("x"), HOSTILE, "started", name="demo", config_sha256=HOSTILE + str(config), config=config)
    found = read_log(JOURNAL, "demo", "runs/demo")
    assert len(found.entries[1].changed) == 20
    assert found.entries[1].changes == 1002
    assert max(len(change) for change in found.entries[1].changed) <= 200
    text = document(journal=found)
    assert_tables_are_even(outside_code(text))
    assert "and 997 more" in text
    assert document(existing=text) == document()


def test_its_length_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(250):
        append_to_journal(Run("runs/demo"), "train", "started", name="demo", number=number)
    found = read_log(JOURNAL, "demo", "runs/demo")
    assert (len(found.entries), found.earlier_entries) == (200, 50)
    text = section(document(journal=found), "miscellaneous")
    assert text.count("| `runs/demo` |") == 40
    assert "210 earlier entries are left out here" in text
    monkeypatch.setattr(experiment_log, "BYTES_READ_MAX", 1000)
    cut = read_log(JOURNAL, "demo", "runs/demo")
    assert 0 < len(cut.entries) < 12
    assert cut.unreadable_lines == 0


def test_the_document_takes_it_from_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "draw", lambda *_: {})
    run = write_run(Path("runs", "demo"))
    write_document(run, "runs/demo")
    assert "No line of this run was found" in run.document.read_text()
    train("runs/demo", validation_top1_accuracy=0.5)
    write_document(run, "runs/demo")
    assert "| `runs/demo` | train | ended, top-1 50.00 % |" in run.document.read_text()
    record = run.read(JournalRecord)
    JOURNAL.unlink()
    update_log_record(run, "runs/demo")  # elsewhere, or after the journal was thrown away
    assert run.read(JournalRecord) == record


def test_a_line_is_plain_json(tmp_path: Path) -> None:
    train("runs/demo", validation_top1_accuracy=0.5)
    assert all(isinstance(json.loads(line), dict) for line in JOURNAL.read_text().splitlines())


@pytest.mark.parametrize("kind", ["fifo", "endless"])
def test_a_log_that_is_not_a_file_blocks_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    JOURNAL.parent.mkdir()
    if kind == "fifo":
        os.mkfifo(JOURNAL)
        with pytest.raises(DiskError, match=r"journal\.jsonl"):
            append_to_journal(Run("runs/x"), "train", "started")
    else:
        JOURNAL.symlink_to("/dev/zero")
    assert read_log(JOURNAL, "x", "runs/x").entries == []
