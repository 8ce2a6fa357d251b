"""Which verb finds each tampering of tests/builders/tamperings.py?

    python benchmarks/tamperings.py recipes/demo runs/smoke

Each is tried with a copy of the first recipe that has what it changes. Predictions are in a run only.

`own` is the code that wrote the page, `later` any other: that one compares numbers, but not words. A tampering that
leaves no contradiction is found only by running again (`verify`, `reproduce`). Writes benchmarks/results/tamperings.md.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from recipe.review.check.command import check  # noqa: E402
from recipe.review.findings import Finding, Kind  # noqa: E402
from recipe.review.opening import open_recipe  # noqa: E402
from recipe.review.verify.files import BROKEN, links  # noqa: E402
from tests.builders.tamperings import CONSISTENT, TAMPERINGS, Tampering, render_again  # noqa: E402

COLUMNS = ("check, own", "check, later", "check --execute", "verify --skip trace")


def found_by(folder: Path) -> dict[str, list[str]]:
    """Verb -> what it found."""

    def of(findings: list[Finding]) -> list[str]:
        wrong = (one for one in findings if one.kind is Kind.finding and "not measured yet" not in one.what)
        return [f"{one.place}: {one.what}" for one in wrong]

    found: dict[str, list[str]] = {column: [] for column in COLUMNS}
    for column, is_own in (("check, own", True), ("check, later", False)):
        with mock.patch("recipe.review.check.document.is_own_code", lambda facts, is_own=is_own: is_own):
            found[column] = of(check(open_recipe(folder, warns=False)).findings)
    if not any(found.values()):  # it draws the figures again, which takes seconds
        found["check --execute"] = of(check(open_recipe(folder, warns=False), executes=True).findings)
    chain = links(open_recipe(folder, warns=False), None, None)
    found["verify --skip trace"] = [f"{link.name}: {link.detail}" for link in chain if link.state == BROKEN]
    return found


def tried(recipe: Path, tampering: Tampering) -> dict[str, list[str]] | None:
    """The findings for a tampered copy. None where the recipe lacks what would be changed."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(recipe, Path(scratch) / recipe.name))
        render_again(folder)  # the page of this checkout
        before = contents(folder)
        try:
            tampering(folder)
        except (LookupError, StopIteration, FileNotFoundError, ValueError):
            return None
        return None if contents(folder) == before and tampering is not render_again else found_by(folder)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, nargs="+")
    parser.add_argument("--only", default="", help="names that begin so")
    arguments = parser.parse_args()
    for recipe in arguments.recipes:
        clean = tried(recipe, render_again)
        if clean is not None and any(clean.values()):
            raise SystemExit(f"false findings on the untouched recipe: {clean}")
    lines = [f"| Tampering | {' | '.join(COLUMNS)} | First finding |", "|:--|" + ":--|" * (len(COLUMNS) + 1)]
    counts = Counter[str]()
    for name, tampering in TAMPERINGS.items():
        if not name.startswith(arguments.only):
            continue
        found = next(filter(None, (tried(recipe, tampering) for recipe in arguments.recipes)), None)
        if found is None:
            counts["not possible here"] += 1
            print(f"-       {name}")
            continue
        is_found = any(found.values())
        verdict = "found" if is_found else "consistent" if name in CONSISTENT else "MISSED"
        counts[verdict] += 1
        first = next((what for column in COLUMNS for what in found[column]), "found only by running again")
        marks = ["yes" if found[column] else "–" for column in COLUMNS]
        print(f"{verdict:<7} {name}: {first[:150]}")
        lines.append("| " + " | ".join([name, *marks, first[:140].replace("|", "\\|")]) + " |")
    total = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    print(total)
    if not arguments.only:
        head = f"# Tamperings\n\n`python benchmarks/tamperings.py recipes/demo runs/smoke`: {total}.\n\n"
        (ROOT / "benchmarks" / "results" / "tamperings.md").write_text(head + "\n".join(lines) + "\n")
    raise SystemExit(counts["MISSED"] > 0)


if __name__ == "__main__":
    main()
