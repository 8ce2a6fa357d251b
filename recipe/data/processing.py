"""Preprocessing: raw images in, shards, index, manifest and the record of the Data chapter out.

    find and list the raw images -> hold them to what is expected -> deal them to shards -> make the shards in parallel
    -> merge their notes into index, manifest and record

Several processes, of one node or many, can share the shards: `sharing`.

The result depends on the raw images and the settings only, never on the number of processes, on the order in which they
finish or on how often the work was interrupted: a shard's images are fixed before any worker starts, and a shard is
written whole or not at all. Training images are dealt to shards in the order of the SHA-256 of their keys, so that
whoever reads shards one after another meets well-mixed classes; validation images stay sorted.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import features

from recipe.config.identity import differences, sha256_of
from recipe.config.schema import Config, Corrupt, DataConfig, Expectation, Source
from recipe.data import imagenet
from recipe.data.archives import digests
from recipe.data.expectation import require_ilsvrc2012, require_published_md5
from recipe.data.images import FILTER, Rules
from recipe.data.listing import Raw, Rows, counted_by_reason, found_in, in_parts, listing_sha256, loss_lines
from recipe.data.look_alikes import look_alike_lines
from recipe.data.merging import Merged, Part, merge, part_of
from recipe.data.packing import WORK, Note, Task, Workplace, finished, pack_here, run_task, start_worker
from recipe.data.progress import Progress
from recipe.data.raw import find_raw, given_raw_dir, read_errors
from recipe.data.reporting import record_of
from recipe.data.shards import (
    MANIFEST,
    SPLITS,
    Manifest,
    ManifestSplit,
    Shard,
    manifest_sha256,
    npy_bytes,
    problems,
    read_manifest,
    size_of,
)
from recipe.data.sharing import LOST_SECONDS, Plan, Team, require_same_plan
from recipe.environment import machine, usable_cores
from recipe.errors import UserError
from recipe.launcher import ALONE, Launch
from recipe.provenance import Stage
from recipe.records import Archive, ClassName, PreprocessingRecord, from_json, to_json
from recipe.run import disk_errors, locked, shown_path, write_atomically
from recipe.signals import blocked, interruptible, start_resource_tracker

RECORD = "preprocessing.json"
LOCK = "lock"
DECODERS = ("jpg", "zlib", "webp", "libtiff", "avif", "jpg_2000")  # in Pillow; None for one that it lacks
PNG_GROWTH = 10  # times the bytes of the files: worth a warning
SHARD_FILE = re.compile(r"^(train|val)-\d{5,}\.tar$")


def preprocess(config: Config, launch: Launch = ALONE) -> PreprocessingRecord:
    """Make the data set of `config.data`, continue an interrupted run, or recognise a finished one.

    `launch` says which of several processes this is, that share the shards; each returns when all is finished.
    """
    data, directory = config.data, Path(config.data.directory)
    done = finished_record(data, directory)
    if done is not None:
        return done
    refuse_foreign_directory(directory, given_raw_dir(data), data)  # before anything is created
    if launch.size > 1:
        refuse_damaged_data_set(directory)
    if not launch.is_first:
        return assisted(data, directory, launch)
    with interruptible(), sole_writer(directory):
        done = finished_record(data, directory)  # another process may have finished while this one was starting
        if done is None:
            with Team(directory, launch) as team:
                stage = Stage(directory)
                raw = find_raw(data)
                done = repaired(data, directory, raw) or made(data, directory, raw, stage, team)
    return done


def data_settings(data: DataConfig) -> dict[str, Any]:
    """Everything that shapes the bytes of the data set; what has no effect is left out."""
    settings: dict[str, Any] = {
        "name": data.name,
        "source": data.source.value,
        "expect": data.expect.value,
        "corrupt": data.corrupt.value,
        "max_pixels": data.max_pixels,
        "images_per_shard": data.images_per_shard,
        "resize_short_side": data.resize_short_side,
    }
    if data.resize_short_side is not None:
        settings["quality"] = data.quality
        settings["resize_filter"] = FILTER  # so that no shard of another filter is continued
    if data.source is Source.folder:
        settings["validation_fraction"] = data.validation_fraction
    if data.source is Source.demo:
        settings["train_images_per_class"] = data.train_images_per_class
        settings["validation_images_per_class"] = data.validation_images_per_class
    return settings


def finished_record(data: DataConfig, directory: Path) -> PreprocessingRecord | None:
    """The record of a finished data set with these settings and all its files; one of other settings stops."""
    if not (directory / MANIFEST).is_file():
        return None
    manifest = read_manifest(directory)
    changed = differences(manifest.settings, data_settings(data))
    if changed:
        raise UserError(
            f"{shown_path(directory)} holds a finished data set of other settings ({'; '.join(changed)}); give another "
            "data.directory or delete that one"
        )
    require_same_listing(data, directory, manifest)
    for problem in all_problems(directory, manifest):
        print(f"{problem}; it will be made again", file=sys.stderr)
        return None
    record = stored_record(directory)
    if record is None:
        return None
    images = ", ".join(f"{split.images:,} {name}" for name, split in manifest.splits.items())
    print(f"{shown_path(directory)} is finished ({images} images): nothing to do", file=sys.stderr)
    return record


def require_same_listing(data: DataConfig, directory: Path, manifest: Manifest) -> None:
    """A folder of one's own grows and shrinks: a finished data set of other images than it holds now stops.

    The other sources are fixed sets. Where the raw images are gone, or their disk is not mounted, there is no question.
    """
    if data.source is not Source.folder or data.raw_dir is None:
        return
    raw_dir = Path(data.raw_dir)
    with read_errors(raw_dir):
        if not (raw_dir.is_dir() and found_in(raw_dir)):
            return
    rows = find_raw(data).rows
    if listing_sha256(rows) == manifest.listing_sha256:
        return
    before = sum(split.images for split in manifest.splits.values()) + len(manifest.rejected)
    now = sum(len(split) for split in rows.values())
    what = f"{before:,} images, now there are {now:,}"
    raise UserError(
        f"{shown_path(directory)} was made when data.raw_dir={shown_path(raw_dir)} held "
        f"{what if now != before else f'other images (as many as now: {now:,})'}; "
        "give another data.name or data.directory, or delete that one"
    )


def stored_record(directory: Path) -> PreprocessingRecord | None:
    """The record beside the manifest, or None where it is missing, damaged or of another manifest."""
    path = directory / RECORD
    try:
        record = from_json(path.read_bytes(), PreprocessingRecord, shown_path(path))
    except FileNotFoundError:
        return None
    except UserError as error:
        print(f"{error}; it will be made again", file=sys.stderr)
        return None
    if record.outputs.get("manifest") != manifest_sha256(directory):
        print(f"{shown_path(path)} belongs to another manifest; it will be made again", file=sys.stderr)
        return None
    return record


def all_problems(directory: Path, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the files of a data set, both splits."""
    for name in manifest.splits:
        yield from problems(directory, manifest, name)


