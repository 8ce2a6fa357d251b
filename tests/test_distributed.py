"""Launching on all processes: the launcher, refusals, and errors of workers (T41, T42)."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recipe import distributed
from recipe.config.schema import Config, TrainerConfig
from recipe.distributed import (
    World,
    device_type,
    device_versions,
    hardware_of,
    launch,
    processes_per_node,
    start_world,
    threads_per_process,
)
from recipe.errors import DiskError, UserError, WorkerError
from recipe.run.environment import usable_cores
from tests.builders.configs import compose_config
from tests.builders.ranks import torchrun_environment


def world(local_size: int = 1) -> World:
    return World(0, local_size, 0, local_size, torch.device("cpu"), "none")


def trainer(*overrides: str) -> TrainerConfig:
    return compose_config("experiment=smoke", *(f"trainer.{override}" for override in overrides)).trainer


@pytest.fixture(autouse=True)
def plain_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start without torchrun, and without a GPU by default."""
    for name in torchrun_environment(0, 1):
        monkeypatch.delenv(name, raising=False)
    see_gpus(monkeypatch, 0)


def see_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)


def started_by_torchrun(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    for name, value in torchrun_environment(0, processes).items():
        monkeypatch.setenv(name, value)


# ---- how many processes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "gpus", "expected"),
    [
        (("accelerator=cpu",), 0, 1),
        (("accelerator=cpu", "gpus=3"), 0, 3),
        (("accelerator=cpu",), 4, 1),
        (("accelerator=auto",), 0, 1),
        (("accelerator=auto",), 4, 4),
        (("accelerator=auto", "gpus=2"), 4, 2),
        (("accelerator=cuda",), 4, 4),
        (("accelerator=cuda", "gpus=1"), 4, 1),
    ],
)
def test_processes_are_the_configured_number_else_all_gpus_else_one(
    overrides: tuple[str, ...], gpus: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    see_gpus(monkeypatch, gpus)
    assert processes_per_node(trainer(*overrides)) == expected


@pytest.mark.parametrize(
    ("overrides", "gpus", "sentence"),
    [
        (("accelerator=auto", "gpus=2"), 0, r"trainer\.gpus=2, but torch .* sees no GPU; trainer\.accelerator=cpu"),
        (("accelerator=cuda",), 0, r"trainer\.accelerator=cuda, but torch .* sees no GPU"),
        (("accelerator=auto", "gpus=8"), 4, r"trainer\.gpus=8, but this machine shows 4; use trainer\.gpus=4"),
    ],
)
def test_gpus_that_are_not_there_are_refused(
    overrides: tuple[str, ...], gpus: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    see_gpus(monkeypatch, gpus)
    with pytest.raises(UserError, match=sentence):
        processes_per_node(trainer(*overrides))


def test_torchruns_number_counts_and_a_contradiction_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    started_by_torchrun(monkeypatch, 4)
    assert processes_per_node(trainer("accelerator=cpu")) == 4
    assert processes_per_node(trainer("accelerator=cpu", "gpus=4")) == 4
    with pytest.raises(UserError, match=r"trainer\.gpus=2, but torchrun started 4 processes on this node"):
        processes_per_node(trainer("accelerator=cpu", "gpus=2"))


def test_more_torchrun_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    started_by_torchrun(monkeypatch, 4)
    see_gpus(monkeypatch, 2)
    with pytest.raises(UserError, match="this machine shows 2"):
        processes_per_node(trainer("accelerator=auto"))


def test_the_device_is_the_configured_one_else_the_available_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_type(trainer("accelerator=auto")) == device_type(trainer("accelerator=cpu")) == "cpu"
    see_gpus(monkeypatch, 1)
    assert device_type(trainer("accelerator=auto")) == "cuda"
    assert device_type(trainer("accelerator=cpu")) == "cpu"


# ---- threads ----------------------------------------------------------------------------------------


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """T42: eight processes with as many threads as cores each would compete."""
    monkeypatch.setattr("recipe.distributed.usable_cores", lambda: 16)
    assert [threads_per_process(None, world(size)) for size in (1, 2, 5, 16, 40)] == [16, 8, 3, 1, 1]
    assert threads_per_process(7, world(8)) == 7


# ---- a world of one ---------------------------------------------------------------------------------


def test_a_world_of_one_reduces_to_itself() -> None:
    alone = world()
    assert alone.is_rank0
    assert alone.sum(torch.tensor([3])).tolist() == [3]
    assert alone.gather("x") == ["x"]
    assert alone.broadcast_from_rank0("x") == "x"
    alone.barrier()
    alone.assert_equal_across_ranks("anything", "0")


def test_a_failure_of_the_first_keeps_its_kind() -> None:
    with pytest.raises(DiskError, match="full"), world().rank0_errors_everywhere():
        raise DiskError("full")


def test_hardware_on_a_cpu_names_no_accelerator() -> None:
    assert hardware_of(world()).accelerator is None
    assert hardware_of(world()).cores == usable_cores()
    assert device_versions(world()) == {"torch": torch.__version__}


# ---- launching --------------------------------------------------------------------------------------


def where_it_runs(config: Config) -> tuple[int, str]:
    return os.getpid(), config.name


def test_one_process_runs_right_here(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_config("experiment=smoke")
    assert launch(where_it_runs, config) == (os.getpid(), "smoke")
    started_by_torchrun(monkeypatch, 4)
    assert launch(where_it_runs, replace(config, trainer=trainer("gpus=4"))) == (os.getpid(), "smoke")


def two_processes(directory: Path) -> Config:
    return compose_config("experiment=smoke", "trainer.gpus=2", "trainer.timeout_seconds=60", f"run_dir={directory}")


def disagreement(worlds: World, mine: str) -> str:
    try:
        worlds.assert_equal_across_ranks("the source code", mine)
    except UserError as error:
        return str(error)
    return "agreed"


def decision(worlds: World, fails: bool) -> str:
    try:
        with worlds.rank0_errors_everywhere():
            if worlds.is_rank0 and fails:
                raise DiskError("no space")
    except UserError as error:
        return f"exit code {error.exit_code}: {error}"
    return "went on"


def report(config: Config) -> dict[str, Any]:
    """The facts of every process, gathered on the first."""
    with start_world(config.trainer) as found:
        mine = {
            "place": (found.rank, found.size, found.local_rank, found.local_size, found.backend),
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "same": disagreement(found, "a" * 64),
            "different": disagreement(found, "ab"[found.rank] * 64),
            "fails": decision(found, fails=True),
            "passes": decision(found, fails=False),
            "name": config.name,
        }
        found.barrier()
        gathered = found.gather(mine)
    return {"first": found.is_rank0, "ranks": gathered}


def second_fails(config: Config) -> None:
    """Rank 1 raises `UserError` while the others wait for it."""
    if os.environ["RANK"] == "1":
        raise DiskError("cannot write runs/x: the disk is full")
    with start_world(config.trainer):
        pass


def second_fails_inside(config: Config) -> None:
    """Rank 1 fails inside the group while the first one waits for it in a collective operation."""
    with start_world(config.trainer) as found:
        if not found.is_rank0:
            raise DiskError("shard x is damaged") if config.seed == 0 else RuntimeError("out of memory")
        found.barrier()


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "sentence"), [(0, "shard x is damaged"), (1, "rank . failed")])
def test_a_process_that_fails_among_others_does_not_wait_for_them(tmp_path: Path, seed: int, sentence: str) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerError, match=sentence):
        launch(second_fails_inside, replace(two_processes(tmp_path), seed=seed))
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("is_launched", "has_failed", "leaves"),
    [(False, False, True), (False, True, True), (True, False, True), (True, True, False)],
)
def test_a_failed_process_does_not_wait_for_the_others(
    monkeypatch: pytest.MonkeyPatch, is_launched: bool, has_failed: bool, leaves: bool
) -> None:
    if is_launched:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "somewhere")
    else:
        monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    left: list[bool] = []
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(True))
    distributed._leave_group(World(0, 2, 0, 2, torch.device("cpu"), "nccl"), has_failed)
    assert bool(left) == leaves


