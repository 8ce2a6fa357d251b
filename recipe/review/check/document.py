"""Level *resolvable*: is the document what the records give, and is everything there that it names?"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from recipe.config.identity import flatten
from recipe.document.blocks import difference
from recipe.document.claims import as_json, identity
from recipe.document.facts import Facts
from recipe.document.render import generated_blocks
from recipe.errors import UserError
from recipe.files import WEIGHTS_BYTES_MAX, is_inside, opened
from recipe.records import Record
from recipe.review.check.code import source_sha256_here, stages
from recipe.review.check.page import Page
from recipe.review.findings import Finding, Kind, Level, listed, shortened
from recipe.run import Run

PNG = b"\x89PNG\r\n\x1a\n"
LEFT_BEHIND = ("checkpoints", "tensorboard", "onnx/", "predictions/", "inference.ipynb")  # of a published recipe
RECORD_OF_CLAIM = {
    "data": "preprocessing",
    "training": "training",
    "evaluation": "evaluation",
    "serialization": "serialization",
}
RENDER = "run a stage of this run again: it writes the document anew from the records"
RESTORE = "take the file from version control, or run its stage again"


# Claims and records


def claim_findings(name: str, block: dict[str, Any], facts: Facts, unreadable: set[str]) -> list[Finding]:
    """Every claim of the JSON block that the records do not give."""
    expected = json.loads(as_json(identity(facts)))
    found = missing_records(name, claims_of(block), facts, unreadable)
    ours, theirs = flatten(without_orphans(block, facts)), flatten(without_orphans(expected, facts))
    is_same_code = written_by(facts) == source_sha256_here()
    for key in [*ours, *(key for key in theirs if key not in ours and is_same_code)]:
        said, given = (values.get(key, "nothing") for values in (ours, theirs))
        if said != given and not key.startswith("config") and key != "recipe_id":
            what = f"it says {shortened(said)}, the records give {shortened(given)}"
            found.append(Finding(Level.resolvable, f"{name}, JSON block, {key}", what, RENDER))
    return found + unclaimed(name, block, expected)


def unclaimed(name: str, block: dict[str, Any], expected: dict[str, Any]) -> list[Finding]:
    """Stages that left a record of which the block says nothing at all."""
    claims = claims_of(block)
    return [
        Finding(Level.resolvable, f"{name}, JSON block, claims.{claim}", "it says nothing, a record is there", RENDER)
        for claim, value in claims_of(expected).items()
        if value is not None and claims.get(claim) is None
    ]


def claims_of(block: Mapping[str, Any] | None) -> dict[str, Any]:
    """The claims of a JSON block; none where it holds no such object."""
    claims = block.get("claims") if block else None
    return claims if isinstance(claims, dict) else {}


def missing_records(name: str, claims: dict[str, Any], facts: Facts, unreadable: set[str]) -> list[Finding]:
    """Claims that rest on a record which is not there; one that cannot be read was reported already."""
    gone = [
        f"records/{record}.json"
        for claim, record in RECORD_OF_CLAIM.items()
        if claims.get(claim) is not None and getattr(facts, record) is None
    ]
    return [
        Finding(Level.resolvable, place, f"{name} rests its claims on it, and it is not there", RESTORE)
        for place in gone
        if place not in unreadable
    ]


def without_orphans(block: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """The block without what comes from records that are not there."""
    kept = {
        claim: value
        for claim, value in claims_of(block).items()
        if claim not in RECORD_OF_CLAIM or getattr(facts, RECORD_OF_CLAIM[claim]) is not None
    }
    of_training = ("code", "circumstances") if facts.training is None else ()
    of_fingerprint = ("fingerprint",) if facts.fingerprint is None else ()
    rest = {key: value for key, value in block.items() if key not in ("claims", *of_training, *of_fingerprint)}
    return {**rest, "claims": kept}


# Blocks and records


def block_findings(page: Page, facts: Facts) -> list[Finding]:
    """Blocks that are whole, but not what the records give.

    Another version of the template gives other words from equal records, so that a difference means something only
    where this checkout is the code that wrote the document.
    """
    differing = differing_blocks(page, facts)
    if not differing:
        return []
    if written_by(facts) != source_sha256_here():
        what = f"this checkout would write {listed(list(differing))} in other words than the code that wrote them"
        return [Finding(Level.resolvable, page.name, what, "check with the code of the recipe", Kind.cannot_tell)]
    return [
        Finding(Level.resolvable, page.place(block_id), f"it is not what the records give: {changed}", RENDER)
        for block_id, changed in differing.items()
    ]


def orphaned_projection(page: Page, facts: Facts) -> list[Finding]:
    """The one block that not every document has must have its record."""
    if "projection" not in page.blocks or facts.projection is not None:
        return []
    what = "the document projects, and records/projection.json is not there"
    return [Finding(Level.resolvable, page.place("projection"), what, RESTORE)]


def differing_blocks(page: Page, facts: Facts) -> dict[str, str]:
    """Block id -> its first changed lines."""
    return {
        block_id: first_change(page.blocks[block_id].content, content)
        for block_id, content in generated_blocks(facts).items()
        if block_id in page.blocks
        and block_id not in page.edited
        and page.blocks[block_id].content.replace("\r\n", "\n") != content
    }


def first_change(found: str, generated: str) -> str:
    """One line that went and one that would come."""
    lines = difference(found, generated).split("\n")[2:]
    signs = [next((line for line in lines if line.startswith(sign)), "") for sign in "-+"]
    return "; ".join(shortened(line, 160) for line in signs if line)


def written_by(facts: Facts) -> str | None:
    """The source hash of the code that ran the newest stage, and wrote the document behind it."""
    ran = [provenance for _, provenance in stages(facts)]
    return max(ran, key=lambda one: one.started).source_sha256_at_end if ran else None


# Files


def link_findings(page: Page, folder: Path) -> list[Finding]:
    """Linked files that are not there, or are no pictures."""
    absent: list[str] = []
    found = []
    for target, line in dict(reversed(page.links)).items():
        path = folder / target.partition("#")[0]
        if not target.startswith("/") and is_there(path):
            found += picture_findings(page, path, target, line)
        elif target.startswith(LEFT_BEHIND):
            absent.append(target)
        else:
            what = f"it links {shortened(target)}, which is not there"
            found.append(Finding(Level.resolvable, f"{page.name}, line {line}", what, RESTORE))
    return found + not_here(page.name, absent)


def picture_findings(page: Page, path: Path, target: str, line: int) -> list[Finding]:
    if path.suffix != ".png" or not path.is_file():
        return []
    with path.open("rb") as handle:
        if handle.read(len(PNG)) == PNG:
            return []
    return [
        Finding(Level.well_formed, shortened(target), f"line {line} of {page.name} shows it; it is no PNG", RESTORE)
    ]


def not_here(place: str, names: list[str]) -> list[Finding]:
    if not names:
        return []
    what = f"not in this folder, so that nobody can look: {listed(sorted(set(names)))}"
    return [Finding(Level.resolvable, place, what, kind=Kind.cannot_tell)]


def output_findings(facts: Facts, run: Run, level: Level) -> list[Finding]:
    """Recorded files whose SHA-256 is another; exported models, which are large, only where it is asked for."""
    found, absent = [], []
    for record, name, recorded in recorded_outputs(facts):
        if name.startswith("onnx/") != (level is Level.executed):
            continue
        path = inside(run.directory, name)
        if path is None:
            what = f"it names {shortened(name)}, which is not a file of the recipe"
            found.append(Finding(Level.well_formed, f"records/{record}, outputs", what, RESTORE))
        elif not is_there(path):
            absent.append(name)
        elif other := difference_of(path, {recorded}, f"in records/{record}"):
            found.append(Finding(level, name, other, RESTORE))
    return found + not_here("recorded outputs", absent)


def recorded_outputs(facts: Facts) -> Iterator[tuple[str, str, str]]:
    """(record, file, SHA-256) of every output that is a file of the recipe."""
    named = {
        "evaluation.json": facts.evaluation,
        "serialization.json": facts.serialization,
        "inference.json": facts.inference,
        **{f"evaluations/{other.protocol.name}.json": other for other in facts.other_evaluations},
    }
    for name, record in named.items():
        for file, recorded in (record.outputs if record is not None else {}).items():
            if "/" in file:
                yield name, file, recorded


def inside(folder: Path, name: str) -> Path | None:
    """The file of this name, None where it would lie elsewhere: a record may come from a stranger."""
    path = folder / name
    return path if not os.path.isabs(name) and is_inside(path, folder) else None


def is_there(path: Path) -> bool:
    """Whether anything has this name; a name that no file can have names nothing."""
    return os.path.exists(path)


def difference_of(path: Path, hashes: Container[str], where: str) -> str | None:
    """What keeps a file from being one with these hashes; None where it is."""
    try:
        with opened(path, "it", WEIGHTS_BYTES_MAX) as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
    except UserError as error:
        return str(error)
    return None if found in hashes else f"its SHA-256 is not the one {where}"


# The twin


def twin_findings(run: Run, block: dict[str, Any], facts: Facts) -> list[Finding]:
    """recipe.json says the same as the document and the records."""
    if not os.path.lexists(run.twin):
        return []
    place = run.twin.name
    try:
        twin = read_twin(run)
    except (UserError, ValueError, RecursionError) as error:
        return [Finding(Level.well_formed, place, f"it cannot be read: {error}", RENDER)]
    wrong = [key for key in block if twin.get(key) != block[key]]
    recorded = twin.get("records")
    for name, value in (recorded if isinstance(recorded, dict) else {}).items():
        record = getattr(facts, name, None) if name in RECORD_NAMES else None
        if record is not None and not is_same_record(value, record):
            wrong.append(f"records.{name}")
    if not wrong:
        return []
    what = f"it differs from the document or the records in {listed(wrong)}"
    return [Finding(Level.resolvable, place, what, RENDER)]


RECORD_NAMES = (
    "preprocessing",
    "training",
    "evaluation",
    "serialization",
    "inference",
    "fingerprint",
    "projection",
    "energy",
)


def is_same_record(value: Any, record: Record) -> bool:
    """Read as the record was, so that a field which an older version did not write has its default in both."""
    try:
        return msgspec.convert(value, type(record)) == record
    except msgspec.ValidationError:
        return False


def read_twin(run: Run) -> dict[str, Any]:
    twin = json.loads(run.content(run.twin))
    if not isinstance(twin, dict):
        raise UserError("it is no JSON object")
    return twin
