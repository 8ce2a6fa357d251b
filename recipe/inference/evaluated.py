"""The evaluated checkpoint of a run, whose accuracy is known: it is exported, timed and shown."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from recipe.errors import UserError
from recipe.models.build import restored_model, weights_sha256
from recipe.models.checkpoint import eval_weights, interface_of, load_checkpoint
from recipe.run.directory import Run
from recipe.run.files import display_path
from recipe.run.records import EvaluationRecord, Interface, TrainingRecord


@dataclass(frozen=True)
class Evaluated:
    """The network with its weights on the CPU, its interface and its records."""

    where: str  # the checkpoint's file
    model: nn.Module  # in evaluation mode
    interface: Interface
    weights_sha256: str
    manifest_sha256: str  # of the data set that it was trained on
    training: TrainingRecord
    evaluation: EvaluationRecord


def load_evaluated(run: Run) -> Evaluated:
    """Load the checkpoint of the evaluation record. Raises `UserError` with the command to run first, or again."""
    here = display_path(run.directory)
    training, evaluation = run.read(TrainingRecord), run.read(EvaluationRecord)
    if training is None:
        raise UserError(f"{here} holds no finished training: run `python train.py run_dir={here}` first")
    if evaluation is None:
        raise UserError(
            f"{here} holds no evaluation, and a model of unknown accuracy is not used: "
            f"run `python evaluate.py run_dir={here}` first"
        )
    path = run.checkpoints / evaluation.protocol.checkpoint
    where, state = display_path(path), load_checkpoint(path)
    weights = weights_sha256(eval_weights(state))
    if weights != evaluation.inputs.get("weights"):
        raise UserError(
            f"{where} holds other weights than those that were evaluated: run `python evaluate.py run_dir={here}` again"
        )
    return Evaluated(
        where=where,
        model=restored_model(state, where).eval(),
        interface=interface_of(state, where),
        weights_sha256=weights,
        manifest_sha256=state["manifest_sha256"],
        training=training,
        evaluation=evaluation,
    )