def refuse_foreign_directory(directory: Path, raw_dir: Path, data: DataConfig) -> None:
    """What is left over in a data directory is removed, so it must be new, empty, or of our own making."""
    processed, raw = directory.absolute().resolve(), raw_dir.absolute().resolve()
    if raw.is_relative_to(processed) or (data.source is Source.folder and processed.is_relative_to(raw)):
        raise UserError(
            f"data.directory={shown_path(directory)} and data.raw_dir={shown_path(raw_dir)} lie inside one another; "
            "give data.directory= a place of its own"
        )
    found = {entry.name for entry in found_in(directory)} if directory.is_dir() else set()  # at once: others may begin
    if found - {LOCK} and not found & {MANIFEST, RECORD, WORK}:
        raise UserError(
            f"data.directory={shown_path(directory)} holds files that preprocess.py did not write, and some of them "
            "could be lost; give a new or an empty folder"
        )


def refuse_damaged_data_set(directory: Path) -> None:
    """Only a single process repairs what was finished once."""
    if (directory / MANIFEST).is_file():
        raise UserError(
            f"{shown_path(directory)} holds a finished data set that is damaged: let one process repair it, with "
            "`python preprocess.py` instead of torchrun"
        )


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """One writer per data directory; what a killed one left half written is removed."""
    with disk_errors(directory):
        (directory / WORK).mkdir(parents=True, exist_ok=True)
    with locked(directory / LOCK, "being written", "data.directory"):
        with disk_errors(directory):
            for leftover in (*directory.glob("*.tmp-*"), *(directory / WORK).glob("*.tmp-*")):
                leftover.unlink(missing_ok=True)
        yield


