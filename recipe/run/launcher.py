"""Rank and size of this process's launch, from environment variables.

Only torch's elastic engine (torchrun, or `trainer.gpus=N` through it) starts processes that work together. Several
processes of another launcher would each work alone on the same files, so they are refused. Leftover variables of one
process are ignored.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recipe.errors import UserError

ELASTIC = "TORCHELASTIC_RUN_ID"  # what torch.distributed.is_torchelastic_launched looks at
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SIZES = (  # of job systems, srun, mpirun, mpiexec
    *("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"),
    *("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
)
TASK = "SLURM_PROCID"  # of srun. 0 in a batch script, which is one process and also has SLURM_NTASKS


@dataclass(frozen=True)
class Launch:
    """The place of this process among those of its launch."""

    rank: int = 0
    size: int = 1
    local_size: int = 1  # on this node
    local_rank: int = 0
    is_elastic: bool = False  # started by torch's elastic engine

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0


ALONE = Launch()


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """The place of this process. Empty variables count as unset.

    Raises `UserError` if the variables contradict one another, or if another launcher than torchrun started several
    processes.
    """
    if environment.get(ELASTIC) is not None:
        return _elastic(environment)
    asking = [name for name in SIZES if environment.get(name, "") not in ("", "1")]
    asking += [TASK] if environment.get(TASK, "") not in ("", "0") else []
    if asking:
        raise UserError(
            f"{_shown(asking, environment)} in the environment: this is one of several processes, but torchrun did not "
            f"start it; start it with torchrun, or `unset {' '.join(asking)}` to work without the others"
        )
    return ALONE


def report_ignored(environment: Mapping[str, str] = os.environ) -> None:
    """Print the ignored variables of another launch."""
    left = [name for name in PLACE if environment.get(name)]
    if left and environment.get(ELASTIC) is None:
        print(f"ignored, as torchrun did not start this: {_shown(left, environment)}", file=sys.stderr, flush=True)


def _elastic(environment: Mapping[str, str]) -> Launch:
    words = [environment.get(name, "") for name in PLACE]
    if all(word.isdecimal() for word in words):
        rank, size, local_rank, local_size = map(int, words)
        if rank < size and local_rank < local_size <= size:
            return Launch(rank, size, local_size, local_rank, is_elastic=True)
    raise UserError(
        f"{_shown((ELASTIC, *PLACE), environment)} in the environment contradict one another: start with torchrun, "
        f"or `unset {ELASTIC}`"
    )


def _shown(names: Sequence[str], environment: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={environment.get(name, '')}" for name in names)
