"""The JSON block of the document: a recipe and its claims, for programs.

All of it is copied from the records of the run. `recipe.review` compares it with another machine, checkout or run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from recipe.config.identity import config_sha256, recipe_id
from recipe.document.run_data import RunData
from recipe.run.records import (
    Epoch,
    EvaluationRecord,
    PreprocessingRecord,
    SeedCounts,
    SeedsRecord,
    SerializationRecord,
    TrainingRecord,
    record_sha256,
)

RECIPE_FORMAT = "recipe/1"
RECORD_OF_CLAIM = {  # chapter of the claims -> record
    "data": "preprocessing",
    "training": "training",
    "evaluation": "evaluation",
    "serialization": "serialization",
}
DYNAMICS = (
    *("epoch", "learning_rate", "train_loss", "train_top1"),
    *("validation_loss", "validation_top1", "validation_top5"),
)
LINE_MAX = 400  # letters of a line of JSON


def recipe_claims(facts: RunData) -> dict[str, Any]:
    """The pinned configuration with its hashes, and every claim. Nulls where nothing was run yet."""
    training = facts.training
    return {
        "format": RECIPE_FORMAT,
        "config": facts.config,
        "config_sha256": config_sha256(facts.config) if facts.config else None,
        "recipe_id": recipe_id(facts.config) if facts.config else None,
        "code": training_code(training) if training else None,
        "determinism_context": training.determinism_context if training else None,
        "claims": {
            "data": data_claims(facts.preprocessing) if facts.preprocessing else None,
            "training": training_claims(training) if training else None,
            "evaluation": evaluation_claims(facts.evaluation) if facts.evaluation else None,
            "serialization": serialization_claims(facts.serialization) if facts.serialization else None,
            "seeds": seeds_claims(facts.seeds, facts.seeds.evaluation)
            if facts.seeds and facts.seeds.evaluation
            else None,
        },
        "fingerprint_sha256": record_sha256(facts.fingerprint) if facts.fingerprint else None,
    }


def as_json(values: dict[str, Any]) -> str:
    """Readable JSON: an object or a list on one line if it fits, else its entries, short ones side by side.

    ASCII. Every inner line is indented, so that none of them is markdown.
    """
    return _encoded(values, "")


def _encoded(value: Any, indent: str, name: str = "") -> str:
    line = name + json.dumps(value, ensure_ascii=True, allow_nan=False)
    room = LINE_MAX - len(indent) - len(", ")
    if not isinstance(value, dict | list) or not value or (indent and len(line) < room):
        return line
    if isinstance(value, dict):
        (opened, closed), named = "{}", [(f"{json.dumps(key)}: ", entry) for key, entry in value.items()]
    else:
        (opened, closed), named = "[]", [("", entry) for entry in value]
    lines: list[str] = []
    for name_of, entry in named:
        text, is_scalar = _encoded(entry, indent + "  ", name_of), not isinstance(entry, dict | list)
        if lines and is_scalar and not lines[-1].endswith(("}", "]")) and len(lines[-1]) + len(text) + 4 < room:
            lines[-1] += f", {text}"
        else:
            lines.append(text)
    return name + opened + "\n" + ",\n".join(f"{indent}  {text}" for text in lines) + f"\n{indent}{closed}"


def training_code(training: TrainingRecord) -> dict[str, Any]:
    provenance = training.provenance
    return {
        "command": provenance.command,
        "commit": provenance.commit,
        "tree": provenance.tree_at_start.state,
        "source_sha256": provenance.source_sha256,
        "source_sha256_at_end": provenance.source_sha256_at_end,
    }


def data_claims(preprocessing: PreprocessingRecord) -> dict[str, Any]:
    """The data set. `raw_sha256` is equal for every layout of the same images."""
    return {
        "data_set": preprocessing.data_set,
        "manifest_sha256": preprocessing.outputs.get("manifest"),
        "classes": preprocessing.class_count,
        "class_list_sha256": preprocessing.class_list_sha256,
        "splits": {
            name: {"images": split.images, "raw_sha256": split.raw_sha256}
            for name, split in preprocessing.splits.items()
        },
    }


def training_claims(training: TrainingRecord) -> dict[str, Any]:
    """The start, course and result of training."""
    return {
        "initial_weights_sha256": training.model.initial_weights_sha256,
        "architecture_sha256": training.model.architecture_sha256,
        "parameters": training.model.parameters,
        "order_sha256": training.loader.order_sha256,
        "augmentation_sha256": training.augmentation_sha256,
        "steps": training.schedule.steps,
        "steps_per_epoch": training.schedule.steps_per_epoch,
        "images_seen": training.images_seen,
        "batch_norm_batch_size": training.loader.batch_norm_batch_size,
        "processes": training.processes,
        "accelerator": training.provenance.hardware.accelerator,
        "is_exact": all(session.is_exact is not False for session in training.sessions),
        "weights_sha256": training.outputs.get("weights"),
        "epochs": columns(training.epochs),
    }


def columns(epochs: Sequence[Epoch]) -> dict[str, list[Any]]:
    """One list for each column, so that 600 epochs stay a few lines. How long an epoch took is not a claim."""
    return {name: [getattr(epoch, name) for epoch in epochs] for name in DYNAMICS}


def evaluation_claims(evaluation: EvaluationRecord) -> dict[str, Any]:
    """The metric as integer counts, and how it was measured."""
    return {
        "protocol": evaluation.protocol.name,
        "transform_sha256": evaluation.protocol.transform_sha256,
        "decoder": evaluation.protocol.decoder,
        "weights_sha256": evaluation.inputs.get("weights"),
        "images": evaluation.images,
        "correct_top1": evaluation.correct_top1,
        "correct_top5": evaluation.correct_top5,
        "loss": evaluation.loss,
        "runs": evaluation.runs,
    }


def serialization_claims(serialization: SerializationRecord) -> dict[str, Any]:
    return {
        entry.variant: {
            "sha256": entry.sha256,
            "correct_top1": entry.correct_top1,
            "correct_top5": entry.correct_top5,
            "flips": entry.flips,
        }
        for entry in serialization.variants
    }


def seeds_claims(seeds: SeedsRecord, evaluation: SeedCounts) -> dict[str, Any]:
    """Several runs of the recipe. Their epochs are in records/seeds.json."""
    return {"seeds": [run.seed for run in seeds.runs], **msgspec.to_builtins(evaluation)}