def made(data: DataConfig, directory: Path, raw: Raw, stage: Stage, team: Team) -> PreprocessingRecord:
    """Everything from the listing to the record."""
    archives = verified_archives(data, directory, raw)
    archive_hashes = [archive.sha256 for archive in archives]
    tasks = planned(data, raw, archive_hashes)
    remove_strays(directory, {task.name for task in tasks})
    team.announce(plan_of(data, tasks, archive_hashes))
    clock = time.perf_counter()
    parts = shared_parts(data, directory, raw, tasks, team)
    seconds = time.perf_counter() - clock
    merged = {name: merge([parts[task.name] for task in tasks if task.split == name]) for name in SPLITS}
    require_images_left(raw, merged)
    write_data_set(data, directory, raw, merged)
    record = record_of(
        data,
        data_settings(data),
        raw,
        archives,
        merged,
        stage.finish(machine()),
        processes=team.total("processes"),
        images_per_second=team.total("fresh_images") / seconds,
        continued_shards=team.total("continued_shards"),
    )
    write_atomically(directory / RECORD, to_json(record))
    team.stop_beating()
    shutil.rmtree(directory / WORK)
    report(record, merged)
    return record


def assisted(data: DataConfig, directory: Path, launch: Launch) -> PreprocessingRecord:
    """A rank other than 0: make this one's shards, and wait until rank 0 has merged all."""
    with interruptible(), Team(directory, launch) as team:
        plan = team.await_plan()
        raw = find_raw(data)  # not before: rank 0 may have had to draw or download it
        raw.verified = names_of_verified(hashed_archives(data, directory, raw))
        tasks = planned(data, raw, plan.archives)
        require_same_plan(launch.rank, plan, plan_of(data, tasks, plan.archives))
        kept = kept_parts(directory, tasks, team)
        fresh_parts(data, directory, raw, without(kept, team.share_of(tasks)), team, ignored)
        team.await_end()
    return awaited_record(directory)


def shared_parts(data: DataConfig, directory: Path, raw: Raw, tasks: list[Task], team: Team) -> dict[str, Part]:
    """All shards by name, this process's own and those of its peers."""
    parts = kept_parts(directory, tasks, team)
    with Progress("making shards", sum(len(task.rows) for task in tasks), "images", done=team.images) as progress:
        parts |= fresh_parts(data, directory, raw, without(parts, team.share_of(tasks)), team, progress.reach)
        team.await_others(progress.reach)
    return parts | {task.name: part_of(task, peers_note(directory, task)) for task in without(parts, tasks)}


def kept_parts(directory: Path, tasks: list[Task], team: Team) -> dict[str, Part]:
    """Of this process's shards those that an earlier launch finished."""
    mine = team.share_of(tasks)
    parts = {task.name: part_of(task, note) for task in mine if (note := finished(directory, task)) is not None}
    team.continued_shards, team.images = len(parts), sum(len(part.rows) for part in parts.values())
    return parts


def without(parts: dict[str, Part], tasks: list[Task]) -> list[Task]:
    """The shards that are not there yet."""
    return [task for task in tasks if task.name not in parts]


