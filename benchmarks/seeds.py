"""Trains many seeds of one small recipe, sound ones and faulty ones, and keeps how each went as one line of JSON.

`python benchmarks/seeds.py IMAGES WORK` fills WORK/rows.jsonl; IMAGES is an archive or a folder that holds CIFAR-10 as
`train/<class>/<image>` and `val/<class>/<image>`. A run takes seconds on one thread. What is killed continues: a run
that left its line is not trained again. Two processes at most, at low priority.

Half of the faults are settings, the others are done to the data or to the code; the table of what `watch` sees takes
each as code that does not do what its configuration says, since another configuration would be refused by name.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))

TRAIN_PER_CLASS, VALIDATION_PER_CLASS = 60, 30
WRONG_LABELS_OF_TEN = 1
CLEAN_SEEDS, FAULT_SEEDS = 80, 3
FIRST_FAULT_SEED = 1000
WORDS = [
    "experiment=smoke",
    "data=folder",
    "data.name=cifar10_subset",
    "data.mean=[0.4914,0.4822,0.4465]",
    "data.std=[0.2470,0.2435,0.2616]",
    "optimization.epochs=10",
    "optimization.batch_size=30",
    "optimization.learning_rate=0.1",
    "optimization.label_smoothing=0.0",
    "optimization.warmup_epochs=2",
    "augmentation.crop_pixels=12",
    "augmentation.scale_min=0.35",
    "evaluation.resize_pixels=12",
    "evaluation.crop_pixels=12",
    "evaluation.batch_size=300",
    "trainer.torch_threads=1",
    "loader.threads=1",
    "trainer.keep_checkpoints=1",
]


@dataclass(frozen=True)
class Fault:
    """What is wrong with a run: other settings, other data, or other code."""

    words: tuple[str, ...] = ()
    data: str = "data"  # the folder of processed images
    ends_at: float | None = None  # share of the steps after which the learning rate stays at its end


FAULTS = {
    "learning rate x 10": Fault(("optimization.learning_rate=1.0",)),
    "learning rate x 2": Fault(("optimization.learning_rate=0.2",)),
    "learning rate / 10": Fault(("optimization.learning_rate=0.01",)),
    "weight decay x 100": Fault(("optimization.weight_decay=0.005",)),
    "neither crop nor flip": Fault(
        (
            *("augmentation.scale_min=1.0", "augmentation.ratio_min=1.0", "augmentation.ratio_max=1.0"),
            "augmentation.flip_probability=0.0",
        )
    ),
    "mean and std swapped": Fault(("data.mean=[0.2470,0.2435,0.2616]", "data.std=[0.4914,0.4822,0.4465]")),
    "labels + 1 for a tenth of the images": Fault(data="wrong"),
    "no warm-up": Fault(("optimization.warmup_epochs=0",)),
    "momentum 0": Fault(("optimization.momentum=0.0",)),
    "label smoothing 0.5": Fault(("optimization.label_smoothing=0.5",)),
    "schedule ends after three quarters": Fault(ends_at=0.75),
}


@dataclass(frozen=True)
class Job:
    """One run to train; `fault` names an entry of `FAULTS`, None is the sound recipe."""

    seed: int
    fault: str | None = None

    @property
    def name(self) -> str:
        """Tells it from all others."""
        return f"{self.fault or 'clean'}, seed {self.seed}"


@dataclass
class Place:
    """The working directory."""

    root: Path
    rows: Path = field(init=False)

    def __post_init__(self) -> None:
        self.rows = self.root / "rows.jsonl"

    def done(self) -> set[str]:
        """The names of the runs that left their line."""
        if not self.rows.exists():
            return set()
        return {json.loads(line)["name"] for line in self.rows.read_text().splitlines()}


def main() -> None:
    """Prepare the images once, then train whatever is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="a zip archive or a folder")
    parser.add_argument("work", type=Path, help="working directory; rows.jsonl in it is what comes out")
    parser.add_argument("--workers", type=int, choices=(1, 2), default=2)
    parser.add_argument("--clean-seeds", type=int, default=CLEAN_SEEDS)
    parser.add_argument("--fault-seeds", type=int, default=FAULT_SEEDS)
    arguments = parser.parse_args()
    place = Place(arguments.work.resolve())
    images = arguments.images.resolve()
    os.nice(10)
    prepare(images, place)
    done = place.done()
    jobs = [job for job in all_jobs(arguments.clean_seeds, arguments.fault_seeds) if job.name not in done]
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        futures = [pool.submit(trained, job, place.root) for job in jobs]
        for count, future in enumerate(as_completed(futures), start=1):
            line = future.result()
            with place.rows.open("a") as handle:
                handle.write(json.dumps(line) + "\n")
            print(f"{count}/{len(jobs)}  {line['name']}  {line['seconds']} s", flush=True)


def all_jobs(clean_seeds: int, fault_seeds: int) -> list[Job]:
    """Sound and faulty runs by turns, so that a part of them is a fair part."""
    clean = [Job(seed) for seed in range(clean_seeds)]
    faulty = [Job(FIRST_FAULT_SEED + seed, fault) for seed in range(fault_seeds) for fault in FAULTS]
    spread = [(place / max(1, len(jobs)), job) for jobs in (clean, faulty) for place, job in enumerate(jobs)]
    return [job for _, job in sorted(spread, key=lambda entry: entry[0])]


