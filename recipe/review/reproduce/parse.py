"""Parses the JSON block of a document into a `Config` and typed claims. The block is untrusted data.

It must have every key of the schema and no other, with values inside the schema's bounds. Nothing is expanded, looked
up or opened. Facts of the machine come from this checkout: a recipe that names one is refused.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from recipe.config.identity import flatten
from recipe.config.schema import Config, config_from_pinned, invalid
from recipe.errors import UserError
from recipe.review.findings import shorten

LONGEST_LIST = 1000
LONGEST_TEXT = 20_000
LARGEST_NUMBER = 2**53  # exact as a number of JSON
SHOWN_LETTERS = 120
CHECKPOINTS = ("last", "best")

Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Word = Annotated[str, msgspec.Meta(max_length=300)]
BoundedCount = Annotated[int, msgspec.Meta(ge=0, le=LARGEST_NUMBER)]


class ClaimedSplit(msgspec.Struct, frozen=True, kw_only=True):
    images: BoundedCount
    raw_sha256: Sha256


class ClaimedData(msgspec.Struct, frozen=True, kw_only=True):
    data_set: Word
    manifest_sha256: Sha256
    class_list_sha256: Sha256
    splits: dict[Word, ClaimedSplit]


class ClaimedTraining(msgspec.Struct, frozen=True, kw_only=True):
    """The start, the course and the result of training. `epochs` has one list for each column."""

    initial_weights_sha256: Sha256
    architecture_sha256: Sha256
    parameters: BoundedCount
    order_sha256: Sha256
    augmentation_sha256: Sha256
    steps: BoundedCount
    steps_per_epoch: BoundedCount
    images_seen: BoundedCount
    batch_norm_batch_size: BoundedCount
    processes: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_NUMBER)]
    accelerator: Word | None
    is_exact: bool
    weights_sha256: Sha256
    epochs: dict[Word, list[float | None]]


class ClaimedEvaluation(msgspec.Struct, frozen=True, kw_only=True):
    """The metric as counts."""

    protocol: Word
    transform_sha256: Sha256
    decoder: Word
    weights_sha256: Sha256
    images: BoundedCount
    correct_top1: BoundedCount
    correct_top5: BoundedCount
    loss: float


class ClaimedFile(msgspec.Struct, frozen=True, kw_only=True):
    sha256: Sha256
    correct_top1: BoundedCount
    correct_top5: BoundedCount
    flips: BoundedCount


class ClaimedSeeds(msgspec.Struct, frozen=True, kw_only=True):
    """The spread of several runs that differ in their seed only."""

    seeds: list[int]
    images: BoundedCount
    correct_top1: list[BoundedCount]


class Claims(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a recipe claims. A stage without claims is None."""

    data: ClaimedData | None = None
    training: ClaimedTraining | None = None
    evaluation: ClaimedEvaluation | None = None
    serialization: dict[Word, ClaimedFile] | None = None
    seeds: ClaimedSeeds | None = None


class ClaimedCode(msgspec.Struct, frozen=True, kw_only=True):
    commit: Word | None
    tree: Word
    source_sha256: Sha256


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """All of the block but its configuration."""

    config_sha256: Sha256
    recipe_id: Sha256
    code: ClaimedCode
    claims: Claims
    determinism_context: dict[Word, Word | int | float | bool | None]


def parse_recipe(identity: Mapping[str, Any]) -> Recipe:
    """The claims by type. Raises `UserError` with the name of a missing or mistyped one."""
    values = {name: identity.get(name) for name in Recipe.__struct_fields__}
    for stage in ("code", "determinism_context"):
        if values[stage] is None:
            raise UserError(f"the recipe has no {stage}: nothing was trained yet")
    try:
        return msgspec.convert(values, Recipe)
    except (msgspec.ValidationError, RecursionError) as error:
        raise UserError(f"the recipe's JSON block does not fit: {shown(str(error))}") from error


def parse_config(identity: Mapping[str, Any]) -> Config:
    """The configuration, with the neutral values of `RUNTIME_KEYS` for the caller to replace.

    Raises `UserError` with the key, or if the block has the hashes of another configuration.
    """
    values = identity.get("config")
    try:
        if not isinstance(values, Mapping):
            raise invalid("config", values, "a group of settings")
        for key, value in flatten(values).items():
            if isinstance(value, list) and len(value) > LONGEST_LIST:
                raise invalid(key, shown(value), f"a list of at most {LONGEST_LIST}")
            for entry in value if isinstance(value, list) else [value]:
                _check_plain(key, entry)
        config = config_from_pinned(values)
    except (UserError, RecursionError) as error:
        raise UserError(shown(str(error), 1000)) from error  # may quote the block
    if config.evaluation.checkpoint not in CHECKPOINTS:
        raise invalid("evaluation.checkpoint", shown(config.evaluation.checkpoint), "last or best in a recipe")
    pinned = config.pinned
    for name, digest in (("config_sha256", pinned.config_sha256), ("recipe_id", pinned.recipe_id)):
        if identity.get(name) != digest:
            raise UserError(
                f"the recipe's {name} is {shown(identity.get(name))}, that of its configuration is {digest}: one of "
                "the two was edited, or the recipe was written by a version of the code with other keys"
            )
    return config


def _check_plain(key: str, value: Any) -> None:
    if isinstance(value, int | float) and not abs(value) <= LARGEST_NUMBER:  # NaN neither
        raise invalid(key, shown(value), f"finite, and at most {LARGEST_NUMBER}")
    if isinstance(value, Mapping | list):
        raise invalid(key, shown(value), "a plain value")
    if not isinstance(value, str):
        return
    if len(value) > LONGEST_TEXT:
        raise invalid(key, f"{len(value)} letters", f"at most {LONGEST_TEXT} letters")
    if "${" in value:
        raise invalid(key, shown(value), "plain text without '${', which is not expanded here")
    is_prose = ".description." in f".{key}"
    controls = [letter for letter in value if unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t"]
    if controls or not (is_prose or value.isprintable()):
        raise invalid(key, shown(value), "text without control characters")


def shown(value: Any, most: int = SHOWN_LETTERS) -> str:
    """An untrusted value for a terminal: one line of at most `most` letters, without control characters."""
    if isinstance(value, Mapping):
        return "a group"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST_NUMBER:
        return "a huge number"
    return shorten(value, most)
