"""Several processes share the shards of a data set: the same bytes as from one, and no process waits for ever."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recipe.config.schema import Config
from recipe.data import processing, sharing
from recipe.data.processing import preprocess
from recipe.data.sharing import Team
from recipe.errors import HangError, UserError
from recipe.launcher import Launch
from recipe.records import PreprocessingRecord, from_json
from recipe.run import CHECKOUT
from tests.data.layouts import config, jpeg, train_images, write_official
from tests.data.test_processing import content_of
from tests.worlds import torchrun_environment

RANK = """
import sys, time
from pathlib import Path
sys.path.insert(0, {checkout!r})
from recipe.data import packing, sharing
from recipe.data.processing import preprocess
from recipe.errors import one_clear_sentence
from recipe.launcher import launched
from tests.data.layouts import config

sharing.BEAT_SECONDS, sharing.LOST_SECONDS = 0.05, {lost_seconds}
original, seen = packing.store, []

def slow(*arguments):
    seen.append(1)
    if len(seen) > {pause_after}:
        time.sleep(600)
    return original(*arguments)

packing.store = slow
with one_clear_sentence():
    preprocess(config(Path({raw!r}), Path({out!r}), **{changes!r}), launched())
"""


class Ranks:
    """Processes as torchrun would start them; whatever is left of them ends with the test."""

    def __init__(self, raw: Path, out: Path) -> None:
        self.raw, self.out = raw, out
        self.running: list[subprocess.Popen[str]] = []

    def start(
        self, rank: int, size: int, pause_after: int = 10**9, lost_seconds: float = 60.0, **changes: Any
    ) -> subprocess.Popen[str]:
        """One process, which stops in the middle of an image once it has stored so many."""
        script = RANK.format(
            checkout=str(CHECKOUT),
            raw=str(changes.pop("raw", self.raw)),
            out=str(self.out),
            pause_after=pause_after,
            lost_seconds=lost_seconds,
            changes={"processes": 0} | changes,
        )
        words = [sys.executable, "-c", script]
        self.running.append(
            subprocess.Popen(
                words,
                env=os.environ | torchrun_environment(rank, size),
                text=True,
                stderr=subprocess.PIPE,
                cwd=CHECKOUT,
            )
        )
        return self.running[-1]

    def ended(self) -> list[tuple[int, str]]:
        """The exit codes and words of all that were started."""
        found = []
        for process in self.running:
            words = process.communicate(timeout=120)[1]
            found.append((process.returncode, words))
        self.running.clear()
        return found


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_official(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def alone(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set as one process makes it."""
    directory = tmp_path_factory.mktemp("alone") / "data"
    preprocess(config(official, directory))
    return directory


@pytest.fixture
def ranks(official: Path, tmp_path: Path) -> Iterator[Ranks]:
    found = Ranks(official, tmp_path / "out")
    yield found
    for process in found.running:
        process.kill()
        process.communicate()


def record_in(directory: Path) -> PreprocessingRecord:
    return from_json((directory / "preprocessing.json").read_bytes(), PreprocessingRecord, "record")


@pytest.mark.parametrize(("size", "workers"), [(2, 1), (3, 0)])
def test_processes_that_share_the_shards_make_the_same_bytes(
    alone: Path, ranks: Ranks, size: int, workers: int
) -> None:
    for rank in reversed(range(size)):
        ranks.start(rank, size, processes=workers)
    assert [code for code, _ in ranks.ended()] == [0] * size
    assert content_of(ranks.out) == content_of(alone)
    assert record_in(ranks.out).processes == size * workers
    assert not (ranks.out / ".recipe-work").exists()
    ranks.start(1, size)
    ((code, words),) = ranks.ended()
    assert code == 0
    assert "nothing to do" in words


def wait_for_shards(out: Path, count: int) -> None:
    """Until so many are finished."""
    deadline = time.monotonic() + 60
    while len(list(out.glob(".recipe-work/*-*.json"))) < count and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_is_named_and_the_next_launch_continues(alone: Path, ranks: Ranks, lost: int) -> None:
    """Shards have 5, 5, 2, 5 and 1 images: each process finishes one before it is killed, or waits for the other."""
    started = [ranks.start(rank, 2, pause_after=5 if rank == lost else 10**9, lost_seconds=2) for rank in (0, 1)]
    wait_for_shards(ranks.out, 2)
    started[lost].kill()
    ended = ranks.ended()
    assert ended[1 - lost][0] == HangError.exit_code
    assert f"rank {lost} has given no sign in" in ended[1 - lost][1]
    assert not (ranks.out / "manifest.json").exists()
    for rank in (0, 1):
        ranks.start(rank, 2)
    assert [code for code, _ in ranks.ended()] == [0, 0]
    assert content_of(ranks.out) == content_of(alone)
    assert record_in(ranks.out).continued_shards >= 2


def test_what_several_began_one_can_finish(alone: Path, ranks: Ranks, official: Path) -> None:
    for rank in (0, 1, 2):
        ranks.start(rank, 3, pause_after=5)
    wait_for_shards(ranks.out, 3)
    for process in ranks.running:
        process.kill()
    ranks.ended()
    assert preprocess(config(official, ranks.out)).continued_shards == 3
    assert content_of(ranks.out) == content_of(alone)