def fresh_parts(
    data: DataConfig, directory: Path, raw: Raw, tasks: list[Task], team: Team, on_images: Callable[[int], None]
) -> dict[str, Part]:
    """Make these shards; `on_images` is told how many images all processes have made."""
    team.processes = process_count(data, tasks, team.on_this_node)

    def count(images: int) -> None:
        team.has_made(images)
        on_images(team.total("images"))

    return packed(workplace(data, directory, raw), tasks, team.processes, count)


def ignored(images: int) -> None:
    """Rank 0 shows the progress of all."""


def peers_note(directory: Path, task: Task) -> Note:
    """The note of a shard that another process made; a network file system may show it late."""
    deadline = time.monotonic() + LOST_SECONDS
    while (note := finished(directory, task)) is None:
        if time.monotonic() > deadline:
            raise UserError(
                f"{task.name} was made by another process but is not in {shown_path(directory)}: is that the same "
                "folder for all processes? Run the same command to continue"
            )
        time.sleep(1)
    return note


def awaited_record(directory: Path) -> PreprocessingRecord:
    """What rank 0 wrote last; a network file system may show it late."""
    deadline = time.monotonic() + LOST_SECONDS
    while not (directory / MANIFEST).is_file() or (record := stored_record(directory)) is None:
        if time.monotonic() > deadline:
            raise UserError(f"rank 0 ended without finishing {shown_path(directory)}: run the same command to continue")
        time.sleep(1)
    return record


def repaired(data: DataConfig, directory: Path, raw: Raw) -> PreprocessingRecord | None:
    """Make the missing or cut shards of a finished data set again; None where there is more to do than that."""
    if not (directory / MANIFEST).is_file() or (record := stored_record(directory)) is None:
        return None
    raw.verified = names_of_verified(record.archives)
    shards = {shard.name: shard for split in read_manifest(directory).splits.values() for shard in split.shards}
    tasks = planned(data, raw, [])
    damaged = [task for task in tasks if task.name in shards and is_damaged(directory, shards[task.name])]
    if not damaged or {task.name for task in tasks} != set(shards):
        return None
    # In the work folder: one that is not what the manifest names, but of the right size, must never get its name.
    with Progress("making shards", sum(len(task.rows) for task in damaged), "images") as progress:
        parts = packed(workplace(data, directory / WORK, raw), damaged, process_count(data, damaged), progress.add)
    wrong = sorted(name for name, part in parts.items() if part.shard != shards[name])
    with disk_errors(directory):
        for name in parts.keys() - wrong:
            (directory / WORK / name).replace(directory / name)
        shutil.rmtree(directory / WORK)
    if wrong:
        raise UserError(
            f"{wrong[0]} was made again but is not what it was: the raw images or Pillow changed; delete "
            f"{shown_path(directory / MANIFEST)} to make the whole data set again"
        )
    return finished_record(data, directory)


def verified_archives(data: DataConfig, directory: Path, raw: Raw) -> list[Archive]:
    """Hold the raw data to what is expected, the quick checks first; returns the archives with their hashes."""
    print(listing_line(raw), *loss_lines(raw), *look_alike_lines(raw.class_ids), sep="\n", file=sys.stderr)
    if data.expect is Expectation.ilsvrc2012:
        require_ilsvrc2012(raw)
    archives = hashed_archives(data, directory, raw)
    if data.expect is Expectation.ilsvrc2012:
        require_published_md5(archives, imagenet.PUBLISHED_MD5)
    raw.verified = names_of_verified(archives)
    return archives


def hashed_archives(data: DataConfig, directory: Path, raw: Raw) -> list[Archive]:
    """The archives with their hashes; read once for all processes, and remembered in the data directory."""
    published = {} if data.source is Source.demo else imagenet.PUBLISHED_MD5  # the demo only borrows the names
    with read_errors(given_raw_dir(data)):
        return digests(raw.archives, published, directory / WORK / "archives.json")


