"""Preprocessing: raw images -> shards, index, manifest and the record of the Data chapter.

    list the raw images -> check them -> assign them to shards -> make the shards in parallel
    -> merge their notes into index, manifest and record

Several processes, of one node or many, can share the shards: `sharing`.

The result depends on the raw images and the settings only, not on the number of processes, their order or
interruptions: the images of a shard are fixed before any worker starts, and a shard gets its name only when complete.
Training images are assigned to shards in the order of the SHA-256 of their keys, so that shards read in sequence have
well-mixed classes. Validation images stay sorted.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import PIL
from PIL import features

from recipe.config.identity import differences, sha256_of
from recipe.config.schema import Config, Corrupt, DataConfig, Expectation, Source
from recipe.data.images import Rules
from recipe.data.manifest import (
    MANIFEST,
    RECORD,
    Manifest,
    ManifestSplit,
    data_settings,
    read_manifest,
    read_record,
)
from recipe.data.shards import SPLITS, problems, size_of
from recipe.errors import UserError
from recipe.preprocessing import imagenet
from recipe.preprocessing.archives import digests
from recipe.preprocessing.folders import look_alike_lines
from recipe.preprocessing.ilsvrc import check_ilsvrc2012, check_published_md5
from recipe.preprocessing.listing import (
    Raw,
    Rows,
    folder_entries,
    in_parts,
    left_out_in_words,
    listing_sha256,
    loss_lines,
)
from recipe.preprocessing.shard_writer import (
    WORK,
    Merged,
    Note,
    Part,
    RawReader,
    ShardMaker,
    Task,
    WriterSettings,
    finished,
    merge_parts,
    npy_bytes,
    part_of,
    run_task,
    start_worker,
)
from recipe.preprocessing.sharing import Plan, Team, check_same_plan
from recipe.preprocessing.sources import check_raw_dir, find_raw, read_errors
from recipe.preprocessing.summary import is_ilsvrc2012, print_summary, record_of
from recipe.run.environment import machine, usable_cores
from recipe.run.files import disk_errors, display_path, exclusive_lock, write_atomically
from recipe.run.launcher import ALONE, Launch
from recipe.run.progress import ProgressPrinter
from recipe.run.provenance import Stage
from recipe.run.records import Archive, ClassName, PreprocessingRecord, to_json
from recipe.run.terminal import blocked, interruptible, start_resource_tracker

LOCK = "lock"
DECODERS = ("jpg", "zlib", "webp", "libtiff", "avif", "jpg_2000")  # features of Pillow. None for a missing one
SHARD_FILE = re.compile(r"^(train|val)-\d{5,}\.tar$")
VISIBLE_POLL_SECONDS = 1.0
VISIBLE_SECONDS = 180.0  # a network file system may show a new file a minute later


def preprocess(config: Config, launch: Launch = ALONE) -> PreprocessingRecord:
    """Make the data set of `config.data`, or continue an interrupted run, or return the record of a finished one.

    `launch` is the place of this process among those that share the shards. Each returns when all are finished.
    """
    data, directory = config.data, Path(config.data.directory)
    with interruptible(), Team(launch) as team:
        if not launch.is_rank0:
            return assist(data, directory, team)
        record = finished_preprocessing(data, directory)
        if record is None:
            check_directory(directory, check_raw_dir(data), data)
            with sole_writer(directory):
                record = finished_preprocessing(data, directory)  # another process may have finished meanwhile
                if record is None:
                    stage, raw = Stage(directory), find_raw(data)
                    record = repair(data, directory, raw) or make(data, directory, raw, stage, team)
        team.end(record)
        return record


def finished_preprocessing(data: DataConfig, directory: Path) -> PreprocessingRecord | None:
    """The record of a finished data set with all its files. Raises `UserError` for one of other settings."""
    if not (directory / MANIFEST).is_file():
        return None
    manifest = read_manifest(directory)
    changed = differences(manifest.settings, data_settings(data))
    if changed:
        raise UserError(
            f"{display_path(directory)} has a finished data set of other settings ({'; '.join(changed)}); "
            "give another data.directory or delete that one"
        )
    check_same_listing(data, directory, manifest)
    for problem in (problem for split in manifest.splits for problem in problems(directory, manifest, split)):
        print(f"{problem}; it will be made again", file=sys.stderr)
        return None
    try:
        record = read_record(directory)
    except UserError as error:
        print(f"{error}; it will be made again", file=sys.stderr)
        return None
    images = ", ".join(f"{split.images:,} {name}" for name, split in manifest.splits.items())
    print(f"{display_path(directory)} is finished ({images} images): nothing to do", file=sys.stderr)
    return record


def check_same_listing(data: DataConfig, directory: Path, manifest: Manifest) -> None:
    """Raise `UserError` if the raw folder of a finished data set has changed.

    Other sources are fixed sets. Missing raw images, such as those of an unmounted disk, are not compared.
    """
    if data.source is not Source.folder or data.raw_dir is None:
        return
    raw_dir = Path(data.raw_dir)
    with read_errors(raw_dir):
        if not (raw_dir.is_dir() and folder_entries(raw_dir)):
            return
    rows = find_raw(data).rows
    if listing_sha256(rows) == manifest.listing_sha256:
        return
    before = sum(split.images for split in manifest.splits.values()) + len(manifest.rejected)
    now = sum(len(split) for split in rows.values())
    what = f"{before:,} images, now there are {now:,}"
    raise UserError(
        f"{display_path(directory)} was made when data.raw_dir={display_path(raw_dir)} had "
        f"{what if now != before else f'other images (as many as now: {now:,})'}; "
        "give another data.name or data.directory, or delete that one"
    )


def check_directory(directory: Path, raw_dir: Path, data: DataConfig) -> None:
    """Raise `UserError` unless the data directory is new, empty or our own, since leftover files are removed."""
    processed, raw = directory.absolute().resolve(), raw_dir.absolute().resolve()
    if raw.is_relative_to(processed) or (data.source is Source.folder and processed.is_relative_to(raw)):
        raise UserError(
            f"data.directory={display_path(directory)} and data.raw_dir={display_path(raw_dir)} are inside "
            "one another; give data.directory= a place of its own"
        )
    names = {entry.name for entry in folder_entries(directory)} if directory.is_dir() else set()
    if names - {LOCK} and not names & {MANIFEST, RECORD, WORK}:
        raise UserError(
            f"data.directory={display_path(directory)} has files that preprocess.py did not write, and some of them "
            "could be lost; give a new or an empty folder"
        )


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Lock the data directory, and remove partial files of a killed process."""
    with disk_errors(directory):
        (directory / WORK).mkdir(parents=True, exist_ok=True)
    with exclusive_lock(directory / LOCK, "being written", "data.directory"):
        with disk_errors(directory):
            for leftover in (*directory.glob("*.tmp-*"), *(directory / WORK).glob("*.tmp-*")):
                leftover.unlink(missing_ok=True)
        yield


