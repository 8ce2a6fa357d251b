"""The README.md of a published recipe: the front matter of a Hugging Face model card, then the document.

Generated parts are replaced when the recipe is published again. Text of people is kept: keys of the front matter below
`# recipe:end card`, prose between the generated blocks.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import yaml

from recipe.document import blocks
from recipe.document.blocks import Block, Prose
from recipe.document.formatting import on_one_line
from recipe.document.render import generated_blocks
from recipe.document.run_data import RunData
from recipe.errors import UserError

LICENCE = "mit"  # of this project, as the Hub spells it
CARD_BEGIN = re.compile(r"# recipe:begin card sha256=(?P<sha256>[0-9a-f]{64})")
CARD_END = "# recipe:end card"
FENCE = "---"


def readme(facts: RunData, licence: str, run_document: str, published: str | None) -> str:
    """The file's text. `run_document` is the run's document, `published` the existing README.md.

    Raises `UserError` where a generated part of either was edited by hand.
    """
    generated = generated_blocks(facts)
    own_keys, body = ("", None) if published is None else split_front_matter(published, card(facts, licence))
    blocks.check_edits(blocks.split(run_document), generated)
    document = blocks.merge_blocks(run_document if body is None else body, generated)
    if body is not None:
        document = with_prose_of(document, run_document)
    return front_matter(card(facts, licence), own_keys) + ("\n" if body is None else "") + document


# ---- front matter -------------------------------------------------------------------------------------


def card(facts: RunData, licence: str) -> dict[str, Any]:
    """The metadata of the model card, with the Hub's index of results."""
    assert facts.preprocessing is not None, "a published recipe has its data"
    assert facts.training is not None, "a published recipe was trained"
    is_imagenet = facts.preprocessing.is_ilsvrc2012
    values: dict[str, Any] = {
        "license": licence,
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "recipe", on_one_line(facts.training.model.name)],
    }
    if is_imagenet:
        values["datasets"] = ["ILSVRC/imagenet-1k"]
    values["metrics"] = ["accuracy"]
    values["model-index"] = [{"name": facts.name, "results": [result(facts)]}]
    return values


def result(facts: RunData) -> dict[str, Any]:
    """The evaluation for the Hub's index of results. Values are fractions."""
    evaluation, data = facts.evaluation, facts.preprocessing
    assert evaluation is not None, "a published recipe was evaluated"
    assert data is not None, "a published recipe has its data"
    name = on_one_line(data.data_set)
    protocol = on_one_line(evaluation.protocol.name)
    metrics = [
        {
            "type": kind,
            "value": round(correct / evaluation.images, 6),
            "name": f"{words} accuracy, {correct} of {evaluation.images} images, protocol {protocol}",
        }
        for kind, words, correct in (
            ("accuracy", "Top-1", evaluation.correct_top1),
            ("top-5-accuracy", "Top-5", evaluation.correct_top5),
        )
    ]
    return {
        "task": {"type": "image-classification", "name": "Image classification"},
        "dataset": {
            "type": "ILSVRC/imagenet-1k" if data.is_ilsvrc2012 else name,
            "name": name if data.is_ilsvrc2012 else f"{name} (not ILSVRC2012)",
            "split": "validation",
        },
        "metrics": metrics,
    }


def front_matter(values: dict[str, Any], own_keys: str) -> str:
    """The front matter with its dashes. `own_keys` are the lines of people."""
    content = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000, default_flow_style=None)
    lines = [
        FENCE,
        f"# recipe:begin card sha256={blocks.content_sha256(content)}",
        content.rstrip("\n"),
        CARD_END,
        *own_keys.splitlines(),
        FENCE,
    ]
    text = "\n".join(lines) + "\n"
    check_front_matter(text)
    return text


def check_front_matter(text: str) -> None:
    """Raise `UserError` unless the front matter is a YAML mapping without duplicate keys."""
    try:
        node = yaml.compose(text.removeprefix(FENCE).rsplit(FENCE, 1)[0], Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"the front matter of README.md is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(node, yaml.MappingNode):
        raise UserError("the front matter of README.md is not a mapping")
    twice = [key for key, count in Counter(key.value for key, _ in node.value).items() if count > 1]
    if twice:
        raise UserError(f"the front matter of README.md has the key {twice[0]!r} twice: it is generated, remove yours")


def split_front_matter(text: str, values: dict[str, Any]) -> tuple[str, str]:
    """(own keys, the document) of a published README.md. Raises `UserError` where the generated part was edited."""
    lines = text.split("\n")
    plain = [line.rstrip("\r") for line in lines]
    if not plain or plain[0] != FENCE or FENCE not in plain[1:]:
        return "", text
    end = plain.index(FENCE, 1)
    inside = plain[1:end]
    begin = CARD_BEGIN.fullmatch(inside[0]) if inside else None
    if begin is None or CARD_END not in inside:
        raise UserError(
            "the front matter of README.md has lost its marks `# recipe:begin card` and `# recipe:end card`: restore "
            "them, or remove the front matter to have it written again"
        )
    place = inside.index(CARD_END)
    content = "\n".join(inside[1:place]) + "\n"
    if blocks.content_sha256(content) != begin["sha256"]:
        wanted = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000, default_flow_style=None)
        raise UserError(
            "the generated part of the front matter of README.md was edited by hand, and the edit would be lost: put "
            f"your keys below `{CARD_END}` and restore the others.\n{blocks.difference(content, wanted)}"
        )
    return "\n".join(inside[place + 1 :]), "\n".join(lines[end + 1 :])


# ---- prose --------------------------------------------------------------------------------------------


def with_prose_of(document: str, run_document: str) -> str:
    """The published document with the prose of the run's document that it lacks, each after its block."""
    pieces = blocks.split(document)
    for block_id, words in prose_by_place(run_document).items():
        place = end_of_place(pieces, block_id)
        there = prose_by_place("".join(piece.text for piece in pieces)).get(block_id, "")
        if words.strip() and words.strip() not in there:
            gap = "" if there.endswith("\n") or not there else "\n"
            pieces.insert(place, Prose(gap + words))
    return "".join(piece.text for piece in pieces)


def prose_by_place(document: str) -> dict[str, str]:
    """Block id -> the prose after it. "" is the prose before the first block."""
    prose: dict[str, str] = {"": ""}
    place = ""
    for piece in blocks.split(document):
        if isinstance(piece, Block):
            place = piece.id
            prose[place] = ""
        else:
            prose[place] += piece.text
    return prose


def end_of_place(pieces: list[Prose | Block], block_id: str) -> int:
    """The position after the prose that follows a block. The end where the block is missing."""
    ids = [piece.id if isinstance(piece, Block) else None for piece in pieces]
    if block_id and block_id not in ids:
        return len(pieces)
    start = ids.index(block_id) + 1 if block_id else 0
    return next((at for at in range(start, len(pieces)) if isinstance(pieces[at], Block)), len(pieces))
