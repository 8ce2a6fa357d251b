"""Numbers that people type beside a metric's name: a wrong one is a warning, and nothing else is."""

from __future__ import annotations

import time

import pytest

from recipe.review.check.page import Page
from recipe.review.findings import Kind
from recipe.review.prose import prose_findings, recorded_numbers

CLAIMS = {
    "evaluation": {"images": 50_000, "correct_top1": 37_000, "correct_top5": 45_915, "loss": 1.0416},
    "serialization": {"int8": {"correct_top1": 36_850, "correct_top5": 45_800}},
}
RIGHT = [
    "We reach top-1 74.00 %.",
    "Top-1 74.0 and top-5 91.8.",
    "It has 74 % top-1 and 91.83 % top-5.",
    "top-1 accuracy: **74.00 %**",
    "| top-1 | 74.00 % |",
    "a top-1 accuracy of 0.74",
    "the top-1\naccuracy is 74.00 %",
    "int8 gives top-1 73.70 %",
    "validation loss 1.042",
]
WRONG = [
    ("We reach top-1 74.05 %.", "74.05"),
    ("Top-1 74.0 and top-5 92.8.", "92.8"),
    ("It has 74.1 % top-1 and 91.83 % top-5.", "74.1"),
    ("top-1 accuracy: **76.13 %**", "76.13"),
    ("| top-1 | 74.05 % |", "74.05"),
    ("a top-1 accuracy of 0.7405", "0.7405"),
    ("the top-1\naccuracy is 74.05 %", "74.05"),
    ("validation loss 1.14", "1.14"),
]
OF_SOMETHING_ELSE = [
    "The published top-1 is 76.13 %.",
    "torchvision reports a top-1 of 76.13 %",
    "2 points below; top-1 rose by 0.3 %",
    "top-1 error 26.0 %",
    "top-1 at epoch 30 was 61.2 %",
    "We expect top-1 of at least 75.5 %",
    "top-1. 99.9 % of the images are photographs.",
    "top-1\n\n55.5 % of something else",
    "top-1/top-5: 70.1/90.2",
    "top-1 with resize 256 and 3 crops",
    "top-1 on resnet50-v1.5 in 2019",
    "`top-1 99.9 %`",
    "```\ntop-1 99.9 %\n```",
    "[see](http://example.org/top-1-99.9)",
    "<!-- top-1 99.9 % -->",
    "The learning rate is 0.1 and the loss 5.5.",
]


def warnings(text: str) -> list[str]:
    found = prose_findings(Page("recipe.md", text), recorded_numbers(None, CLAIMS))
    assert all(one.kind is Kind.warning for one in found)
    return [one.what for one in found]


@pytest.mark.parametrize("text", RIGHT)
def test_a_number_that_is_the_record_at_its_precision_is_right(text: str) -> None:
    assert warnings(text) == []


@pytest.mark.parametrize(("text", "number"), WRONG)
def test_another_number_is_a_warning(text: str, number: str) -> None:
    (warning,) = warnings(text)
    assert f" {number}" in warning


@pytest.mark.parametrize("text", OF_SOMETHING_ELSE)
def test_a_number_of_something_else_is_left_alone(text: str) -> None:
    assert warnings(text) == []


def test_the_line_is_named_and_generated_blocks_are_not_prose() -> None:
    block = f"<!-- recipe:begin x sha256={'0' * 64} -->\ntop-1 99.9 %\n<!-- recipe:end x -->\n"
    (found,) = prose_findings(Page("recipe.md", f"one\n{block}\ntwo\ntop-1 99.9 %\n"), recorded_numbers(None, CLAIMS))
    assert found.place == "recipe.md, line 7"


PIECES = ["<!--", " ", "\n ", "`", "](", "1", "1.", "#", "# #", "top-1 ", "| ", "- ", "9%", "\u00a0"]


@pytest.mark.parametrize("piece", PIECES)
def test_no_text_of_a_stranger_takes_long(piece: str) -> None:
    """What grows with the square of the length would take minutes here."""
    page = Page("recipe.md", f"a {piece * 60_000} b\n")
    before = time.process_time()
    assert prose_findings(page, recorded_numbers(None, CLAIMS)) is not None
    assert page.headings is not None
    assert page.links == []
    assert time.process_time() - before < 3


def test_where_nothing_was_measured_nothing_is_wrong() -> None:
    assert prose_findings(Page("recipe.md", "top-1 99.9 %"), recorded_numbers(None, {})) == []