def prepare(images: Path, place: Place) -> None:
    """Two processed data sets: the images as they are, and with a tenth of the training labels one class further."""
    for name, wrong in (("data", 0), ("wrong", WRONG_LABELS_OF_TEN)):
        if (place.root / name).exists():
            continue
        shutil.rmtree(place.root / f"{name}-raw", ignore_errors=True)
        subset(images, place.root / f"{name}-raw", wrong)
        with inside(place.root):
            from recipe.preprocessing.pipeline import preprocess

            preprocess(configuration((), place.root, name))


def subset(images: Path, target: Path, wrong_of_ten: int) -> None:
    """The first images of every class by name."""
    counts = {"train": TRAIN_PER_CLASS, "val": VALIDATION_PER_CLASS}
    files = sorted(members(images), key=lambda member: member[0])
    classes = sorted({name.parts[-2] for name, _ in files})
    taken: dict[tuple[str, str], int] = {}
    for name, read in files:
        split, class_name = name.parts[-3:-1]
        number = taken.get((split, class_name), 0)
        if split not in counts or number >= counts[split]:
            continue
        taken[split, class_name] = number + 1
        is_wrong = split == "train" and number % 10 < wrong_of_ten
        label = classes[(classes.index(class_name) + is_wrong) % len(classes)]
        folder = target / split / label
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{class_name}-{name.name}").write_bytes(read())


def members(images: Path) -> Iterator[tuple[PurePosixPath, Callable[[], bytes]]]:
    """Every image file by its path, with a function that reads it."""
    if images.is_dir():
        for file in images.rglob("*.*"):
            yield PurePosixPath(file.relative_to(images.parent)), file.read_bytes
        return
    archive = zipfile.ZipFile(images)
    for member in archive.namelist():
        if PurePosixPath(member).suffix:
            yield PurePosixPath(member), lambda member=member: archive.read(member)  # type: ignore[misc]


@cache
def configuration(words: tuple[str, ...], root: Path, data: str) -> Any:
    """The typed configuration of seed 0 on one of the processed data sets."""
    from hydra import compose, initialize_config_dir

    from recipe.config.compose import to_config

    places = [f"data.directory={root / data}", f"data.raw_dir={root / f'{data}-raw'}", "run_dir=unused"]
    with initialize_config_dir(version_base="1.3", config_dir=str(CHECKOUT / "conf")):
        return to_config(compose("config", [*WORDS, *words, *places]))


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in another directory: the journal of all runs goes there."""
    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def trained(job: Job, root: Path) -> dict[str, Any]:
    """Train one run in this process and return its line; the run itself is removed."""
    from recipe.errors import NonFiniteError
    from recipe.run.directory import Run
    from recipe.training.loop import train

    fault = FAULTS[job.fault] if job.fault else Fault()
    run = Run(root / f"run-{hashlib.sha256(job.name.encode()).hexdigest()[:12]}")
    shutil.rmtree(run.directory, ignore_errors=True)
    record, before = None, (time.perf_counter(), time.process_time())
    config = copy.deepcopy(configuration(fault.words, root, fault.data))
    config.seed, config.run_dir = job.seed, run.directory.name
    with inside(root), silenced(), ending_early(fault.ends_at), suppress(NonFiniteError):  # its rows say where it ended
        record = train(config)
    rows = run.metric_rows()
    shutil.rmtree(run.directory)
    return {
        "name": job.name,
        "fault": job.fault,
        "seed": job.seed,
        "recipe_id": config.pinned.recipe_id,
        "weights_sha256": record.outputs["weights"] if record else None,
        "seconds": round(time.perf_counter() - before[0], 1),
        "processor_seconds": round(time.process_time() - before[1], 1),
        "rows": [{name: row[name] for name in KEPT} for row in rows],
    }


KEPT = ("split", "epoch", "step", "images_seen", "loss", "top1_accuracy", "top5_accuracy", "learning_rate")


@contextmanager
def silenced() -> Iterator[None]:
    """Without the lines for a person."""
    with open(os.devnull, "w") as nowhere:
        before, sys.stdout = sys.stdout, nowhere
        try:
            yield
        finally:
            sys.stdout = before


@contextmanager
def ending_early(share: float | None) -> Iterator[None]:
    """A schedule that is over after this share of the steps."""
    from recipe.training import build

    true = build.build_schedule

    def early(settings: Any, steps_per_epoch: int) -> Any:
        whole = true(settings, steps_per_epoch)
        last = round(whole.steps * (share or 1))
        shortened = replace(whole, steps=last)

        class Ended:
            def __call__(self, step: int) -> float:
                return float(shortened(min(step, last)))

            def facts(self) -> Any:
                return whole.facts()

        return Ended()

    build.build_schedule = early if share else true
    try:
        yield
    finally:
        build.build_schedule = true


if __name__ == "__main__":
    main()
