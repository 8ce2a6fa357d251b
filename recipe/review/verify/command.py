"""Do the files belong together, and does this code behave as the recipe's did?

Two tests that a stranger can make in a minute: the chain of hashes as far as the files are there, and the canary, ten
optimizer steps on a few drawn images beside the trace that the recipe holds.
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

from recipe.config.compose import config_from_overrides
from recipe.config.schema import NAME
from recipe.document.commands import EXPERIMENTS
from recipe.document.formatting import on_one_line
from recipe.errors import UserError
from recipe.records import Fingerprint
from recipe.review.opening import Subject, open_subject
from recipe.review.verify.code import fingerprint_here
from recipe.review.verify.files import BROKEN, Link, links
from recipe.review.verify.trace import CANNOT_TELL, Difference, compared, stored_fingerprint

DECIDING = 3  # differences shown of a canary that fails; the others follow from them


def describe(parser: ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.add_argument("path", help="a run, a published recipe, or its document")
    parser.add_argument("--raw-dir", type=Path, help="the raw archives; those of the experiment's file by default")
    parser.add_argument("--data-dir", type=Path, help="the processed data; that of the experiment's file by default")
    parser.add_argument("--skip", choices=("chain", "canary"), help="leave one of the two out")
    parser.add_argument("--json", action="store_true", help="for programs")


def answer(arguments: Namespace) -> int:
    """Test both; 1 where a link is broken or the canary died."""
    subject = open_subject(arguments.path)
    chain = [] if arguments.skip == "chain" else found_links(subject, arguments.raw_dir, arguments.data_dir)
    clock = time.perf_counter()
    differences = None if arguments.skip == "canary" else canary(subject)
    seconds = time.perf_counter() - clock
    if arguments.json:
        print(
            json.dumps({"chain": rows(chain), "canary": None if differences is None else rows(differences)}, indent=2)
        )
    else:
        _print_chain(chain)
        if differences is not None:
            _print_canary(differences, stored_fingerprint(subject), seconds)
    is_broken = any(link.state == BROKEN for link in chain)
    return int(is_broken or any(difference.kind != CANNOT_TELL for difference in differences or []))


def rows(entries: list[Link] | list[Difference]) -> list[dict[str, str]]:
    """For programs."""
    return [dict(vars(entry)) for entry in entries]


def found_links(subject: Subject, raw_dir: Path | None, data_dir: Path | None) -> list[Link]:
    """The chain; a document alone has none."""
    if subject.run is None:
        return []
    usual_raw, usual_data = usual_places(subject)
    return list(links(subject, raw_dir or usual_raw, data_dir or usual_data))


def usual_places(subject: Subject) -> tuple[Path | None, Path | None]:
    """Where this checkout's file of the experiment has raw and processed data."""
    config = (subject.identity or {}).get("config")
    name = str(config.get("name", "")) if isinstance(config, dict) else ""
    if not NAME.fullmatch(name) or not (EXPERIMENTS / f"{name}.yaml").is_file():
        return None, None
    try:
        data = config_from_overrides([f"experiment={name}"]).data
    except UserError:
        return None, None
    return (Path(data.raw_dir) if data.raw_dir else None), Path(data.directory)


def canary(subject: Subject) -> list[Difference]:
    """What this code does otherwise than the recipe's did."""
    return compared(stored_fingerprint(subject), fingerprint_here(subject))


def _print_chain(chain: list[Link]) -> None:
    for link in chain:
        print(on_one_line(link.line()))
    counts = {
        state: sum(link.state == state for link in chain) for state in dict.fromkeys(link.state for link in chain)
    }
    summary = (
        ", ".join(f"{count} {state}" for state, count in counts.items()) or "a document alone: no files to compare"
    )
    print(f"chain: {summary}")


def _print_canary(differences: list[Difference], stored: Fingerprint, seconds: float) -> None:
    changed = [difference for difference in differences if difference.kind != CANNOT_TELL]
    for difference in [*changed[:DECIDING], *(d for d in differences if d.kind == CANNOT_TELL)]:
        print(on_one_line(f"{difference.kind}: {difference.line()}"))
    if len(changed) > DECIDING:
        print(f"... and {len(changed) - DECIDING} more")
    verdict = "died: this code does not do what the recipe's did" if changed else "lives: this code does what it did"
    print(f"canary {verdict} ({len(stored.steps)} steps, {seconds:.0f} s)")
