"""A number that a person typed beside the name of a metric, and that no record has: the "74.05 here, 74.0 there" of
hand-written recipes.

Free text is full of numbers, so this only warns, and only where the number stands within a few words of the name,
in the same sentence, and nothing says that it is of something else (published, expected, below, of an epoch ...).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from recipe.document.facts import Facts
from recipe.review.check.page import Page
from recipe.review.findings import Finding, Kind, Level

TOKEN = re.compile(
    r"(?P<top1>\btop[- ]?1\b)|(?P<top5>\btop[- ]?5\b)|(?P<loss>\b(?:validation|evaluation|val\.?|eval) loss\b)"
    r"|(?P<number>(?<![\w.,+\-\u2212±])\d++(?:\.\d++)?+(?![.,]?\w)(?P<percent>[ \u00a0\u202f]?%)?)"
    r"|(?P<end>[.!?;](?=\s|$)|\n[ \t]*\n|^[ \t]*[-*#|]|\|\s*\n)|(?P<word>[^\W\d_][\w'-]*|±)",
    re.IGNORECASE | re.MULTILINE,
)
METRICS = ("top1", "top5", "loss")
NAMES = {"top1": "top-1", "top5": "top-5", "loss": "validation loss"}
WORDS_AFTER, WORDS_BEFORE, WORDS_LOOKED_AT = 3, 1, 6
OF_SOMETHING_ELSE = re.compile(
    r"published|papers?|report(ed)?|expect(ed|s)?|targets?|goal|torchvision|timm|baseline|reference|previous(ly)?|earlier"
    r"|(an|the)?other'?s?|their|below|above|under|over|than|least|most|from|by|about|around|roughly|random|chance|errors?"
    r"|difference|gap|points?|pp|gain(ed|s)?|drop(ped|s)?|lost|loses|improve(d|s|ment)?|worse|better|higher|lower|epochs?"
    r"|train|training|until|up|to|would|should|could|may|might|if|between|within|±|original|authors?|literature",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Token:
    """A metric's name, a number, a word or the end of a sentence."""

    kind: str
    text: str
    at: int
    is_percent: bool = False


@dataclass(frozen=True)
class Typed:
    """A number beside a metric's name."""

    metric: str
    number: Token


def prose_findings(page: Page, recorded: dict[str, list[float]]) -> list[Finding]:
    """One warning for each number that is no record of its metric, rounded to the digits that were typed."""
    return [
        Finding(
            Level.resolvable,
            f"{page.name}, line {page.prose.count(chr(10), 0, typed.number.at) + 1}",
            f"it says {NAMES[typed.metric]} {typed.number.text}, the record {shown(typed.metric, recorded)}",
            "correct the sentence, or say there whose number it is (published, expected, at epoch ...)",
            Kind.warning,
        )
        for typed in numbers_beside_metrics(page.prose)
        if recorded.get(typed.metric) and not is_recorded(typed, recorded)
    ]


def shown(metric: str, recorded: dict[str, list[float]]) -> str:
    """The first value, which is the result itself."""
    value = recorded[metric][0]
    return f"{value:.4f}" if metric == "loss" else f"{100 * value:.2f} %"


def recorded_numbers(facts: Facts | None, claims: dict[str, Any]) -> dict[str, list[float]]:
    """Metric -> its values, the result first, as fractions; from the records, else from the document's own claims."""
    if facts is not None:
        return from_records(facts)
    found: dict[str, list[float]] = {name: [] for name in METRICS}
    evaluation = claims.get("evaluation")
    if isinstance(evaluation, dict):
        images = evaluation.get("images")
        exported = claims.get("serialization")
        rows = [evaluation, *(exported.values() if isinstance(exported, dict) else ())]
        for row in rows:
            add_counts(found, row if isinstance(row, dict) else {}, images)
        if isinstance(evaluation.get("loss"), float):
            found["loss"].append(evaluation["loss"])
    return found


