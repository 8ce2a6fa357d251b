"""Preprocessing end to end: equal bytes in any run, unusual and corrupt images, resuming, refusals."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from recipe.config.schema import Corrupt, Decoder, Expectation, Source
from recipe.data.decoding import build_decoder, decoded
from recipe.data.images import DamagedImageError, RejectedImageError, Rules, store
from recipe.data.manifest import read_manifest
from recipe.data.shards import open_split
from recipe.errors import DiskError, UserError
from recipe.preprocessing import pipeline, shard_writer
from recipe.preprocessing.demo import write_demo_archives
from recipe.preprocessing.pipeline import preprocess
from recipe.preprocessing.sources import find_raw
from recipe.run.files import CHECKOUT
from recipe.run.records import PreprocessingRecord
from tests.builders.images import encoded, jpeg, jpeg_header_of, pixels, png_header_of
from tests.builders.layouts import (
    VALIDATION_LABELS,
    WNIDS,
    config,
    content_of,
    train_images,
    validation_images,
    write_extracted,
    write_files,
    write_kaggle,
    write_official,
)
from tests.builders.ranks import is_running

KEEP = Rules(keeps_png=False, resize_short_side=None, quality=90)
KEEP_FOLDER = Rules(keeps_png=True, resize_short_side=None, quality=90)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small ILSVRC2012 as archives."""
    return write_official(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def finished(official: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreprocessingRecord]:
    """The finished data set, made once. Tests that change it work on a copy."""
    directory = tmp_path_factory.mktemp("finished") / "data"
    return directory, preprocess(config(official, directory))


# ---- what comes out ---------------------------------------------------------------------------------


def test_original_bytes_and_labels_come_back(finished: tuple[Path, PreprocessingRecord]) -> None:
    labels = dict(zip(validation_images(), VALIDATION_LABELS, strict=True))
    labels |= {key: WNIDS.index(key[:9]) for key in train_images()}
    for name, images in (("train", train_images()), ("val", validation_images())):
        split = open_split(finished[0], name)
        assert {split.key(i): split.read(i) for i in range(len(split))} == images
        assert [labels[split.key(i)] for i in range(len(split))] == split.labels.tolist()
        for i in range(len(split)):
            with Image.open(io.BytesIO(split.read(i))) as image:
                assert image.size == (split.index[i]["width"], split.index[i]["height"])


def test_training_images_are_dealt_by_hash_and_validation_is_sorted(
    finished: tuple[Path, PreprocessingRecord],
) -> None:
    train, val = (open_split(finished[0], name) for name in ("train", "val"))
    keys = [train.key(i) for i in range(len(train))]
    assert keys == sorted(train_images(), key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    assert [val.key(i) for i in range(len(val))] == sorted(validation_images())
    assert [shard.images for shard in train.shards] == [5, 5, 2]


def webdataset_samples(shards: list[str]) -> list[dict[str, Any]]:
    """All samples, by an independent reader (it leaves its files to the garbage collector)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
        gc.collect()
    return samples


def test_webdataset_opens_the_shards(finished: tuple[Path, PreprocessingRecord]) -> None:
    for name, images in (("train", train_images()), ("val", validation_images())):
        split = open_split(finished[0], name)
        shards = [str(finished[0] / shard.name) for shard in split.shards]
        samples = webdataset_samples(shards)
        assert {sample["__key__"]: sample["jpg"] for sample in samples} == images
        assert [int(sample["cls"]) for sample in samples] == split.labels.tolist()


def test_the_record_is_true(finished: tuple[Path, PreprocessingRecord], official: Path) -> None:
    directory, record = finished
    lines = [
        f"{key} {WNIDS.index(key[:9])} {hashlib.sha256(content).hexdigest()}\n"
        for key, content in sorted(train_images().items())
    ]
    assert record.inputs["raw/train"] == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert record.outputs.pop("manifest") == hashlib.sha256((directory / "manifest.json").read_bytes()).hexdigest()
    assert record.outputs == {name: digest for name, digest in content_of(directory).items() if name.endswith(".tar")}
    for archive in record.archives:
        assert archive.sha256 == hashlib.sha256((official / archive.name).read_bytes()).hexdigest()
        assert record.inputs[archive.name] == archive.sha256
        assert archive.is_published_md5 is False
    assert (record.splits["train"].images, record.splits["train"].classes) == (12, 3)
    assert (record.splits["val"].images_per_class_min, record.splits["val"].images_per_class_max) == (2, 2)
    assert not record.is_ilsvrc2012
    assert [(example.index, example.class_id) for example in record.label_examples] == list(enumerate(WNIDS))
    assert record.class_list_sha256 == hashlib.sha256("\n".join(WNIDS).encode()).hexdigest()


def test_no_path_host_or_user_is_written(finished: tuple[Path, PreprocessingRecord], official: Path) -> None:
    for name in ("manifest.json", "preprocessing.json"):
        text = (finished[0] / name).read_text()
        for secret in (str(official), str(finished[0]), str(CHECKOUT), os.uname().nodename, str(Path.home())):
            assert secret not in text
    assert finished[1].raw_path == "$RAW_DIR"


def test_paths_inside_the_checkout_are_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipe.preprocessing.summary.CHECKOUT", tmp_path)
    record = preprocess(config(write_official(tmp_path / "data/raw"), tmp_path / "data/tiny"))
    assert (record.raw_path, record.processed_path) == ("data/raw", "data/tiny")


# ---- equal bytes, however it ran --------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_gives_the_same_bytes(
    finished: tuple[Path, PreprocessingRecord], official: Path, tmp_path: Path, processes: int
) -> None:
    record = preprocess(config(official, tmp_path, processes=processes))
    assert content_of(tmp_path) == content_of(finished[0])
    assert record.processes == processes


@pytest.mark.parametrize("write", [write_extracted, write_kaggle])
def test_every_layout_gives_the_same_shards(
    finished: tuple[Path, PreprocessingRecord], tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    record = preprocess(config(write(tmp_path / "raw"), tmp_path / "out"))
    same = {name: digest for name, digest in content_of(finished[0]).items() if name != "manifest.json"}
    assert {name: digest for name, digest in content_of(tmp_path / "out").items() if name != "manifest.json"} == same
    assert [record.inputs[f"raw/{name}"] for name in ("train", "val")] == [
        finished[1].inputs[f"raw/{name}"] for name in ("train", "val")
    ]


def test_the_demo_takes_the_same_path(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"source": Source.demo, "train_images_per_class": 2, "validation_images_per_class": 1}
    record = preprocess(config(tmp_path / "raw", tmp_path / "out", **changes))
    write_demo_archives(tmp_path / "twin", 2, 1)
    other = preprocess(config(tmp_path / "twin", tmp_path / "other"))
    assert record.inputs == other.inputs
    assert record.splits["train"].images == 2 * record.class_count
    assert record.layout == f"drawn, in the layout of {other.layout}"
    assert {archive.is_published_md5 for archive in record.archives} == {None}


MODULES_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {checkout!r})
from recipe.preprocessing import shard_writer
from recipe.preprocessing.pipeline import preprocess
from recipe.preprocessing.sources import find_raw
from tests.builders.layouts import config

original = shard_writer.store

def noting(*arguments):
    Path({seen!r}).write_text(" ".join(sys.modules))
    return original(*arguments)

shard_writer.store = noting
if __name__ == "__main__":
    import torch
    preprocess(config({raw!r}, Path({out!r}), processes=1))
"""


@pytest.mark.process
def test_workers_import_no_torch(official: Path, tmp_path: Path) -> None:
    """Even if the parent did: each of a hundred workers would cost a second and half a gigabyte."""
    script, seen = tmp_path / "script.py", tmp_path / "seen"
    script.write_text(
        MODULES_SCRIPT.format(checkout=str(CHECKOUT), seen=str(seen), raw=str(official), out=str(tmp_path / "out"))
    )
    subprocess.run([sys.executable, str(script)], check=True, capture_output=True)
    modules = set(seen.read_text().split())
    assert "recipe.preprocessing.shard_writer" in modules
    assert not {"torch", "torchvision", "nvidia"} & modules


# ---- killed, stopped, continued ---------------------------------------------------------------------

SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {checkout!r})
from recipe.preprocessing import pipeline, shard_writer
from recipe.preprocessing.pipeline import preprocess
from recipe.preprocessing.sources import find_raw
from recipe.run.terminal import report_user_errors
from tests.builders.layouts import config

out = Path({out!r})
original = shard_writer.store

def slow(*arguments):
    if len(list(out.glob(".recipe-work/*-*.json"))) >= {shards}:
        time.sleep({pause_seconds})
    return original(*arguments)

shard_writer.store = slow
write_data_set = pipeline.write_data_set

def late(*arguments):
    time.sleep({pause_seconds})  # the last shards may have been under way when the others were counted
    return write_data_set(*arguments)

pipeline.write_data_set = late
if __name__ == "__main__":
    with report_user_errors():
        preprocess(config({raw!r}, out, processes=2))
"""


def start_slowly(raw: Path, out: Path, shards: int, pause_seconds: float = 0.5) -> subprocess.Popen[str]:
    """Start preprocessing in its own process group. It pauses before each image after the given number of shards.

    Returns when these are finished.
    """
    script = out.with_suffix(".py")
    script.write_text(
        SCRIPT.format(checkout=str(CHECKOUT), raw=str(raw), out=str(out), shards=shards, pause_seconds=pause_seconds)
    )
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True, text=True, stderr=subprocess.PIPE)
    while process.poll() is None and (
        len(list(out.glob(".recipe-work/*-*.json"))) < shards or not (out / "lock").exists()
    ):
        time.sleep(0.005)
    return process


def members_of_group(group: int) -> list[int]:
    """The processes of a group that are still running."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    found = []
    for pid in pids:
        try:
            if os.getpgid(pid) == group and is_running(pid):
                found.append(pid)
        except (ProcessLookupError, FileNotFoundError):
            continue
    return found


@pytest.mark.process
@pytest.mark.parametrize(("shards", "seconds"), [(0, 0.0), (0, 1.0), (1, 0.0), (2, 0.1), (4, 0.2)])
def test_killed_at_any_point_and_continued_gives_the_same_bytes(
    finished: tuple[Path, PreprocessingRecord], official: Path, tmp_path: Path, shards: int, seconds: float
) -> None:
    out = tmp_path / "out"
    process = start_slowly(official, out, shards, pause_seconds=60)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = len(list(out.glob(".recipe-work/*-*.json")))
    assert done >= shards
    assert not (out / "manifest.json").exists()
    (out / "train-00000.tar.tmp-123").write_bytes(b"half a shard")
    record = preprocess(config(official, out, processes=2))
    assert content_of(out) == content_of(finished[0])
    assert record.continued_shards == done
    assert {path.name for path in out.iterdir()} - set(content_of(out)) <= {"lock", "records", "preprocessing.json"}


@pytest.mark.process
def test_workers_end_when_only_the_parent_is_killed(official: Path, tmp_path: Path) -> None:
    process = start_slowly(official, tmp_path / "out", 1)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while members_of_group(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert members_of_group(process.pid) == []


@pytest.mark.process
@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("send", [os.killpg, os.kill], ids=["group", "parent"])
@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM"), (signal.SIGHUP, 129, "SIGHUP")],
)
def test_a_signal_ends_quickly_and_the_next_command_continues(
    finished: tuple[Path, PreprocessingRecord],
    official: Path,
    tmp_path: Path,
    number: int,
    code: int,
    name: str,
    send: Callable[[int, int], None],
) -> None:
    process = start_slowly(official, tmp_path / "out", 1)
    started = time.monotonic()
    send(process.pid, number)
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - started < 15  # takes a second, five on a busy machine
    assert process.returncode == code
    assert errors.splitlines()[1:] == [f"stopped by {name}; run the same command to continue"]
    preprocess(config(official, tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.tmp-*"))
    assert content_of(tmp_path / "out") == content_of(finished[0])


@pytest.mark.process
def test_an_interrupted_run_of_other_settings_leaves_nothing(official: Path, tmp_path: Path) -> None:
    process = start_slowly(official, tmp_path / "out", 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    record = preprocess(config(official, tmp_path / "out", images_per_shard=100))
    assert record.continued_shards == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["train-00000.tar", "val-00000.tar"]


def copy_of(finished: tuple[Path, PreprocessingRecord], target: Path) -> Path:
    """A copy of a data set, to damage it."""
    import shutil

    shutil.copytree(finished[0], target)
    return target


@pytest.mark.process
def test_a_finished_run_is_recognised_without_its_raw_files(
    finished: tuple[Path, PreprocessingRecord], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_of(finished, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    record = preprocess(config(tmp_path / "gone", out, processes=3))
    assert record.outputs["train-00000.tar"] == content_of(out)["train-00000.tar"]
    assert "is finished (12 train, 6 val images): nothing to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_other_settings_are_refused_with_the_difference(
    finished: tuple[Path, PreprocessingRecord], official: Path
) -> None:
    with pytest.raises(UserError, match=r"other settings \(images_per_shard: 5 -> 6\); give another data.directory"):
        preprocess(config(official, finished[0], images_per_shard=6))


@pytest.mark.process
def test_settings_without_effect_do_not_count(finished: tuple[Path, PreprocessingRecord], official: Path) -> None:
    preprocess(config(official, finished[0], jpeg_quality=50, validation_fraction=0.5, processes=2))


@pytest.mark.parametrize("damage", ["missing shard", "cut shard", "missing index", "missing record"])
def test_a_damaged_data_set_is_repaired(
    finished: tuple[Path, PreprocessingRecord], official: Path, tmp_path: Path, damage: str
) -> None:
    out = copy_of(finished, tmp_path / "out")
    if damage == "cut shard":
        (out / "val-00001.tar").write_bytes(b"x")
    else:
        (
            out
            / {
                "missing shard": "train-00001.tar",
                "missing index": "val.index.npy",
                "missing record": "preprocessing.json",
            }[damage]
        ).unlink()
    kept = (out / "train-00000.tar").stat().st_mtime_ns
    preprocess(config(official, out))
    assert content_of(out) == content_of(finished[0])
    assert (out / "preprocessing.json").exists()
    assert not (out / ".recipe-work").exists()
    if "shard" in damage:
        assert (out / "train-00000.tar").stat().st_mtime_ns == kept


def test_a_repair_from_other_images_is_refused(finished: tuple[Path, PreprocessingRecord], tmp_path: Path) -> None:
    out = copy_of(finished, tmp_path / "out")
    (out / "train-00001.tar").unlink()
    other = {key: jpeg(key + "x") for key in train_images()}
    raw = write_official(tmp_path / "raw", train=other)
    for _ in range(2):  # a wrong shard of the right size must not be accepted at the second try
        with pytest.raises(UserError, match=r"train-00001.tar was made again with other bytes"):
            preprocess(config(raw, out))
    (out / "manifest.json").unlink()  # the remedy in the message
    assert preprocess(config(raw, out)).continued_shards == 0


def test_no_wrong_shard_of_a_repair_gets_its_name(
    finished: tuple[Path, PreprocessingRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the second of two wrong ones nor one whose repair was interrupted."""
    out = copy_of(finished, tmp_path / "out")
    lost = ["train-00000.tar", "train-00001.tar"]
    for name in (*lost, "val-00000.tar"):
        (out / name).unlink()
    raw = write_official(tmp_path / "raw", train={key: jpeg(key + "x") for key in train_images()})
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "make_shards", interrupted_when_done)
        with pytest.raises(KeyboardInterrupt):
            preprocess(config(raw, out))
        assert not [name for name in lost if (out / name).exists()]
    with pytest.raises(UserError, match=r"train-00000.tar was made again with other bytes"):
        preprocess(config(raw, out))
    assert not [name for name in lost if (out / name).exists()]
    assert (out / "val-00000.tar").exists()


def interrupted_when_done(*arguments: Any) -> None:
    """Interrupt preprocessing after the last shard was written."""
    MAKE_SHARDS(*arguments)
    raise KeyboardInterrupt


MAKE_SHARDS = pipeline.make_shards


def test_a_folder_with_other_files_is_refused(official: Path, tmp_path: Path) -> None:
    out = tmp_path / "home"
    (out / "work").mkdir(parents=True)
    for name in ("train-00007.tar", "notes.tmp-1", "work/thesis.txt"):
        (out / name).write_text("mine")
    with pytest.raises(UserError, match=r"has files that preprocess\.py did not write"):
        preprocess(config(official, out))
    assert sorted(path.name for path in out.rglob("*")) == ["notes.tmp-1", "thesis.txt", "train-00007.tar", "work"]


def test_a_fresh_volume_is_an_empty_directory(official: Path, tmp_path: Path) -> None:
    """Its root has folders of the operating system. They stay unchanged."""
    for name in ("lost+found", "System Volume Information", "$RECYCLE.BIN", ".Trash-1000"):
        (tmp_path / "volume" / name).mkdir(parents=True)
    (tmp_path / "volume" / ".DS_Store").touch()
    preprocess(config(official, tmp_path / "volume"))
    preprocess(config(official, tmp_path / "plain"))
    assert content_of(tmp_path / "volume").items() >= content_of(tmp_path / "plain").items()
    assert (tmp_path / "volume" / "lost+found").is_dir()


def test_an_unmounted_disk_is_not_a_change_of_the_images(tmp_path: Path) -> None:
    """The finished data set is used. The empty mount point has files of the operating system."""
    write_files(tmp_path / "raw" / "cat", {f"{n}": jpeg("x") for n in range(60)})
    settings = config(tmp_path / "raw", tmp_path / "out", source=Source.folder)
    done = preprocess(settings)
    (tmp_path / "raw").rename(tmp_path / "unmounted")
    (tmp_path / "raw" / "lost+found").mkdir(parents=True)
    assert preprocess(settings) == done


def test_omitted_files_are_in_the_record_and_reported_before_any_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path / "raw" / "cat", {f"{n}": jpeg("x") for n in range(60)})
    write_files(tmp_path / "raw" / "cat", {"60.heic": b"x", "notes.txt": b"x", "._1.JPEG": b"x"}, "")
    record = preprocess(config(tmp_path / "raw", tmp_path / "out", source=Source.folder))
    assert {reason: (found.count, found.examples) for reason, found in record.left_out.items()} == {
        "not an image of this layout (.heic)": (1, ["cat/60.heic"]),
        "not an image of this layout (.txt)": (1, ["cat/notes.txt"]),
    }
    assert {loser: found.examples for loser, found in record.lost_images.items()} == {"cat": ["cat/60.heic"]}
    _, warning, *_ = capsys.readouterr().err.splitlines()
    assert warning == "warning: images of the class 'cat' that are left out: 1 (cat/60.heic)"


def test_raw_and_processed_data_do_not_lie_in_one_another(official: Path, tmp_path: Path) -> None:
    inside = write_official(tmp_path / "data" / "raw")
    with pytest.raises(UserError, match="are inside one another"):
        preprocess(config(inside, tmp_path / "data"))
    assert not (tmp_path / "data" / "lock").exists()


def test_a_folder_data_set_does_not_lie_among_its_own_classes(tmp_path: Path) -> None:
    """It would be listed as a class at the next run."""
    write_files(tmp_path / "raw" / "cat", {f"{n}": jpeg("x") for n in range(60)})
    for inside in ("raw", "raw/out", "raw/cat/out", "link"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / "raw")
        with pytest.raises(UserError, match="are inside one another"):
            preprocess(config(tmp_path / "raw", tmp_path / inside, source=Source.folder))
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == ["cat"]


def test_a_folder_with_only_our_lock_is_accepted(official: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lock").touch()
    preprocess(config(official, tmp_path / "out"))


def refuse_to_lock(*_: object) -> None:
    """Raise the error of a file system without locks."""
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_file_system_without_locks_is_refused(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse_to_lock)
    with pytest.raises(UserError, match=r"file system of .* cannot lock files \(No locks.*; give a data.directory"):
        preprocess(config(official, tmp_path / "out"))


def test_the_note_goes_before_its_shard_is_written_again(official: Path, tmp_path: Path) -> None:
    """Otherwise the note of one plan could be of a shard that another plan wrote before it was killed."""
    data = config(official, tmp_path / "out")
    preprocess(data)
    place = pipeline.writer_settings(data.data, tmp_path / "out", find_raw(data.data))
    task = pipeline.plan_shards(data.data, find_raw(data.data), [])[0]
    note = shard_writer.note_path(tmp_path / "out", task)
    note.parent.mkdir()
    note.write_text("of another plan")
    seen: list[bool] = []
    maker = shard_writer.ShardMaker(
        task, place, shard_writer.RawReader(place.containers), never(lambda: seen.append(note.exists()))
    )
    maker.make()
    assert seen
    assert not any(seen)


def never(look: Callable[[], None]) -> Callable[[], bool]:
    """A function that calls `look` and returns False."""

    def should_stop() -> bool:
        look()
        return False

    return should_stop


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported_and_the_command_continues(
    finished: tuple[Path, PreprocessingRecord], official: Path, tmp_path: Path
) -> None:
    """The temporary name of the index is a link to /dev/full."""
    out = tmp_path / "out"
    out.mkdir()
    full = out / f"train.index.npy.tmp-{os.getpid()}"

    def fill(directory: Path) -> None:
        full.symlink_to("/dev/full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "remove_strays", lambda directory, wanted: fill(directory))
        with pytest.raises(DiskError, match=r"cannot write .*train.index.npy: No space left on device; free"):
            preprocess(config(official, out))
    record = preprocess(config(official, out))
    assert record.continued_shards == 5
    assert content_of(out) == content_of(finished[0])


def test_a_disk_error_of_a_worker_is_reported(official: Path, tmp_path: Path) -> None:
    (tmp_path / "out/train-00000.tar").mkdir(parents=True)
    (tmp_path / "out" / shard_writer.WORK).mkdir()
    with pytest.raises(DiskError, match=r"cannot write .*train-00000.tar: Is a directory"):
        preprocess(config(official, tmp_path / "out"))


def test_a_second_writer_is_refused(official: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / shard_writer.WORK).mkdir(parents=True)
    with (tmp_path / "out" / "lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being written by another process"):
            preprocess(config(official, tmp_path / "out"))


def test_missing_raw_files_create_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        preprocess(config(tmp_path / "nowhere", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_written(official: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*: Not a directory"):
        preprocess(config(official, tmp_path / "file" / "out"))


def test_wrong_md5_stops_before_anything_is_packed(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "check_ilsvrc2012", lambda raw: None)
    with pytest.raises(UserError, match=r"ILSVRC2012_img_train.tar has md5 \w{32}, published is 1d675b47d978889d74"):
        preprocess(config(official, tmp_path / "out", expect=Expectation.ilsvrc2012))
    assert not list((tmp_path / "out").glob("*.tar"))


# ---- odd images -------------------------------------------------------------------------------------


def exif_rotated() -> bytes:
    """A JPEG with an EXIF orientation of 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(pixels("rotated"), exif=exif)


def corrupt_exif() -> bytes:
    """An intact image with an EXIF block that Pillow warns of."""
    return encoded(pixels("exif"), exif=b"Exif\0\0" + b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40)


def test_unusual_images_in_ilsvrc2012(tmp_path: Path) -> None:
    """T34, T35, T36: some images keep their bytes, others are converted, and all are listed."""
    odd = {
        "n01440764_5": encoded(pixels("cmyk").convert("CMYK")),
        "n02085620_5": encoded(pixels("png"), "PNG"),
        "n02085620_6": encoded(pixels("grey", channels=1)),
        "n03445777_5": exif_rotated(),
        "n03445777_6": corrupt_exif(),
    }
    validation = validation_images() | {"ILSVRC2012_val_00000003": encoded(pixels("c").convert("CMYK"))}
    raw = write_official(tmp_path / "raw", train=train_images() | odd, validation=validation)
    record = preprocess(config(raw, tmp_path / "out"))
    manifest = read_manifest(tmp_path / "out")
    assert {(image.split, image.key): (image.what, image.done) for image in manifest.converted} == {
        ("train", "n01440764_5"): ("CMYK JPEG", "stored as lossless RGB PNG"),
        ("train", "n02085620_5"): ("PNG not named .png", "stored as lossless RGB PNG"),
        ("val", "ILSVRC2012_val_00000003"): ("CMYK JPEG", "stored as lossless RGB PNG"),
    }
    assert record.unusual_images == {
        "CMYK JPEG": 2,
        "PNG not named .png": 1,
        "grayscale": 1,
        "EXIF orientation, not applied": 1,
    }
    split = open_split(tmp_path / "out", "train")
    stored = {split.key(i): split.read(i) for i in range(len(split))}
    for key in ("n02085620_6", "n03445777_5", "n03445777_6"):
        assert stored[key] == odd[key]
    for key in ("n01440764_5", "n02085620_5"):
        assert pixels_of(stored[key]).tobytes() == pixels_of(odd[key]).tobytes()
    samples = webdataset_samples([str(tmp_path / "out" / shard.name) for shard in split.shards])
    assert {sample["__key__"] for sample in samples if "png" in sample} == {"n01440764_5", "n02085620_5"}


@pytest.mark.parametrize("tail", [b"", b"\0\0", b"\r\n\r\n\r\n", bytes(64)])
@pytest.mark.parametrize("progressive", [False, True])
def test_no_jpeg_without_its_end_keeps_its_bytes(tail: bytes, progressive: bool) -> None:
    """Pillow reads some of these, other decoders do not."""
    whole = encoded(pixels("end", 200, 150), progressive=progressive)
    assert store(whole + b"whatever follows", False, KEEP).unusual is None
    try:
        stored = store(whole.removesuffix(b"\xff\xd9") + tail, False, KEEP)
    except DamagedImageError:
        return
    assert (stored.unusual, stored.extension) == ("JPEG without an end marker", "png")
    for decoder in Decoder:
        assert np.array_equal(
            decoded(stored.content, build_decoder(decoder)).permute(1, 2, 0).numpy(), pixels_of(whole)
        )


def test_a_jpeg_that_only_pillow_reads_is_stored_losslessly() -> None:
    content = encoded(pixels("end", 200, 150)).removesuffix(b"\xff\xd9") + b"\r\n\r\n\r\n"
    assert store(content, False, KEEP).unusual == "JPEG without an end marker"


def pixels_of(content: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """RGB as torchvision's ImageFolder sees it: the oracle."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def sixteen_bits() -> bytes:
    """A grey PNG of 16 bits."""
    return encoded(Image.fromarray(np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)), "PNG")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (encoded(pixels("a").convert("P"), "PNG"), "PNG with a palette"),
        (encoded(pixels("a", channels=4), "PNG"), "PNG with transparency"),
        (encoded(pixels("a").convert("LA"), "PNG"), "PNG with transparency"),
        (encoded(pixels("a"), "PNG", transparency=(0, 0, 0)), "PNG with transparency"),
        (encoded(pixels("a").convert("1"), "PNG"), "PNG of 1 bits"),
        (sixteen_bits(), "PNG of 16 bits"),
        (encoded(pixels("a"), "PNG", save_all=True, append_images=[pixels("b")]), "PNG with several frames"),
    ],
)
def test_unusual_png_files_of_folders_become_rgb(content: bytes, what: str) -> None:
    stored = store(content, True, KEEP_FOLDER)
    assert (stored.unusual, stored.extension) == (what, "png")
    with Image.open(io.BytesIO(stored.content)) as image:
        assert (image.mode, image.info) == ("RGB", {})
    if what != "PNG of 16 bits":
        assert pixels_of(stored.content).tobytes() == pixels_of(content).tobytes()


def test_sixteen_bits_keep_their_high_byte() -> None:
    stored = store(sixteen_bits(), True, KEEP_FOLDER)
    wanted = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32) >> 8
    assert (pixels_of(stored.content) == wanted[:, :, None]).all()


def test_plain_png_files_keep_their_bytes_only_with_a_png_name() -> None:
    for mode in ("RGB", "L"):
        content = encoded(pixels("a").convert(mode), "PNG")
        assert store(content, True, KEEP_FOLDER).content == content
        assert store(content, False, KEEP_FOLDER).unusual == "PNG not named .png"
        assert store(content, True, KEEP).unusual == "PNG not named .png"
    assert store(jpeg("a"), True, KEEP_FOLDER).content == jpeg("a")


def test_a_profile_or_comment_does_not_reach_the_png() -> None:
    content = encoded(pixels("a").convert("CMYK"), icc_profile=b"profile" * 20, comment=b"hello")
    with Image.open(io.BytesIO(store(content, False, KEEP).content)) as image:
        assert image.info == {}


DAMAGED = {
    "empty": (b"", r"it is empty \(0 bytes\)"),
    "text": (b"<html>404 not found</html>", "it is none of JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF, JPEG 2000"),
    "eps": (encoded(pixels("a"), "EPS"), "it is none of JPEG, PNG, WebP"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is none of JPEG, PNG, WebP"),
    "truncated JPEG": (encoded(pixels("a", 400, 300))[:2000], "truncated"),
    "truncated PNG": (encoded(pixels("a", 400, 300), "PNG")[:2000], "truncated"),
    "header only": (jpeg("a")[:20], "."),
    "PNG bomb": (png_header_of(20_000, 20_000), "it is too large"),
    "JPEG bomb": (jpeg_header_of(20_000, 20_000), "it is too large"),
    "large, below Pillow's own limit": (
        png_header_of(14_000, 13_000),
        "it is too large: 14000 x 13000 pixels, while data.max_pixels=178956970",
    ),
    "PNG without data": (png_header_of(10, 10), "."),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_images_have_a_reason_that_repeats(case: str) -> None:
    content, reason = DAMAGED[case]
    texts = set()
    for _ in range(2):
        with pytest.raises(RejectedImageError, match=reason) as caught:
            store(content, False, KEEP)
        texts.add(str(caught.value))
    assert len(texts) == 1
    assert "0x" not in texts.pop()


def test_random_damage_is_an_image_or_a_reason() -> None:
    generator = np.random.default_rng(0)
    for original in (jpeg("a"), encoded(pixels("b"), "PNG"), exif_rotated()):
        for _ in range(150):
            content = bytearray(original)
            for at in generator.integers(0, len(content), 3):
                content[at] = generator.integers(0, 256)
            with contextlib.suppress(DamagedImageError):
                assert store(bytes(content), False, KEEP).width > 0


@pytest.mark.process
def test_a_corrupt_image_stops_with_its_name(tmp_path: Path) -> None:
    raw = write_official(tmp_path / "tars", train=train_images() | {"n02085620_3": jpeg("a")[:300]})
    with pytest.raises(UserError, match=r"n02085620_3 in .*img_train.tar \(at byte \d+\) is corrupt: .*_corrupt=skip"):
        preprocess(config(raw, tmp_path / "out"))
    write_extracted(tmp_path / "raw")
    (tmp_path / "raw/train/n02085620/n02085620_3.JPEG").write_bytes(b"")
    with pytest.raises(UserError, match=r"n02085620/n02085620_3.JPEG is corrupt: it is empty"):
        preprocess(config(tmp_path / "raw", tmp_path / "out", processes=2))


def test_corrupt_images_are_left_out_and_listed_with_skip(tmp_path: Path) -> None:
    bad = {"n02085620_3": jpeg("a")[:300], "n02085620_4": b""}
    validation = validation_images() | {"ILSVRC2012_val_00000001": png_header_of(20_000, 20_000)}
    raw = write_official(tmp_path / "raw", train=train_images() | bad, validation=validation)
    record = preprocess(config(raw, tmp_path / "out", on_corrupt=Corrupt.skip))
    assert [(image.split, image.key) for image in record.rejected] == [
        ("train", "n02085620_3"),
        ("train", "n02085620_4"),
        ("val", "ILSVRC2012_val_00000001"),
    ]
    assert read_manifest(tmp_path / "out").rejected == record.rejected
    assert (record.splits["train"].images, record.splits["val"].images) == (10, 5)
    split = open_split(tmp_path / "out", "train")
    assert {split.key(i): split.read(i) for i in range(len(split))} == {
        key: content for key, content in train_images().items() if key not in bad
    }
    assert [split.labels[i] for i in range(10)] == [WNIDS.index(split.key(i)[:9]) for i in range(10)]


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (
            [key for key in train_images() if key.startswith("n02085620")],
            "no training image of class 'n02085620' can be stored",
        ),
        (
            list(validation_images()),
            r"none of the 6 val images can be stored, such as ILSVRC2012_val_00000001: it is empty",
        ),
        (list(train_images()), "none of the 12 train images can be stored"),
    ],
)
def test_neither_a_class_nor_a_split_may_lose_all_its_images(tmp_path: Path, bad: list[str], sentence: str) -> None:
    empty = dict.fromkeys(bad, b"")
    train, validation = (
        {k: empty.get(k, v) for k, v in images().items()} for images in (train_images, validation_images)
    )
    raw = write_official(tmp_path / "raw", train=train, validation=validation)
    with pytest.raises(UserError, match=sentence):
        preprocess(config(raw, tmp_path / "out", on_corrupt=Corrupt.skip))
    assert not (tmp_path / "out" / "manifest.json").exists()


# ---- resizing ---------------------------------------------------------------------------------------


def test_only_large_training_images_are_resized(tmp_path: Path) -> None:
    large = {"n01440764_9": encoded(pixels("large", 301, 200)), "n01440764_8": encoded(pixels("l", 200, 99, 1))}
    validation = validation_images() | {"ILSVRC2012_val_00000001": encoded(pixels("large", 301, 200))}
    raw = write_official(tmp_path / "raw", train=train_images() | large, validation=validation)
    record = preprocess(config(raw, tmp_path / "out", resize_short_side=64, jpeg_quality=80))
    split = open_split(tmp_path / "out", "train")
    stored = {split.key(i): split.read(i) for i in range(len(split))}
    sizes = {split.key(i): (int(split.index[i]["width"]), int(split.index[i]["height"])) for i in range(len(split))}
    assert {key: stored[key] for key in train_images()} == train_images()
    assert (sizes["n01440764_9"], sizes["n01440764_8"]) == ((96, 64), (129, 64))
    with Image.open(io.BytesIO(large["n01440764_9"])) as image:
        small = image.resize((96, 64), Image.Resampling.BILINEAR)
    oracle = encoded(small, quality=80)
    assert stored["n01440764_9"] == oracle
    assert record.splits["train"].grey_images == 1
    val = open_split(tmp_path / "out", "val")
    assert {val.key(i): val.read(i) for i in range(len(val))} == validation
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    settings = manifest["settings"]
    assert (settings["resize_short_side"], settings["jpeg_quality"], settings["resize_filter"]) == (64, 80, "bilinear")
    assert "64 pixels resized to it (bilinear, antialiased)" in record.stored_as


def test_shards_of_another_filter_are_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_official(tmp_path / "raw")
    data = config(raw, tmp_path, resize_short_side=16).data
    plans = [task.plan_sha256 for task in pipeline.plan_shards(data, find_raw(data), [])]
    monkeypatch.setattr("recipe.data.manifest.FILTER", "bicubic")
    assert not set(plans) & {task.plan_sha256 for task in pipeline.plan_shards(data, find_raw(data), [])}


def test_an_unusual_image_is_resized_too() -> None:
    content = encoded(pixels("c", 200, 100).convert("CMYK"))
    stored = store(content, False, Rules(keeps_png=False, resize_short_side=50, quality=90))
    assert (stored.width, stored.height, stored.extension) == (100, 50, "jpg")
    assert (stored.unusual, stored.done) == ("CMYK JPEG", "stored as resized RGB JPEG")


# ---- folders ----------------------------------------------------------------------------------------


def test_a_folder_data_set_end_to_end(tmp_path: Path) -> None:
    for name in ("cat", "dog.v2"):
        write_files(tmp_path / "raw" / name, {f"{name} {n}.jpg": jpeg(f"{name}{n}") for n in range(12)}, "")
        write_files(tmp_path / "raw" / name, {"a.png": encoded(pixels(name), "PNG"), "a.jpg": jpeg(name)}, "")
    record = preprocess(config(tmp_path / "raw", tmp_path / "out", source=Source.folder, validation_fraction=0.25))
    assert record.splits["train"].images + record.splits["val"].images == 28
    assert record.unusual_images == {}
    assert record.label_convention == "position among the sorted names of the class folders, counted from 0"
    assert read_manifest(tmp_path / "out").settings["validation_fraction"] == 0.25
    found = {}
    for name in ("train", "val"):
        shards = sorted(str(path) for path in (tmp_path / "out").glob(f"{name}-*.tar"))
        for sample in webdataset_samples(shards):
            found[sample["__key__"]] = (sample.get("jpg") or sample["png"], int(sample["cls"]))
    assert found["cat/a%2Epng"] == (encoded(pixels("cat"), "PNG"), 0)
    assert found["dog%2Ev2/a%2Ejpg"] == (jpeg("dog.v2"), 1)
    assert len(found) == 28


def write_animals(raw: Path) -> dict[str, Any]:
    """A folder data set with its settings."""
    for name in ("cat", "dog"):
        write_files(raw / name, {f"{n}": jpeg(f"{name}{n}") for n in range(20)})
    return {"source": Source.folder, "validation_fraction": 0.25}


def remove_an_image(raw: Path) -> None:
    (raw / "cat" / "7.JPEG").unlink()


def add_a_class(raw: Path) -> None:
    write_files(raw / "eel", {"1": jpeg("eel"), "2": jpeg("eel")})


def change_a_size(raw: Path) -> None:
    (raw / "cat" / "7.JPEG").write_bytes(jpeg("another picture"))


def move_an_image(raw: Path) -> None:
    (raw / "cat" / "7.JPEG").rename(raw / "dog" / "seven.JPEG")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (remove_an_image, "had 40 images, now there are 39; give another data.name or data.directory"),
        (add_a_class, "had 40 images, now there are 42;"),
        (change_a_size, r"had other images \(as many as now: 40\);"),
        (move_an_image, r"had other images \(as many as now: 40\);"),
    ],
)
def test_a_finished_folder_data_set_of_other_images_is_refused(
    tmp_path: Path, change: Callable[[Path], None], sentence: str
) -> None:
    changes = write_animals(tmp_path / "raw")
    preprocess(config(tmp_path / "raw", tmp_path / "out", **changes))
    change(tmp_path / "raw")
    before = content_of(tmp_path / "out")
    with pytest.raises(UserError, match=sentence):
        preprocess(config(tmp_path / "raw", tmp_path / "out", **changes))
    assert content_of(tmp_path / "out") == before


def test_a_finished_folder_data_set_does_not_need_its_raw_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder may be absent, or the empty mount point of a disk."""
    changes = write_animals(tmp_path / "raw")
    record = preprocess(config(tmp_path / "raw", tmp_path / "out", **changes))
    os.utime(tmp_path / "raw" / "cat" / "7.JPEG", (1, 1))
    (tmp_path / "raw").rename(tmp_path / "moved")
    (tmp_path / "empty").mkdir()
    for place in ("moved", "empty", "gone"):
        capsys.readouterr()
        assert preprocess(config(tmp_path / place, tmp_path / "out", **changes)) == record
        assert "nothing to do" in capsys.readouterr().err


@pytest.mark.process
def test_a_killed_worker_is_reported(official: Path, tmp_path: Path) -> None:
    process = start_slowly(official, tmp_path / "out", 1)
    children = [pid for pid in members_of_group(process.pid) if is_worker(pid)]
    assert children
    os.kill(children[0], signal.SIGKILL)
    _, text = process.communicate(timeout=30)
    assert "a worker process was killed" in text


def is_worker(pid: int) -> bool:
    """True for a child process of multiprocessing other than the resource tracker."""
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_notes_of_other_code_are_ignored(official: Path, tmp_path: Path) -> None:
    (tmp_path / "out/.recipe-work").mkdir(parents=True)
    (tmp_path / "out/.recipe-work/train-00000.json").write_text("{}")
    assert preprocess(config(official, tmp_path / "out")).continued_shards == 0
    assert shard_writer.WORK not in {path.name for path in (tmp_path / "out").iterdir()}