def test_processes_of_other_settings_are_refused(ranks: Ranks) -> None:
    ranks.start(0, 2)
    ranks.start(1, 2, images_per_shard=6)
    ended = ranks.ended()
    assert [code for code, _ in ended] == [2, 2]
    for _, words in ended:
        assert "rank 1 has other settings than rank 0 (images_per_shard: 5 -> 6)" in words
    assert not (ranks.out / "manifest.json").exists()


def test_processes_that_see_other_images_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    other = write_official(tmp_path / "other", train=train_images() | {"n02085620_3": jpeg("a larger name")})
    ranks.start(0, 2)
    ranks.start(1, 2, raw=other)
    for code, words in ranks.ended():
        assert code == 2
        assert "rank 1 comes to other shards than rank 0" in words


def test_a_corrupt_image_of_one_process_stops_all_with_its_name(ranks: Ranks, tmp_path: Path) -> None:
    keys = [row["key"].decode() for row in planned_rows(config(ranks.raw, ranks.out), 1)]
    ranks.raw = write_official(tmp_path / "raw", train=train_images() | {keys[0]: b""})
    ranks.start(0, 2)
    ranks.start(1, 2)
    for code, words in ranks.ended():
        assert code == 2
        assert f"{keys[0]} in " in words
        assert "is corrupt: it is empty" in words


def planned_rows(made: Config, number: int) -> Any:
    """The raw images of one shard of the training set."""
    return processing.planned(made.data, processing.find_raw(made.data), [])[number].rows


@pytest.mark.parametrize(("rank", "missing"), [(0, 1), (1, 0)])
def test_a_process_without_the_others_says_so(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, missing: int
) -> None:
    monkeypatch.setattr(sharing, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(sharing, "LOST_SECONDS", 0.3)
    with pytest.raises(HangError, match=f"rank {missing} has given no sign in .* not the same folder for all"):
        preprocess(config(official, tmp_path / "out", processes=0), Launch(rank, 2, 1))
    sign = json.loads((tmp_path / f"out/.recipe-work/ranks/{rank}.json").read_text())
    assert sign["state"] == "failed"


def test_signs_of_an_earlier_launch_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that all is ready nor that all has failed."""
    monkeypatch.setattr(sharing, "BEAT_SECONDS", 0.02)
    for state, error in (("made", HangError), ("failed", HangError)):
        for rank in (0, 1):
            old = Team(tmp_path, Launch(rank, 2, 1))
            old.state, old.plan = state, sharing.Plan(settings={}, archives=[], shards_sha256="old")
            old.signs[1 - rank] = sharing.Sign(token="old", beat=1, state=state, seen={})
            old._write()
        monkeypatch.setattr(sharing, "LOST_SECONDS", 0.3)
        with pytest.raises(error, match="rank 0 has given no sign"), Team(tmp_path, Launch(1, 2, 1)) as team:
            team.await_plan()
        with pytest.raises(error, match="rank 1 has given no sign"), Team(tmp_path, Launch(0, 2, 1)) as team:
            team.await_others(lambda images: None)


def test_a_damaged_data_set_is_repaired_by_one_process_only(official: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(alone, out)
    (out / "train-00001.tar").unlink()
    for rank in (0, 1):
        with pytest.raises(UserError, match="is damaged: let one process repair it"):
            preprocess(config(official, out), Launch(rank, 2, 2))


def test_the_cores_of_a_node_are_divided(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processing, "usable_cores", lambda: 8)
    tasks = processing.planned(
        config(official, tmp_path).data, processing.find_raw(config(official, tmp_path).data), []
    )
    data = config(official, tmp_path, processes=None).data
    assert [processing.process_count(data, tasks, sharers) for sharers in (1, 2, 4, 16)] == [5, 4, 2, 1]
    assert processing.process_count(config(official, tmp_path, processes=3).data, tasks, 4) == 3


def test_torchrun_starts_it(official: Path, alone: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words += [str(CHECKOUT / "preprocess.py"), "data=imagenet", "data.expect=nothing", f"data.raw_dir={official}"]
    words += ["data.name=tiny", f"data.directory={tmp_path / 'out'}", "data.images_per_shard=5", "data.processes=0"]
    done = subprocess.run(
        [*words, f"run_dir={tmp_path / 'run'}"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    same = {name: digest for name, digest in content_of(alone).items() if name != "manifest.json"}
    made = content_of(tmp_path / "out")
    assert {name: digest for name, digest in made.items() if name != "manifest.json"} == same
    assert done.stdout.count(f"manifest_sha256 {made['manifest.json']}") == 1
    assert record_in(tmp_path / "out").provenance.command.startswith(
        "torchrun --nnodes=1 --nproc-per-node=2 preprocess"
    )
    assert (tmp_path / "run" / "recipe.md").exists()
    journal = (tmp_path / "runs" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in journal] == ["started", "ended"]
