"""Names of classes that a person cannot tell apart: two spellings in Unicode, letters of two alphabets, case, spaces.

A folder that has been on a Mac may come back as a second one: its ä is an a with a mark there. The same name twice is
refused; names that look alike are two classes all the same (`Cat` and `cat` can be meant), with a warning.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator

from recipe.errors import UserError

SHOWN_MAX = 10
TWINS = str.maketrans(  # Cyrillic and Greek letters with the shape of a Latin one
    "аеорсухіјѕһԁԛԝАВЕКМНОРСТУХЅІЈοανρυκιΑΒΕΖΗΙΚΜΝΟΡΤΥΧ",
    "aeopcyxijshdqwABEKMHOPCTYXSIJoavpukiABEZHIKMNOPTYX",
)


def refuse_same_names(names: Iterable[str], where: str) -> None:
    """Stop where two names are canonically equivalent: the same text, stored in two ways."""
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise UserError(
                f"the class folders {other!a} and {name!a} in {where} have the same name in two spellings of Unicode: "
                "merge them, or rename one"
            )


def look_alike(name: str, others: Iterable[str]) -> str | None:
    """The first of the others that looks like this name."""
    return next((other for other in others if other != name and appearance(other) == appearance(name)), None)


def look_alike_lines(names: Iterable[str]) -> Iterator[str]:
    """A warning for each group of names that look alike, the first ten of them."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(appearance(name), []).append(name)
    for group in [group for group in groups.values() if len(group) > 1][:SHOWN_MAX]:
        yield f"warning: classes whose names look alike: {', '.join(map(ascii, group))}; merge those that are one class"


def appearance(name: str) -> str:
    """The same text for names that look alike: compatible forms, alphabets, case and spaces count as equal."""
    plain = unicodedata.normalize("NFKC", name).translate(TWINS)
    seen = "".join(letter for letter in plain if unicodedata.category(letter) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", seen.casefold()).split())
