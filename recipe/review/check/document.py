"""Level *resolvable*: the document beside the records, and the files that it names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from recipe.config.identity import flatten
from recipe.document.blocks import difference
from recipe.document.recipe_json import RECORD_OF_CLAIM, as_json, recipe_claims
from recipe.document.render import generated_blocks
from recipe.document.run_data import RunData
from recipe.errors import UserError
from recipe.review.check.checklist import Page
from recipe.review.check.code import command_findings, source_sha256_here
from recipe.review.check.files import RESTORE, absent_files
from recipe.review.check.records import config_findings
from recipe.review.findings import Finding, Kind, Level, first_few, shorten
from recipe.review.opening import OpenedRecipe, contradictions, dict_or_empty
from recipe.run.directory import Run
from recipe.run.records import RECORDS, Record

PNG = b"\x89PNG\r\n\x1a\n"
NOT_PUBLISHED = ("checkpoints", "tensorboard", "onnx/", "predictions/", "inference.ipynb")
RENDER = "run a stage of this run again: it writes the document from the records"


def document_findings(page: Page, recipe: OpenedRecipe, facts: RunData | None, unreadable: set[str]) -> list[Finding]:
    """The JSON block, recipe.json, the generated blocks and the links, against the records where they are there.

    `unreadable` holds the records that were already reported.
    """
    block, findings = recipe.block, list[Finding]()
    if block is None:
        what = "the document holds no readable ```json block of a known format, so that no program can run it again"
        mend = "delete the block `recipe` with its markers and run a stage again: it is written again"
        findings.append(Finding(Level.well_formed, f"{page.name}, JSON block", what, mend))
    else:
        findings += json_block_findings(page.name, block, recipe.run, facts, unreadable)
    if facts is None:
        return findings
    config = block.get("config") if block else None
    findings += command_findings(facts, config if isinstance(config, dict) else None)
    if not page.damage and not unreadable:
        findings += generated_block_findings(page, facts)
    assert recipe.document_path is not None, "there is a page"
    return findings + link_findings(page, recipe.document_path.parent)


def edit_findings(page: Page) -> list[Finding]:
    """Generated blocks whose content is not what their marker says."""
    what = "this generated block was edited by hand"
    mend = "put your words outside the markers; delete the block with its markers and run a stage again to restore it"
    return [Finding(Level.well_formed, page.place(block_id), what, mend) for block_id in page.edited]


# The JSON block


def json_block_findings(
    name: str, block: dict[str, Any], run: Run | None, facts: RunData | None, unreadable: set[str]
) -> list[Finding]:
    """The block against its own hashes, config.yaml, the records and recipe.json."""
    try:
        wrong = contradictions(block)
    except (ValueError, TypeError):
        what = "it holds numbers that are not finite"
        return [Finding(Level.well_formed, f"{name}, JSON block, config", what, RENDER)]
    findings = [Finding(Level.resolvable, f"{name}, JSON block", what, RENDER) for what in wrong]
    if facts is None or run is None:
        return findings
    config = block.get("config")
    if isinstance(config, dict):
        findings += config_findings(name, config, facts)
    return findings + claim_differences(name, block, facts, unreadable) + recipe_json_findings(run, block, facts)


def claim_differences(name: str, block: dict[str, Any], facts: RunData, unreadable: set[str]) -> list[Finding]:
    """Claims of the JSON block that the records do not give, and records that it does not mention."""
    expected = json.loads(as_json(recipe_claims(facts)))
    claims, findings = dict_or_empty(block.get("claims")), []
    for claim, record in RECORD_OF_CLAIM.items():
        place = f"records/{record}.json"
        if claims.get(claim) is not None and getattr(facts, record) is None and place not in unreadable:
            what = f"{name} rests its claims on it, and it is not there"
            findings.append(Finding(Level.resolvable, place, what, RESTORE))
    ours, theirs = flatten(with_records(block, facts)), flatten(with_records(expected, facts))
    is_same_code = written_by(facts) == source_sha256_here()
    for key in [*ours, *(key for key in theirs if key not in ours and is_same_code)]:
        claimed, given = (values.get(key, "nothing") for values in (ours, theirs))
        if claimed != given and not key.startswith("config") and key != "recipe_id":
            what = f"it says {shorten(claimed)}, the records give {shorten(given)}"
            findings.append(Finding(Level.resolvable, f"{name}, JSON block, {key}", what, RENDER))
    for claim, value in dict_or_empty(expected.get("claims")).items():
        if value is not None and claims.get(claim) is None:
            place = f"{name}, JSON block, claims.{claim}"
            findings.append(Finding(Level.resolvable, place, "it says nothing, a record is there", RENDER))
    return findings


def with_records(block: Mapping[str, Any], facts: RunData) -> dict[str, Any]:
    """The block without the claims whose records are not there."""
    claims = {
        claim: value
        for claim, value in dict_or_empty(block.get("claims")).items()
        if claim not in RECORD_OF_CLAIM or getattr(facts, RECORD_OF_CLAIM[claim]) is not None
    }
    of_training = ("code", "determinism_context") if facts.training is None else ()
    of_fingerprint = ("fingerprint_sha256",) if facts.fingerprint is None else ()
    rest = {key: value for key, value in block.items() if key not in (*of_training, *of_fingerprint)}
    return rest | {"claims": claims}


def recipe_json_findings(run: Run, block: dict[str, Any], facts: RunData) -> list[Finding]:
    """What recipe.json says otherwise than the document and the records."""
    if not os.path.lexists(run.json_file):
        return []
    try:
        values = json.loads(run.content(run.json_file))
        if not isinstance(values, dict):
            raise UserError("it is not a JSON object")
    except (UserError, ValueError, RecursionError) as error:
        return [Finding(Level.well_formed, run.json_file.name, f"it cannot be read: {error}", RENDER)]
    changed = [key for key in block if values.get(key) != block[key]]
    for name, value in dict_or_empty(values.get("records")).items():
        record = getattr(facts, name, None) if name in RECORDS else None
        if record is not None and not is_same_record(value, record):
            changed.append(f"records.{name}")
    if not changed:
        return []
    what = f"it differs from the document or the records in {first_few(changed)}"
    return [Finding(Level.resolvable, run.json_file.name, what, RENDER)]


def is_same_record(value: Any, record: Record) -> bool:
    """Compared as records, so that a field that an older version did not write has its default in both."""
    try:
        return msgspec.convert(value, type(record)) == record
    except msgspec.ValidationError:
        return False


# Generated blocks


def generated_block_findings(page: Page, facts: RunData) -> list[Finding]:
    """Blocks that were not edited, but are not what the records give.

    Another version of the template gives other words from equal records, so that a difference is a finding only where
    this checkout is the code that wrote the document.
    """
    changed = {
        block_id: first_change(page.blocks[block_id].content, content)
        for block_id, content in generated_blocks(facts).items()
        if block_id in page.blocks
        and block_id not in page.edited
        and page.blocks[block_id].content.replace("\r\n", "\n") != content
    }
    if changed and written_by(facts) != source_sha256_here():
        what = f"this checkout would write {first_few(list(changed))} in other words than the code that wrote them"
        return [Finding(Level.resolvable, page.name, what, "check with the code of the recipe", Kind.cannot_tell)]
    return [
        Finding(Level.resolvable, page.place(block_id), f"it is not what the records give: {lines}", RENDER)
        for block_id, lines in changed.items()
    ]


def first_change(found: str, generated: str) -> str:
    """The first removed and the first added line."""
    lines = difference(found, generated).split("\n")[2:]
    first = [next((line for line in lines if line.startswith(sign)), "") for sign in "-+"]
    return "; ".join(shorten(line, 160) for line in first if line)


def written_by(facts: RunData) -> str | None:
    """The source hash of the code that ran the newest stage, which wrote the document after it."""
    ran = [record.provenance for _, record in facts.stages()]
    return max(ran, key=lambda one: one.started).source_sha256_at_end if ran else None


# Files


def link_findings(page: Page, folder: Path) -> list[Finding]:
    """Linked files that are not there, and pictures that are not PNG."""
    absent: list[str] = []
    findings = []
    for target, line in dict(reversed(page.links)).items():
        path, where = folder / target.partition("#")[0], f"line {line}"
        if target.startswith("/") or not os.path.exists(path):
            if target.startswith(NOT_PUBLISHED):
                absent.append(target)
            else:
                what = f"it links {shorten(target)}, which is not there"
                findings.append(Finding(Level.resolvable, f"{page.name}, {where}", what, RESTORE))
        elif path.suffix == ".png" and path.is_file():
            with path.open("rb") as handle:
                is_png = handle.read(len(PNG)) == PNG
            if not is_png:
                what = f"{where} of {page.name} shows it; it is not a PNG"
                findings.append(Finding(Level.well_formed, shorten(target), what, RESTORE))
    return findings + absent_files(page.name, absent)
