"""reproduction.md: the record of a reproduction as a page."""

from __future__ import annotations

from recipe.document.formatting import NOTHING, code, duration, hardware, setting, table, text, tree
from recipe.run.records import JudgedClaim, ReproductionRecord, Setting

WORDS = """A level says how much was shown. BIT-EXACT: the same bits. NUMERICALLY EQUAL: within the stated tolerance,
over the first epoch. STATISTICALLY CONSISTENT: not further apart than several runs of the recipe, whose number and
spread are given; smaller differences cannot be seen. EVALUATION EQUAL: the same weights give the same counts, but for a
few images. DIFFERS: it is not what the recipe claims. CANNOT TELL: this comparison can show neither.

The recipe's own numbers are taken from its document and deserve the trust of its author; this report adds the
measurements of a second party."""


def reproduction_page(record: ReproductionRecord) -> str:
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
        bullets(record.determinism_context),
    ]
    return "\n\n".join(sections) + "\n"


def row(claim: JudgedClaim) -> tuple[str, ...]:
    """One claim."""
    return text(claim.claim), f"**{claim.level}**", value(claim.claimed), value(claim.found), text(claim.why)


def value(found: Setting) -> str:
    """A value of a cell; of hashes the first digits, the record has all."""
    if isinstance(found, str):
        return code(found[:16]) or NOTHING
    return NOTHING if found is None else setting(found)


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {text(line)}" for line in lines) or "In nothing that was recorded."
