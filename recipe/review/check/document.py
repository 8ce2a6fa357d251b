"""Level *resolvable*: the document beside the records, and the files that it names."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

from recipe.config.identity import flatten
from recipe.document.blocks import difference
from recipe.document.model_card import CARD_END, LICENCE, card, check_front_matter, front_matter, split_front_matter
from recipe.document.recipe_json import RECORD_OF_CLAIM, as_json, recipe_claims
from recipe.document.render import generated_blocks, json_file
from recipe.document.run_data import RunData
from recipe.errors import UserError
from recipe.review.check.checklist import HEADINGS, Page
from recipe.review.check.code import command_findings, source_sha256_here
from recipe.review.check.files import RESTORE, absent_files
from recipe.review.check.numbers import forged_lines, given_numbers
from recipe.review.check.pairs import pair_findings
from recipe.review.check.records import config_findings
from recipe.review.findings import Finding, Kind, Level, first_few, shorten
from recipe.review.opening import OpenedRecipe, contradictions, dict_or_empty
from recipe.run.directory import Run
from recipe.run.records import RECORDS, Record

PNG = b"\x89PNG\r\n\x1a\n"
NOT_PUBLISHED = ("checkpoints", "tensorboard", "onnx/", "predictions/", "inference.ipynb")
CARD_MARK = "# recipe:begin card"
CARD = re.compile(r"---\n# recipe:begin card sha256=[0-9a-f]{64}\n(.*?)# recipe:end card\n", re.DOTALL)
LICENCE_LINE = re.compile(r"^license: (\S+)$", re.MULTILINE)
LINES_SHOWN = 5  # of one block
PUBLISH = "publish the recipe again: it writes the front matter from the records"
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
        findings += [*generated_findings(page, facts), *unshown_figures(page, facts, recipe.run)]
    assert recipe.document_path is not None, "there is a page"
    return findings + link_findings(page, recipe.document_path.parent)


def contradictions_of(recipe: OpenedRecipe, facts: RunData | None, unreadable: set[str]) -> list[Finding]:
    """Contradictions between the page, its JSON block and the records, without notes."""
    page, findings = page_of(recipe), [] if facts is None else [*pair_findings(facts)]
    if page is not None:
        findings += edit_findings(page)
        if recipe.block is not None:
            findings += json_block_findings(page.name, recipe.block, recipe.run, facts, unreadable)
        if facts is not None and not page.damage and not unreadable:
            findings += generated_findings(page, facts)
    return [finding for finding in findings if finding.kind is Kind.finding]


def page_of(recipe: OpenedRecipe) -> Page | None:
    if recipe.document is None or recipe.document_path is None:
        return None
    return Page(recipe.document_path.name, recipe.document)


def edit_findings(page: Page) -> list[Finding]:
    """Edits of generated parts, by the marks of the page alone."""
    if page.damage is not None:
        mend = "take the document from version control"
        return [Finding(Level.well_formed, page.name, page.damage, mend)]
    what = "this generated block was edited by hand"
    mend = "put your words outside the markers; delete the block with its markers and run a stage again to restore it"
    findings = [Finding(Level.well_formed, page.place(block_id), what, mend) for block_id in page.edited]
    for block_id in page.blocks.keys() - HEADINGS.keys():
        what = f"no template of this pipeline has a block {block_id!r}, so no record gives it"
        findings.append(Finding(Level.well_formed, page.place(block_id), what, "remove it with its markers"))
    for line in page.stray_markers:
        what = f"{shorten(line)} looks like the marker of a generated block and is none"
        findings.append(Finding(Level.well_formed, page.name, what, "remove it, or indent it if it is a quotation"))
    if CARD_MARK in page.text:
        try:
            _, rest = split_front_matter(page.text, {})
            check_front_matter(page.text.removesuffix(rest))
        except UserError as error:
            what = str(error).partition("\n")[0]
            findings.append(Finding(Level.well_formed, f"{page.name}, front matter", what, PUBLISH))
    return findings


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
    is_same_code = is_own_code(facts)
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
    expected = json.loads(json_file(facts))
    changed += [key for key in values if key not in expected]
    given: dict[str, Record] = {record.machine: record for record in facts.timing}
    given |= {name: record for name in RECORDS if (record := getattr(facts, name)) is not None}
    for key in ("records", "timing"):
        for name, value in dict_or_empty(values.get(key)).items():
            is_known = name in RECORDS if key == "records" else name in given
            if (name in given and not is_same_record(value, given[name])) or not is_known:
                changed.append(f"{key}.{name}")
    found = flatten({key: values.get(key) for key in ("name", "metrics")})
    wanted = flatten({key: expected[key] for key in ("name", "metrics")})
    changed += [key for key, value in found.items() if wanted.get(key) != value]
    sections = dict_or_empty(values.get("sections"))
    states = {name: dict_or_empty(section).get("state") for name, section in expected["sections"].items()}
    changed += [
        f"sections.{name}" for name, state in states.items() if dict_or_empty(sections.get(name)).get("state") != state
    ]
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


def generated_findings(page: Page, facts: RunData) -> Iterator[Finding]:
    """Generated parts that were not edited, but are not what the records give.

    Another version of the template gives other words from equal records, so that words are compared only where this
    checkout is the code that wrote the document. Numbers always are.
    """
    generated = generated_blocks(facts)
    found = {block_id: page.blocks[block_id].content for block_id in generated if block_id in page.blocks}
    places = {block_id: page.place(block_id) for block_id in found}
    if card := generated_card(page, facts):
        found["front matter"], generated["front matter"] = card
        places["front matter"] = f"{page.name}, front matter"
    elif facts.publication is not None and page.name == "README.md":
        what = "the model card's front matter is not there"
        yield Finding(Level.present, f"{page.name}, front matter", what, PUBLISH)
    changed = {
        name: content
        for name, content in found.items()
        if name not in page.edited and content.replace("\r\n", "\n") != generated[name]
    }
    if is_own_code(facts):
        for name, content in changed.items():
            what = f"it is not what the records give: {first_change(content, generated[name])}"
            yield Finding(Level.resolvable, places[name], what, RENDER)
        return
    if "front matter" in changed:
        ours, theirs = (card_values(text) for text in (generated["front matter"], changed["front matter"]))
        wrong = [key for key, value in theirs.items() if ours.get(key) != value and not key.endswith("metrics.name")]
        if wrong:
            what = f"the records give other values of {first_few(wrong)}"
            yield Finding(Level.resolvable, places["front matter"], what, PUBLISH)
    given = given_numbers(facts, generated.values()) if changed else set()
    for name, content in changed.items():
        if name != "recipe":  # the JSON block, which is compared claim by claim
            lines = [*forged_lines(content, generated[name], given)]
            title = generated[name].split("\n")[0]
            if name == "summary" and content.strip().split("\n")[0] != title:
                lines.append(f"its title is not {title}")
            for line in lines[:LINES_SHOWN]:
                yield Finding(Level.resolvable, places[name], line, RENDER)
    if changed:
        what = f"this checkout would write {first_few(list(changed))} in other words than the code that wrote them"
        yield Finding(Level.resolvable, page.name, what, "check with the code of the recipe", Kind.cannot_tell)


def generated_card(page: Page, facts: RunData) -> tuple[str, str] | None:
    """The generated front matter of a published page as it is, and as the records give it. None where it has none."""
    found = CARD.match(page.text.replace("\r\n", "\n"))
    if found is None or None in (facts.preprocessing, facts.training, facts.evaluation):
        return None
    licence = LICENCE_LINE.search(found[0])
    generated = front_matter(card(facts, licence[1] if licence else LICENCE), "")
    return found[1], generated.split("\n", 2)[2].removesuffix(f"{CARD_END}\n---\n")


def card_values(content: str) -> dict[str, list[str]]:
    """Key -> values of a front matter. Aliases are not followed."""
    values: dict[str, list[str]] = {}
    nodes = [("", yaml.compose(content, Loader=yaml.SafeLoader))]
    seen: set[int] = set()
    while nodes:
        key, node = nodes.pop()
        if isinstance(node, yaml.ScalarNode):
            values.setdefault(key, []).append(node.value)
        elif node is not None and id(node) not in seen:
            seen.add(id(node))
            is_map = isinstance(node, yaml.MappingNode)
            nodes += (
                [(f"{key}.{name.value}", one) for name, one in node.value]
                if is_map
                else [(key, one) for one in node.value]
            )
    return values


def first_change(found: str, generated: str) -> str:
    """The first removed and the first added line."""
    lines = difference(found, generated).split("\n")[2:]
    first = [next((line for line in lines if line.startswith(sign)), "") for sign in "-+"]
    return "; ".join(shorten(line, 160) for line in first if line)


def is_own_code(facts: RunData) -> bool:
    """Whether this checkout is the code that ran the newest stage, which wrote the document after it."""
    ran = [record.provenance for _, record in facts.stages()]
    return bool(ran) and max(ran, key=lambda one: one.started).source_sha256_at_end == source_sha256_here()


# Files


def unshown_figures(page: Page, facts: RunData, run: Run | None) -> list[Finding]:
    """Figures of the folder that the page does not show, as those of an earlier stage."""
    shown = {target for target, _ in page.links}
    there = [] if run is None else sorted(f"figures/{path.name}" for path in run.figures.glob("*.png"))
    unshown = [name for name in there if name not in shown]
    if not unshown:
        return []
    what = f"the page does not show {first_few(unshown)}"
    return [Finding(Level.resolvable, "figures", what, "remove them", Kind.note)]


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
