"""Everything that a continuation needs: tensors, and a few numbers about how far the run has come.

The order of an epoch and the pixels of a sample are functions of the seed, so the position in the data is just
(epoch, batch); the learning rate is a function of the step. There is no generator and no scheduler to save.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec
import torch
from torch import nn

from recipe.checkpoint import State, newest_checkpoint, prune_checkpoints, save_checkpoint
from recipe.config.identity import Pinned
from recipe.distributed import World
from recipe.errors import NonFiniteError, UserError
from recipe.records import Epoch, Interface, Session
from recipe.run import Run, now, shown_path
from recipe.training.averaging import WeightAverage
from recipe.training.optimization import Stepper


@dataclass
class Progress:
    """How far a run has come; all of it is saved with every checkpoint."""

    epoch: int = 0  # completed epochs, their validation included
    batch: int = 0  # completed batches of the epoch after those
    trained_epochs: int = 0  # whose last step is done
    step: int = 0  # completed optimizer steps
    images_seen: int = 0
    best_epoch: int = 0
    best_step: int = 0
    best_top1_accuracy: float = -1.0
    training_seconds: float = 0.0
    validation_seconds: float = 0.0
    epoch_seconds: float = 0.0  # of training, since the last completed epoch
    epoch_waited_seconds: float = 0.0  # of these, for data
    epoch_held_up_seconds: float = 0.0  # of these, by the measure of `Probe`
    peak_memory_bytes: int = 0  # of the accelerator
    window: dict[str, Any] = field(default_factory=dict)  # since the last row: a tally per process, and seconds
    epochs: list[dict[str, Any]] = field(default_factory=list)
    sessions: list[dict[str, Any]] = field(default_factory=list)

    def epoch_records(self) -> list[Epoch]:
        """Every epoch's cost."""
        return [Epoch(**epoch) for epoch in self.epochs]

    def tally_of(self, world: World) -> list[float]:
        """What this process had counted since the last row; with another number of them the first has it all."""
        tallies = self.window.get("tallies", [])
        if len(tallies) == world.size:
            mine: list[float] = tallies[world.rank]
            return mine
        return [sum(column) for column in zip([0.0] * 4, *tallies, strict=True)] if world.is_first else [0.0] * 4

    def lap(self) -> tuple[float, float]:
        """(seconds since the last row, of which waited for data)."""
        return self.window.get("seconds", 0.0), self.window.get("waited_seconds", 0.0)

    def session_records(self) -> list[Session]:
        """Every uninterrupted stretch."""
        return [Session(**session) for session in self.sessions]


@dataclass(frozen=True)
class TrainingState:
    """The live objects whose tensors are saved, and what must be equal for a continuation to be bit-exact."""

    run: Run
    model: nn.Module  # the bare one, not its replica
    average: WeightAverage
    stepper: Stepper
    progress: Progress
    pinned: Pinned
    interface: Interface
    manifest_sha256: str
    circumstances: dict[str, Any]

    def save(self, keep: int) -> None:
        """Write a checkpoint, then delete those that are no longer needed; refuses weights that are not finite."""
        model = self.model.state_dict()
        if not all(torch.isfinite(tensor).all() for tensor in model.values()):
            raise NonFiniteError(
                f"the weights are not finite at step {self.progress.step}; no checkpoint is written, "
                "the last one is kept"
            )
        state: State = {
            "config": self.pinned.values,
            "config_sha256": self.pinned.config_sha256,
            "interface": msgspec.to_builtins(self.interface),
            "manifest_sha256": self.manifest_sha256,
            "circumstances": self.circumstances,
            "progress": asdict(self.progress),
            "model": model,
            "average": self.average.state(),
            "optimizer": self.stepper.optimizer.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
            "skipped_steps": self.stepper.skipped_steps,
        }
        save_checkpoint(self.run.checkpoints, self.progress.step, state)
        prune_checkpoints(self.run.checkpoints, keep, self.progress.best_step)

    def restore(self, state: State | None, world: World) -> None:
        """Continue from a checkpoint, or begin; notes the session and whether it can be bit-exact."""
        if state is None:
            self._begin_session(world.size, is_exact=None, note="from the beginning")
            return
        self._must_match(state)
        self._restore("model", self.model.load_state_dict, state)
        self._restore("average", self.average.restore, state)
        self._restore("optimizer", self._restore_optimizer, state)
        self._restore("scaler", self.stepper.scaler.load_state_dict, state)
        self._restore("progress", self._restore_progress, state)
        self.stepper.skipped_steps = state["skipped_steps"]
        self.stepper.tally += self.stepper.tally.new_tensor(self.progress.tally_of(world))  # on its own device
        changed = changes(state["circumstances"], self.circumstances)
        if next(self.model.parameters()).is_cuda and not torch.are_deterministic_algorithms_enabled():
            changed.append("algorithms are not deterministic (trainer.deterministic=false)")
        note = f"continued at step {self.progress.step}" + (f", not bit-exact: {'; '.join(changed)}" if changed else "")
        self._begin_session(world.size, is_exact=not changed, note=note)

    def _restore(self, entry: str, restore: Callable[[Any], object], state: State) -> None:
        """Hand one entry to its owner; a file with a right checksum may still hold what training never wrote."""
        try:
            restore(state[entry])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise UserError(
                f"the entry {entry!r} of the checkpoint of step {state['progress']['step']} in "
                f"{shown_path(self.run.directory)} does not fit this run ({type(error).__name__}); remove its file to "
                "continue from the one before, or begin again with trainer.restart=true"
            ) from error

    def _restore_optimizer(self, saved: dict[str, Any]) -> None:
        optimizer = self.stepper.optimizer
        optimizer.load_state_dict(saved)
        for parameter, buffers in optimizer.state.items():
            for name, buffer in buffers.items():
                if isinstance(buffer, torch.Tensor) and buffer.dim() and buffer.shape != parameter.shape:
                    raise ValueError(f"{name} has another shape than its parameter")

    def _restore_progress(self, saved: dict[str, Any]) -> None:
        found = msgspec.convert(saved, Progress)
        for name in saved.keys() & vars(found).keys():
            setattr(self.progress, name, getattr(found, name))

    def _must_match(self, state: State) -> None:
        for what, mine in (("config_sha256", self.pinned.config_sha256), ("manifest_sha256", self.manifest_sha256)):
            if state[what] != mine:
                raise UserError(
                    f"the checkpoint's {what} is {state[what][:16]}, this run's is {mine[:16]}: it belongs "
                    "to another configuration or data set; give another run_dir"
                )

    def _begin_session(self, processes: int, is_exact: bool | None, note: str) -> None:
        self.progress.sessions.append(
            {
                "started": now(),
                "first_step": self.progress.step,
                "processes": processes,
                "is_exact": is_exact,
                "note": note,
                "source": self.circumstances["the source"],
                "images_per_batch_norm": self.circumstances["images per forward pass"],
            }
        )


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs between the circumstances of two sessions, in words."""
    return [f"{name} was {before.get(name)}, is {value}" for name, value in after.items() if before.get(name) != value]


def saved_state(run: Run) -> State | None:
    """The newest valid checkpoint; leftovers of an interrupted writing are removed first."""
    for leftover in run.checkpoints.glob("*.tmp-*"):
        leftover.unlink()
    state = newest_checkpoint(run.checkpoints)
    if state is not None:
        progress = state["progress"]
        print(f"continuing in epoch {progress['epoch'] + 1} at step {progress['step']}", file=sys.stderr, flush=True)
    return state
