"""The record of preprocessing: what the Data chapter of every recipe on this data set says."""

from __future__ import annotations

import hashlib
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import features

from recipe.config.identity import sha256_of, to_dict
from recipe.config.schema import DataConfig, Expectation
from recipe.data import imagenet
from recipe.data.images import FILTER, GREY, ROTATED
from recipe.data.listing import Raw, Tally
from recipe.data.merging import Merged
from recipe.data.shards import MANIFEST
from recipe.records import (
    Archive,
    LabelExample,
    LeftOut,
    PreprocessingRecord,
    Provenance,
    Setting,
    SplitFacts,
)
from recipe.run import CHECKOUT, printable

PERCENTILES = (0, 5, 50, 95, 100)
EXAMPLES_MAX = 20
SHARD_ORDER = "training images by the SHA-256 of their keys, validation images by their keys"


def record_of(
    data: DataConfig,
    settings: dict[str, Setting],
    raw: Raw,
    archives: list[Archive],
    merged: dict[str, Merged],
    provenance: Provenance,
    *,
    processes: int,
    images_per_second: float,  # of making shards, without listing and hashing
    continued_shards: int,
) -> PreprocessingRecord:
    """Everything read back from the raw listing, the shards and the manifest on disk."""
    oddities = [oddity for split in merged.values() for oddity in split.oddities]
    return PreprocessingRecord(
        config_sha256=sha256_of(settings),
        provenance=provenance,
        inputs={f"raw/{name}": split.raw_sha256 for name, split in merged.items()}
        | {archive.name: archive.sha256 for archive in archives},
        outputs=outputs(Path(data.directory), merged),
        description=to_dict(data.description),
        data_set=data.name,
        layout=raw.layout,
        raw_path=path_or_variable(Path(data.raw_dir or "."), "$RAW_DIR"),
        processed_path=path_or_variable(Path(data.directory), f"$DATA_DIR/{data.name}"),
        expectation=data.expect.value,
        is_ilsvrc2012=data.expect is Expectation.ilsvrc2012 and not any(split.rejected for split in merged.values()),
        archives=archives,
        splits={name: split_facts(split) for name, split in merged.items()},
        class_count=len(raw.class_ids),
        class_list_sha256=imagenet.class_list_sha256(raw.class_ids),
        label_convention=raw.label_convention,
        label_examples=label_examples(raw, merged["train"]),
        validation_split=raw.validation_split,
        shard_order=SHARD_ORDER,
        stored_as=stored_as(data),
        odd_images=odd_images(merged),
        odd_examples=oddities[:EXAMPLES_MAX],
        rejected=[oddity for split in merged.values() for oddity in split.rejected],
        left_out=tallies(raw.left_out),
        lost_images=tallies(raw.lost_images),
        decoded_with=f"Pillow {PIL.__version__}, {jpeg_library()}; JPEG checked by simplejpeg {version('simplejpeg')}",
        processes=processes,
        images_per_second=round(images_per_second, 1),
        continued_shards=continued_shards,
    )


def outputs(directory: Path, merged: dict[str, Merged]) -> dict[str, str]:
    """The manifest's hash (which covers the index) and that of each shard."""
    found = {"manifest": hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()}
    return found | {shard.name: shard.sha256 for split in merged.values() for shard in split.shards}


def split_facts(split: Merged) -> SplitFacts:
    """Counts and sizes of one split."""
    per_class = np.bincount(split.index["label"])
    per_class = per_class[per_class > 0]
    return SplitFacts(
        images=len(split.index),
        classes=len(per_class),
        images_per_class_min=int(per_class.min()),
        images_per_class_max=int(per_class.max()),
        raw_sha256=split.raw_sha256,
        shards=len(split.shards),
        shard_bytes=sum(shard.bytes for shard in split.shards),
        width_percentiles=percentiles(split.index["width"]),
        height_percentiles=percentiles(split.index["height"]),
        grey_images=len(split.grey_images),
    )


def percentiles(values: NDArray[np.uint32]) -> list[int]:
    """Pixels at 0, 5, 50, 95 and 100 %, each the size of a real image."""
    return [int(value) for value in np.percentile(values, PERCENTILES, method="nearest")]


def label_examples(raw: Raw, train: Merged) -> list[LabelExample]:
    """The first, the middle and the last class, each with the first of its training images."""
    labels = sorted({0, len(raw.class_ids) // 2, len(raw.class_ids) - 1})
    return [label_example(raw, train, label) for label in labels if (train.index["label"] == label).any()]


def label_example(raw: Raw, train: Merged, label: int) -> LabelExample:
    """One image of a class, to check a reading of the convention against."""
    key = min(train.keys[train.index["label"] == label])
    class_id = raw.class_ids[label]
    return LabelExample(
        key=bytes(key).decode("ascii"), index=label, class_id=class_id, name=raw.class_names.get(class_id, class_id)
    )


def odd_images(merged: dict[str, Merged]) -> dict[str, int]:
    """Kind -> count over both splits, grey and rotated images (which keep their bytes) included."""
    counts = Counter(oddity.what for split in merged.values() for oddity in split.oddities)
    counts[GREY] = sum(len(split.grey_images) for split in merged.values())
    counts[ROTATED] = sum(len(split.rotated_images) for split in merged.values())
    return {kind: count for kind, count in sorted(counts.items()) if count}


def tallies(found: dict[str, Tally]) -> dict[str, LeftOut]:
    """What was left out, as the record lists it."""
    return {name: LeftOut(count=tally.count, examples=tally.examples) for name, tally in sorted(found.items())}


def stored_as(data: DataConfig) -> str:
    """What became of the images' bytes, in words."""
    if data.resize_short_side is None:
        return "original bytes; odd images as lossless RGB PNG"
    return (
        f"training images with a short side above {data.resize_short_side} pixels resized to it ({FILTER}, "
        f"antialiased) as JPEG of quality {data.quality}; all others, and the validation set, in original "
        "bytes; odd images as lossless RGB PNG"
    )


def jpeg_library() -> str:
    """The library that Pillow decodes JPEG with."""
    name = "libjpeg-turbo" if features.check_feature("libjpeg_turbo") else "libjpeg"
    version = features.version("libjpeg_turbo") or features.version("jpg")
    return f"{name} {version}"


def path_or_variable(path: Path, variable: str) -> str:
    """A path as records may show it: relative to the checkout, or outside of it a variable."""
    absolute = path.absolute()
    return printable(str(absolute.relative_to(CHECKOUT))) if absolute.is_relative_to(CHECKOUT) else variable
