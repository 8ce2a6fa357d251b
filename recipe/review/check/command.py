"""`check`: a linter of recipes, against the guideline and what this project adds to it.

Four levels: is it *present*, is it *well-formed*, is it *resolvable* (hashes match, commands parse, the code is known,
records and document agree), and, with `--execute`, was it *executed* (measured again, as far as that needs no torch).
A document that people wrote is looked through for headings and keywords only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from recipe.document.facts import Facts
from recipe.errors import UserError
from recipe.review import prose
from recipe.review.check import code as sources
from recipe.review.check import document as agreement
from recipe.review.check import presence
from recipe.review.check import records as consistency
from recipe.review.check.files import executed_findings
from recipe.review.check.page import Page
from recipe.review.findings import Finding, Kind, Level, Report, printable
from recipe.review.opening import Subject, contradictions, open_subject
from recipe.review.reading import Reader


def describe(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("path", metavar="PATH", help="a run, a published recipe, or one document")
    parser.add_argument("--execute", action="store_true", help="also measure again what needs no torch")
    parser.add_argument("--strict", action="store_true", help="warnings fail the check too")
    parser.add_argument("--json", action="store_true", help="print the findings for programs")


def answer(arguments: argparse.Namespace) -> int:
    """0: no finding, 1: findings; notes, warnings and CANNOT TELL do not count. Raises `UserError` for what cannot be
    opened."""
    report = check(open_subject(arguments.path), executes=arguments.execute)
    if arguments.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        print("\n".join([*lines_of_items(report), *report.lines()]))
    return report.exit_code(arguments.strict)


def lines_of_items(report: Report) -> list[str]:
    """What was seen of each item, for documents of which nothing else is known."""
    if report.is_own:
        return []
    return [
        printable(f"{item['state']:8} {item['section']}: {item['item']}" + f" ({item['where']})" * bool(item["where"]))
        for item in report.items
    ]


def check(subject: Subject, executes: bool = False) -> Report:
    """Look through a recipe."""
    try:
        if subject.document is not None and not is_own(subject):
            return check_foreign(subject)
        return check_own(subject, executes)
    except RecursionError:
        raise UserError(f"{subject.name} is nested too deeply to be a recipe") from None
    except ArithmeticError as error:
        raise UserError(f"{subject.name} holds numbers that no run has: {error}") from error


def is_own(subject: Subject) -> bool:
    """Whether this pipeline wrote it: it has a JSON block, generated blocks, or records beside it."""
    page = page_of(subject)
    return subject.identity is not None or subject.run is not None or bool(page and (page.blocks or page.damage))


def page_of(subject: Subject) -> Page | None:
    if subject.document is None or subject.document_path is None:
        return None
    return Page(subject.document_path.name, subject.document)


def check_foreign(subject: Subject) -> Report:
    page = page_of(subject)
    assert page is not None, "the caller looked"
    seen = presence.foreign_items(page)
    items = [one.as_json() for one in seen]
    return Report(subject.name, False, [Level.present], presence.foreign_findings(page, seen), items)


def check_own(subject: Subject, executes: bool) -> Report:
    reader = Reader(subject.run) if subject.run is not None else None
    facts = reader.facts() if reader is not None else None
    levels = [Level.present, Level.well_formed, Level.resolvable, *([Level.executed] if executes else [])]
    report = Report(subject.name, True, levels)
    page = page_of(subject)
    report.findings += reader.findings if reader is not None else without_records(subject)
    report.findings += page_findings(page, report) if page else without_document(subject)
    if facts is not None and subject.run is not None and reader is not None:
        report.findings += consistency.record_findings(facts)
        report.findings += sources.code_findings(facts, subject.run)
        report.findings += agreement.output_findings(facts, subject.run, Level.resolvable)
    if page is not None:
        unreadable = {found.place for found in reader.findings} if reader is not None else set()
        report.findings += block_findings(page, subject, facts, unreadable)
    if executes and facts is not None and subject.run is not None:
        report.findings += executed_findings(facts, subject.run)
    return report


def without_records(subject: Subject) -> list[Finding]:
    what = "no records beside the document: its claims were compared with nothing but each other"
    return [Finding(Level.resolvable, subject.name, what, "give the folder of the run", Kind.cannot_tell)]


def without_document(subject: Subject) -> list[Finding]:
    what = "records, but no document (recipe.md or README.md)"
    return [Finding(Level.present, subject.name, what, "run a stage of this run again: it writes the document")]


def page_findings(page: Page, report: Report) -> list[Finding]:
    """Markers, and which items are there."""
    if page.damage is not None:
        return [Finding(Level.well_formed, page.name, page.damage, "take the document from version control")]
    seen = presence.own_items(page)
    report.items += [one.as_json() for one in seen]
    edited = [
        Finding(
            Level.well_formed,
            page.place(block_id),
            "this generated block was edited by hand",
            "put your words outside the markers; delete the block with its markers and run a stage again to restore it",
        )
        for block_id in page.edited
    ]
    return presence.own_findings(page, seen) + edited


def block_findings(page: Page, subject: Subject, facts: Facts | None, unreadable: set[str]) -> list[Finding]:
    """The JSON block, what the document links, and what people wrote, against the records where they are there."""
    block, found = subject.identity, []
    config = block.get("config") if block else None
    if block is None:
        found.append(no_block(page))
    else:
        found += claim_findings(page, block, subject, facts, unreadable)
    if facts is not None:
        found += sources.command_findings(facts, config if isinstance(config, dict) else None)
        found += [] if page.damage or unreadable else agreement.block_findings(page, facts)
        found += [] if unreadable else agreement.orphaned_projection(page, facts)
        found += agreement.link_findings(page, page_folder(subject))
    return found + prose.prose_findings(page, prose.recorded_numbers(facts, agreement.claims_of(block)))


def page_folder(subject: Subject) -> Path:
    assert subject.document_path is not None, "there is a page"
    return subject.document_path.parent


def no_block(page: Page) -> Finding:
    return Finding(
        Level.well_formed,
        f"{page.name}, JSON block",
        "the document holds no readable ```json block of a known format, so that no program can run it again",
        "delete the block `recipe` with its markers and run a stage again: it is written anew",
    )


def claim_findings(
    page: Page, block: dict[str, Any], subject: Subject, facts: Facts | None, unreadable: set[str]
) -> list[Finding]:
    """The block against itself, config.yaml, the records and recipe.json."""
    try:
        wrong = contradictions(block)
    except (ValueError, TypeError):
        place = f"{page.name}, JSON block, config"
        return [Finding(Level.well_formed, place, "it holds numbers that are not finite", agreement.RENDER)]
    found = [Finding(Level.resolvable, f"{page.name}, JSON block", what, agreement.RENDER) for what in wrong]
    if facts is None or subject.run is None:
        return found
    config = block.get("config")
    if isinstance(config, dict):
        found += consistency.config_findings(page.name, config, facts)
    found += agreement.claim_findings(page.name, block, facts, unreadable)
    return found + agreement.twin_findings(subject.run, block, facts)
