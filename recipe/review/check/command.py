"""`check`: compare a recipe with the guideline's checklist and with itself.

Four levels: *present*, *well-formed*, *resolvable* (hashes match, commands parse, the code is known, records and
document agree) and *executed* (with `--execute`: hashes, counts and figures are measured again).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from recipe.document.run_data import RunData
from recipe.errors import UserError
from recipe.review.check.checklist import Page, presence_findings, seen_items
from recipe.review.check.code import code_findings
from recipe.review.check.document import document_findings, edit_findings, page_of
from recipe.review.check.files import executed_findings, output_findings
from recipe.review.check.records import record_findings
from recipe.review.findings import LINE_LENGTH_MAX, Finding, Kind, Level, shorten
from recipe.review.opening import OpenedRecipe, RecordReader, open_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a run, a published recipe, or one document")
    parser.add_argument("--execute", action="store_true", help="also measure hashes, counts and figures again")
    parser.add_argument("--strict", action="store_true", help="fail for notes and CANNOT TELL, too")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """0: no finding, 1: findings (notes or CANNOT TELL with --strict). Raises `UserError` for an unreadable recipe."""
    report = check(open_recipe(arguments.path, warns=False), executes=arguments.execute)
    print(json.dumps(report.as_json(), indent=2) if arguments.json else "\n".join(report.lines()))
    return int(any(arguments.strict or finding.kind is Kind.finding for finding in report.findings))


@dataclass
class CheckReport:
    """The findings of one check, and the state of every item of the checklist."""

    recipe: str
    levels: list[Level]
    findings: list[Finding] = field(default_factory=list)
    items: list[dict[str, Any]] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Kind -> number of findings."""
        counts = Counter(finding.kind for finding in self.findings)
        return {kind.value: counts[kind] for kind in Kind}

    def as_json(self) -> dict[str, Any]:
        return {
            "format": "check/1",
            "subject": self.recipe,
            "levels": [level.value for level in self.levels],
            "counts": self.counts(),
            "findings": [asdict(finding) for finding in self.findings],
            "items": self.items,
        }

    def lines(self) -> list[str]:
        """The report for people: findings first, a summary last."""
        order = list(Kind)
        findings = sorted(self.findings, key=lambda finding: order.index(finding.kind))
        present = sum(item["state"] == "present" for item in self.items)
        counts = ", ".join(
            f"{count} {kind}" + "s" * (count != 1 and kind != Kind.cannot_tell.value)
            for kind, count in self.counts().items()
        )
        levels = ", ".join(level.value for level in self.levels)
        return [
            *(line for finding in findings for line in finding.lines()),
            f"{shorten(self.recipe, LINE_LENGTH_MAX)}: {counts}; {present} of {len(self.items)} items present "
            f"(checked: {levels})",
        ]


def check(recipe: OpenedRecipe, executes: bool = False) -> CheckReport:
    """Check a recipe of this pipeline. Raises `UserError` for other documents and for one nested too deeply."""
    page = page_of(recipe)
    if recipe.block is None and recipe.run is None and not (page and (page.blocks or page.damage)):
        raise UserError(
            f"{recipe.name} was not written by this pipeline: it has no JSON block, no generated block and no records "
            "beside it, so there is nothing to check it against"
        )
    try:
        return _check(recipe, page, executes)
    except RecursionError:
        raise UserError(f"{recipe.name} is nested too deeply to be a recipe") from None
    except ArithmeticError as error:
        raise UserError(f"{recipe.name} has numbers that no run has: {error}") from error


def _check(recipe: OpenedRecipe, page: Page | None, executes: bool) -> CheckReport:
    levels = [Level.present, Level.well_formed, Level.resolvable, *([Level.executed] if executes else [])]
    report = CheckReport(recipe.name, levels)
    facts: RunData | None = None
    unreadable: set[str] = set()
    if recipe.run is None:
        what = "no records beside the document: its claims were compared with nothing but each other"
        mend = "give the folder of the run"
        report.findings.append(Finding(Level.resolvable, recipe.name, what, mend, Kind.cannot_tell))
    else:
        reader = RecordReader(recipe.run)
        facts = reader.facts()
        report.findings += reader.findings
        unreadable = {finding.place for finding in reader.findings}
    if page is None:
        what, mend = "records, but no document (recipe.md or README.md)", "run a stage of this run again: it writes one"
        report.findings.append(Finding(Level.present, recipe.name, what, mend))
    else:
        if page.damage is None:
            items = seen_items(page)
            report.items += [item.as_json() for item in items]
            report.findings += presence_findings(page, items)
        report.findings += edit_findings(page)
    if facts is not None and recipe.run is not None:
        report.findings += record_findings(facts)
        report.findings += code_findings(facts, recipe.run)
        report.findings += output_findings(facts, recipe.run, Level.resolvable)
    if page is not None:
        report.findings += document_findings(page, recipe, facts, unreadable)
    if executes and facts is not None and recipe.run is not None:
        report.findings += executed_findings(facts, recipe.run)
    return report
