"""One of two recipes that `diff` compares: its JSON block, or the same made from its records.

The block may come from anybody: a value of another type than expected counts as absent.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from recipe.config.identity import flatten
from recipe.document.recipe_json import recipe_claims
from recipe.errors import UserError
from recipe.review.findings import LINE_LENGTH_MAX, shorten
from recipe.review.opening import OpenedRecipe, dict_or_empty
from recipe.review.reading import RecordReader
from recipe.run.records import TrainingRecord

LARGEST_FLOAT = 1e300
Curve = list[tuple[float, float]]  # (share of training, learning rate), in order


@dataclass(frozen=True)
class Comparable:
    """A recipe's JSON block, and its training record where records are there."""

    name: str
    block: dict[str, Any]
    training: TrainingRecord | None

    @classmethod
    def from_recipe(cls, recipe: OpenedRecipe) -> Comparable:
        """By the records, else by the document's block; raises `UserError` where there is neither."""
        if recipe.run is None:
            return cls(recipe.name, recipe.required_block(), None)
        reader = RecordReader(recipe.run)
        facts = reader.facts()
        for finding in reader.findings:
            raise UserError(shorten(f"{recipe.name}, {finding.place}: {finding.what}", LINE_LENGTH_MAX))
        return cls(recipe.name, json.loads(json.dumps(recipe_claims(facts))), facts.training)

    def claims(self, chapter: str) -> dict[str, Any]:
        """The claims of a chapter; empty where its stage has not run."""
        return dict_or_empty(dict_or_empty(self.block.get("claims")).get(chapter))

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, flat."""
        return flatten(dict_or_empty(self.block.get("config")))

    @property
    def epochs(self) -> dict[str, list[Any]]:
        """The columns of the dynamics."""
        columns = dict_or_empty(self.claims("training").get("epochs"))
        return {name: values for name, values in columns.items() if isinstance(values, list)}

    def learning_rates(self) -> list[Curve]:
        """The learning rate over the share of training, the best source first; empty where a source is missing.

        The sources: the schedule as the run evaluated it, the trace, the end of each epoch.
        """
        points, steps = [], 1
        if self.training is not None:
            points, steps = self.training.schedule.points, max(self.training.schedule.steps - 1, 1)
        evaluated = sorted((step / steps, rate) for step, rate in points)
        traced = numbers_or_empty(dict_or_empty(self.block.get("fingerprint")).get("learning_rates"))
        ends = numbers_or_empty(self.epochs.get("learning_rate"))
        return [
            evaluated if len(evaluated) > 1 else [],
            [(at / (len(traced) - 1), rate) for at, rate in enumerate(traced)] if len(traced) > 1 else [],
            [((at + 1) / len(ends), rate) for at, rate in enumerate(ends)] if len(ends) > 1 else [],
        ]


def numbers_or_empty(values: object) -> list[float]:
    return values if isinstance(values, list) and all(is_finite_number(value) for value in values) else []


def is_finite_number(value: Any) -> bool:
    """Whether a value is a number that can be computed with without overflow."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST_FLOAT < value < LARGEST_FLOAT


def value_at(curve: Curve, share: float) -> float:
    """The curve at a share of training, linear between its points."""
    for (left, low), (right, high) in pairwise(curve):
        if share <= right:
            within = (share - left) / (right - left) if right > left else 1.0
            return low + (high - low) * min(max(within, 0.0), 1.0)
    return curve[-1][1]
