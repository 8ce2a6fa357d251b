"""`diff`: the differences of two recipes, those first that can explain a difference in accuracy."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from recipe.document.recipe_json import RECORD_OF_CLAIM
from recipe.errors import UserError
from recipe.review.diff.differences import (
    Comparable,
    Difference,
    circumstance_differences,
    config_differences,
    derived_differences,
    hidden_differences,
    is_finite_number,
)
from recipe.review.diff.impact import TITLES, Group, rank_of, theme_of
from recipe.review.findings import LINE_LENGTH_MAX, shorten
from recipe.review.opening import open_recipe

SHARES = (0.25, 0.5, 0.75, 1.0)  # of training, at which dynamics are compared
NORMAL_95 = 1.96


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("A", "B"):
        parser.add_argument(name.lower(), metavar=name, help="a run, a published recipe, or a document")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """0: the recipes and their results are the same, 1: they differ. Raises `UserError` for other files."""
    try:
        a, b = (Comparable.from_recipe(open_recipe(path)) for path in (arguments.a, arguments.b))
        comparison = compare_recipes(a, b)
    except RecursionError:
        raise UserError("one of the recipes is nested too deeply to be one") from None
    print(json.dumps(comparison.as_json(), indent=2) if arguments.json else "\n".join(comparison.lines()))
    return int(comparison.differs)


@dataclass
class DiffReport:
    a: str
    b: str
    differs: bool
    same_recipe: str  # a sentence if both are the same recipe, or empty
    differences: list[Difference]
    dynamics: list[str]
    results: list[str]
    not_compared: list[str]

    def as_json(self) -> dict[str, Any]:
        differences = [{**asdict(difference), "group": difference.group.name} for difference in self.differences]
        return {"format": "diff/1", **vars(self), "differences": differences}

    def lines(self) -> list[str]:
        lines = [f"A: {self.a}", f"B: {self.b}", *([self.same_recipe] if self.same_recipe else [])]
        sections = {
            title: [difference.line() for difference in self.differences if difference.group is group]
            for group, title in TITLES.items()
        }
        sections |= {"Dynamics": self.dynamics, "Results": self.results, "Not compared": self.not_compared}
        for title, entries in sections.items():
            lines += ["", f"{title}:", *(f"  {entry}" for entry in entries)] if entries else []
        return ["  " * line.startswith("  ") + shorten(line, LINE_LENGTH_MAX) for line in lines]


def compare_recipes(a: Comparable, b: Comparable) -> DiffReport:
    """All differences, in the order of their likely effect."""
    differences = [*config_differences(a, b)]
    themes = {theme_of(one.key) for one in differences if one.group is Group.accuracy}
    differences += derived_differences(a, b)
    differences += [one for one in hidden_differences(a, b) if theme_of(one.key) not in themes]
    differences += circumstance_differences(a, b)
    differences.sort(key=lambda one: (one.group, rank_of(one.key)))  # stable: equals keep the order of the schema
    results, results_differ = result_lines(a, b)
    ids = {str(recipe.block.get("recipe_id")) for recipe in (a, b)}
    same_recipe = ""
    if not differences:
        same_recipe = "the same recipe: nothing differs that was recorded"
    elif len(ids) == 1 and "None" not in ids:
        same_recipe = f"the same configuration but for the seed at most: recipe_id {shorten(ids.pop(), 16)}"
    return DiffReport(
        a=a.name,
        b=b.name,
        differs=bool(differences) or results_differ,
        same_recipe=same_recipe,
        differences=differences,
        dynamics=dynamics_lines(a, b),
        results=results,
        not_compared=not_compared(a, b),
    )


def dynamics_lines(a: Comparable, b: Comparable) -> list[str]:
    """Validation top-1 at equal share of training."""
    columns = [[value for value in one.epochs.get("validation_top1", []) if is_finite_number(value)] for one in (a, b)]
    if not all(columns) or columns[0] == columns[1]:
        return []
    lines = []
    for share in SHARES:
        epochs = [share * len(column) for column in columns]
        if all(count == int(count) for count in epochs):
            before, after = (column[int(count) - 1] for column, count in zip(columns, epochs, strict=True))
            change = f"{before:.2%} -> {after:.2%} ({100 * (after - before):+.2f} points)"
            lines.append(f"validation top-1 at {share:.0%} of training: {change}")
    return lines


def result_lines(a: Comparable, b: Comparable) -> tuple[list[str], bool]:
    """Accuracies with their counts, their difference and a bound on noise. True if anything differs."""
    before, after = a.claims("evaluation"), b.claims("evaluation")
    if not (has_counts(before) and has_counts(after)):
        return [], False
    lines = []
    for key, name in (("correct_top1", "top-1"), ("correct_top5", "top-5")):
        old, new = before[key] / before["images"], after[key] / after["images"]
        lines.append(
            f"{name}: {old:.2%} ({before[key]:,} of {before['images']:,}) -> {new:.2%} ({after[key]:,} of "
            f"{after['images']:,}), {100 * (new - old):+.2f} percentage points"
        )
    differ = any(before[key] != after[key] for key in ("correct_top1", "correct_top5", "images"))
    if before.get("weights_sha256") and before.get("weights_sha256") == after.get("weights_sha256"):
        return [*lines, "both measured the same weights"], differ
    lines.append(noise(before, after) if differ else "the counts are equal")
    return lines, differ or before.get("weights_sha256") != after.get("weights_sha256")


def has_counts(evaluation: dict[str, Any]) -> bool:
    """Whether an evaluation claims possible counts."""
    counts = [evaluation.get(name) for name in ("correct_top1", "correct_top5", "images")]
    if not all(isinstance(count, int) for count in counts):
        return False
    top1, top5, images = counts
    return bool(0 <= top1 <= top5 <= images < 2**53 and images > 0)  # type: ignore[operator]


def noise(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The meaning of a difference of two single runs: their spread is unknown, and a bound can only rule noise out."""
    if before.get("protocol") != after.get("protocol"):
        return "they were measured by different protocols: the difference is not a measure of the recipes"
    shares = [row["correct_top1"] / row["images"] for row in (before, after)]
    variances = [p * (1 - p) / row["images"] for p, row in zip(shares, (before, after), strict=True)]
    bound = 100 * NORMAL_95 * math.sqrt(sum(variances))
    difference = 100 * abs(shares[1] - shares[0])
    runs = [row.get("runs") for row in (before, after)]
    spread = "spread unknown (1 run each)" if runs == [1, 1] else f"spread not recorded ({runs[0]} and {runs[1]} runs)"
    verdict = (
        f"{difference:.2f} is within it: this says nothing about which recipe is better"
        if difference <= bound
        else f"{difference:.2f} is beyond it: more than the choice of images explains"
    )
    return (
        f"{spread}; binomial bound of a difference, 95 %: {bound:.2f} points; {verdict}. Seeds of long, converged "
        "trainings were found to vary by less than the bound, those of short ones by more"
    )


def not_compared(a: Comparable, b: Comparable) -> list[str]:
    """Chapters that only one of them, or neither, has."""
    lines = []
    for chapter in RECORD_OF_CLAIM:
        in_a, in_b = bool(a.claims(chapter)), bool(b.claims(chapter))
        if in_a != in_b:
            lines.append(f"{chapter}: {'B' if in_a else 'A'} does not have a record of it")
        elif not in_a and chapter != "serialization":
            lines.append(f"{chapter}: neither has a record of it")
    return lines
