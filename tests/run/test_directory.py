"""The run directory: complete or absent files, one writer at a time, no deletion, no leaked paths."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipe.errors import DiskError, UserError
from recipe.run.directory import Run, append_to_journal
from recipe.run.files import CHECKOUT, portable_path, redact_paths, write_atomically
from recipe.run.records import (
    RECORD_LISTS,
    RECORDS,
    STAGES,
    ClassCounts,
    EvaluationRecord,
    Hardware,
    Protocol,
    Provenance,
    Record,
    TrainingRecord,
    TreeState,
    from_json,
    to_json,
)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# ---- writing ----------------------------------------------------------------------------------------


def test_a_file_is_written_and_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "file"
    for content in (b"first", b"", b"\x00" * 100_000):
        write_atomically(path, content)
        assert path.read_bytes() == content
        assert names(path.parent) == {"file"}


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "hint"),
    [(errno.ENOSPC, "free some space"), (errno.EROFS, "give another place"), (errno.EIO, "give another place")],
)
def test_a_failure_leaves_the_old_file_and_no_temporary_one(
    failing: str, number: int, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(*((os, "fsync", fails) if failing == "fsync" else (Path, "replace", fails)))
    with pytest.raises(DiskError, match=f"{os.strerror(number)}; {hint}") as refused:
        write_atomically(tmp_path / "file", b"new")
    assert refused.value.exit_code == 74
    assert "\n" not in str(refused.value)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == {"file"}


def test_an_interrupt_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == {"file"}


def test_the_content_reaches_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    flush, rename = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("flush"), flush(descriptor))[1])
    monkeypatch.setattr(Path, "replace", lambda self, target: (events.append("rename"), rename(self, target))[1])
    write_atomically(tmp_path / "file", b"x")
    assert events[:2] == ["flush", "rename"]


def test_an_unwritable_directory_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="Not a directory"):
        Run(tmp_path / "file" / "run").directory_exists()


def test_an_unwritable_journal_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("no directory")
    with pytest.raises(DiskError, match="cannot write"):
        append_to_journal(Run("runs/x"), "train", "started")


# ---- the lock ---------------------------------------------------------------------------------------

HOLDER = """
import sys, time
sys.path.insert(0, {checkout!r})
from recipe.run.directory import Run
with Run({directory!r}).lock():
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    run, again = Run(tmp_path / "run"), Run(tmp_path / "run")
    with run.lock():
        with pytest.raises(UserError, match="is in use by another process"), again.lock():
            pass
        with Run(tmp_path / "other").lock():
            pass
    with again.lock():
        pass


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(UserError, match=r"file system of .*run cannot lock files \(No locks.*; give a run_dir on"),
        Run(tmp_path / "run").lock(),
    ):
        pass


@pytest.mark.process
def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    code = HOLDER.format(checkout=str(CHECKOUT), directory=str(run.directory))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(UserError, match="is in use by another process"), run.lock():
                pass
        finally:
            os.kill(holder.pid, signal.SIGKILL)
            holder.wait()
    with run.lock():
        pass


