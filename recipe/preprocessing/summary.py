"""The record of preprocessing, for the Data chapter, and the printed summary."""

from __future__ import annotations

import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import features

from recipe.config.identity import sha256_of, to_dict
from recipe.config.schema import DataConfig, Expectation
from recipe.data.images import FILTER, GREY, ROTATED
from recipe.data.manifest import data_settings, manifest_sha256
from recipe.preprocessing import imagenet
from recipe.preprocessing.listing import Raw, Tally
from recipe.preprocessing.shard_writer import Merged
from recipe.run.files import CHECKOUT, printable
from recipe.run.records import Archive, LabelExample, LeftOut, PreprocessingRecord, Provenance, SplitFacts

PERCENTILES = (0, 5, 50, 95, 100)
EXAMPLES_MAX = 20
SHARD_ORDER = "training images by the SHA-256 of their keys, validation images by their keys"
PNG_GROWTH = 10  # times the bytes of the files: worth a warning


def record_of(
    data: DataConfig,
    raw: Raw,
    archives: list[Archive],
    merged: dict[str, Merged],
    provenance: Provenance,
    *,
    processes: int,
    images_per_second: float,  # of making shards, without listing and hashing
    continued_shards: int,
) -> PreprocessingRecord:
    """The record, read back from the raw listing, the shards and the manifest on disk."""
    return PreprocessingRecord(
        config_sha256=sha256_of(data_settings(data)),
        provenance=provenance,
        inputs={f"raw/{name}": split.raw_sha256 for name, split in merged.items()}
        | {archive.name: archive.sha256 for archive in archives},
        outputs={"manifest": manifest_sha256(data.directory)}
        | {shard.name: shard.sha256 for split in merged.values() for shard in split.shards},
        description=to_dict(data.description),
        data_set=data.name,
        layout=raw.layout,
        raw_path=portable(Path(data.raw_dir or "."), "$RAW_DIR"),
        processed_path=portable(Path(data.directory), f"$DATA_DIR/{data.name}"),
        expectation=data.expect.value,
        is_ilsvrc2012=is_ilsvrc2012(data, merged),
        archives=archives,
        splits={name: split_facts(split) for name, split in merged.items()},
        class_count=len(raw.class_ids),
        class_list_sha256=imagenet.class_list_sha256(raw.class_ids),
        label_convention=raw.label_convention,
        label_examples=label_examples(raw, merged["train"]),
        validation_split=raw.validation_split,
        shard_order=SHARD_ORDER,
        stored_as=stored_as(data),
        unusual_images=unusual_counts(merged),
        unusual_examples=[image for split in merged.values() for image in split.unusual.converted][:EXAMPLES_MAX],
        rejected=[image for split in merged.values() for image in split.unusual.rejected],
        left_out=tallies(raw.left_out),
        lost_images=tallies(raw.lost_images),
        decoded_with=f"Pillow {PIL.__version__}, {jpeg_library()}; JPEG checked by simplejpeg {version('simplejpeg')}",
        processes=processes,
        images_per_second=round(images_per_second, 1),
        continued_shards=continued_shards,
    )


def is_ilsvrc2012(data: DataConfig, merged: dict[str, Merged]) -> bool:
    """True if the images were checked to be ILSVRC2012 and all are stored."""
    return data.expect is Expectation.ilsvrc2012 and not any(split.unusual.rejected for split in merged.values())


def split_facts(split: Merged) -> SplitFacts:
    """Counts and sizes of one split."""
    per_class = np.bincount(split.index["label"])
    present = per_class[per_class > 0]
    return SplitFacts(
        images=len(split.index),
        classes=len(present),
        images_per_class_min=int(present.min()),
        images_per_class_max=int(present.max()),
        images_per_class=per_class.tolist(),
        raw_sha256=split.raw_sha256,
        shards=len(split.shards),
        shard_bytes=sum(shard.bytes for shard in split.shards),
        width_percentiles=percentiles(split.index["width"]),
        height_percentiles=percentiles(split.index["height"]),
        grey_images=len(split.unusual.grey),
    )


