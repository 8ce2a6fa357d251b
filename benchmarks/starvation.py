"""What decoding does to a thread that launches work: threads beside it, or processes.

    python benchmarks/starvation.py --images DIR

The main thread does what training on a GPU does there: many tiny operations of torch, one after the other, each of
which lets go of Python's lock. It is blocked while another thread has the lock; the kernel tells this time from time on
a core and from time waiting for a core, so that a busy machine does not blur it. Meanwhile images are decoded as fast
as can be. Settings take turns; printed are the main thread's operations per second, beside those without any decoding.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "benchmarks"))
sys.path.insert(0, str(CHECKOUT))

import torch  # noqa: E402
from loading import composed  # noqa: E402
from PIL import Image  # noqa: E402

from recipe.data.loading import BatchLayout, TrainingBatches  # noqa: E402
from recipe.data.pipeline import preprocess  # noqa: E402
from recipe.data.processes import open_decoding  # noqa: E402
from recipe.data.shards import open_split  # noqa: E402
from recipe.distributed import World  # noqa: E402
from recipe.training.augmentation import build_augmentation  # noqa: E402

SIDES = {"32-to-128": (32, 128), "256-to-224": (256, 224)}  # short side of the files, pixels of the crop
ALONE = World(0, 1, 0, 1, torch.device("cpu"), "none")
BATCH = 64


def prepared(images: Path, work: Path, side: int) -> Path:
    """Shards of the images, made smaller."""
    sources = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))[:256]
    for number, source in enumerate(sources):
        with Image.open(source) as image:
            scale = side / min(image.size)
            size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
            small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        stream = io.BytesIO()
        small.save(stream, "JPEG", quality=90)
        for split in ("train", *(["val"] if number < 4 else [])):
            target = work / f"raw{side}" / split / f"class{number % 2}" / f"{number:04d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(stream.getvalue())
    words = [f"data.raw_dir={work / f'raw{side}'}", f"data.directory={work / str(side)}", f"data.name=of{side}"]
    preprocess(composed("data=folder", *words))
    return work / str(side)


@contextmanager
def decoding(directory: Path, pixels: int, threads: int, processes: int) -> Iterator[Iterator[Any]]:
    """Endless batches."""
    words = [
        f"trainer.data_processes={processes}",
        f"trainer.data_threads={threads}",
        f"augmentation.crop_pixels={pixels}",
    ]
    config = composed(*words)
    splits = [open_split(directory, "train")]
    with open_decoding(splits, config.data.decoder, config.trainer, ALONE) as (made,):
        batches = TrainingBatches(made, build_augmentation(config.augmentation, 0), BatchLayout(BATCH, 1, 1), 0, 0)
        yield itertools.chain.from_iterable(batches.epoch(number) for number in itertools.count())


def ran_and_queued_seconds() -> tuple[float, float]:
    """This thread's time on a core, and its time waiting for one."""
    ran, queued, _ = map(int, Path("/proc/thread-self/schedstat").read_text().split())
    return ran / 1e9, queued / 1e9


def launches(batches: Iterator[Any] | None, seconds: float) -> dict[str, float]:
    """Tiny operations of the main thread, and images meanwhile: a batch is taken when so much work was done."""
    number, images, operations, waited = torch.zeros(8), 0, 0, 0.0
    began, before_all = time.perf_counter(), ran_and_queued_seconds()
    blocked_in_waiting = 0.0
    while time.perf_counter() - began < seconds:
        for _ in range(2000):
            number.add_(1)
        operations += 2000
        if batches is not None:
            before, clocks = time.perf_counter(), ran_and_queued_seconds()
            images += len(next(batches)[0].images)
            took = time.perf_counter() - before
            waited += took
            blocked_in_waiting += took - sum(ran_and_queued_seconds()) + sum(clocks)
    elapsed = time.perf_counter() - began - waited
    ran, queued = (after - before for after, before in zip(ran_and_queued_seconds(), before_all, strict=True))
    blocked = max(0.0, elapsed + waited - ran - queued - blocked_in_waiting)
    return {
        "operations_per_second": operations / elapsed,
        "images_per_second": images / (elapsed + waited),
        "blocked": blocked / (blocked + ran),
        "waited": waited / (elapsed + waited),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--threads", default="1,2,4,8,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--keep", help="write the JSON here")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.threads.split(",")]
    settings = [(count, processes) for count in counts for processes in (0, -(-count // 2))]
    result: dict[str, Any] = {"load": os.getloadavg(), "rounds": arguments.rounds, "kinds": {}}
    with tempfile.TemporaryDirectory() as work:
        for kind, (side, pixels) in SIDES.items():
            directory = prepared(Path(arguments.images), Path(work), side)
            found: dict[str, list[dict[str, float]]] = {}
            for _ in range(arguments.rounds):
                found.setdefault("nothing", []).append(launches(None, arguments.seconds))
                for threads, processes in settings:
                    name = f"{threads} threads" + (f" in {processes} processes" if processes else " of this process")
                    with decoding(directory, pixels, threads, processes) as batches:
                        next(batches)
                        found.setdefault(name, []).append(launches(batches, arguments.seconds))
            base = statistics.median(row["operations_per_second"] for row in found["nothing"])
            result["kinds"][kind] = found
            print(f"{kind}: alone {base:,.0f} operations/s")
            for name, rows in found.items():
                mid = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
                share = [row["operations_per_second"] / base for row in rows]
                print(
                    f"  {name:30} {mid['operations_per_second'] / base:6.1%} ({min(share):.1%} to {max(share):.1%})"
                    f"  blocked {mid['blocked']:5.1%}  {mid['images_per_second']:6,.0f} images/s",
                    flush=True,
                )
    if arguments.keep:
        Path(arguments.keep).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
