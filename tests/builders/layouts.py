"""Small raw data sets in the layouts that people have, written with the standard library only: the tests' input."""

from __future__ import annotations

import gzip
import hashlib
import io
import shutil
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from scipy.io import savemat

from recipe.config.schema import Config, Corrupt, DataConfig, Expectation, Source
from recipe.data.shards import open_split
from tests.builders.images import jpeg

WNIDS = ("n01440764", "n02085620", "n03445777")  # sorted, so that labels are 0, 1, 2
NAMES = ("tench, Tinca tinca", "Chihuahua", "golf ball")
ILSVRC_IDS = (3, 1, 2)  # of the devkit; none is the label + 1
VALIDATION_LABELS = (2, 0, 1, 1, 0, 2)
Images = Mapping[str, bytes]


def train_images(per_class: int = 4) -> dict[str, bytes]:
    """n01440764_1 and so on."""
    return {key: jpeg(key) for wnid in WNIDS for key in (f"{wnid}_{number}" for number in range(1, per_class + 1))}


def validation_images() -> dict[str, bytes]:
    """ILSVRC2012_val_00000001 and so on."""
    keys = (f"ILSVRC2012_val_{number:08d}" for number in range(1, len(VALIDATION_LABELS) + 1))
    return {key: jpeg(key) for key in keys}


def tar_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A plain tar."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def class_tar(wnid: str, images: Images) -> bytes:
    """The tar of one class."""
    return tar_bytes((f"{key}.JPEG", content) for key, content in images.items() if key.startswith(wnid))


def meta_mat() -> bytes:
    """The devkit's table in the order of its IDs, with an inner node of WordNet behind the classes."""
    order = np.argsort(ILSVRC_IDS)
    rows = [(float(ILSVRC_IDS[i]), WNIDS[i], NAMES[i], "gloss", 0.0, np.empty((1, 0)), 0.0, 4.0) for i in order]
    rows.append((4.0, "n00001740", "entity", "gloss", 3.0, np.array([1.0, 2.0, 3.0]), 1.0, 0.0))
    fields = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    ]
    stream = io.BytesIO()
    savemat(stream, {"synsets": np.array(rows, dtype=[(name, object) for name in fields]).reshape(-1, 1)})  # type: ignore[arg-type]
    return stream.getvalue()


def devkit_members() -> list[tuple[str, bytes]]:
    """The two files that are read, and one that is not."""
    truth = "".join(f"{ILSVRC_IDS[label]}\n" for label in VALIDATION_LABELS)
    folder = "ILSVRC2012_devkit_t12"
    return [
        (f"{folder}/readme.txt", b"read me"),
        (f"{folder}/data/meta.mat", meta_mat()),
        (f"{folder}/data/ILSVRC2012_validation_ground_truth.txt", truth.encode()),
    ]


def write_devkit(raw_dir: Path) -> None:
    """ILSVRC2012_devkit_t12.tar.gz."""
    raw_dir.mkdir(parents=True, exist_ok=True)
    (raw_dir / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(tar_bytes(devkit_members()), mtime=0))


def write_official(raw_dir: Path, train: Images | None = None, validation: Images | None = None) -> Path:
    """The three archives."""
    train, validation = train or train_images(), validation or validation_images()
    write_devkit(raw_dir)
    tars = ((f"{wnid}.tar", class_tar(wnid, train)) for wnid in reversed(WNIDS))
    (raw_dir / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(tars))
    members = ((f"{key}.JPEG", content) for key, content in validation.items())
    (raw_dir / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(members))
    return raw_dir


def write_files(folder: Path, images: Images, suffix: str = ".JPEG") -> None:
    """Plain files."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, content in images.items():
        (folder / f"{key}{suffix}").write_bytes(content)


def write_train_folders(folder: Path, train: Images) -> None:
    """<wnid>/<image>."""
    for wnid in WNIDS:
        write_files(folder / wnid, {key: content for key, content in train.items() if key.startswith(wnid)})


def write_extracted(raw_dir: Path, is_flat: bool = False) -> Path:
    """train/<wnid>/, and val/<wnid>/ or a flat val/ with the devkit's archive."""
    write_train_folders(raw_dir / "train", train_images())
    for (key, content), label in zip(validation_images().items(), VALIDATION_LABELS, strict=True):
        write_files(raw_dir / "val" if is_flat else raw_dir / "val" / WNIDS[label], {key: content})
    if is_flat:
        write_devkit(raw_dir)
    return raw_dir


def write_extracted_with_devkit_folder(raw_dir: Path) -> Path:
    """A flat val/ beside an extracted devkit."""
    write_extracted(raw_dir, is_flat=True)
    (raw_dir / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    for name, content in devkit_members():
        (raw_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (raw_dir / name).write_bytes(content)
    return raw_dir


def write_kaggle(raw_dir: Path) -> Path:
    """ILSVRC/Data/CLS-LOC/ and the two tables."""
    write_train_folders(raw_dir / "ILSVRC/Data/CLS-LOC/train", train_images())
    write_files(raw_dir / "ILSVRC/Data/CLS-LOC/val", validation_images())
    rows = [
        f"{key},{WNIDS[label]} 85 1 499 272 {WNIDS[label]} 1 1 2 2"
        for key, label in zip(validation_images(), VALIDATION_LABELS, strict=True)
    ]
    (raw_dir / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]) + "\n")
    names = [f"{wnid} {name}" for wnid, name in zip(WNIDS, NAMES, strict=True)]
    (raw_dir / "LOC_synset_mapping.txt").write_text("\n".join(names) + "\n")
    return raw_dir


def data_config(raw_dir: Path | str, directory: Path, **changes: Any) -> DataConfig:
    """Settings for a data set of a few images."""
    values: dict[str, Any] = {
        "name": "tiny",
        "source": Source.imagenet,
        "raw_dir": str(raw_dir),
        "directory": str(directory),
        "expect": Expectation.nothing,
        "on_corrupt": Corrupt.stop,
        "images_per_shard": 5,
        "processes": 1,
    }
    return DataConfig(**(values | changes))


def config(raw_dir: Path | str, directory: Path, **changes: Any) -> Config:
    """As much of a configuration as preprocessing looks at."""
    return cast(Config, SimpleNamespace(data=data_config(raw_dir, directory, **changes)))


def content_of(directory: Path) -> dict[str, str]:
    """File -> SHA-256 of everything that has to be equal."""
    names = sorted(path for path in directory.iterdir() if path.suffix in (".tar", ".npy") or path.stem == "manifest")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


VICTIM = 57


def with_damaged_image(data_directory: Path, copy: Path) -> tuple[str, str]:
    """A copy of the data set with zeros in one image; its key and its shard."""
    shutil.copytree(data_directory, copy)
    split = open_split(copy, "train")
    entry = split.index[VICTIM]
    shard = split.shards[int(entry["shard"])].name
    with (copy / shard).open("r+b") as handle:
        handle.seek(int(entry["offset"]))
        handle.write(bytes(64))
    return split.key(VICTIM), shard