def make(data: DataConfig, directory: Path, raw: Raw, stage: Stage, team: Team) -> PreprocessingRecord:
    """Make the data set, from the checks of the raw images to the record."""
    archives = check_raw(data, directory, raw)
    archive_hashes = [archive.sha256 for archive in archives]
    tasks = plan_shards(data, raw, archive_hashes)
    remove_strays(directory, {task.name for task in tasks})
    team.announce(plan_of(data, tasks, archive_hashes))
    started = time.perf_counter()
    parts = kept_parts(directory, tasks, team)
    total = sum(len(task.rows) for task in tasks)
    with ProgressPrinter("making shards", total, "images", done=team.images) as progress:
        parts, counts = make_share(data, directory, raw, tasks, parts, team, progress.reach)
        processes, fresh_images, continued_shards = team.sum_counts(counts, progress.reach)
    parts |= {task.name: await_part(directory, task) for task in tasks if task.name not in parts}
    seconds = time.perf_counter() - started
    merged = {name: merge_parts([parts[task.name] for task in tasks if task.split == name]) for name in SPLITS}
    check_images_left(raw, merged)
    write_data_set(data, directory, raw, merged)
    record = record_of(
        data,
        raw,
        archives,
        merged,
        stage.finish(machine()),
        processes=processes,
        images_per_second=fresh_images / seconds,
        continued_shards=continued_shards,
    )
    write_atomically(directory / RECORD, to_json(record))
    shutil.rmtree(directory / WORK)
    print_summary(record, merged)
    return record


