"""From a stranger's JSON block to a `Config` and to typed claims: data that is checked value by value, never run.

Every key of the schema must be there and no other; each value must be of the schema's own type and pass its own
checks; nothing is expanded, looked up or opened. Facts of the machine are no business of a recipe: they come from this
checkout, and a recipe that names one is refused. What would cost much more than any recipe of this project is
listed, for a person to allow.
"""

from __future__ import annotations

import math
import types
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec

from recipe.config import MACHINE_FACTS, NAME, Config, config_sha256, leaves, pinned, recipe_id
from recipe.document.formatting import on_one_line
from recipe.errors import UserError

LONGEST_LIST = 1000
LONGEST_TEXT = 20_000
LARGEST_NUMBER = 2**53  # what JSON's numbers hold exactly
SHOWN_LETTERS = 120

# More than any experiment in conf/ asks for; beyond it a person has to agree.
CAPS = {
    "optimization.epochs": 1000,
    "optimization.batch_size": 16_384,
    "optimization.averaging.recalibrate_images": 100_000,
    "augmentation.crop_pixels": 512,
    "augmentation.repeats": 8,
    "augmentation.policy.operations": 16,
    "augmentation.progressive.first_pixels": 512,
    "data.train_images_per_class": 2000,
    "data.validation_images_per_class": 2000,
    "data.resize_short_side": 1024,
    "data.images_per_shard": 100_000,
    "evaluation.resize_pixels": 1024,
    "evaluation.crop_pixels": 512,
    "evaluation.batch_size": 4096,
    "serialization.batch_size": 4096,
    "serialization.int8_calibration_images": 10_000,
    "trainer.keep_checkpoints": 20,
}
CHECKPOINTS = ("last", "best")

Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Word = Annotated[str, msgspec.Meta(max_length=300)]
Count = Annotated[int, msgspec.Meta(ge=0, le=LARGEST_NUMBER)]


class ClaimedSplit(msgspec.Struct, frozen=True, kw_only=True):
    """One split of the data set."""

    images: Count
    raw_sha256: Sha256


class ClaimedData(msgspec.Struct, frozen=True, kw_only=True):
    """What the data were."""

    data_set: Word
    manifest_sha256: Sha256
    class_list_sha256: Sha256
    splits: dict[Word, ClaimedSplit]


class ClaimedTraining(msgspec.Struct, frozen=True, kw_only=True):
    """What training began with, did and left; `epochs` has one list for each column."""

    initial_weights_sha256: Sha256
    architecture_sha256: Sha256
    parameters: Count
    order_sha256: Sha256
    augmentation_sha256: Sha256
    steps: Count
    steps_per_epoch: Count
    images_seen: Count
    images_per_batch_norm: Count
    processes: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_NUMBER)]
    accelerator: Word | None
    is_exact: bool
    weights_sha256: Sha256
    epochs: dict[Word, list[float | None]]
    final: dict[Word, float]


class ClaimedEvaluation(msgspec.Struct, frozen=True, kw_only=True):
    """The metric as counts."""

    protocol: Word
    transform_sha256: Sha256
    decoder: Word
    weights_sha256: Sha256
    images: Count
    correct_top1: Count
    correct_top5: Count
    loss: float


class ClaimedFile(msgspec.Struct, frozen=True, kw_only=True):
    """One exported file."""

    sha256: Sha256
    correct_top1: Count
    correct_top5: Count
    flips: Count


class ClaimedSeeds(msgspec.Struct, frozen=True, kw_only=True):
    """Several runs that differ in their seed only: how far honest runs lie apart."""

    seeds: list[int]
    images: Count
    correct_top1: list[Count]


