"""How two recipes turned out: dynamics at equal share of training, accuracies with their counts, and noise."""

from __future__ import annotations

import math
from typing import Any

from recipe.review.diff.inputs import Side, is_number

SHARES = (0.25, 0.5, 0.75, 1.0)  # of training, at which dynamics are compared
NORMAL_95 = 1.96


def dynamics_lines(a: Side, b: Side) -> list[str]:
    """Validation top-1 at equal share of training."""
    columns = [[value for value in side.epochs.get("validation_top1", []) if is_number(value)] for side in (a, b)]
    if not all(columns) or columns[0] == columns[1]:
        return []
    rows = []
    for share in SHARES:
        done = [share * len(column) for column in columns]  # epochs
        if any(epochs != int(epochs) for epochs in done):
            continue
        old, new = (column[int(epochs) - 1] for column, epochs in zip(columns, done, strict=True))
        rows.append(
            f"validation top-1 at {share:.0%} of training: {old:.2%} -> {new:.2%} ({100 * (new - old):+.2f} points)"
        )
    return rows


def result_lines(a: Side, b: Side) -> tuple[list[str], bool]:
    """Accuracies with their counts, their difference, and what can be said about noise; whether anything differs."""
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
    """Whether an evaluation holds the counts of one."""
    names = ("correct_top1", "correct_top5", "images")
    counts = [count for name in names if isinstance(count := evaluation.get(name), int)]
    return len(counts) == len(names) and 0 <= counts[0] <= counts[1] <= counts[2] < 2**53 and counts[2] > 0


def noise(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What a difference of two single runs can mean: their spread is unknown, and a bound can only rule noise out."""
    if before.get("protocol") != after.get("protocol"):
        return "they were measured by different protocols: the difference is no measure of the recipes"
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
