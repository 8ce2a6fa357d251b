"""Batches: a function of (seed, epoch, number), on any number of processes and threads (T1-T3, T14, T20, T21)."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode

from recipe.config.schema import Decoder, LoaderConfig, OptimizationConfig, TrainerConfig
from recipe.data.augment.crop import build_augmentation
from recipe.data.batches import (
    WINDOW_SHARDS,
    Batch,
    BatchLayout,
    EvaluationBatches,
    TrainingBatches,
    block_order,
    derive_layout,
    epoch_order,
)
from recipe.data.decoding import EncodedImage, UndecodableError, WholeImage, build_decoder
from recipe.data.loader import ThreadedLoader
from recipe.data.shards import open_split
from recipe.data.transforms import EvaluationTransform
from recipe.distributed import World
from recipe.errors import UserError
from recipe.training.optim import build_schedule
from tests.builders.configs import compose_config, no_augmentation

VIEW = EvaluationTransform(8, 8, InterpolationMode.BILINEAR)


class Numbers:
    """A split for tests: image i is a grey square of level i, with label i modulo 7."""

    def __init__(self, images: int) -> None:
        self.labels = np.arange(images, dtype=np.uint32) % 7

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> bytes:
        return b"%d" % i


class GreySquares:
    """A decoder of these images."""

    name = "grey squares"

    def open(self, content: bytes) -> EncodedImage:
        return WholeImage(torch.full((3, 8, 8), int(content), dtype=torch.uint8))


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, size, rank, size, torch.device("cpu"), "none")


def settings(batch_size: int, cap: int = 256) -> tuple[OptimizationConfig, TrainerConfig]:
    config = compose_config(
        "experiment=smoke",
        f"optimization.batch_size={batch_size}",
        f"trainer.max_micro_batch_size={cap}",
    )
    return config.optimization, config.trainer


@pytest.fixture(scope="module")
def config() -> LoaderConfig:
    return compose_config("experiment=smoke", "loader.threads=2").loader


@contextmanager
def training_batches(
    images: int, layout: BatchLayout, config: LoaderConfig, rank: int = 0, seed: int = 5
) -> Iterator[TrainingBatches]:
    """Batches of `Numbers` without augmentation."""
    with closing(ThreadedLoader(Numbers(images), GreySquares(), config, world())) as threads:  # type: ignore[arg-type]
        yield TrainingBatches(threads, no_augmentation(8), layout, rank, seed)


def part_indices(layout: BatchLayout, config: LoaderConfig) -> list[list[list[int]]]:
    """For each global batch the indices of each part, from all ranks, in the order of parts."""
    ranks = []
    for rank in range(layout.processes):
        with training_batches(100, layout, config, rank) as batches:
            ranks.append([[batch.indices.tolist() for batch in step] for step in batches.epoch(1)])
    return [[part for forward in zip(*steps, strict=True) for part in forward] for steps in zip(*ranks, strict=True)]


def joined(batches: list[list[list[int]]]) -> list[list[int]]:
    return [[index for part in parts for index in part] for parts in batches]


def same_batches(one: list[list[Batch]], other: list[list[Batch]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for mine, theirs in zip(one, other, strict=True)
        for left, right in zip(mine, theirs, strict=True)
        for a, b in zip(left[:3], right[:3], strict=True)
    )


# ---- the layout -------------------------------------------------------------------------------------


def divides(size: int, processes: int, cap: int) -> bool:
    return size % (processes * math.ceil(size / (processes * cap))) == 0


def test_batch_size_learning_rate_and_parts_are_equal_on_8_4_and_1_processes() -> None:
    optimization, trainer = settings(1024, cap=128)
    layouts = {processes: derive_layout(optimization, trainer, processes) for processes in (8, 4, 1)}
    assert {processes: layout.accumulation_steps for processes, layout in layouts.items()} == {8: 1, 4: 2, 1: 8}
    assert {layout.images_per_forward for layout in layouts.values()} == {128}
    assert {layout.global_batch_size for layout in layouts.values()} == {1024}
    schedules = {build_schedule(optimization, 10_000 // layout.global_batch_size) for layout in layouts.values()}
    assert len(schedules) == 1
    assert schedules.pop().peak == optimization.learning_rate


def test_a_layout_respects_the_cap_and_divides() -> None:
    optimization, trainer = settings(32, cap=16)
    for size in range(1, 200):
        for processes in (1, 2, 3, 8):
            optimization.batch_size = size
            if not divides(size, processes, 16):
                continue
            layout = derive_layout(optimization, trainer, processes)
            assert 1 <= layout.images_per_forward <= 16
            assert layout.images_per_forward * processes * layout.accumulation_steps == size


def test_an_indivisible_batch_size_is_refused_with_the_nearest_valid_ones() -> None:
    optimization, trainer = settings(1000)
    with pytest.raises(UserError, match=r"batch_size=1000 .* 3 processes x 2 .*nearest valid: 996 or 1002$"):
        derive_layout(optimization, trainer, 3)


def test_the_named_batch_sizes_are_the_nearest_and_do_divide() -> None:
    optimization, trainer = settings(32, cap=10)
    wrong = []
    for processes in (1, 2, 3):
        for size in range(1, 120):
            if divides(size, processes, 10):
                continue
            optimization.batch_size = size
            with pytest.raises(UserError) as refusal:
                derive_layout(optimization, trainer, processes)
            named = [int(value) for value in re.findall(r"\d+", str(refusal.value).split("nearest valid:")[1])]
            below = next((value for value in range(size, 0, -1) if divides(value, processes, 10)), None)
            above = next(value for value in range(size, 1000) if divides(value, processes, 10))
            if named != [value for value in (below, above) if value]:
                wrong.append((processes, size, named, below, above))
    assert not wrong, f"(processes, size, named, nearest below, nearest above): {wrong[:5]}"


# ---- the order --------------------------------------------------------------------------------------


def test_the_order_is_a_permutation_and_pure() -> None:
    order = epoch_order(3, 4, 1000)
    assert np.array_equal(np.sort(order), np.arange(1000))
    np.random.seed(9)
    assert np.array_equal(order, epoch_order(3, 4, 1000))
    assert np.array_equal(order, np.random.default_rng((1, 3, 4)).permutation(1000)), "as it always was"


def test_every_epoch_and_every_seed_has_another_order() -> None:
    orders = {epoch_order(seed, epoch, 50).tobytes() for seed in range(6) for epoch in range(6)}
    assert len(orders) == 36


def test_a_quasi_random_order_is_a_permutation_within_a_few_shards() -> None:
    sizes = [40] * 20 + [7]
    shard_of = np.repeat(np.arange(21), sizes)
    orders = [block_order(seed, epoch, sizes) for seed in (1, 2) for epoch in (0, 1)]
    assert len({order.tobytes() for order in orders}) == 4
    assert np.array_equal(orders[0], block_order(1, 0, sizes)), "pure"
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(807))
        shards = shard_of[order]
        assert len(set(shards[:273].tolist())) <= WINDOW_SHARDS
        assert len(set(shards[:64].tolist())) > 4, "mixed within"
        last_seen = [np.flatnonzero(shards == shard)[-1] - np.flatnonzero(shards == shard)[0] for shard in range(21)]
        assert max(last_seen) < 40 * WINDOW_SHARDS


def test_the_quasi_random_order_is_delivered_and_recorded(data_directory: Path) -> None:
    config = compose_config("experiment=smoke", "loader.order=quasi_random")
    pool = ThreadedLoader(open_split(data_directory, "train"), build_decoder(Decoder.pillow), config.loader, world())
    with closing(pool):
        batches = TrainingBatches(pool, no_augmentation(8), BatchLayout(36, 1, 1), 0, 5, config.loader.order)
        seen = [index for (batch,) in batches.epoch(0) for index in batch.indices.tolist()]
        assert seen == block_order(5, 0, [shard.images for shard in pool.split.shards]).tolist()
        assert batches.facts().order == "quasi_random"
        assert batches.facts().first_indices == seen[:8]


# ---- training batches -------------------------------------------------------------------------------


def test_a_global_batch_has_the_same_parts_on_any_number_of_processes(config: LoaderConfig) -> None:
    expected = part_indices(BatchLayout(24, 1, 6), config)
    for processes, accumulation in ((2, 3), (3, 2), (6, 1)):
        assert part_indices(BatchLayout(24, processes, accumulation), config) == expected
    whole = part_indices(BatchLayout(24, 1, 1), config)
    assert joined(expected) == joined(whole)
    for processes in (2, 3):
        assert joined(part_indices(BatchLayout(24, processes, 1), config)) == joined(whole)


def test_an_epoch_has_no_image_twice_and_drops_the_incomplete_batch(config: LoaderConfig) -> None:
    with training_batches(100, BatchLayout(24, 1, 2), config) as batches:
        seen = [index for step in batches.epoch(0) for batch in step for index in batch.indices.tolist()]
        facts = batches.facts()
    assert len(seen) == len(set(seen)) == batches.images_per_epoch == facts.images_per_epoch == 96
    assert facts.images_left_out_per_epoch == 4
    assert batches.batches_per_epoch == 4
    assert facts.first_indices == epoch_order(5, 0, 100)[:8].tolist() == seen[:8]


def test_other_images_are_left_out_in_every_epoch(config: LoaderConfig) -> None:
    with training_batches(100, BatchLayout(24, 1, 1), config) as batches:
        seen = {
            frozenset(index for (batch,) in batches.epoch(epoch) for index in batch.indices.tolist())
            for epoch in range(5)
        }
    assert len(seen) == 5


def test_images_labels_and_indices_belong_together(config: LoaderConfig) -> None:
    with training_batches(100, BatchLayout(24, 1, 1), config) as batches:
        for (batch,) in batches.epoch(2):
            assert torch.equal(batch.labels, batch.indices % 7)
            assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.indices)
            assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("first_batch", [0, 1, 3, 4])
def test_resuming_gives_the_tail_of_the_epoch(first_batch: int, config: LoaderConfig) -> None:
    with training_batches(100, BatchLayout(24, 1, 2), config) as batches:
        assert same_batches(list(batches.epoch(3, first_batch)), list(batches.epoch(3))[first_batch:])


def test_a_batch_larger_than_the_data_set_is_refused(config: LoaderConfig) -> None:
    with (
        pytest.raises(UserError, match=r"optimization\.batch_size=24 is more than the 23 training images"),
        training_batches(23, BatchLayout(24, 1, 1), config),
    ):
        pass


def real_pixels(data_directory: Path, threads: int, layout: BatchLayout, rank: int = 0) -> list[list[Batch]]:
    """One augmented epoch of the small demo set."""
    config = compose_config("experiment=smoke", f"loader.threads={threads}")
    decoder = build_decoder(config.loader.decoder)
    pool = ThreadedLoader(open_split(data_directory, "train"), decoder, config.loader, world())
    with closing(pool):
        augmentation = build_augmentation(config.augmentation, 3)
        return list(TrainingBatches(pool, augmentation, layout, rank, 3).epoch(1))


def test_pixels_are_the_same_for_any_number_of_threads(data_directory: Path) -> None:
    alone = real_pixels(data_directory, 1, BatchLayout(36, 1, 1))
    assert len(alone) == 3
    for threads in (2, 4):
        assert same_batches(alone, real_pixels(data_directory, threads, BatchLayout(36, 1, 1)))


def test_pixels_are_the_same_for_any_number_of_processes(data_directory: Path) -> None:
    alone = real_pixels(data_directory, 2, BatchLayout(36, 1, 1))
    for processes in (2, 3):
        ranks = [real_pixels(data_directory, 2, BatchLayout(36, processes, 1), rank) for rank in range(processes)]
        for (whole,), *parts in zip(alone, *ranks, strict=True):
            assert torch.equal(whole.images, torch.cat([batch.images for (batch,) in parts]))


def test_a_damaged_image_stops_with_its_name_and_its_shard(data_directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "damaged"
    shutil.copytree(data_directory, copy)
    split = open_split(copy, "train")
    victim = 57
    entry = split.index[victim]
    shard = split.shards[int(entry["shard"])].name
    with (copy / shard).open("r+b") as handle:
        handle.seek(int(entry["offset"]))
        handle.write(bytes(64))
    with pytest.raises(UserError) as stopped:
        real_pixels(copy, 2, BatchLayout(36, 1, 1))
    assert shard in str(stopped.value)
    assert split.key(victim) in str(stopped.value)
    assert "the shard is damaged; delete that file and run `python preprocess.py` again" in str(stopped.value)
    assert "\n" not in str(stopped.value)


class Refusing:
    """A decoder that reads nothing."""

    name = "refusing"

    def open(self, content: bytes) -> EncodedImage:
        raise UndecodableError("unknown kind")


def refused_image(data_directory: Path) -> str:
    """The error if images of intact shards are refused."""
    pool = ThreadedLoader(
        open_split(data_directory, "train"),
        Refusing(),
        compose_config("experiment=smoke", "loader.threads=2").loader,
        world(),
    )
    with closing(pool), pytest.raises(UserError) as stopped:
        list(EvaluationBatches(pool, VIEW, 4, world()))
    return str(stopped.value)


def test_a_refused_image_of_an_intact_shard_does_not_advise_preprocessing(data_directory: Path) -> None:
    """Making the shard again would give the same bytes and the same error."""
    said = refused_image(data_directory)
    assert "install the version in the Data chapter" in said
    assert "(unknown kind)" in said
    assert "delete" not in said
    assert "damaged" not in said


def test_a_loader_that_is_left_early_closes_at_once(config: LoaderConfig) -> None:
    with training_batches(100, BatchLayout(24, 1, 1), config) as batches:
        epoch = batches.epoch(0)
        next(epoch)
        epoch.close()  # type: ignore[attr-defined]
        assert same_batches([next(batches.epoch(0))], [next(batches.epoch(0))])


# ---- evaluation batches -----------------------------------------------------------------------------


def evaluation_indices(images: int, batch_size: int, processes: int, config: LoaderConfig) -> list[list[list[int]]]:
    """Indices by rank and batch."""
    ranks = []
    for rank in range(processes):
        with closing(ThreadedLoader(Numbers(images), GreySquares(), config, world())) as threads:  # type: ignore[arg-type]
            batches = EvaluationBatches(threads, VIEW, batch_size, world(rank, processes))
            found = [batch.indices.tolist() for batch in batches]
            assert len(found) == len(batches)
        ranks.append(found)
    return ranks


@pytest.mark.parametrize(
    ("images", "batch_size"), [(50, 8), (48, 8), (47, 5), (1, 8), (7, 8), (23, 1), (9, 4), (31, 10)]
)
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_evaluation_covers_every_image_exactly_once_in_the_same_batches(
    images: int, batch_size: int, processes: int, config: LoaderConfig
) -> None:
    ranks = evaluation_indices(images, batch_size, processes, config)
    seen = [index for rank in ranks for batch in rank for index in batch]
    assert sorted(seen) == list(range(images))
    count = math.ceil(images / batch_size)
    dealt = [ranks[number % processes][number // processes] for number in range(count)]
    assert dealt == [list(range(start, min(start + batch_size, images))) for start in range(0, images, batch_size)]
