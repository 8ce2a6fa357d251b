"""One recipe of a comparison: its JSON block, or the same made from its records, and what follows from it.

The block may come from a stranger: whatever is not of the expected type counts as absent.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from recipe.config.identity import flatten
from recipe.document.claims import identity
from recipe.errors import UserError
from recipe.records import TrainingRecord
from recipe.review.findings import printable
from recipe.review.opening import Subject
from recipe.review.reading import Reader


@dataclass(frozen=True)
class Side:
    """One recipe: its JSON block, or the same made from its records."""

    name: str
    block: dict[str, Any]
    training: TrainingRecord | None  # where records are there

    def claims(self, chapter: str) -> dict[str, Any]:
        """What is claimed of a chapter; nothing where its stage has not run."""
        return objects(objects(self.block.get("claims")).get(chapter))

    @property
    def config(self) -> dict[str, Any]:
        return flatten(objects(self.block.get("config")))

    @property
    def epochs(self) -> dict[str, list[Any]]:
        """Columns of the dynamics."""
        return {
            name: values for name, values in objects(self.claims("training").get("epochs")).items() if is_list(values)
        }


def objects(value: object) -> dict[str, Any]:
    """A JSON object, or an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def is_list(value: object) -> bool:
    return isinstance(value, list)


def side_of(subject: Subject) -> Side:
    """The records where they are there, else the document's JSON block; raises `UserError` where there is neither."""
    if subject.run is None:
        return Side(subject.name, subject.claims(), None)
    reader = Reader(subject.run)
    facts = reader.facts()
    if reader.findings:
        found = reader.findings[0]
        raise UserError(printable(f"{subject.name}, {found.place}: {found.what}"))
    return Side(subject.name, json.loads(json.dumps(identity(facts))), facts.training)


def is_number(value: Any) -> bool:
    """A finite number of ordinary size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


LARGEST = 1e300


Curve = list[tuple[float, float]]  # (share of training, learning rate), in order


def curves_of(side: Side) -> list[Curve]:
    """The learning rate over the share of training, the best source first; an empty one where there is none.

    The schedule as the run evaluated it; the canary's rates; the rate at the end of each epoch.
    """
    training = side.training
    points = training.schedule.points if training is not None else []
    steps = max(training.schedule.steps - 1, 1) if training is not None else 1
    evaluated = sorted((step / steps, rate) for step, rate in points)
    sampled = numbers(objects(side.block.get("fingerprint")).get("learning_rates"))
    ends = numbers(side.epochs.get("learning_rate"))
    return [
        evaluated if len(evaluated) > 1 else [],
        [(at / (len(sampled) - 1), rate) for at, rate in enumerate(sampled)] if len(sampled) > 1 else [],
        [((at + 1) / len(ends), rate) for at, rate in enumerate(ends)] if len(ends) > 1 else [],
    ]


def numbers(values: object) -> list[float]:
    """A list of numbers; empty for anything else."""
    return values if isinstance(values, list) and all(is_number(value) for value in values) else []


def value_at(curve: Curve, share: float) -> float:
    """Read between the points."""
    for (left, low), (right, high) in pairwise(curve):
        if share <= right:
            within = (share - left) / (right - left) if right > left else 1.0
            return low + (high - low) * min(max(within, 0.0), 1.0)
    return curve[-1][1]
