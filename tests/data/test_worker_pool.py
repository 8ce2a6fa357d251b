"""Batches from worker processes: equal to those from threads, and errors of the processes."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode

from recipe.config.schema import Decoder, LoaderConfig
from recipe.data import decoding as library
from recipe.data.augment.crop import build_augmentation
from recipe.data.batches import Batch, BatchLayout, EvaluationBatches, EvaluationRequest, Loader, TrainingBatches
from recipe.data.shards import Split, open_split
from recipe.data.transforms import EvaluationTransform
from recipe.data.worker_pool import WorkerLoader, even_shares, open_loaders, worker_count
from recipe.distributed import World
from recipe.errors import UserError, WorkerError
from recipe.run.terminal import FROM_OUTSIDE
from tests.builders.configs import compose_config

ALONE = World(0, 1, 0, 1, torch.device("cpu"), "none")
GPU = World(0, 1, 0, 1, torch.device("cuda", 0), "nccl")
VIEW = EvaluationTransform(40, 32, InterpolationMode.BILINEAR)
VICTIM = 3
AUGMENTED = [
    "augmentation.mixup.mixup_alpha=0.2",
    "augmentation.random_erasing.probability=0.5",
    "augmentation.auto_augment.policy=trivial_augment",
]


def loader(processes: int, threads: int = 2) -> LoaderConfig:
    words = [f"loader.workers={processes}", f"loader.threads={threads}"]
    return compose_config("experiment=smoke", *words).loader


@contextmanager
def decoding(splits: list[Split], processes: int) -> Iterator[list[Loader]]:
    with open_loaders(splits, loader(processes), ALONE) as made:
        yield made


@pytest.fixture(scope="module")
def splits(data_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Split]:
    """train, val, and a val with a damaged image."""
    copy = tmp_path_factory.mktemp("damaged") / "demo"
    shutil.copytree(data_directory, copy)
    damaged = open_split(copy, "val")
    with (copy / damaged.shards[0].name).open("r+b") as handle:
        handle.seek(int(damaged.index[VICTIM]["offset"]))
        handle.write(bytes(64))
    return [*(open_split(data_directory, name) for name in ("train", "val")), damaged]


@pytest.fixture(scope="module")
def two(splits: list[Split]) -> Iterator[list[Loader]]:
    """Two processes for all tests of this file, since they start slowly. The last test kills one."""
    with decoding(splits, 2) as made:
        yield made


def without_nvimagecodec(patch: pytest.MonkeyPatch, error: Exception | None) -> None:
    """Make the import fail: the library is absent, or loading it raises `error`."""
    library.load_nvimgcodec.cache_clear()
    library.report_fallback.cache_clear()
    if error is None:
        patch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    else:
        patch.setattr(library.tempfile, "TemporaryDirectory", Mock(side_effect=error))


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.process)])
@pytest.mark.parametrize(
    ("error", "reason"),
    [(None, "it is not installed"), (OSError("libstdc++.so.6 is too old"), "libstdc++.so.6 is too old")],
)
def test_without_nvimagecodec_pillow_decodes_and_one_line_says_so(
    splits: list[Split],
    workers: int,
    error: Exception | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, request = loader(workers), EvaluationRequest(np.arange(4), VIEW)
    assert config.decoder is Decoder.nvimgcodec
    with open_loaders(splits[1:2], config, ALONE) as made:
        expected = next(iter(made[0].load([request]))).images.clone()
    with monkeypatch.context() as patch:
        without_nvimagecodec(patch, error)
        for _ in range(2):
            with open_loaders(splits[1:2], config, ALONE) as made:
                assert made[0].decoder_name == "pillow", "every record takes it from here"
                assert torch.equal(next(iter(made[0].load([request]))).images, expected)
    assert capsys.readouterr().err == (
        f"nvImageCodec (loader.decoder=nvimgcodec) cannot be used on this machine ({reason}): "
        "Pillow decodes, with the same pixels and slower\n"
    )


def test_only_rank_0_says_that_pillow_decodes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    without_nvimagecodec(monkeypatch, None)
    assert library.usable_decoder(Decoder.nvimgcodec).name == "pillow"
    assert capsys.readouterr().err == ""


def children(decoding: Loader) -> list[int]:
    """The worker processes. Empty before the first batch."""
    assert isinstance(decoding, WorkerLoader)
    pid = decoding.pool.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def flat(batch: Batch) -> list[torch.Tensor]:
    return [*batch[:3], *(batch.mix_parameters or ())]


def everything(train: Loader, validation: Loader, processes: int) -> list[list[torch.Tensor]]:
    """Two augmented, mixed and erased epochs, the second from its second batch on, then the validation set."""
    config = compose_config("experiment=smoke", *AUGMENTED)
    batches = TrainingBatches(train, build_augmentation(config.augmentation, 3), BatchLayout(48, 1, 2), 0, 3)
    assert batches.facts().loading_processes == processes
    found = [flat(batch) for step in batches.epoch(0) for batch in step]
    found += [flat(batch) for step in batches.epoch(1, first_batch=1) for batch in step]
    return found + [flat(batch) for batch in EvaluationBatches(validation, VIEW, 7, ALONE)]


def test_one_and_two_processes_make_the_batches_of_threads(splits: list[Split], two: list[Loader]) -> None:
    with decoding(splits, 0) as (train, validation, _):
        expected = everything(train, validation, 0)
    with decoding(splits, 1) as (train, validation, _):
        one = everything(train, validation, 1)
    assert len(expected) == 4 + 2 + 7
    assert all(len(batch) == 8 for batch in expected[:6])
    for found in (one, everything(two[0], two[1], 2)):
        assert [len(batch) for batch in found] == [len(batch) for batch in expected]
        assert all(
            torch.equal(mine, theirs)
            for one, other in zip(found, expected, strict=True)
            for mine, theirs in zip(one, other, strict=True)
        )


def test_memory_is_reused_only_after_its_batch_is_freed(two: list[Loader]) -> None:
    with nullcontext(two) as (train, *_):
        assert isinstance(train, WorkerLoader)
        parts = [np.arange(12, dtype=np.int64) + first for first in range(0, 96, 12)]
        held = list(train.load(EvaluationRequest(indices, VIEW) for indices in parts))
        copies = [batch.images.clone() for batch in held]
        sizes = set()
        for _ in range(3):
            assert len(list(train.load(EvaluationRequest(indices, VIEW) for indices in parts))) == len(held)
            assert all(torch.equal(batch.images, copy) for batch, copy in zip(held, copies, strict=True))
            sizes.add(train.pool.memory.bytes)
        assert len(sizes) == 1, "what was free is used first"
        assert held[0].images.is_contiguous(memory_format=torch.channels_last)
        used = sizes.pop() - sum(slot.bytes for slot in train.pool.memory.free)
        del held
        assert used >= sum(copy.numel() for copy in copies)
        assert sum(slot.bytes for slot in train.pool.memory.free) == train.pool.memory.bytes


def test_an_abandoned_iterator_frees_its_memory_and_the_next_one_works(two: list[Loader]) -> None:
    with nullcontext(two) as (train, validation, _):
        assert isinstance(train, WorkerLoader)
        for _ in range(2):
            batches = iter(EvaluationBatches(train, VIEW, 4, ALONE))
            next(batches)
            batches.close()  # type: ignore[attr-defined]
        assert sum(len(batch.indices) for batch in EvaluationBatches(validation, VIEW, 5, ALONE)) == len(
            validation.split
        )
        for _ in range(500):
            if not train.pool.pending:
                break
            time.sleep(0.01)
        assert not train.pool.pending


def test_a_damaged_image_is_named_and_the_others_still_come(two: list[Loader]) -> None:
    train, _, damaged = two
    with pytest.raises(UserError) as stopped:
        list(EvaluationBatches(damaged, VIEW, 4, ALONE))
    assert damaged.split.shards[0].name in str(stopped.value)
    assert damaged.split.key(VICTIM) in str(stopped.value)
    assert "the shard is damaged; delete that file and run `python preprocess.py` again" in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert sum(len(batch.indices) for batch in EvaluationBatches(train, VIEW, 36, ALONE)) == 108


def test_signals_to_all_are_the_training_process_s_to_answer(two: list[Loader]) -> None:
    with nullcontext(two) as (train, *_):
        assert isinstance(train, WorkerLoader)
        process = train.pool.process
        for numbers in (FROM_OUTSIDE, FROM_OUTSIDE):
            for number in numbers:
                for pid in (process.pid, *children(train)):
                    os.kill(pid, number)
            assert sum(len(batch.indices) for batch in EvaluationBatches(train, VIEW, 36, ALONE)) == 108
        assert process.poll() is None


def test_how_many_processes() -> None:
    automatic = compose_config("experiment=smoke", "loader.threads=7").loader
    assert worker_count(automatic, ALONE) == 0
    assert worker_count(automatic, GPU) == 4
    assert worker_count(loader(3), ALONE) == 3
    assert worker_count(loader(0), GPU) == 0
    with pytest.raises(UserError, match=r"loader\.workers=-1"):
        loader(-1)


def test_shares_cover_a_batch_evenly() -> None:
    for count in range(1, 30):
        for processes in range(1, 9):
            shares = even_shares(count, processes)
            assert [image for first, last in shares for image in range(first, last)] == list(range(count))
            sizes = [last - first for first, last in shares]
            assert len(shares) == min(count, processes)
            assert max(sizes) - min(sizes) <= 1


def test_a_killed_process_is_reported(two: list[Loader]) -> None:
    with nullcontext(two) as (train, *_):
        assert isinstance(train, WorkerLoader)
        batches = iter(EvaluationBatches(train, VIEW, 4, ALONE))
        next(batches)
        os.kill(children(train)[1], signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"decodes images was ended by SIGKILL; .*memory") as stopped:
            list(batches)
        assert stopped.value.exit_code == 128 + signal.SIGKILL
        assert "\n" not in str(stopped.value)
        with pytest.raises(WorkerError):
            next(iter(EvaluationBatches(train, VIEW, 4, ALONE)))