def assist(data: DataConfig, directory: Path, team: Team) -> PreprocessingRecord:
    """Make the share of a rank other than 0, and wait until rank 0 has merged all."""
    plan, counts = team.await_plan(), (0, 0, 0)
    if plan is not None:
        where = display_path(directory)
        await_visible(lambda: (directory / WORK).is_dir(), f"rank 0 writes to another folder than {where} of this rank")
        raw = find_raw(data)  # after rank 0, which may draw or download it
        raw.verified = verified_names(hashed_archives(data, directory, raw))
        tasks = plan_shards(data, raw, plan.archives)
        check_same_plan(team.rank, plan, plan_of(data, tasks, plan.archives))
        parts = kept_parts(directory, tasks, team)
        _, counts = make_share(data, directory, raw, tasks, parts, team, on_images=lambda images: None)
    return team.await_end(counts)


def kept_parts(directory: Path, tasks: list[Task], team: Team) -> dict[str, Part]:
    """The shards of this process that an earlier launch finished, by name."""
    share = team.share_of(tasks)
    parts = {task.name: part_of(task, note) for task in share if (note := finished(directory, task)) is not None}
    team.count_images(sum(len(part.rows) for part in parts.values()))
    return parts


def make_share(
    data: DataConfig,
    directory: Path,
    raw: Raw,
    tasks: list[Task],
    kept: dict[str, Part],
    team: Team,
    on_images: Callable[[int], None],
) -> tuple[dict[str, Part], tuple[int, int, int]]:
    """Make the missing shards of this process. Returns all of its shards by name, and its counts.

    `on_images` receives the number of images that all processes have finished. The counts are processes, images in new
    shards, and kept shards.
    """
    missing = [task for task in team.share_of(tasks) if task.name not in kept]
    processes = process_count(data, missing, team.on_this_node)

    def count(images: int) -> None:
        on_images(team.count_images(images))

    fresh = make_shards(writer_settings(data, directory, raw), missing, processes, count, team.check)
    return kept | fresh, (processes, sum(len(part.rows) for part in fresh.values()), len(kept))


def await_part(directory: Path, task: Task) -> Part:
    """Wait for a shard of another process."""
    problem = f"{task.name} was made by another process but is not in {display_path(directory)}"
    await_visible(lambda: finished(directory, task) is not None, problem)
    note = finished(directory, task)
    assert note is not None
    return part_of(task, note)


