"""The launch of a process: one decision for training, preprocessing and the recorded command."""

from __future__ import annotations

import pytest

from recipe.errors import UserError
from recipe.run.launcher import ALONE, Launch, launched, report_ignored
from tests.builders.ranks import torchrun_environment


def test_rank_and_size_come_from_torchrun() -> None:
    assert launched(torchrun_environment(0, 1)) == Launch(0, 1, 1, 0, is_elastic=True)
    assert launched(torchrun_environment(2, 3)) == Launch(2, 3, 3, 2, is_elastic=True)
    assert launched(torchrun_environment(9, 16, nodes=2)) == Launch(9, 16, 8, 1, is_elastic=True)
    inside_srun = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "PMI_SIZE": "2"}
    assert launched(torchrun_environment(1, 2) | inside_srun).size == 2


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "", "RANK": ""},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "23456"},
        {"WORLD_SIZE": "1", "RANK": "1"},
        {"RANK": "x"},
        {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script
        {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
    ids=str,
)
def test_variables_without_effect_mean_one_process(environment: dict[str, str]) -> None:
    assert launched(environment) == ALONE


@pytest.mark.parametrize(
    ("environment", "seen", "way_out"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2", "unset WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "5"}, "WORLD_SIZE=2", "unset WORLD_SIZE"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two", "unset WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0", "unset WORLD_SIZE"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, "SLURM_PROCID=1", "unset SLURM_PROCID"),
        (
            {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "PMI_SIZE": "4"},
            "SLURM_STEP_NUM_TASKS=4, PMI_SIZE=4, SLURM_PROCID=3",
            "unset SLURM_STEP_NUM_TASKS PMI_SIZE SLURM_PROCID",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2", "unset OMPI_COMM_WORLD_SIZE"),
    ],
    ids=str,
)
def test_several_processes_of_another_launcher_are_refused(
    environment: dict[str, str], seen: str, way_out: str
) -> None:
    with pytest.raises(UserError) as refused:
        launched(environment)
    assert str(refused.value).startswith(f"{seen} in the environment: ")
    assert f"start it with torchrun, or `{way_out}`" in str(refused.value)
    remaining = {name: value for name, value in environment.items() if name not in way_out.split()}
    assert launched(remaining) == ALONE


@pytest.mark.parametrize(
    "changed",
    [
        {"RANK": "2"},
        {"RANK": "-1"},
        {"RANK": "x"},
        {"WORLD_SIZE": ""},
        {"LOCAL_RANK": "2"},
        {"LOCAL_WORLD_SIZE": "3", "LOCAL_RANK": "2"},
        {"LOCAL_WORLD_SIZE": "0"},
    ],
    ids=str,
)
def test_contradicting_variables_of_torchrun_are_refused(changed: dict[str, str]) -> None:
    environment = torchrun_environment(1, 2) | changed
    with pytest.raises(UserError, match="contradict one another: start with torchrun, or `unset TORCHELASTIC_RUN_ID`"):
        launched(environment)


def test_variables_that_have_no_effect_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    report_ignored({"RANK": "1", "WORLD_SIZE": "1", "LOCAL_RANK": ""})
    assert capsys.readouterr().err == "ignored, as torchrun did not start this: RANK=1, WORLD_SIZE=1\n"
    report_ignored({})
    report_ignored(torchrun_environment(1, 2))
    assert capsys.readouterr().err == ""
