"""The numbers of a page that another version of the code wrote.

Its words may differ from those that this checkout writes, its numbers may not: each is one that the records give under
the formatters of the page. Times, versions and hashes count as numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from recipe.document import formatting
from recipe.document.render import json_file
from recipe.document.run_data import RunData
from recipe.run.records import RECORD_LISTS, RECORDS, ClassCounts, EvaluationRecord

TOKEN = re.compile(
    r"(?<![\w.,-])(?:"
    r"\d[\d,.]* % \([\d,]+ of [\d,]+\)"  # an accuracy
    r"|(?P<time>\d{4}-\d\d-\d\dT[\d:]+Z)|(?P<hash>[0-9a-f]{12,64}(?!\w))|(?P<version>\d+(?:\.\d+){2,}[\w+.]*)"
    r"|(?P<duration>(?:\d+ h \d\d min|\d+ min \d\d s|[\d.]*\d s)(?!\w))|(?P<size>[\d,.]*\d (?:bytes|[KMGT]iB)(?!\w))"
    r"|[\d,]*\d(?:\.\d+)?(?:e[+-]?\d+)?(?: %)?(?![\w.]*\w)"
    r")"
)
INTEGER, DECIMALS = re.compile(r"(?<![.\d,])[\d,]*\d"), re.compile(r"\.\d+")
SMALL = re.compile(r"\d{1,2}(?: %)?|100 %")  # also in the words of a template
PUBLISHED = "*published*"  # a row of the template's own constants


def forged_lines(content: str, generated: str, given: set[str]) -> Iterator[str]:
    """Lines whose numbers are not those of the records. `generated` is what this checkout would write.

    A line in the words of this checkout is compared as it is. A line in other words has only numbers that are `given`.
    """
    lines = set(generated.splitlines())
    known = {in_words(line) for line in lines} - {""}
    rows = {in_words(line, 1): line for line in lines}
    for line in content.replace("\r\n", "\n").splitlines():
        if line in lines or PUBLISHED in line:
            continue
        words, tokens = in_words(line), tokens_of(line)
        is_named = re.search(r"[^\W\d_]", re.sub(r"<\w+>|#e", "", words)) is not None
        if tokens and ((is_named and words in known) or (not is_named and in_words(line, 1) in rows)):
            yield f"the records give other numbers for: {line.strip()}"
        elif unknown := [token for token in tokens if token not in given and not SMALL.fullmatch(token)]:
            yield f"the records do not give {', '.join(unknown[:3])}: {line.strip()}"


def tokens_of(text: str) -> list[str]:
    return [found[0] for found in TOKEN.finditer(text)]


def in_words(line: str, kept: int = 0) -> str:
    """A line with its numbers replaced by their form, but for the first `kept` ones."""
    found = list(TOKEN.finditer(line))
    for token in reversed(found[kept:]):
        shown = INTEGER.sub("#", DECIMALS.sub(lambda decimals: "." + "0" * (len(decimals[0]) - 1), token[0]))
        line = line[: token.start()] + (f"<{token.lastgroup}>" if token.lastgroup else shown) + line[token.end() :]
    return line


def given_numbers(facts: RunData, generated: Iterable[str]) -> set[str]:
    """Every number of the records under the formatters of the page, and those of the page of this checkout."""
    given = {token for content in generated for token in tokens_of(content)}
    given |= set(tokens_of(json_file(facts).decode()))
    for value in numbers_of(facts):
        given |= set(shown_forms(value))
    for record in (facts.evaluation, *facts.other_evaluations):
        counted: list[EvaluationRecord | ClassCounts] = [] if record is None else [record, *record.per_class]
        for one in counted:
            given |= {formatting.accuracy(count, one.images) for count in (one.correct_top1, one.correct_top5)}
    return given


def numbers_of(facts: RunData) -> Iterator[int | float]:
    records = [getattr(facts, name) for name in (*RECORDS, *RECORD_LISTS)]
    yield from _numbers([facts.config, facts.metrics, msgspec.to_builtins(records)])


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, Mapping | list | tuple):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(entry)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def shown_forms(value: int | float) -> Iterator[str]:
    """A number under each formatter."""
    yield from (f"{value:.12g}", f"{value:,}", formatting.duration(value))
    yield from (formatting.significant(value, digits) for digits in (2, 3, 4))
    if isinstance(value, int):
        yield from (formatting.size(value), formatting.number(value))
    else:
        yield from (formatting.number(value, decimals) for decimals in range(5))
        if 0 <= value <= 1:
            yield formatting.percent(value)
