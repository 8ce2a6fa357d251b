"""Several processes share the shards of a data set: the bytes of one process, and no waiting for ended ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from recipe.errors import HangError
from recipe.preprocessing import pipeline
from recipe.preprocessing.pipeline import preprocess
from recipe.run.files import CHECKOUT
from recipe.run.records import PreprocessingRecord, from_json
from tests.builders.images import jpeg
from tests.builders.layouts import config, content_of, train_images, write_official
from tests.builders.ranks import is_running, torchrun_environment

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("default_signals")]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")

# A rank of `pauses` stops after so many images. Rank r finishes shards before: 5, 5, 2, 5 and 1 images.
RANK = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {checkout!r})
from recipe.preprocessing import shard_writer
from recipe.preprocessing.pipeline import preprocess
from recipe.run.terminal import report_user_errors
from recipe.run.launcher import launched
from tests.builders.layouts import config

rank, original, stored = int(os.environ["RANK"]), shard_writer.store, []
raw, changes = {by_rank!r}.get(rank, ({raw!r}, {changes!r}))
Path({pids!r}, str(rank)).write_text(str(os.getpid()))

def slow(*arguments):
    stored.append(1)
    if len(stored) > {pauses!r}.get(rank, 10**9):
        time.sleep({pause_seconds})
    return original(*arguments)

shard_writer.store = slow
if __name__ == "__main__":
    with report_user_errors():
        preprocess(config(Path(raw), Path({out!r}), **changes), launched())
"""


class Ranks:
    """Several processes that make one data set. Remaining ones end with the test."""

    def __init__(self, raw: Path, folder: Path) -> None:
        self.raw, self.folder, self.out, self.pids = raw, folder, folder / "out", folder / "pids"
        self.running: list[subprocess.Popen[str]] = []

    def script(
        self,
        pauses: dict[int, int] | None = None,
        pause_seconds: float = 600,
        by_rank: dict[int, tuple[str, dict[str, Any]]] | None = None,
        **changes: Any,
    ) -> str:
        """A program that makes the share of its rank. `pauses` has the number of images after which a rank stops."""
        shutil.rmtree(self.pids, ignore_errors=True)
        self.pids.mkdir()
        path = self.folder / "rank.py"
        path.write_text(
            RANK.format(
                checkout=str(CHECKOUT),
                raw=str(self.raw),
                out=str(self.out),
                pids=str(self.pids),
                pauses=pauses or {},
                pause_seconds=pause_seconds,
                by_rank=by_rank or {},
                changes={"processes": 0} | changes,
            )
        )
        return str(path)

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            words, env=os.environ | environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        self.running.append(process)
        return process

    def torchrun(self, size: int, **options: Any) -> subprocess.Popen[str]:
        """All ranks on one node, under torchrun."""
        return self.start(*TORCHRUN, f"--nproc-per-node={size}", self.script(**options))

    def nodes(self, size: int, **options: Any) -> list[subprocess.Popen[str]]:
        """One rank per node, as with torchrun on several nodes: no launcher ends the others, and one has the store."""
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        script = self.script(**options)
        return [
            self.start(sys.executable, script, **(torchrun_environment(rank, size, size) | place))
            for rank in range(size)
        ]

    def pid(self, rank: int) -> int:
        wait_for(lambda: (self.pids / str(rank)).exists() and (self.pids / str(rank)).read_text() != "")
        return int((self.pids / str(rank)).read_text())

    def wait_for_shards(self, count: int) -> None:
        wait_for(lambda: len(list(self.out.glob(".recipe-work/*-*.json"))) >= count)

    def kill(self) -> None:
        for process in self.running:
            process.kill()
            process.communicate()
        self.running.clear()


