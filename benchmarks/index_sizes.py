"""Start-up time, memory and time to the first batch by the size of the index: 10,000 to 14 million images.

    python benchmarks/index_sizes.py

The index is made up over a few real bytes: every image is the same small JPEG, so that what is measured grows with the
number of images alone. Each size runs in a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "benchmarks"))
sys.path.insert(0, str(CHECKOUT))

SIZES = (10_000, 1_281_167, 14_000_000)
IMAGES_PER_SHARD = 1000


def made_up(directory: Path, images: int) -> None:
    """A data set of so many images that are all the same one."""
    import numpy as np
    from PIL import Image

    from recipe.data.manifest import Manifest, ManifestSplit
    from recipe.data.shard_writer import npy_bytes, write_shard
    from recipe.data.shards import INDEX
    from recipe.records import to_json

    stream = io.BytesIO()
    Image.effect_noise((320, 256), 60).convert("RGB").save(stream, "JPEG")
    shard, (place,) = write_shard(directory / "train-00000.tar", [("0", "jpg", stream.getvalue(), 0)])
    count = -(-images // IMAGES_PER_SHARD)
    index = np.zeros(images, INDEX)
    index["shard"], index["label"] = np.arange(images) // IMAGES_PER_SHARD, np.arange(images) % 1000
    index["offset"], index["bytes"], index["width"], index["height"] = place.offset, place.bytes, 320, 256
    keys = np.full(images, b"n01440764_10026", dtype="S15")
    (directory / "train.index.npy").write_bytes(npy_bytes(index))
    (directory / "train.keys.npy").write_bytes(npy_bytes(keys))
    shards = []
    for number in range(count):
        name = f"train-{number:05d}.tar"
        if number:
            (directory / name).symlink_to(directory / shard.name)
        shards.append(type(shard)(name=name, images=1000, bytes=shard.bytes, sha256=shard.sha256))
    split = ManifestSplit(
        images=images,
        index_sha256=hashlib.sha256((directory / "train.index.npy").read_bytes()).hexdigest(),
        keys_sha256=hashlib.sha256((directory / "train.keys.npy").read_bytes()).hexdigest(),
        shards=shards,
        grey_images=[],
        rotated_images=[],
    )
    manifest = Manifest(
        name="made-up",
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


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(directory: Path, processes: int) -> dict[str, float]:
    """One start: open, the order of an epoch, the first batch, then the facts of the record."""
    import torch
    from loading import composed

    from recipe.data.loading import BatchLayout, TrainingBatches
    from recipe.data.processes import open_decoding
    from recipe.data.shards import open_split
    from recipe.distributed import World
    from recipe.training.augmentation import build_augmentation

    config = composed(f"trainer.data_processes={processes}", "trainer.data_threads=2")
    world = World(0, 1, 0, 1, torch.device("cpu"), "none")
    floor = peak_mib()
    clocks = [(time.perf_counter(), time.process_time())]
    split = open_split(directory, "train")
    clocks.append((time.perf_counter(), time.process_time()))
    with open_decoding([split], config.data.decoder, config.trainer, world) as (decoding,):
        batches = TrainingBatches(decoding, build_augmentation(config.augmentation, 0), BatchLayout(256, 1, 1), 0, 0)
        next(iter(batches.epoch(0)))
        clocks.append((time.perf_counter(), time.process_time()))
        peak = peak_mib()
        batches.facts()
        clocks.append((time.perf_counter(), time.process_time()))
    seconds = [later[0] - earlier[0] for earlier, later in itertools.pairwise(clocks)]
    busy = [later[1] - earlier[1] for earlier, later in itertools.pairwise(clocks)]
    return {
        "open_seconds": seconds[0],
        "first_batch_seconds": seconds[1],
        "facts_seconds": seconds[2],
        "open_processor_seconds": busy[0],
        "first_batch_processor_seconds": busy[1],
        "facts_processor_seconds": busy[2],
        "memory_above_imports_mib": peak - floor,
        "with_facts_mib": peak_mib() - floor,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--keep", help="write the JSON here")
    arguments = parser.parse_args()
    if arguments.role:
        print(json.dumps(measured(Path(arguments.role[0]), arguments.processes)))
        return
    rows: list[dict[str, Any]] = []
    for images in SIZES:
        with tempfile.TemporaryDirectory() as directory:
            made_up(Path(directory), images)
            words = [sys.executable, __file__, directory, "--processes", str(arguments.processes)]
            output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        rows.append({"images": images, **{name: round(value, 3) for name, value in json.loads(output).items()}})
        print(rows[-1], flush=True)
    if arguments.keep:
        Path(arguments.keep).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
