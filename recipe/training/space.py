"""Whether the disk will hold what a run leaves, asked before the first step instead of found out in the night.

What counts is what this user may still write on the file system of the run directory; quotas are not seen here.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable

from torch import Tensor

from recipe.checkpoint import checkpoint_files
from recipe.config.schema import OptimizerKind
from recipe.errors import DiskError
from recipe.run import shown_path
from recipe.training.build import Training

MOMENTS = {OptimizerKind.lamb: 2}  # tensors that an optimizer keeps per parameter; one, where it is not named


def check_space(training: Training) -> None:
    """On the first process: warn where the disk cannot hold all checkpoints, stop where it cannot hold one."""
    if not training.world.is_first:
        return
    directory = training.run.directory
    free, one, wanted = shutil.disk_usage(directory).free, checkpoint_bytes(training), checkpoints_at_once(training)
    kept = sum(path.stat().st_size for path in checkpoint_files(training.run.checkpoints))
    where = f"the disk of {shown_path(directory)} has {mib(free)} left, and"
    if free < one:
        raise DiskError(f"{where} a checkpoint takes {mib(one)}; free some space, or give a run_dir on another disk")
    if free + kept < one * wanted:
        print(
            f"warning: {where} {wanted} checkpoints of {mib(one)} will be there at once "
            f"(trainer.keep_checkpoints={training.config.trainer.keep_checkpoints}, the best one, one being written); "
            "free some space, or keep fewer",
            file=sys.stderr,
            flush=True,
        )


def checkpoint_bytes(training: Training) -> int:
    """Size of a checkpoint: of one that is there, else that of its tensors."""
    files = checkpoint_files(training.run.checkpoints)
    if files:
        return files[-1].stat().st_size
    weights = size(training.model.state_dict().values())
    averages = 1 if training.average.is_on else 0
    moments = MOMENTS.get(training.config.optimization.optimizer, 1)
    return weights * (1 + averages) + moments * size(training.model.parameters())


def checkpoints_at_once(training: Training) -> int:
    """The newest, the best one, and one that is being written; a short run has fewer."""
    trainer, epochs = training.config.trainer, training.config.optimization.epochs
    kept = trainer.keep_checkpoints + 1
    return min(kept, epochs) + 1 if trainer.save_every_steps is None else kept + 1


def size(tensors: Iterable[Tensor]) -> int:
    """In bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
