"""Each claim of a recipe beside the records of a second run, with a level and the reason for it.

    BIT-EXACT                 the same bits
    NUMERICALLY EQUAL         within the stated tolerance, early, before rounding has been amplified
    STATISTICALLY CONSISTENT  not further apart than several runs of the recipe, whose number and spread are given
    EVALUATION EQUAL          the same weights, measured: the counts differ by a few images at most
    DIFFERS                   the claim is wrong
    CANNOT TELL               this comparison can show neither

Equal circumstances (device, versions, threads, processes, code) and deterministic algorithms give equal bits: other
bits are DIFFERS. In other circumstances other bits are expected. Then the first epoch shows if the same was done, and
only several seeds show if the same was reached. One run has no spread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.stats import t

from recipe.document.formatting import NOTHING, code, duration, hardware, setting, table, text, tree
from recipe.document.recipe_json import RECORD_OF_CLAIM
from recipe.document.run_data import RunData
from recipe.review.findings import CANNOT_TELL
from recipe.review.reproduce.parse import ClaimedSeeds, ClaimedTraining, Claims, Recipe, shown
from recipe.run.records import EvaluationRecord, JudgedClaim, ReproductionRecord, Setting, TrainingRecord

BIT_EXACT, NUMERICALLY_EQUAL = "BIT-EXACT", "NUMERICALLY EQUAL"
CONSISTENT, EVALUATION_EQUAL = "STATISTICALLY CONSISTENT", "EVALUATION EQUAL"
DIFFERS = "DIFFERS"

LEARNING_RATE_TOLERANCE = 1e-9  # relative, computed in double precision
# Of the mean train loss, relative. Between 1 and 2 CPU threads it differed by 0.6 % on `demo` (37 steps of ResNet-50)
# and by 1e-7 on `smoke` (12 steps): rounding grows fast, so this catches gross faults only. Hashes say the rest.
FIRST_EPOCH_TOLERANCE = 0.02
SEEDS_MIN = 3
CONFIDENCE = 0.95
MOST_OTHER_IMAGES = 10_000  # equal evaluations differ by one image in so many, and by one at least


@dataclass(frozen=True)
class DeterminismContext:
    """The differences of the circumstances of two trainings, in words."""

    changed: list[str]
    is_deterministic: bool  # equal circumstances give equal bits

    @property
    def promise_equal_bits(self) -> bool:
        return not self.changed and self.is_deterministic

    @property
    def why_not(self) -> str:
        reasons = list(self.changed)
        if not self.is_deterministic:
            reasons.append("its algorithms are not deterministic, or it was continued inexactly")
        return "; ".join(reasons)


def judge_claims(recipe: Recipe, facts: RunData, changed: list[str]) -> list[JudgedClaim]:
    """Judge every claim by the records of the second run. `changed` are the differences of circumstances, in words."""
    claims = recipe.claims
    judged = list(judge_data(claims, facts))
    if claims.training is not None and facts.training is not None:
        context = DeterminismContext(changed, is_deterministic(claims.training, facts.training))
        judged += judge_training(claims.training, facts.training, context)
        judged += judge_evaluation(claims, facts, context)
        judged += judge_exports(claims, facts)
    for claim, record in RECORD_OF_CLAIM.items():
        if getattr(claims, claim) is not None and getattr(facts, record) is None:
            why = "the stage was not run (--stages)"
            judged.append(JudgedClaim(claim=claim, level=CANNOT_TELL, claimed=None, found=None, why=why))
    return judged


def is_deterministic(claimed: ClaimedTraining, training: TrainingRecord) -> bool:
    """Whether equal circumstances give equal bits: on a CPU or with deterministic algorithms, without a break."""
    on_cpu = claimed.accelerator is None and training.provenance.hardware.accelerator is None
    return claimed.is_exact and (on_cpu or training.precision.get("deterministic_algorithms") is True)


def same_bits(claim: str, claimed: Setting, found: Setting, why_else: str) -> JudgedClaim:
    """Judge a claim that is either equal or wrong."""
    level, why = (BIT_EXACT, "equal") if claimed == found else (DIFFERS, why_else)
    return JudgedClaim(claim=claim, level=level, claimed=claimed, found=found, why=why)


def rounded_bits(claim: str, claimed: str, found: str, context: DeterminismContext) -> JudgedClaim:
    """Judge a claim with last digits that depend on the processor and on versions."""
    if claimed == found or not context.changed:
        return same_bits(claim, claimed, found, "in equal determinism_context: the code does something else")
    why = f"other last digits are possible, since {context.why_not}"
    return JudgedClaim(claim=claim, level=CANNOT_TELL, claimed=claimed, found=found, why=why)


def judge_data(claims: Claims, facts: RunData) -> Iterator[JudgedClaim]:
    claimed, data = claims.data, facts.preprocessing
    if claimed is None or data is None:
        return
    for name, split in claimed.splits.items():
        found = data.splits.get(name)
        raw = found.raw_sha256 if found else None
        yield same_bits(f"raw images, {shown(name)}", split.raw_sha256, raw, "other images, keys or labels")
    yield same_bits("class list", claimed.class_list_sha256, data.class_list_sha256, "other classes, or another order")
    manifest = data.outputs.get("manifest")
    yield same_bits("processed data (manifest)", claimed.manifest_sha256, manifest, "other shards than the recipe's")


def judge_training(
    claimed: ClaimedTraining, training: TrainingRecord, context: DeterminismContext
) -> Iterator[JudgedClaim]:
    """The start of the training, its first epoch and its weights."""
    loader, schedule = training.loader, training.schedule
    for name, theirs, ours in (
        ("architecture", claimed.architecture_sha256, training.model.architecture_sha256),
        ("parameters", claimed.parameters, training.model.parameters),
        ("order of the images, first two epochs", claimed.order_sha256, loader.order_sha256),
        ("optimizer steps", claimed.steps, schedule.steps),
        ("images seen", claimed.images_seen, training.images_seen),
        ("images per batch norm", claimed.batch_norm_batch_size, loader.batch_norm_batch_size),
    ):
        yield same_bits(name, theirs, ours, "counts and names do not depend on the machine")
    for name, theirs, ours in (
        ("initial weights", claimed.initial_weights_sha256, training.model.initial_weights_sha256),
        ("augmentation of a fixed image", claimed.augmentation_sha256, training.augmentation_sha256),
    ):
        yield rounded_bits(name, theirs, ours, context)
    yield first_epoch(claimed, training)
    yield weights(claimed, training, context)


def first_epoch(claimed: ClaimedTraining, training: TrainingRecord) -> JudgedClaim:
    """Learning rate and mean train loss of the first epoch: a sign that the same thing was done."""
    names = ("learning_rate", "train_loss")
    theirs = {name: (claimed.epochs.get(name) or [None])[0] for name in names}
    ours = {name: getattr(training.epochs[0], name) for name in names}
    level, why = near(theirs, ours)
    claim = "first epoch: learning rate, mean train loss"
    return JudgedClaim(claim=claim, level=level, claimed=dict(theirs), found=dict(ours), why=why)


def near(theirs: dict[str, float | None], ours: dict[str, float]) -> tuple[str, str]:
    """Level and reason for the numbers of the first epoch."""
    if theirs == ours:
        return BIT_EXACT, "equal to the last digit"
    apart = {}
    for name, value in theirs.items():
        if value is None:
            return CANNOT_TELL, f"the recipe does not say its {name}"
        apart[name] = abs(value - ours[name]) / max(abs(value), abs(ours[name]), 1e-30)
    is_near = apart["learning_rate"] <= LEARNING_RATE_TOLERANCE and apart["train_loss"] <= FIRST_EPOCH_TOLERANCE
    why = (
        f"they differ by {apart['learning_rate']:.1e} and {apart['train_loss']:.1e} of their value; allowed are "
        f"{LEARNING_RATE_TOLERANCE:.0e} and {FIRST_EPOCH_TOLERANCE:g}"
    )
    return (NUMERICALLY_EQUAL if is_near else DIFFERS), why


def weights(claimed: ClaimedTraining, training: TrainingRecord, context: DeterminismContext) -> JudgedClaim:
    theirs, ours = claimed.weights_sha256, training.outputs.get("weights")
    if theirs == ours:
        level, why = BIT_EXACT, "the same hash"
    elif context.promise_equal_bits:
        level, why = DIFFERS, "every circumstance is equal and the algorithms are deterministic: bits must be equal"
    else:
        level, why = CANNOT_TELL, f"other bits are expected, since {context.why_not}"
    return JudgedClaim(claim="trained weights", level=level, claimed=theirs, found=ours, why=why)


def judge_evaluation(claims: Claims, facts: RunData, context: DeterminismContext) -> Iterator[JudgedClaim]:
    """Top-1 and top-5 as counts."""
    claimed, evaluation = claims.evaluation, facts.evaluation
    if claimed is None or evaluation is None:
        return
    for name in ("correct_top1", "correct_top5"):
        theirs, ours = getattr(claimed, name), getattr(evaluation, name)
        level, why = judge_counts(claims, evaluation, theirs, ours, is_top1=name == "correct_top1")
        if level == CANNOT_TELL and context.promise_equal_bits:
            why = f"{why}; its weights differ where they must not"
        yield JudgedClaim(
            claim=f"{name.replace('correct_top', 'top-')} of {claimed.images:,} images",
            level=level,
            claimed=theirs,
            found=ours,
            why=why,
        )


def judge_counts(
    claims: Claims, evaluation: EvaluationRecord, theirs: int, ours: int, is_top1: bool
) -> tuple[str, str]:
    claimed = claims.evaluation
    assert claimed is not None, "the caller looked"
    if claimed.protocol != evaluation.protocol.name or claimed.images != evaluation.images:
        return CANNOT_TELL, (
            f"measured by {evaluation.protocol.name} on {evaluation.images:,} images, the recipe's by "
            f"{shown(claimed.protocol)} on {claimed.images:,}"
        )
    if claimed.weights_sha256 == evaluation.inputs.get("weights"):
        allowed = allowed_images(claimed.images)
        apart = abs(theirs - ours)
        why = f"the same weights; {apart} image(s) apart, allowed: {allowed}"
        return (EVALUATION_EQUAL if apart <= allowed else DIFFERS), why
    if claims.seeds is None:
        return CANNOT_TELL, "other weights; the recipe is one run (n = 1): its spread is unknown"
    if not is_top1:
        return CANNOT_TELL, "other weights; the recipe gives the spread of top-1 only"
    return against_seeds(claims.seeds, evaluation.images, ours)


def allowed_images(images: int) -> int:
    """The largest difference of equal evaluations, in images: kernels change the last digits of logits."""
    return math.ceil(images / MOST_OTHER_IMAGES)


def against_seeds(seeds: ClaimedSeeds, images: int, ours: int) -> tuple[str, str]:
    """One more run beside the prediction interval of the runs of the recipe (Student's t)."""
    number = len(seeds.correct_top1)
    if number < SEEDS_MIN or len(set(seeds.seeds)) != number or seeds.images != images:
        return (
            CANNOT_TELL,
            f"other weights; {number} run(s) of other seeds are too few for a spread ({SEEDS_MIN} or more)",
        )
    centre, spread = mean(seeds.correct_top1) / images, stdev(seeds.correct_top1) / images
    if spread == 0:
        return CANNOT_TELL, f"other weights; the {number} runs of other seeds are all equal, which gives no spread"
    reach = float(t.ppf((1 + CONFIDENCE) / 2, number - 1)) * math.sqrt(1 + 1 / number) * spread
    why = (
        f"{ours / images:.2%}; {CONFIDENCE:.0%} of further runs are expected within {centre:.2%} ± {reach:.2%} "
        f"(n = {number}, standard deviation {spread:.2%}); smaller differences cannot be seen"
    )
    return (CONSISTENT if abs(ours / images - centre) <= reach else DIFFERS), why


def judge_exports(claims: Claims, facts: RunData) -> Iterator[JudgedClaim]:
    """Each exported file: the same bytes, or the same answers."""
    if claims.serialization is None or facts.serialization is None:
        return
    exported = {entry.variant: entry for entry in facts.serialization.variants}
    weights_sha256 = facts.serialization.inputs.get("weights")
    for name, theirs in claims.serialization.items():
        ours = exported.get(name)
        if ours is None:
            level, why = DIFFERS, "no such file was exported"
        elif theirs.sha256 == ours.sha256:
            level, why = BIT_EXACT, "the same file"
        elif claims.training is None or claims.training.weights_sha256 != weights_sha256:
            level, why = CANNOT_TELL, "it is of other weights"
        else:
            apart, allowed = abs(theirs.correct_top1 - ours.correct_top1), allowed_images(facts.serialization.images)
            level = EVALUATION_EQUAL if apart <= allowed else DIFFERS
            why = (
                f"the same weights in another file (it names the commit and the versions that made it); top-1 {apart} "
                f"image(s) apart, allowed: {allowed}"
            )
        yield JudgedClaim(
            claim=f"exported model, {shown(name)}",
            level=level,
            claimed=theirs.sha256,
            found=None if ours is None else ours.sha256,
            why=why,
        )


def overall_verdict(claims: list[JudgedClaim]) -> str:
    """One line over all claims, the worst first."""
    levels = {claim.claim: claim.level for claim in claims}
    wrong = ", ".join(name for name, level in levels.items() if level == DIFFERS)
    open_claims = ", ".join(name for name, level in levels.items() if level == CANNOT_TELL)
    if wrong:
        return f"{DIFFERS}: {wrong}"
    if levels.get("trained weights") == BIT_EXACT:
        rest = f"; {CANNOT_TELL}: {open_claims}" if open_claims else ""
        return f"{BIT_EXACT}: the trained weights have the recipe's hash, and no claim was found wrong{rest}"
    if open_claims:
        return f"{CANNOT_TELL}: {open_claims}; no claim was found wrong"
    return "no claim was found wrong, at the levels below"


# ---- reproduction.md --------------------------------------------------------------------------------


WORDS = """A level says how much was shown. BIT-EXACT: the same bits. NUMERICALLY EQUAL: within the stated tolerance,
over the first epoch. STATISTICALLY CONSISTENT: not further apart than several runs of the recipe, whose number and
spread are given; smaller differences cannot be seen. EVALUATION EQUAL: the same weights give the same counts, but for a
few images. DIFFERS: the claim is wrong. CANNOT TELL: this comparison can show neither.

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
    return text(claim.claim), f"**{claim.level}**", value(claim.claimed), value(claim.found), text(claim.why)


def value(found: Setting) -> str:
    """A value of a cell. Hashes are cut to 16 digits, the record has all."""
    if isinstance(found, str):
        return code(found[:16]) or NOTHING
    return NOTHING if found is None else setting(found)


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {text(line)}" for line in lines) or "In nothing that was recorded."