def percentiles(values: NDArray[np.uint32]) -> list[int]:
    """Pixels at 0, 5, 50, 95 and 100 %, each of an existing image."""
    return [int(value) for value in np.percentile(values, PERCENTILES, method="nearest")]


def label_examples(raw: Raw, train: Merged) -> list[LabelExample]:
    """The first, the middle and the last class, each with its first training image."""
    examples = []
    for label in sorted({0, len(raw.class_ids) // 2, len(raw.class_ids) - 1}):
        keys, class_id = train.keys[train.index["label"] == label], raw.class_ids[label]
        if len(keys):
            key, name = bytes(min(keys)).decode("ascii"), raw.class_names.get(class_id, class_id)
            examples.append(LabelExample(key=key, index=label, class_id=class_id, name=name))
    return examples


def unusual_counts(merged: dict[str, Merged]) -> dict[str, int]:
    """Kind -> count over both splits, including grayscale and rotated images, which keep their bytes."""
    counts = Counter(image.what for split in merged.values() for image in split.unusual.converted)
    counts[GREY] = sum(len(split.unusual.grey) for split in merged.values())
    counts[ROTATED] = sum(len(split.unusual.rotated) for split in merged.values())
    return {kind: count for kind, count in sorted(counts.items()) if count}


def tallies(left_out: dict[str, Tally]) -> dict[str, LeftOut]:
    """The entries of tallies in the record."""
    return {name: LeftOut(count=tally.count, examples=tally.examples) for name, tally in sorted(left_out.items())}


def stored_as(data: DataConfig) -> str:
    """The form of the stored images, in words."""
    if data.resize_short_side is None:
        return "original bytes; unusual images as lossless RGB PNG"
    return (
        f"training images with a short side above {data.resize_short_side} pixels resized to it ({FILTER}, "
        f"antialiased) as JPEG of quality {data.jpeg_quality}; all others, and the validation set, in original "
        "bytes; unusual images as lossless RGB PNG"
    )


def jpeg_library() -> str:
    """The JPEG library of Pillow."""
    name = "libjpeg-turbo" if features.check_feature("libjpeg_turbo") else "libjpeg"
    return f"{name} {features.version('libjpeg_turbo') or features.version('jpg')}"


def portable(path: Path, outside: str) -> str:
    """A path relative to the checkout. `outside` for other paths."""
    absolute = path.absolute()
    return printable(str(absolute.relative_to(CHECKOUT))) if absolute.is_relative_to(CHECKOUT) else outside


def print_summary(record: PreprocessingRecord, merged: dict[str, Merged]) -> None:
    """Print counts, and warnings about grown images and unexpected ones on ILSVRC2012."""
    images = ", ".join(f"{facts.images:,} {name}" for name, facts in record.splits.items())
    unusual = ", ".join(f"{count:,} {kind}" for kind, count in record.unusual_images.items()) or "none"
    converted = [image for split in merged.values() for image in split.unusual.converted]
    print(
        f"{record.processed_path}: {images} images; unusual: {unusual}; converted: {len(converted)}; "
        f"skipped: {len(record.rejected)}",
        file=sys.stderr,
    )
    before = sum(split.unusual.converted_bytes for split in merged.values())
    after = sum(split.unusual.png_bytes for split in merged.values())
    if after > PNG_GROWTH * before:
        print(
            f"warning: images that became lossless PNG take {after:,} bytes, {after / before:.0f} times the {before:,} "
            "of their files; data.resize_short_side stores training images as smaller JPEG",
            file=sys.stderr,
        )
    if record.is_ilsvrc2012:
        for line in imagenet.unexpected([(image.split, image.key, image.what) for image in converted]):
            print(f"unexpected on ILSVRC2012: {line}", file=sys.stderr)