def test_an_error_inside_frees_the_lock(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with pytest.raises(RuntimeError, match="inside"), run.lock():
        raise RuntimeError("inside")
    with run.lock():
        pass


# ---- directories ------------------------------------------------------------------------------------


def test_old_runs_are_numbered_and_kept(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        run = Run(tmp_path / "run")
        run.directory_exists()
        (run.directory / "what").write_text(str(number))
        assert run.archive() == tmp_path / f"run.old-{number}"
    assert names(tmp_path) == {"run.old-1", "run.old-2", "run.old-3"}
    assert [(tmp_path / f"run.old-{number}" / "what").read_text() for number in (1, 2, 3)] == ["1", "2", "3"]


def test_a_free_number_in_between_is_used_without_touching_others(tmp_path: Path) -> None:
    for name in ("run", "run.old-1", "run.old-3"):
        (tmp_path / name).mkdir()
    assert Run(tmp_path / "run").archive().name == "run.old-2"
    assert names(tmp_path) == {"run.old-1", "run.old-2", "run.old-3"}


def test_naming_a_run_creates_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert run.read_config() is None
    assert run.read(TrainingRecord) is None
    assert run.metric_rows() == []
    assert names(tmp_path) == set()


# ---- metrics, journal and configuration -------------------------------------------------------------


MEANS = ("loss", "top1_accuracy", "top5_accuracy")


def metric_row(step: int) -> dict[str, Any]:
    numbers = {name: step / 30 for name in (*MEANS, "images_per_second", "seconds")}
    absent = dict.fromkeys(("data_wait_fraction", "stalled_fraction", *(f"train_{name}" for name in MEANS)))
    return (
        {"split": "train", "epoch": 1, "step": step, "images_seen": 8 * step, "learning_rate": 0.1} | numbers | absent
    )


def test_an_unfinished_last_row_is_left_out(tmp_path: Path) -> None:
    run = Run(tmp_path)
    rows = [metric_row(step) for step in range(1, 5)]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    run.metrics.write_text(whole)
    assert run.metric_rows() == rows
    for cut in range(1, len(json.dumps(rows[-1])) + 2):
        run.metrics.write_text(whole[:-cut])
        assert run.metric_rows() == rows[:-1]


WRONG_ROWS: dict[str, bytes | Callable[[dict[str, Any]], dict[str, Any]]] = {
    "a key lacks": lambda row: {key: value for key, value in row.items() if key != "images_seen"},
    "an unknown key": lambda row: row | {"images": 3},
    "an object": lambda row: row | {"epoch": {"a": 1}},
    "a text": lambda row: row | {"step": "3"},
    "a truth": lambda row: row | {"loss": True},
    "absent": lambda row: row | {"loss": None},
    "not a number": lambda row: row | {"loss": float("nan")},
    "infinite": lambda row: row | {"loss": float("-inf")},
    "a count that nothing reaches": lambda row: row | {"step": 2**60},
    "a huge integer": lambda row: row | {"images_seen": 10**400},
    "a huge number": lambda row: row | {"loss": 10**400},
    "no step yet": lambda row: row | {"step": 0},
    "before the first epoch": lambda row: row | {"epoch": -1},
    "another split": lambda row: row | {"split": "test"},
    "no object": b"[1, 2]",
    "no JSON": b"epoch 1",
    "half a row": b'{"split": "train", "epo',
    "not UTF-8": b'{"split": "tr\xff\xfe"}',
    "bytes that a crash left": bytes(4096),
    "deeply nested": b"[" * 5000,
    "a very long line": b"[" + b"1, " * 100_000 + b"1]",
    "infinite by its exponent": b'{"split": "train", "epoch": 1, "step": 1, "images_seen": 1, "loss": 1e999}',
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_a_line_that_is_not_a_row_is_named(name: str, tmp_path: Path) -> None:
    wrong, sound = WRONG_ROWS[name], json.dumps(metric_row(1)).encode()
    line = wrong if isinstance(wrong, bytes) else json.dumps(wrong(metric_row(2))).encode()
    run = Run(tmp_path)
    run.metrics.write_bytes(sound + b"\n" + line + b"\n" + sound + b"\n")
    with pytest.raises(
        UserError, match=r"^line 2 of .*metrics\.jsonl is not a row of metrics .*delete the line"
    ) as error:
        run.metric_rows()
    assert len(str(error.value)) < 500 + len(str(tmp_path))


def test_the_journal_has_a_line_for_each_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    append_to_journal(Run("runs/a"), "train", "started")
    append_to_journal(Run("runs/b"), "evaluate", "ended", top1_accuracy=0.5)
    lines = [json.loads(line) for line in (tmp_path / "runs" / "journal.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["event"]) for line in lines] == [("train", "started"), ("evaluate", "ended")]
    assert [line["run"].split("/")[-1] for line in lines] == ["a", "b"]
    assert lines[1]["top1_accuracy"] == 0.5


def test_a_pinned_configuration_is_read_as_it_was_written(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "name": "x",
        "seed": 3,
        "data": {"mean": [0.1, 5e-5, 1.0], "note": None, "on": True},
        "text": "no: yes # 'quoted' \u00e9\nline",
    }
    run = Run(tmp_path)
    run.write_config(values)
    assert run.read_config() == values


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: ${oc.env:HOME}", r"contains '\$\{': a pinned configuration is plain values"),
        ("a: [1, 2", "is not YAML"),
        ("- 1", "is not a configuration"),
        ("", "is not a configuration"),
        ("a: !!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_a_configuration_that_is_not_plain_data_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.config.write_text(text)
    with pytest.raises(UserError, match=sentence) as refused:
        run.read_config()
    assert "\n" not in str(refused.value)


# ---- records ----------------------------------------------------------------------------------------


def evaluation_record() -> EvaluationRecord:
    provenance = Provenance(
        command="python evaluate.py",
        commit=None,
        tree_at_start=TreeState(state="clean"),
        tree_at_end=TreeState(state="untracked", untracked=["a b"]),
        source_sha256="0",
        source_sha256_at_end="0",
        started="2026-01-01T00:00:00Z",
        seconds=0.1 + 0.2,
        hardware=Hardware(processor="p", cores=2, memory_gib=1.5),
        versions={"python": "3.11"},
        environment={},
    )
    protocol = Protocol(
        backend="torch",
        arithmetic={},
        epochs_completed=1,
        epochs=1,
        name="p",
        transform={"mean": [0.1], "antialias": True},
        transform_sha256="0",
        decoder="d",
        precision="fp32",
        batch_size=4,
        checkpoint="c",
        weights="as trained",
    )
    counts = ClassCounts(index=0, class_id="n0", name="\u00e9\u6f22", images=3, correct_top1=1, correct_top5=2)
    return EvaluationRecord(
        published={},
        config_sha256="0",
        provenance=provenance,
        inputs={"weights": "1"},
        outputs={},
        protocol=protocol,
        images=3,
        correct_top1=1,
        correct_top5=2,
        loss=1 / 3,
        per_class=[counts],
        processes=1,
        evaluation_seconds=1e-3,
        images_per_second=1e6,
    )


def test_a_record_survives_the_disk(tmp_path: Path) -> None:
    run, record = Run(tmp_path), evaluation_record()
    run.write(record)
    assert run.read(EvaluationRecord) == record
    assert run.read(TrainingRecord) is None
    assert names(tmp_path / "records") == {"evaluation.json"}
    assert to_json(record) == to_json(evaluation_record())
    stored = json.loads((tmp_path / "records" / "evaluation.json").read_bytes())
    assert stored["loss"] == 1 / 3
    assert stored["format"] == "evaluation/1"


def test_every_record_has_its_own_file(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert {run.record_file(kind).name for kind in RECORDS.values()} == {f"{name}.json" for name in RECORDS}
    assert len(set(RECORDS.values())) == len(RECORDS)
    assert set(STAGES) <= set(RECORDS)
    assert {name for name, kind in RECORDS.items() if "provenance" in kind.__struct_fields__} == {
        *STAGES,
        "reproduction",  # of another run
    }
    assert set(RECORD_LISTS) <= set(vars(run))


def changed(**changes: Any) -> bytes:
    values = json.loads(to_json(evaluation_record())) | changes
    return json.dumps({key: value for key, value in values.items() if value != "left out"}).encode()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (changed(extra=1), "extra"),
        (changed(images="3"), "images"),
        (changed(images=3.5), "images"),
        (changed(per_class=[{"index": 0}]), r"per_class"),
        (changed(loss="left out"), "loss"),
        (changed(images=None), "images"),
        (changed(format="evaluation/2"), "evaluation/2"),
        (changed(format="training/1"), "training/1"),
        (b"", "EvaluationRecord"),
        (b"{", "EvaluationRecord"),
        (b"\xff\xfe", "EvaluationRecord"),
        (b"[]", "EvaluationRecord"),
        (to_json(evaluation_record())[:-20], "EvaluationRecord"),
    ],
)
def test_a_record_that_is_not_one_is_refused_by_file_and_field(content: bytes, named: str) -> None:
    with pytest.raises(UserError, match=named) as refused:
        from_json(content, EvaluationRecord, "records/evaluation.json")
    assert "records/evaluation.json" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_records_cannot_be_changed() -> None:
    record: Record = evaluation_record()
    with pytest.raises(AttributeError, match="immutable"):
        record.images = 4  # type: ignore[attr-defined]


# ---- paths ------------------------------------------------------------------------------------------

OUTSIDE = ["/home/alice/data/run", "/data/x", "/x", "/", "/home/alice/with space/run", "/mnt/\u00e9/a-b_c.d/e"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_portable_path_is_never_absolute(path: str) -> None:
    assert not portable_path(path).startswith("/")
    assert "/home" not in portable_path(path)


def test_a_portable_path_names_no_user() -> None:
    for path in ("/home/alice/run", "/Users/alice/run", "/home/alice/runs/x"):
        assert "alice" not in portable_path(path)


def test_a_portable_path_is_relative_to_the_checkout_or_to_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert portable_path(CHECKOUT / "runs" / "demo") == "runs/demo"
    assert portable_path(CHECKOUT) == "."
    monkeypatch.chdir(tmp_path)
    assert portable_path("runs/demo") == "runs/demo"
    assert portable_path(tmp_path / "a") == "a"


@pytest.mark.parametrize(
    "text",
    [
        "{path}",
        "--dir={path}",
        "a={path},{path}",
        "['{path}', \"{path}\"]",
        "x {path}\n{path}",
        "({path})",
        "{path}/",
        "key: {path}",
        "{path}:{path}",
        "{{raw_dir:{path}}}",
        "file://{path}",
        "[{path}]",
        "data.raw_dir='{path}'",
        "/{path}",
    ],
)
def test_text_keeps_no_absolute_path(text: str) -> None:
    cleaned = redact_paths(text.format(path="/home/alice/data/ilsvrc"))
    assert "alice" not in cleaned
    assert "/home" not in cleaned


@pytest.mark.parametrize(
    "text",
    [
        "python train.py experiment=demo run_dir=runs/x",
        "https://example.org/a/b/c",
        "1/2/3",
        "$RAW_DIR/val/x",
        "a / b",
        "../shared/data",
        "${oc.env:X}/a/b",
        "n01440764/x.JPEG",
    ],
)
def test_text_without_absolute_paths_stays(text: str) -> None:
    assert redact_paths(text) == text


def test_paths_in_the_checkout_become_relative() -> None:
    assert redact_paths(f"python {CHECKOUT}/train.py run_dir={CHECKOUT}/runs/x") == "python train.py run_dir=runs/x"
