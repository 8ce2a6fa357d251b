"""The storage format: standard tars, random access, errors with a reason."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from recipe.data.manifest import Manifest, ManifestSplit, Shard, manifest_sha256, read_manifest
from recipe.data.shards import INDEX, open_split
from recipe.errors import DiskError, UserError
from recipe.preprocessing.shard_writer import npy_bytes, tar_header, write_shard
from recipe.run.files import CHECKOUT
from recipe.run.records import to_json

NAMES = ("a.jpg", "x" * 99, "x" * 100, "x" * 101, "cat/" + "y" * 150, "cat/a%2Epng.cls", "~!}.png")
LIMITED = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2])))
from recipe.data.shards import open_split
split = open_split(Path(sys.argv[1]), "train")
for number in range(len(split)):
    split.read(number)
print(len(split))
"""
IMAGES = [("n01440764_1", "jpg", b"first" * 200, 0), ("a/b%2Ec", "png", b"second", 7), ("x" * 180, "jpg", b"", 999)]


Image = tuple[str, str, bytes, int]


def write_data_set(directory: Path, parts: Sequence[Sequence[Image]] = (IMAGES,)) -> Manifest:
    """Write a data set of one split, with a shard for each part."""
    written, index = [], np.zeros(sum(len(part) for part in parts), dtype=INDEX)
    for number, part in enumerate(parts):
        shard, places = write_shard(directory / f"train-{number:05d}.tar", part)
        rows = index[sum(len(before) for before in parts[:number]) :][: len(part)]
        rows["shard"], rows["label"] = number, [label for *_, label in part]
        rows["offset"], rows["bytes"] = [place.offset for place in places], [place.bytes for place in places]
        written.append(shard)
    keys = np.array([key.encode() for part in parts for key, *_ in part])
    for name, array in (("index", index), ("keys", keys)):
        (directory / f"train.{name}.npy").write_bytes(npy_bytes(array))
    hashes = [hashlib.sha256(npy_bytes(array)).hexdigest() for array in (index, keys)]
    split = ManifestSplit(
        images=len(index),
        index_sha256=hashes[0],
        keys_sha256=hashes[1],
        shards=written,
        grey_images=[],
        rotated_images=[],
    )
    manifest = Manifest(
        name="x",
        settings={},
        listing_sha256="",
        is_ilsvrc2012=False,
        label_convention="",
        classes=[],
        splits={"train": split},
        converted=[],
        rejected=[],
    )
    (directory / "manifest.json").write_bytes(to_json(manifest))
    return manifest


def test_a_manifest_keeps_its_names(tmp_path: Path) -> None:
    """Its hash identifies a data set."""
    write_data_set(tmp_path)
    names = ["format", "name", "settings", "listing_sha256", "is_ilsvrc2012", "label_convention", "classes", "splits"]
    assert list(json.loads((tmp_path / "manifest.json").read_bytes())) == [*names, "converted", "rejected"]


def test_tarfile_reads_the_shards(tmp_path: Path) -> None:
    shard, _ = write_shard(tmp_path / "s.tar", IMAGES)
    content = (tmp_path / "s.tar").read_bytes()
    assert shard == Shard(name="s.tar", images=3, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    with tarfile.open(tmp_path / "s.tar") as archive:
        found = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
        owners = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in archive.getmembers()}
    assert found == {f"{key}.{extension}": content for key, extension, content, _ in IMAGES} | {
        f"{key}.cls": str(label).encode() for key, _, _, label in IMAGES
    }
    assert owners == {(0, 0, 0, "", "", 0o644)}
    assert len(content) % 10240 == 0


def test_the_bytes_are_those_of_the_standard_library(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", IMAGES)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for key, extension, content, label in IMAGES:
            for name, data in ((f"{key}.{extension}", content), (f"{key}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    assert (tmp_path / "s.tar").read_bytes() == stream.getvalue()


def test_reading_by_index(tmp_path: Path) -> None:
    write_data_set(tmp_path)
    split = open_split(tmp_path, "train")
    assert len(split) == 3
    assert [split.read(i) for i in range(3)] == [content for _, _, content, _ in IMAGES]
    assert [split.key(i) for i in range(3)] == [key for key, *_ in IMAGES]
    assert split.labels.tolist() == [0, 7, 999]
    assert split.where(1) == "shard train-00000.tar, image a/b%2Ec"


def test_threads_share_a_split_and_processes_open_another(tmp_path: Path) -> None:
    write_data_set(tmp_path)
    split = open_split(tmp_path, "train")
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(split.read, [0] * 200)) == {IMAGES[0][2]}
    assert len(split._descriptors) == 1
    copy = pickle.loads(pickle.dumps(split))
    split.close()
    assert copy.read(1) == split.read(1) == b"second"


def test_no_data_set_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no preprocessed data set in .*python preprocess.py experiment="):
        open_split(tmp_path / "absent", "train")


@pytest.mark.parametrize("name", ["train-00000.tar", "train.index.npy", "train.keys.npy"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write_data_set(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is missing.*`python preprocess.py`"):
        open_split(tmp_path, "train")


def test_a_cut_shard_is_named_with_its_sizes(tmp_path: Path) -> None:
    manifest = write_data_set(tmp_path)
    split = open_split(tmp_path, "train")
    path = tmp_path / "train-00000.tar"
    path.write_bytes(path.read_bytes()[:600])
    bytes_before = manifest.splits["train"].shards[0].bytes
    with pytest.raises(UserError, match=rf"train-00000.tar has 600 bytes instead of {bytes_before:,}"):
        open_split(tmp_path, "train")
    with pytest.raises(UserError, match=r"shard train-00000.tar, image n01440764_1 is cut off"):
        split.read(0)


def test_the_manifest_is_refused_if_it_is_not_one(tmp_path: Path) -> None:
    manifest = write_data_set(tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert manifest_sha256(tmp_path) == hashlib.sha256(to_json(manifest)).hexdigest()
    (tmp_path / "manifest.json").write_text('{"format": "manifest/1"}')
    with pytest.raises(UserError, match=r"manifest.json is not a Manifest"):
        manifest_sha256(tmp_path)


def test_a_full_disk_is_reported_and_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("recipe.data.shards.os.fsync", full)
    with pytest.raises(DiskError, match=r"cannot write .*s.tar: No space left on device; free some space"):
        write_shard(tmp_path / "s.tar", IMAGES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
@pytest.mark.parametrize(("hard_limit", "expected"), [(4096, "100"), (128, "allows 128 open files")])
def test_more_shards_than_the_usual_limit_of_open_files(tmp_path: Path, hard_limit: int, expected: str) -> None:
    """ImageNet has 1,332 shards and `ulimit -n` is usually 1,024: here 100 and 64."""
    write_data_set(tmp_path, [[(f"k{number}", "jpg", b"x", 0)] for number in range(100)])
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), str(hard_limit)], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert expected in (done.stdout if hard_limit == 4096 else done.stderr), done.stderr


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0, 1, 511, 512, 107_000, 2**31])
def test_a_header_equals_that_of_tarfile(name: str, size: int) -> None:
    header = tarfile.TarInfo(name)
    header.size = size
    assert tar_header(name, size) == header.tobuf(tarfile.PAX_FORMAT)