def names_of_verified(archives: list[Archive]) -> set[str]:
    """Those that have their publisher's checksum: damage inside was published."""
    return {archive.name for archive in archives if archive.is_published_md5}


def listing_line(raw: Raw) -> str:
    """What was found, and what else was there."""
    images = ", ".join(f"{len(rows):,} {name}" for name, rows in raw.rows.items())
    left_out = f"; left out: {counted_by_reason(raw.left_out)}" if raw.left_out else ""
    return f"found {raw.layout}: {images} images of {len(raw.class_ids):,} classes{left_out}"


def planned(data: DataConfig, raw: Raw, archive_hashes: list[str]) -> list[Task]:
    """The shards, each with its images; the plan's hash changes with anything that could change the shard's bytes."""
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
    """What several processes have to agree on."""
    shards = sha256_of([task.plan_sha256 for task in tasks])
    return Plan(settings=data_settings(data), archives=archive_hashes, shards_sha256=shards)


def in_hash_order(rows: Rows) -> Rows:
    """Rows in the order of the SHA-256 of their keys: mixed for good, and the same everywhere."""
    parts = [b"".join(hashlib.sha256(key).digest() for key in part.tolist()) for part in in_parts(rows["key"])]
    words = np.frombuffer(b"".join(parts), dtype=">u8").reshape(-1, 4)
    return rows[np.lexsort(words.T[::-1])]


def workplace(data: DataConfig, directory: Path, raw: Raw) -> Workplace:
    """What workers need to know. Only training images are ever resized: the metric is over original ones."""
    train = Rules(
        keeps_png=raw.keeps_png,
        resize_short_side=data.resize_short_side,
        quality=data.quality,
        max_pixels=data.max_pixels,
        is_verified=imagenet.TRAIN_ARCHIVE in raw.verified,
    )
    validation = replace(train, resize_short_side=None, is_verified=imagenet.VALIDATION_ARCHIVE in raw.verified)
    return Workplace(
        directory,
        [path.absolute() for path in raw.containers],
        {"train": train, "val": validation},
        skips_corrupt=data.corrupt is Corrupt.skip,
    )


