"""reproduction.md: what came of running a recipe again, for people; a pure function of its record."""

from __future__ import annotations

from recipe.document.formatting import NOTHING, code, duration, hardware, setting, text, tree
from recipe.records import JudgedClaim, ReproductionRecord, Setting

WORDS = """A level says how much was shown. BIT-EXACT: the same bits. NUMERICALLY EQUAL: within the stated tolerance,
over the first epoch. STATISTICALLY CONSISTENT: no further apart than honest runs of the recipe whose number and spread
are given; smaller differences cannot be seen. EVALUATION EQUAL: the same weights give the same counts, but for a few
images. DIFFERS: it is not what the recipe claims. CANNOT TELL: this comparison can show neither.

The recipe's own numbers are taken from its document and are no more trustworthy than whoever wrote it; what this report
adds is what a second party measured."""


def report(record: ReproductionRecord) -> str:
    """The page."""
    provenance = record.provenance
    sections = [
        f"# Reproduction of {text(record.name)}",
        f"**{text(record.verdict)}**",
        table(
            ("What", ""),
            [
                ("Document, SHA-256", code(record.document_sha256)),
                ("recipe_id", code(record.recipe_id)),
                ("config_sha256", code(record.config_sha256)),
                ("Stages run", text(", ".join(record.stages))),
                ("Code here", f"{tree(provenance)}, source {code(provenance.source_sha256)}"),
                ("Hardware here", hardware(provenance.hardware)),
                ("Settings of this machine", setting(record.machine)),
                ("Started, took", f"{text(provenance.started)}, {duration(provenance.seconds)}"),
            ],
        ),
        "## Claims",
        table(("Claim", "Level", "Claimed", "Found", "Why"), [row(claim) for claim in record.claims]),
        WORDS,
        "## How this checkout differs from the recipe's",
        bullets(record.checkout),
        "## How the circumstances of training differ",
        bullets(record.circumstances),
    ]
    return "\n\n".join(sections) + "\n"


def row(claim: JudgedClaim) -> tuple[str, ...]:
    """One claim."""
    return text(claim.claim), f"**{claim.level}**", value(claim.claimed), value(claim.found), text(claim.why)


def value(found: Setting) -> str:
    """Hashes as code, by their first digits: the record holds them whole."""
    if isinstance(found, str):
        return code(found[:16]) or NOTHING
    return NOTHING if found is None else setting(found)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A markdown table of cells that are markdown already."""
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|" + ":--|" * len(head), *lines[1:]])


def bullets(lines: list[str]) -> str:
    """A list; an empty one is said."""
    return "\n".join(f"- {text(line)}" for line in lines) or "In nothing that was recorded."