def await_visible(is_visible: Callable[[], bool], problem: str) -> None:
    """Wait for a file of another process: a network file system may show it later."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not is_visible():
        if time.monotonic() > deadline:
            raise UserError(f"{problem}: give all processes the same folder, and run the same command to continue")
        time.sleep(VISIBLE_POLL_SECONDS)


def repair(data: DataConfig, directory: Path, raw: Raw) -> PreprocessingRecord | None:
    """Make missing or cut shards of a finished data set again. None if other files are missing."""
    try:
        splits, record = read_manifest(directory).splits.values(), read_record(directory)
    except UserError:
        return None
    raw.verified = verified_names(record.archives)
    shards = {shard.name: shard for split in splits for shard in split.shards}
    tasks = plan_shards(data, raw, [])
    if {task.name for task in tasks} != set(shards):
        return None
    damaged = [task for task in tasks if size_of(directory / task.name) != shards[task.name].bytes]
    if not damaged:
        return None
    # In the work folder: a shard with another hash than the manifest's must not get its name.
    settings, processes = writer_settings(data, directory / WORK, raw), process_count(data, damaged)
    with ProgressPrinter("making shards", sum(len(task.rows) for task in damaged), "images") as progress:
        parts = make_shards(settings, damaged, processes, progress.add)
    wrong = sorted(name for name, part in parts.items() if part.shard != shards[name])
    with disk_errors(directory):
        for name in parts.keys() - wrong:
            (directory / WORK / name).replace(directory / name)
        shutil.rmtree(directory / WORK)
    if wrong:
        raise UserError(
            f"{wrong[0]} was made again with other bytes: the raw images or Pillow changed; delete "
            f"{display_path(directory / MANIFEST)} to make the data set again"
        )
    return finished_preprocessing(data, directory)


def check_raw(data: DataConfig, directory: Path, raw: Raw) -> list[Archive]:
    """Print the listing and compare it with `data.expect`, quick checks first. Returns archives with hashes."""
    print(listing_line(raw), *loss_lines(raw), *look_alike_lines(raw.class_ids), sep="\n", file=sys.stderr)
    if data.expect is Expectation.ilsvrc2012:
        check_ilsvrc2012(raw)
    archives = hashed_archives(data, directory, raw)
    if data.expect is Expectation.ilsvrc2012:
        check_published_md5(archives)
    raw.verified = verified_names(archives)
    return archives


def hashed_archives(data: DataConfig, directory: Path, raw: Raw) -> list[Archive]:
    """The archives with their hashes, cached in the data directory."""
    published = {} if data.source is Source.demo else imagenet.PUBLISHED_MD5  # the demo has the same names
    with read_errors(check_raw_dir(data)):
        return digests(raw.archives, published, directory / WORK / "archives.json")


def verified_names(archives: list[Archive]) -> set[str]:
    """Names of archives with the published checksum: damage in them is accepted."""
    return {archive.name for archive in archives if archive.is_published_md5}


def listing_line(raw: Raw) -> str:
    """A line with the layout, the number of images and unused files."""
    images = ", ".join(f"{len(rows):,} {name}" for name, rows in raw.rows.items())
    left_out = f"; left out: {left_out_in_words(raw.left_out)}" if raw.left_out else ""
    return f"found {raw.layout}: {images} images of {len(raw.class_ids):,} classes{left_out}"


def plan_shards(data: DataConfig, raw: Raw, archive_hashes: list[str]) -> list[Task]:
    """The shards with their images. The hash of a plan changes with everything that could change the shard's bytes."""
    versions = [PIL.__version__, version("simplejpeg"), *map(features.version, DECODERS)]
    shaping = sha256_of([data_settings(data), versions, archive_hashes])
    tasks = []
    for split in SPLITS:
        rows = raw.rows[split] if split == "val" else in_hash_order(raw.rows[split])
        for number, first in enumerate(range(0, len(rows), data.images_per_shard)):
            part = rows[first : first + data.images_per_shard]
            plan = hashlib.sha256(shaping.encode() + repr(part.dtype).encode() + part.tobytes()).hexdigest()
            tasks.append(Task(split, number, part, plan))
    return tasks


def plan_of(data: DataConfig, tasks: list[Task], archive_hashes: list[str]) -> Plan:
    """The plan, on which all processes must agree."""
    shards = sha256_of([task.plan_sha256 for task in tasks])
    return Plan(settings=data_settings(data), archives=archive_hashes, shards_sha256=shards)


def in_hash_order(rows: Rows) -> Rows:
    """Rows in the order of the SHA-256 of their keys: well mixed and reproducible."""
    parts = [b"".join(hashlib.sha256(key).digest() for key in part.tolist()) for part in in_parts(rows["key"])]
    words = np.frombuffer(b"".join(parts), dtype=">u8").reshape(-1, 4)
    return rows[np.lexsort(words.T[::-1])]


def writer_settings(data: DataConfig, directory: Path, raw: Raw) -> WriterSettings:
    """The settings of workers. Only training images are resized: the metric is over original images."""
    train = Rules(
        keeps_png=raw.keeps_png,
        resize_short_side=data.resize_short_side,
        quality=data.jpeg_quality,
        max_pixels=data.max_pixels,
        is_verified=imagenet.TRAIN_ARCHIVE in raw.verified,
    )
    validation = replace(train, resize_short_side=None, is_verified=imagenet.VALIDATION_ARCHIVE in raw.verified)
    return WriterSettings(
        directory,
        [path.absolute() for path in raw.containers],
        {"train": train, "val": validation},
        skips_corrupt=data.on_corrupt is Corrupt.skip,
    )


