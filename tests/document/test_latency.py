"""The Timing information: machines side by side, published figures marked, missing numbers left out."""

from __future__ import annotations

import re
from dataclasses import replace

import msgspec
import pytest

from recipe.document import figures, latency
from recipe.document.formatting import latency as as_text
from recipe.document.render import generated_blocks, json_file
from recipe.document.run_data import sections
from recipe.run.records import InferenceRecord, TimingRecord
from tests.builders.records import REFERENCE, cell, facts, picture, provenance, sha, timing


def chapter(*records: TimingRecord) -> str:
    return generated_blocks(replace(facts(), timing=records))["inference"]


def test_machines_stand_side_by_side() -> None:
    page = chapter(timing(), timing("intel-core-8-cores"))
    cells = "| 8.00 / 12.00 / – | 10.00 / 15.00 / – | *measured*, 200, 200 times |"
    assert f"| NVIDIA H200 | 64 | eager | fp32 {cells}" in page
    assert re.search(r"\| Intel \\\| Core, 8 cores \| 64 \| eager", page), "a name cannot open a cell of the table"
    assert page.count("<details>") >= 2
    assert "no compiler \\| here" in page


def test_the_verdict_is_the_ratio_to_the_reference_of_the_same_machine() -> None:
    (verdict,) = latency.verdicts([timing()])
    assert verdict.reference_milliseconds == 12.5
    assert verdict.fastest_fp32 is not None
    assert verdict.fastest is not None
    assert (verdict.fastest_fp32.backend, verdict.fastest_fp32.p50_milliseconds) == ("onnxruntime CPU", 5.0)
    assert (verdict.fastest.precision, verdict.fastest.p50_milliseconds) == ("int8", 4.0)
    page = " ".join(chapter(timing()).split())
    assert "12.50 ms (p50) from the bytes to the answer" in page
    assert "takes 5.00 ms, 0.40 of it" in page
    assert "4.00 ms, 0.32 of it" in page


def test_without_a_reference_nothing_is_compared() -> None:
    alone = timing(cells=[cell("eager", "both", 10.0), cell(REFERENCE, "both", None)])
    assert latency.verdicts([alone]) == []
    assert "10.00 / 15.00" in chapter(alone)


def test_a_missing_percentile_is_a_dash() -> None:
    assert as_text(cell("eager", "both", None)) == "– / – / –"
    assert as_text(None) == "–"
    assert as_text(cell("eager", "both", 1.0)) == "1.00 / 1.50 / –"


def test_published_figures_are_marked_with_their_source_and_only_beside_their_own_model() -> None:
    page = chapter(timing())
    published = [line for line in page.splitlines() if "*published*" in line]
    assert len(published) == len(latency.PUBLISHED) == 5
    assert all("V100" in line and "| 224 |" in line and "*measured*" not in line for line in published)
    assert "mean 10.37, p95 10.81, p99 11.73" in page
    assert latency.published_rows("small") == ()


def test_latencies_of_other_weights_are_stale_by_machine() -> None:
    run_data = replace(facts(), timing=(timing(), timing("laptop", weights="0" * 64)))
    section = sections(run_data)["timing_information"]
    assert section.state == "stale"
    (reason,) = section.reasons
    assert reason.startswith("on laptop, it used the weights 000000000000")
    assert "Timing information (stale)" in generated_blocks(run_data)["inference"]


def test_no_record_no_number() -> None:
    page = generated_blocks(facts())["inference"]
    assert page.count("Not measured yet: run `python -m recipe.stages.infer run_dir=") == 2
    assert "published" not in page


def test_each_machine_has_a_figure_with_equal_bytes_for_equal_records() -> None:
    records = (timing(), timing("laptop", cells=[cell("eager", "model", 1.0)]))
    run_data = facts(timing=records, training=None, preprocessing=None)
    drawn = figures.draw(run_data)
    assert list(drawn) == ["latency-nvidia-h200.png"], "no figure where single pictures were not measured"
    assert drawn == figures.draw(run_data)
    assert "(figures/latency-laptop.png)" not in chapter(*records)


def test_the_twin_holds_the_records_by_machine() -> None:
    content = msgspec.json.decode(json_file(replace(facts(), timing=(timing(),))))
    assert content["timing"]["nvidia-h200"]["cells"][1]["p50_milliseconds"] == 8.0
    assert content["sections"]["timing_information"] == {"state": "present", "reasons": []}


@pytest.mark.parametrize("label", [None, "zebra | $stripes$"])
def test_names_from_outside_stay_names(label: str | None) -> None:
    run_data = facts()
    assert run_data.training is not None
    record = InferenceRecord(
        config_sha256=run_data.training.config_sha256,
        provenance=provenance("python -m recipe.stages.infer"),
        inputs={"weights": sha("w")},
        outputs={},
        class_count=1,
        label_convention="sorted",
        pictures=[picture("a|b.jpg", label)],
    )
    page = generated_blocks(replace(run_data, inference=record))["inference"]
    assert "zebra \\| \\$stripes\\$ 25.00 %" in page
    row, *_ = [line for line in page.splitlines() if line.startswith("| ") and "b.jpg" in line]
    assert len(re.findall(r"(?<!\\)\|", row)) == (4 if label is None else 5), "no name opens a cell"
    assert figures.draw(replace(run_data, inference=record))["guesses.png"].startswith(b"\x89PNG")