def process_count(data: DataConfig, tasks: list[Task], sharers: int = 1) -> int:
    """As many as were asked for, else one a core; never more than there are shards to make. 0: this one alone.

    `sharers` are the processes of this launch on this node, between which its cores are divided.
    """
    if data.processes == 0:
        return 0
    return max(1, min(data.processes or usable_cores() // sharers, len(tasks)))


def packed(place: Workplace, tasks: list[Task], processes: int, on_images: Callable[[int], None]) -> dict[str, Part]:
    """Make the shards in worker processes; returns them by name. The first failure stops all.

    `on_images` is told of the images of each finished shard; what it raises stops all too.
    """
    if not tasks:
        return {}
    if processes == 0:
        return {task.name: counted(part_of(task, pack_here(task, place)), on_images) for task in tasks}
    start_resource_tracker()
    context = get_context("spawn")
    stop = context.Event()
    executor = ProcessPoolExecutor(processes, context, start_worker, (place, stop))
    try:
        with blocked((signal.SIGINT, signal.SIGHUP)):  # a terminal sends them to all; workers are stopped in order
            futures = {executor.submit(run_task, task): task for task in tasks}
        return {part.shard.name: counted(part, on_images) for part in finishing(futures)}
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for want of memory; run the same command again to continue, "
            "with fewer data.processes if it happens again"
        ) from error
    finally:
        stop.set()  # workers look at it between two images, so that a signal ends them within one
        executor.shutdown(wait=True, cancel_futures=True)


def counted(part: Part, on_images: Callable[[int], None]) -> Part:
    """The same, when its images were told of."""
    on_images(len(part.rows))
    return part


def finishing(futures: dict[Future[Note], Task]) -> Iterator[Part]:
    """Finished shards as they come."""
    for future in as_completed(list(futures)):
        task = futures.pop(future)  # lets go of the future, which would keep its note
        yield part_of(task, future.result())


def remove_strays(directory: Path, wanted: set[str]) -> None:
    """Shards that an interrupted run of other settings left and this one does not overwrite."""
    with disk_errors(directory):
        for path in directory.iterdir():
            if SHARD_FILE.match(path.name) and path.name not in wanted:
                path.unlink()


def is_damaged(directory: Path, shard: Shard) -> bool:
    """Missing, or of another size."""
    return size_of(directory / shard.name) != shard.bytes


def require_images_left(raw: Raw, merged: dict[str, Merged]) -> None:
    """data.corrupt=skip may leave out images, but neither a whole split nor all training images of a class."""
    for name, split in merged.items():
        if not len(split.index):
            raise UserError(
                f"none of the {len(raw.rows[name]):,} {name} images can be stored, such as {split.rejected[0].key}: "
                f"{split.rejected[0].what}; replace them"
            )
    lost = sorted(set(range(len(raw.class_ids))) - set(merged["train"].index["label"].tolist()))
    if lost:
        raise UserError(
            f"no training image of class {raw.class_ids[lost[0]]!r} can be stored ({len(lost)} of "
            f"{len(raw.class_ids)} classes lose theirs): replace them, or remove the class"
        )


def write_data_set(data: DataConfig, directory: Path, raw: Raw, merged: dict[str, Merged]) -> None:
    """Index files, then the manifest that names them by hash: its presence says that the data set is complete."""
    for name, split in merged.items():
        write_atomically(directory / f"{name}.index.npy", npy_bytes(split.index))
        write_atomically(directory / f"{name}.keys.npy", npy_bytes(split.keys))
    manifest = Manifest(
        name=data.name,
        settings=data_settings(data),
        listing_sha256=listing_sha256(raw.rows),
        is_ilsvrc2012=data.expect is Expectation.ilsvrc2012 and not any(split.rejected for split in merged.values()),
        label_convention=raw.label_convention,
        classes=[ClassName(id=class_id, name=raw.class_names.get(class_id, class_id)) for class_id in raw.class_ids],
        splits={
            name: ManifestSplit(
                images=len(split.index),
                index_sha256=hashlib.sha256(npy_bytes(split.index)).hexdigest(),
                keys_sha256=hashlib.sha256(npy_bytes(split.keys)).hexdigest(),
                shards=split.shards,
                grey_images=split.grey_images,
                rotated_images=split.rotated_images,
            )
            for name, split in merged.items()
        },
        oddities=[oddity for split in merged.values() for oddity in split.oddities],
        rejected=[oddity for split in merged.values() for oddity in split.rejected],
    )
    write_atomically(directory / MANIFEST, to_json(manifest))


def report(record: PreprocessingRecord, merged: dict[str, Merged]) -> None:
    """The few lines a person reads at the end."""
    images = ", ".join(f"{facts.images:,} {name}" for name, facts in record.splits.items())
    odd = ", ".join(f"{count:,} x {kind}" for kind, count in record.odd_images.items()) or "none"
    converted, left_out = sum(len(split.oddities) for split in merged.values()), len(record.rejected)
    print(
        f"{record.processed_path}: {images} images; unusual: {odd}; converted: {converted}; left out: {left_out}",
        file=sys.stderr,
    )
    before, after = (
        sum(getattr(split, name) for split in merged.values()) for name in ("converted_bytes", "png_bytes")
    )
    if after > PNG_GROWTH * before:
        print(
            f"warning: images that became lossless PNG take {after:,} bytes, {after / before:.0f} times the {before:,} "
            "of their files; data.resize_short_side stores training images as smaller JPEG",
            file=sys.stderr,
        )
    if record.is_ilsvrc2012:
        oddities = ((oddity.split, oddity.key, oddity.what) for split in merged.values() for oddity in split.oddities)
        for line in imagenet.surprises(oddities):
            print(f"unexpected on ILSVRC2012: {line}", file=sys.stderr)