def process_count(data: DataConfig, tasks: list[Task], ranks_on_node: int = 1) -> int:
    """The number of worker processes: the configured one, else one per core, at most one per shard. 0: this process.

    The ranks of this launch on this node share its cores.
    """
    if data.processes == 0:
        return 0
    return max(1, min(data.processes or usable_cores() // ranks_on_node, len(tasks)))


def make_shards(
    settings: WriterSettings,
    tasks: list[Task],
    processes: int,
    on_images: Callable[[int], None],
    check: Callable[[], None] = lambda: None,
) -> dict[str, Part]:
    """Make shards in worker processes. Returns them by name. The first failure stops all.

    `on_images` receives the number of images of each finished shard. `check` is called often and may raise.
    """
    parts: dict[str, Part] = {}

    def add(task: Task, note: Note) -> None:
        parts[task.name] = part_of(task, note)
        on_images(len(task.rows))

    def should_stop() -> bool:
        check()
        return False

    if not tasks or processes == 0:
        reader = RawReader(settings.containers)
        for task in tasks:
            add(task, ShardMaker(task, settings, reader, should_stop).make())
        return parts
    start_resource_tracker()
    context = get_context("spawn")
    stop = context.Event()
    executor = ProcessPoolExecutor(processes, context, start_worker, (settings, stop))
    try:
        with blocked((signal.SIGINT, signal.SIGHUP)):  # of a terminal: this process stops the workers
            futures = {executor.submit(run_task, task): task for task in tasks}
        while futures:
            for future in wait(futures, VISIBLE_POLL_SECONDS, FIRST_COMPLETED).done:
                add(futures.pop(future), future.result())  # drops the future, which keeps its note in memory
            check()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps because memory ran out; run the same command again to continue, "
            "with fewer data.processes if it happens again"
        ) from error
    finally:
        stop.set()  # workers check it between images
        executor.shutdown(wait=True, cancel_futures=True)
    return parts


def remove_strays(directory: Path, wanted: set[str]) -> None:
    """Remove shards of an interrupted run with other settings that this run does not overwrite."""
    with disk_errors(directory):
        for path in directory.iterdir():
            if SHARD_FILE.match(path.name) and path.name not in wanted:
                path.unlink()


def check_images_left(raw: Raw, merged: dict[str, Merged]) -> None:
    """Raise `UserError` if data.on_corrupt=skip removed a split or all training images of a class."""
    for name, split in merged.items():
        if not len(split.index):
            first = split.unusual.rejected[0]
            raise UserError(
                f"none of the {len(raw.rows[name]):,} {name} images can be stored, such as {first.key}: {first.what}; "
                "replace them"
            )
    lost = sorted(set(range(len(raw.class_ids))) - set(merged["train"].index["label"].tolist()))
    if lost:
        raise UserError(
            f"no training image of class {raw.class_ids[lost[0]]!r} can be stored ({len(lost)} of "
            f"{len(raw.class_ids)} classes lose theirs): replace them, or remove the class"
        )


def write_data_set(data: DataConfig, directory: Path, raw: Raw, merged: dict[str, Merged]) -> None:
    """Write the index files, then the manifest with their hashes. It marks the data set as complete."""
    for name, split in merged.items():
        write_atomically(directory / f"{name}.index.npy", npy_bytes(split.index))
        write_atomically(directory / f"{name}.keys.npy", npy_bytes(split.keys))
    manifest = Manifest(
        name=data.name,
        settings=data_settings(data),
        listing_sha256=listing_sha256(raw.rows),
        is_ilsvrc2012=is_ilsvrc2012(data, merged),
        label_convention=raw.label_convention,
        classes=[ClassName(id=class_id, name=raw.class_names.get(class_id, class_id)) for class_id in raw.class_ids],
        splits={
            name: ManifestSplit(
                images=len(split.index),
                index_sha256=hashlib.sha256(npy_bytes(split.index)).hexdigest(),
                keys_sha256=hashlib.sha256(npy_bytes(split.keys)).hexdigest(),
                shards=split.shards,
                grey_images=split.unusual.grey,
                rotated_images=split.unusual.rotated,
            )
            for name, split in merged.items()
        },
        converted=[image for split in merged.values() for image in split.unusual.converted],
        rejected=[image for split in merged.values() for image in split.unusual.rejected],
    )
    write_atomically(directory / MANIFEST, to_json(manifest))