def wait_for(condition: Any, seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def is_gone(pid: int) -> bool:
    """True if a process has ended with all of its threads, which keep its files open."""
    try:
        return not is_running(pid) and len(list(Path(f"/proc/{pid}/task").iterdir())) <= 1
    except FileNotFoundError:
        return True


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_official(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def alone(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set made by one process."""
    directory = tmp_path_factory.mktemp("alone") / "data"
    preprocess(config(official, directory))
    return directory


@pytest.fixture
def ranks(official: Path, tmp_path: Path) -> Iterator[Ranks]:
    ranks = Ranks(official, tmp_path)
    yield ranks
    ranks.kill()


def record_in(directory: Path) -> PreprocessingRecord:
    return from_json((directory / "preprocessing.json").read_bytes(), PreprocessingRecord, "record")


@pytest.mark.process
@pytest.mark.parametrize(("size", "workers"), [(2, 1), pytest.param(3, 0, marks=pytest.mark.slow)])
def test_ranks_make_the_same_bytes_as_one_process(alone: Path, ranks: Ranks, size: int, workers: int) -> None:
    process = ranks.torchrun(size, processes=workers)
    errors = process.communicate(timeout=200)[1]
    assert process.returncode == 0, errors
    assert content_of(ranks.out) == content_of(alone)
    assert record_in(ranks.out).processes == size * workers
    assert record_in(ranks.out).splits == record_in(alone).splits
    assert not (ranks.out / ".recipe-work").exists()
    again = ranks.torchrun(size)
    errors = again.communicate(timeout=200)[1]
    assert again.returncode == 0
    assert errors.count("nothing to do") == 1


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_others_and_the_same_command_continues(alone: Path, ranks: Ranks, killed: int) -> None:
    process = ranks.torchrun(3, pauses={0: 5, 1: 5, 2: 5})
    ranks.wait_for_shards(3)
    pids = [ranks.pid(rank) for rank in range(3)]
    os.kill(pids[killed], signal.SIGKILL)
    started = time.monotonic()
    assert process.wait(100) != 0
    assert time.monotonic() - started < 20  # it takes two seconds on a quiet machine
    assert all(map(is_gone, pids))
    assert not (ranks.out / "manifest.json").exists()
    again = ranks.torchrun(3)
    errors = again.communicate(timeout=200)[1]
    assert again.returncode == 0, errors
    assert content_of(ranks.out) == content_of(alone)
    assert record_in(ranks.out).continued_shards == 3


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 2])
def test_a_killed_rank_ends_those_of_other_nodes(ranks: Ranks, killed: int) -> None:
    """No launcher sees all ranks: the others notice the closed connection, in a shard or while waiting."""
    processes = ranks.nodes(3, pauses={killed: 5, 1: 5}, pause_seconds=1)
    ranks.wait_for_shards(2)
    processes[killed].kill()
    for rank, process in enumerate(processes):
        errors = process.communicate(timeout=60)[1]
        if rank != killed:
            assert process.returncode == HangError.exit_code, errors
            assert "another process of this launch ended; run the same command to continue" in errors


@pytest.mark.slow
def test_one_process_finishes_the_work_of_several_ranks(alone: Path, ranks: Ranks, official: Path) -> None:
    process = ranks.torchrun(3, pauses={0: 5, 1: 5, 2: 5})
    ranks.wait_for_shards(3)
    process.kill()
    pids = [ranks.pid(rank) for rank in range(3)]
    wait_for(lambda: all(map(is_gone, pids)), 10)  # no rank outlives its launcher
    assert preprocess(config(official, ranks.out)).continued_shards == 3
    assert content_of(ranks.out) == content_of(alone)


@pytest.mark.slow
@pytest.mark.parametrize("slow", [0, 1])
def test_a_slow_rank_is_waited_for(alone: Path, ranks: Ranks, slow: int) -> None:
    process = ranks.torchrun(2, pauses={slow: 5}, pause_seconds=2)
    errors = process.communicate(timeout=200)[1]
    assert process.returncode == 0, errors
    assert content_of(ranks.out) == content_of(alone)


@pytest.mark.slow
def test_a_stopped_rank_is_waited_for(alone: Path, ranks: Ranks) -> None:
    """No time limit ends the others: a rank may hash archives for hours."""
    process = ranks.torchrun(2, pauses={1: 5}, pause_seconds=1)
    ranks.wait_for_shards(2)
    os.kill(ranks.pid(1), signal.SIGSTOP)
    time.sleep(8)
    assert process.poll() is None
    os.kill(ranks.pid(1), signal.SIGCONT)
    errors = process.communicate(timeout=200)[1]
    assert process.returncode == 0, errors
    assert content_of(ranks.out) == content_of(alone)


@pytest.mark.slow
@pytest.mark.parametrize("is_torchrun", [True, False])
def test_an_image_that_one_rank_rejects_stops_all_with_its_name(
    ranks: Ranks, tmp_path: Path, is_torchrun: bool
) -> None:
    """It is in the first shard of rank 1, while the others are slow."""
    data = config(ranks.raw, ranks.out).data
    key = pipeline.plan_shards(data, pipeline.find_raw(data), [])[1].rows[0]["key"].decode()
    ranks.raw = write_official(tmp_path / "raw", train=train_images() | {key: b""})
    sentence = rf"{key} in .* is corrupt: it is empty"
    options: dict[str, Any] = {"pauses": {0: 1, 2: 1}, "pause_seconds": 2}
    if is_torchrun:
        process = ranks.torchrun(3, **options)
        errors = process.communicate(timeout=200)[1]
        assert process.returncode == 1, errors  # torchrun's own
        assert re.search(f"(?m)^error: .*{sentence}", errors)
        assert "SIGTERM; run the same" not in errors
        return
    for rank, one in enumerate(ranks.nodes(3, **options)):
        errors = one.communicate(timeout=200)[1]
        assert one.returncode == 2, errors
        assert re.search(f"(?m)^error: {'' if rank == 1 else 'rank 1 stopped: '}.*{sentence}", errors)
        assert "Traceback" not in errors


@pytest.mark.slow
def test_ranks_with_other_settings_or_images_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    other = write_official(tmp_path / "other", train=train_images() | {"n02085620_3": jpeg("a larger name")})
    for by_rank, sentence in (
        ({1: (str(ranks.raw), {"processes": 0, "images_per_shard": 6})}, r"other settings than rank 0 \(images_per_"),
        ({1: (str(other), {"processes": 0})}, "has other shards than rank 0"),
    ):
        for one in ranks.nodes(2, by_rank=by_rank):
            errors = one.communicate(timeout=200)[1]
            assert one.returncode == 2, errors
            assert re.search(f"rank 1 (has )?{sentence}", errors)
    assert not (ranks.out / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_to_the_launcher_ends_all_in_order(alone: Path, ranks: Ranks, number: int, name: str) -> None:
    process = ranks.torchrun(2, pauses={0: 5, 1: 5}, processes=1)
    pids = [ranks.pid(0), ranks.pid(1)]
    wait_for(lambda: (ranks.out / "lock").exists())
    process.send_signal(number)
    started = time.monotonic()
    errors = process.communicate(timeout=100)[1]
    assert time.monotonic() - started < 25
    assert all(map(is_gone, pids))
    assert f"stopped by {name}; run the same command to continue" in errors
    again = ranks.torchrun(2)
    assert again.wait(200) == 0
    assert content_of(ranks.out) == content_of(alone)


@pytest.mark.slow
def test_a_damaged_data_set_is_repaired(alone: Path, ranks: Ranks) -> None:
    shutil.copytree(alone, ranks.out)
    (ranks.out / "train-00001.tar").unlink()
    process = ranks.torchrun(2)
    errors = process.communicate(timeout=200)[1]
    assert process.returncode == 0, errors
    assert "train-00001.tar is missing; it will be made again" in errors
    assert content_of(ranks.out) == content_of(alone)


@pytest.mark.process
def test_the_cores_of_a_node_are_divided(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "usable_cores", lambda: 8)
    data = config(official, tmp_path, processes=None).data
    tasks = pipeline.plan_shards(data, pipeline.find_raw(data), [])
    assert [pipeline.process_count(data, tasks, ranks) for ranks in (1, 2, 4, 16)] == [5, 4, 2, 1]
    assert pipeline.process_count(config(official, tmp_path, processes=3).data, tasks, 4) == 3


@pytest.mark.slow
def test_preprocess_py_under_torchrun(official: Path, alone: Path, tmp_path: Path) -> None:
    words = [*TORCHRUN, "--nproc-per-node=2", str(CHECKOUT / "preprocess.py"), "data=imagenet", "data.expect=nothing"]
    words += [f"data.raw_dir={official}", "data.name=tiny", f"data.directory={tmp_path / 'out'}"]
    words += ["data.images_per_shard=5", "data.processes=0", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    made, expected = content_of(tmp_path / "out"), content_of(alone)
    assert made.pop("manifest.json") in done.stdout
    expected.pop("manifest.json")  # has other settings
    assert made == expected
    assert done.stdout.count("manifest_sha256") == 1
    assert record_in(tmp_path / "out").provenance.command.startswith(
        "torchrun --nnodes=1 --nproc-per-node=2 preprocess"
    )
    assert (tmp_path / "run" / "recipe.md").exists()
    journal = (tmp_path / "runs" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in journal] == ["started", "ended"]