def from_records(facts: Facts) -> dict[str, list[float]]:
    evaluations = [record for record in (facts.evaluation, *facts.other_evaluations) if record is not None]
    found: dict[str, list[float]] = {name: [] for name in METRICS}
    for record in evaluations:
        counts = {"correct_top1": record.correct_top1, "correct_top5": record.correct_top5}
        add_counts(found, counts, record.images)
        found["loss"].append(record.loss)
    if facts.serialization is not None:
        for entry in facts.serialization.variants:
            counts = {"correct_top1": entry.correct_top1, "correct_top5": entry.correct_top5}
            add_counts(found, counts, facts.serialization.images)
    return found


def add_counts(found: dict[str, list[float]], row: dict[str, Any], images: object) -> None:
    for metric in ("top1", "top5"):
        count = row.get(f"correct_{metric}")
        if isinstance(count, int) and isinstance(images, int) and 0 <= count <= images < 2**53 and images > 0:
            found[metric].append(count / images)


def is_recorded(typed: Typed, recorded: dict[str, list[float]]) -> bool:
    """Whether the number is a recorded one, rounded to the digits that were typed."""
    text = typed.number.text.rstrip("% \u00a0\u202f")
    value, decimals = float(text), len(text.partition(".")[2])
    scale = 1.0 if typed.metric == "loss" or not (typed.number.is_percent or value > 1) else 100.0
    half_a_digit = 0.5 * 10.0**-decimals * (1 + 1e-9)
    return any(math.fabs(scale * known - value) <= half_a_digit for known in recorded[typed.metric])


def numbers_beside_metrics(prose: str) -> Iterator[Typed]:
    """Each metric's name with its number, where there is exactly one candidate."""
    for sentence in sentences(tokens(prose)):
        for at, token in enumerate(sentence):
            if token.kind in METRICS:
                number = number_beside(sentence, at)
                if number is not None and is_plausible(token.kind, sentence[number]):
                    yield Typed(token.kind, sentence[number])


def tokens(prose: str) -> Iterator[Token]:
    for found in TOKEN.finditer(prose):
        kind = found.lastgroup if found.lastgroup != "percent" else "number"
        yield Token(str(kind), found[0], found.start(), bool(found["percent"]))


def sentences(found: Iterator[Token]) -> Iterator[list[Token]]:
    sentence: list[Token] = []
    for token in found:
        if token.kind == "end":
            yield sentence
            sentence = []
        else:
            sentence.append(token)
    yield sentence


def number_beside(sentence: Sequence[Token], at: int) -> int | None:
    """Directly behind the name, else directly before it, else a few words behind, else one word before."""
    for words, step in ((0, 1), (0, -1), (WORDS_AFTER, 1), (WORDS_BEFORE, -1)):
        number = number_within(sentence, at, step, words)
        if number is not None:
            return None if is_of_something_else(sentence, at, number) else number
    return None


def number_within(sentence: Sequence[Token], at: int, step: int, words: int) -> int | None:
    """The next number in one direction, with at most so many words and no other metric in between."""
    for position in range(at + step, at + step * (words + 2), step):
        if not 0 <= position < len(sentence) or sentence[position].kind in METRICS:
            return None
        if sentence[position].kind == "number":
            return position
    return None


def is_of_something_else(sentence: Sequence[Token], at: int, number: int) -> bool:
    """Whether a word nearby says so, or another metric's name shares the number."""
    low, high = min(at, number), max(at, number)
    near = sentence[max(0, low - WORDS_LOOKED_AT) : high + 2]
    if any(token.kind == "word" and OF_SOMETHING_ELSE.fullmatch(token.text) for token in near):
        return True
    neighbours = sentence[max(0, low - 2) : low]
    return any(token.kind in METRICS for token in neighbours) and not any(
        token.kind == "number" for token in neighbours
    )


def is_plausible(metric: str, number: Token) -> bool:
    """An accuracy is a percentage or has decimals; a loss has decimals."""
    value = float(number.text.rstrip("% \u00a0\u202f"))
    has_decimals = "." in number.text
    return has_decimals if metric == "loss" else value <= 100 and (number.is_percent or has_decimals)
