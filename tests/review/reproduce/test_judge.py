"""What a second run can and cannot show about a recipe's claims."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from recipe.document.recipe_json import recipe_claims
from recipe.document.run_data import RunData
from recipe.review.findings import CANNOT_TELL
from recipe.review.reproduce.judge import (
    BIT_EXACT,
    CONSISTENT,
    DIFFERS,
    EVALUATION_EQUAL,
    NUMERICALLY_EQUAL,
    judge_claims,
    overall_verdict,
    reproduction_page,
)
from recipe.review.reproduce.parse import Recipe, parse_recipe
from recipe.run.records import (
    Epoch,
    JudgedClaim,
    ReproductionRecord,
    SeedCounts,
    SeedRun,
    SeedsRecord,
    from_json,
    to_json,
)
from tests.builders.documents import HOSTILE, assert_tables_are_even
from tests.builders.records import evaluation_record, facts, preprocessing_record, provenance, sha, training_record

CIRCUMSTANCES = {"CPU threads": 2, "the device": "cpu"}
OTHER = ["CPU threads: 2 there, 1 here"]


def recipe(**changes: Any) -> Recipe:
    found = recipe_claims(facts(training=training_record(determinism_context=CIRCUMSTANCES), **changes))
    return parse_recipe(json.loads(json.dumps(found)))


def levels(theirs: Recipe, ours: RunData, changed: list[str]) -> dict[str, str]:
    return {claim.claim: claim.level for claim in judge_claims(theirs, ours, changed)}


def other_weights(**changes: Any) -> RunData:
    """The same recipe, trained to other bits."""
    return facts(
        training=training_record(outputs={"weights": sha("other")}, **changes),
        evaluation=evaluation_record(inputs={"manifest": sha("manifest"), "weights": sha("other")}, correct_top1=428),
    )


def test_equal_runs_are_equal_in_every_claim() -> None:
    found = judge_claims(recipe(), facts(), [])
    assert {claim.level for claim in found} == {BIT_EXACT, EVALUATION_EQUAL}
    assert len(found) >= 15
    assert overall_verdict(found).startswith(f"{BIT_EXACT}: the trained weights")


def test_other_bits_in_equal_circumstances_differ() -> None:
    found = levels(recipe(), other_weights(), [])
    assert found["trained weights"] == DIFFERS
    assert "trained weights" in overall_verdict(judge_claims(recipe(), other_weights(), []))


def test_other_bits_in_other_circumstances_tell_nothing_of_one_run() -> None:
    found = levels(recipe(), other_weights(), OTHER)
    assert found["trained weights"] == CANNOT_TELL
    assert found["top-1 of 480 images"] == CANNOT_TELL
    reasons = {claim.claim: claim.why for claim in judge_claims(recipe(), other_weights(), OTHER)}
    assert OTHER[0] in reasons["trained weights"]
    assert "n = 1" in reasons["top-1 of 480 images"]
    assert overall_verdict(judge_claims(recipe(), other_weights(), OTHER)).startswith(CANNOT_TELL)


@pytest.mark.parametrize(("deterministic", "level"), [(True, DIFFERS), (False, CANNOT_TELL)])
def test_on_a_gpu_bits_are_promised_by_deterministic_algorithms_only(deterministic: bool, level: str) -> None:
    hardware = replace(provenance("x").hardware, accelerator="NVIDIA H200")
    ran = provenance("python train.py", hardware=hardware)
    theirs = parse_recipe(
        json.loads(
            json.dumps(
                recipe_claims(facts(training=training_record(provenance=ran, determinism_context=CIRCUMSTANCES)))
            )
        )
    )
    ours = other_weights(provenance=ran, precision={"deterministic_algorithms": deterministic})
    assert levels(theirs, ours, [])["trained weights"] == level


def first_epoch_claim(change: Callable[[Epoch], Epoch]) -> JudgedClaim:
    """The claim about the first epoch, beside a run with changed epochs."""
    ours = facts(training=training_record(epochs=[change(epoch) for epoch in training_record().epochs]))
    [claim] = [claim for claim in judge_claims(recipe(), ours, OTHER) if "first epoch" in claim.claim]
    return claim


@pytest.mark.parametrize(
    ("factor", "level"), [(1.0, BIT_EXACT), (1.001, NUMERICALLY_EQUAL), (0.985, NUMERICALLY_EQUAL), (1.1, DIFFERS)]
)
def test_the_first_epoch_is_held_to_a_stated_tolerance(factor: float, level: str) -> None:
    claim = first_epoch_claim(lambda epoch: replace(epoch, train_loss=epoch.train_loss * factor))
    assert claim.level == level
    if level == NUMERICALLY_EQUAL:
        assert "allowed are 1e-09 and 0.02" in claim.why


def test_another_learning_rate_is_no_rounding() -> None:
    claim = first_epoch_claim(lambda epoch: replace(epoch, learning_rate=epoch.learning_rate * 1.001))
    assert claim.level == DIFFERS


def test_a_recipe_without_epochs_claims_nothing_of_the_first() -> None:
    block = json.loads(json.dumps(recipe_claims(facts())))
    block["claims"]["training"]["epochs"] = {}
    assert levels(parse_recipe(block), facts(), OTHER)["first epoch: learning rate, mean train loss"] == CANNOT_TELL


@pytest.mark.parametrize(("correct", "level"), [(431, EVALUATION_EQUAL), (430, EVALUATION_EQUAL), (429, DIFFERS)])
def test_equal_weights_give_equal_counts_but_for_a_few_images(correct: int, level: str) -> None:
    ours = facts(evaluation=evaluation_record(correct_top1=correct))
    assert levels(recipe(), ours, OTHER)["top-1 of 480 images"] == level


def test_another_protocol_cannot_be_compared() -> None:
    protocol = replace(evaluation_record().protocol, name="another")
    ours = facts(evaluation=evaluation_record(protocol=protocol))
    assert levels(recipe(), ours, [])["top-1 of 480 images"] == CANNOT_TELL


def seeds(*correct: int) -> SeedsRecord:
    runs = [
        SeedRun(
            seed=at,
            weights_sha256=sha(str(at)),
            source_sha256=sha("s"),
            batch_norm_batch_size=None,
            raw_sha256={},
            epochs={},
        )
        for at in range(len(correct))
    ]
    counts = SeedCounts(protocol="p", images=480, correct_top1=list(correct), correct_top5=[1] * len(correct))
    return SeedsRecord(recipe_id=sha("r"), config={}, steps_per_epoch=37, runs=runs, evaluation=counts)


@pytest.mark.parametrize(
    ("correct", "level"),
    [
        ((430, 433), CANNOT_TELL),  # two
        ((431, 431, 431), CANNOT_TELL),  # no spread
        ((431, 433, 429), CONSISTENT),  # 428 is within 431 +- 4.30 x 1.155 x 2 = 9.9
        ((461, 463, 459), DIFFERS),
        ((441, 443, 439, 442, 440, 441), DIFFERS),
    ],
)
def test_only_several_seeds_tell_whether_the_same_was_reached(correct: tuple[int, ...], level: str) -> None:
    theirs = recipe(seeds=seeds(*correct))
    [claim] = [claim for claim in judge_claims(theirs, other_weights(), OTHER) if claim.claim == "top-1 of 480 images"]
    assert claim.level == level
    if level == CONSISTENT:
        assert "89.79% ± 2.07%" in claim.why
        assert "n = 3" in claim.why


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        ({"preprocessing": preprocessing_record(outputs={"manifest": sha("x")})}, "processed data (manifest)"),
        ({"preprocessing": preprocessing_record(class_list_sha256=sha("x"))}, "class list"),
        ({"training": training_record(images_seen=1)}, "images seen"),
        (
            {"training": training_record(loader=replace(training_record().loader, order_sha256=sha("x")))},
            "order of the images, first two epochs",
        ),
        (
            {"training": training_record(model=replace(training_record().model, parameters=1))},
            "parameters",
        ),
    ],
)
def test_integers_and_orders_differ_on_any_machine(change: dict[str, Any], claim: str) -> None:
    assert levels(recipe(), facts(**change), OTHER)[claim] == DIFFERS


def test_rounded_bits_differ_in_equal_circumstances_only() -> None:
    ours = facts(training=training_record(augmentation_sha256=sha("x")))
    assert levels(recipe(), ours, [])["augmentation of a fixed image"] == DIFFERS
    assert levels(recipe(), ours, OTHER)["augmentation of a fixed image"] == CANNOT_TELL


def test_stages_that_were_not_run_are_named() -> None:
    found = levels(recipe(), facts(evaluation=None), [])
    assert found["evaluation"] == CANNOT_TELL
    assert found["trained weights"] == BIT_EXACT


def test_the_report_is_complete_and_harmless() -> None:
    claims = [
        JudgedClaim(claim=HOSTILE, level=level, claimed=HOSTILE, found={"a": HOSTILE}, why=HOSTILE)
        for level in (BIT_EXACT, DIFFERS)
    ]
    record = ReproductionRecord(
        document_sha256=sha("document"),
        name=HOSTILE,
        recipe_id=sha("id"),
        config_sha256=sha("config"),
        provenance=provenance("python -m recipe reproduce x.md --yes"),
        machine={"torch_threads": None, "gpus": 1},
        checkout=[HOSTILE],
        determinism_context=[],
        stages=["train"],
        claims=claims,
        verdict=overall_verdict(claims),
    )
    text = reproduction_page(from_json(to_json(record), ReproductionRecord, "x"))
    assert sha("document") in text
    assert_tables_are_even(text)
    assert "<img" not in text
    assert text.count("\n# ") == 0
    assert text.endswith("In nothing that was recorded.\n")