class Claims(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a recipe claims; a stage that it does not claim is None."""

    data: ClaimedData | None = None
    training: ClaimedTraining | None = None
    evaluation: ClaimedEvaluation | None = None
    serialization: dict[Word, ClaimedFile] | None = None
    seeds: ClaimedSeeds | None = None


class ClaimedCode(msgspec.Struct, frozen=True, kw_only=True):
    """Which code trained."""

    commit: Word | None
    tree: Word
    source_sha256: Sha256


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """All of the block but its configuration."""

    config_sha256: Sha256
    recipe_id: Sha256
    code: ClaimedCode
    claims: Claims
    circumstances: dict[Word, Word | int | float | bool | None]


def restored_recipe(identity: Mapping[str, Any]) -> Recipe:
    """The claims by type; raises `UserError` that names the place of what is missing or of a wrong type."""
    values = {name: identity.get(name) for name in Recipe.__struct_fields__}
    for stage in ("code", "circumstances"):
        if values[stage] is None:
            raise UserError(f"the recipe has no {stage}: nothing was trained yet")
    try:
        return msgspec.convert(values, Recipe)
    except (msgspec.ValidationError, RecursionError) as error:
        raise UserError(f"the recipe's JSON block does not fit: {shown(str(error))}") from error


def restored_config(identity: Mapping[str, Any]) -> Config:
    """The configuration, machine facts neutral; raises `UserError` that names the key, and for hashes of another one.

    Machine facts come out as None, false or an empty folder: whoever runs it fills them in.
    """
    try:
        config = section(Config, identity.get("config"), "")
    except UserError as error:
        raise UserError(shown(str(error), 1000)) from error  # its words are a stranger's
    assert isinstance(config, Config)
    _require_plain_names(config)
    values = pinned(config)
    for name, digest in (("config_sha256", config_sha256(values)), ("recipe_id", recipe_id(values))):
        if identity.get(name) != digest:
            raise UserError(
                f"the recipe's {name} is {shown(identity.get(name))}, that of its configuration is {digest}: one of "
                "the two was edited, or the recipe was written by a version of the code with other keys"
            )
    return config


def _require_plain_names(config: Config) -> None:
    """Names that become a part of a path; `$` of a regular expression lets a line break through."""
    for key, name in (("name", config.name), ("data.name", config.data.name)):
        if not NAME.fullmatch(name):
            raise UserError(f"{key}={shown(name)} cannot be: it must be letters, digits, '.', '_' and '-'")
    if config.evaluation.checkpoint not in CHECKPOINTS:
        raise UserError(
            f"evaluation.checkpoint={shown(config.evaluation.checkpoint)} cannot be reproduced: it must be last or best"
        )


def section(kind: type, value: Any, prefix: str) -> Any:
    """A dataclass of the schema from a JSON object; its own checks run when it is built."""
    if not isinstance(value, Mapping):
        raise UserError(f"{prefix.rstrip('.') or 'config'} must be a group of settings, not {shown(value)}")
    known = {entry.name: f"{prefix}{entry.name}" for entry in fields(kind)}
    for name in value:
        key = f"{prefix}{name}"
        if key in MACHINE_FACTS:
            raise UserError(f"{key} is a fact of the machine, which no recipe may set")
        if name not in known:
            raise UserError(f"{shown(key)} is no setting of this version of the code")
    hints = get_type_hints(kind)
    built = {}
    for name, key in known.items():
        if key in MACHINE_FACTS:
            built[name] = neutral(hints[name])
        elif name not in value:
            raise UserError(f"{key} is missing")
        else:
            built[name] = checked(hints[name], value[name], key)
    return kind(**built)


def neutral(kind: Any) -> Any:
    """A machine fact before somebody decides it."""
    if type(None) in get_args(kind):
        return None
    if isinstance(kind, type) and issubclass(kind, Enum):
        return next(iter(kind))
    return {str: "", bool: False}.get(kind, 1 if kind is int else None)


def checked(kind: Any, value: Any, key: str) -> Any:
    """The value, if it is of the schema's type; whole numbers stand for fractions too, nothing else is converted."""
    if get_origin(kind) in (Union, types.UnionType):
        [other] = [choice for choice in get_args(kind) if choice is not type(None)]
        return None if value is None else checked(other, value, key)
    if is_dataclass(kind):
        return section(kind, value, f"{key}.")  # type: ignore[arg-type]
    if get_origin(kind) is list:
        return _list(get_args(kind)[0], value, key)
    if issubclass(kind, Enum):
        return _choice(kind, value, key)
    if kind is str:
        return _text(value, key)
    if kind is bool:
        return _must(isinstance(value, bool), key, value, "true or false") and value
    return _number(kind, value, key)


def _must(condition: bool, key: str, value: Any, allowed: str) -> bool:
    if not condition:
        raise UserError(f"{key}={shown(value)} cannot be: it must be {allowed}")
    return True


def _list(kind: Any, value: Any, key: str) -> list[Any]:
    _must(isinstance(value, list), key, value, "a list")
    _must(len(value) <= LONGEST_LIST, key, f"{len(value)} entries", f"at most {LONGEST_LIST} entries")
    return [checked(kind, entry, f"{key}[{number}]") for number, entry in enumerate(value)]


def _choice(kind: type[Enum], value: Any, key: str) -> Enum:
    values = [member.value for member in kind]
    _must(isinstance(value, str) and value in values, key, value, f"one of {', '.join(values)}")
    return kind(value)


def _text(value: Any, key: str) -> str:
    _must(isinstance(value, str), key, value, "text")
    _must(len(value) <= LONGEST_TEXT, key, f"{len(value)} letters", f"at most {LONGEST_TEXT} letters")
    _must("${" not in value, key, value, "plain text without '${', which nobody expands here")
    is_prose = ".description." in f".{key}"
    controls = [letter for letter in value if unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t"]
    _must(not controls if is_prose else value.isprintable(), key, value, "text without control characters")
    return str(value)


def _number(kind: type, value: Any, key: str) -> int | float:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind is int:
        _must(whole, key, value, "a whole number")
    else:
        _must(whole or (isinstance(value, float) and math.isfinite(value)), key, value, "a finite number")
    _must(abs(value) <= LARGEST_NUMBER, key, value, f"at most {LARGEST_NUMBER}")
    number: int | float = kind(value)
    return number


def beyond_caps(config: Config) -> Iterator[str]:
    """The settings that ask for more than any recipe of this project does, for a person to allow."""
    values = leaves(pinned(config))
    for key, cap in CAPS.items():
        value = values[key]
        if value is not None and value > cap:
            yield f"{key}={value} (more than {cap})"


def shown(value: Any, most: int = SHOWN_LETTERS) -> str:
    """A stranger's value for a terminal: one line, no control characters, not endless; groups are not walked."""
    if isinstance(value, Mapping):
        return "a group"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST_NUMBER:
        return "a huge number"
    line = on_one_line(str(value))
    return line if len(line) <= most else f"{line[:most]}..."