def different_data(config: Config) -> None:
    """Two nodes, two data sets."""
    with start_world(config.trainer) as found:
        found.assert_equal_across_ranks("the data set's manifest", str(found.rank))


@pytest.mark.slow
def test_processes_that_see_different_data_stop(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="the data set's manifest differs between processes"):
        launch(different_data, two_processes(tmp_path))


@pytest.mark.process
def test_launch_gives_the_first_processs_result(tmp_path: Path) -> None:
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    result = launch(report, two_processes(tmp_path))
    assert {number: signal.getsignal(number) for number in handlers} == handlers, "torch's own would outlive the launch"
    assert result["first"]
    first, second = result["ranks"]
    assert (first["place"], second["place"]) == ((0, 2, 0, 2, "gloo"), (1, 2, 1, 2, "gloo"))
    assert first["threads"] == second["threads"] == max(1, usable_cores() // 2)
    assert first["deterministic"] is second["deterministic"] is True
    assert first["same"] == second["same"] == "agreed"
    expected = f"the source code differs between processes: rank 0: {'a' * 16}, rank 1: {'b' * 16}"
    assert first["different"] == second["different"] == expected
    assert first["passes"] == second["passes"] == "went on"
    assert first["name"] == second["name"] == "smoke"
    assert first["fails"] == second["fails"] == "exit code 74: no space"  # of the one that the launcher sees first


@pytest.mark.slow
def test_an_error_of_rank_1_is_reported_with_its_exit_code(tmp_path: Path) -> None:
    with pytest.raises(WorkerError) as failure:
        launch(second_fails, two_processes(tmp_path))
    assert str(failure.value) == "cannot write runs/x: the disk is full"
    assert failure.value.exit_code == DiskError.exit_code == 74
