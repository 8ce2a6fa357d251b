"""The one command for a machine with a GPU: its parts, skips, stops and results. Nothing is measured here."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks import hardware
from recipe.run.files import CHECKOUT

pytestmark = pytest.mark.process


def arguments_of(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    monkeypatch.setattr("sys.argv", ["hardware.py", *words])
    return hardware.parsed()


@pytest.mark.parametrize(
    "words", [["--raw-dir", "raw"], ["--raw-dir", "raw", "--images", "i", "--seeds", "5"], ["--small"]]
)
def test_every_part_needs_earlier_ones_only_and_names_existing_files(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = arguments_of(monkeypatch, *words)
    make = hardware.small_parts if words == ["--small"] else hardware.parts_of
    parts = list(make(arguments, Path("runs/work")))
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    for at, part in enumerate(parts):
        assert set(part.needs) <= set(names[:at]), part.name
        assert part.words[0] == "-m" or (CHECKOUT / part.words[0]).is_file()
    assert {"step", "preprocess", "doctor", "serialize", "latency", "publish", "check", "drift"} <= set(names)


def test_a_rehearsal_writes_into_its_own_folder_only(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Path("runs/work")
    for part in hardware.small_parts(arguments_of(monkeypatch, "--small"), work):
        for word in part.words:
            key, _, value = word.rpartition("=")
            if key.endswith(("run_dir", "directory", "raw_dir")) or (
                "/" in word and not word.startswith("benchmarks/")
            ):
                assert value.startswith(str(work)), word


def test_parts_are_done_once_and_a_failure_costs_only_what_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = "print('x', end='', file=open('count', 'a'))"
    parts = [
        hardware.Part("good", ["-c", counted]),
        hardware.Part("bad", ["-c", "print('why'); raise SystemExit(3)"]),
        hardware.Part("after bad", ["-c", counted], ("bad",)),
        hardware.Part("after good", ["-c", counted], ("good",)),
    ]
    for turn in (1, 2):
        outcomes: dict[str, object] = {}
        for part in parts:
            outcomes[part.name] = hardware.one(part, outcomes, tmp_path, None)
        assert [outcome.code for outcome in outcomes.values()] == [0, 3, None, 0], turn
    assert (tmp_path / "count").read_text() == "xx", "each good part once"
    assert "why" in (tmp_path / "logs" / "bad.txt").read_text()
    assert "needs bad" in outcomes["after bad"].said
    again = hardware.one(hardware.Part("good", ["-c", f"{counted}; 1"]), {}, tmp_path, None)
    assert "before" not in again.said, "another command is another part"
    assert json.loads((tmp_path / "parts" / "bad.json").read_text())["code"] == 3
    monkeypatch.setattr(hardware, "source_sha256", lambda: "other code")
    again = hardware.one(parts[0], {}, tmp_path, None)
    assert "before" not in again.said


def test_parts_can_be_left_out_by_name(tmp_path: Path) -> None:
    parts = [hardware.Part("a", ["-c", "pass"]), hardware.Part("b", ["-c", "pass"], ("a",))]
    (left,) = hardware.chosen(parts, ["a"])
    assert hardware.one(left, {}, tmp_path, None).said == "not started: it needs a"
    with pytest.raises(SystemExit, match="--skip c: the parts are a, b"):
        hardware.chosen(parts, ["c"])


def test_a_check_out_of_time_is_stopped_and_can_be_continued(tmp_path: Path) -> None:
    saves = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); time.sleep(60)"
    began = time.monotonic()
    stopped = hardware.one(hardware.Part("slow", ["-c", saves]), {}, tmp_path, began + 1.5)
    assert time.monotonic() - began < 30
    assert stopped.code == 75
    assert "to be continued" in stopped.said
    late = hardware.one(hardware.Part("late", ["-c", "pass"]), {}, tmp_path, began)
    assert (late.code, late.said) == (None, "not started: time is up")
    assert not stopped.is_done
