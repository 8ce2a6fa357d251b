"""Numbers become words in one way each, and words from outside cannot become markdown."""

import pytest
from jinja2 import UndefinedError

from recipe.document import formatting
from recipe.document.formatting import Markdown
from recipe.document.render import environment


@pytest.mark.parametrize(
    ("fraction", "printed"),
    [
        (0.7405, "74.05 %"),
        (0.74, "74.00 %"),
        (1, "100.00 %"),
        (0, "0.00 %"),
        (1 / 3, "33.33 %"),
        (None, "–"),
        (float("nan"), "not finite"),
    ],
)
def test_percent(fraction: float | None, printed: str) -> None:
    assert formatting.percent(fraction) == printed


def test_accuracy_carries_its_counts() -> None:
    assert formatting.accuracy(38_065, 50_000) == "76.13 % (38,065 of 50,000)"
    assert formatting.accuracy(0, 0) == "– (0 of 0)"


@pytest.mark.parametrize(
    ("seconds", "printed"),
    [
        (0.4213, "0.42 s"),
        (42.16, "42.2 s"),
        (59.97, "1 min 00 s"),
        (197.4, "3 min 17 s"),
        (3599.9, "1 h 00 min"),
        (91_230, "25 h 20 min"),
        (None, "–"),
    ],
)
def test_duration(seconds: float | None, printed: str) -> None:
    assert formatting.duration(seconds) == printed


@pytest.mark.parametrize(
    ("value_bytes", "printed"),
    [
        (0, "0 bytes"),
        (1023, "1,023 bytes"),
        (147_897_477_120, "137.7 GiB"),
        (6_744_924_160, "6.3 GiB"),
    ],
)
def test_size(value_bytes: int, printed: str) -> None:
    assert formatting.size(value_bytes) == printed


@pytest.mark.parametrize(
    ("setting", "printed"),
    [
        (True, "yes"),
        (None, "none"),
        ([], "none"),
        (5e-05, "5e-05"),
        (0.1, "0.1"),
        (1000000, "1000000"),
        ([0.75, 4 / 3], "0.75, 1.33333333333"),
        ({"eps": 1e-05, "affine": True}, "eps 1e-05, affine yes"),
        ("random_resized_crop", "random_resized_crop"),
    ],
)
def test_settings_keep_their_precision(setting: formatting.Setting, printed: str) -> None:
    assert formatting.setting(setting) == printed


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        ("a|b", "a\\|b"),
        ("<b>&lt;", "&lt;b&gt;&amp;lt;"),
        ("one\r\ntwo\u2028three", "one two three"),
        ("snake_case and _slanted_", "snake_case and \\_slanted\\_"),
        ("![x](y) `c` *b* $m$ ~s~ \\", "!\\[x\\](y) \\`c\\` \\*b\\* \\$m\\$ \\~s\\~ \\\\"),
        ("# no heading", "\\# no heading"),
        ("- no item", "\\- no item"),
        ("1. no item", "1\\. no item"),
        ("0.35", "0.35"),
        ("-0.5", "-0.5"),
        ("abc\u202edef\ud800", "abc def?"),
        ("", ""),
    ],
)
def test_words_from_outside_are_printed_literally(words: str, printed: str) -> None:
    assert formatting.text(words) == printed


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("records/training.json", "`records/training.json`"),
        ("a`b", "<code>a\\`b</code>"),
        ("", ""),
        ("a|b<c>", "<code>a\\|b&lt;c&gt;</code>"),
        ("two\nlines", "`two lines`"),
    ],
)
def test_code(name: str, printed: str) -> None:
    assert formatting.code(name) == printed


def test_a_fence_is_longer_than_what_it_holds() -> None:
    assert formatting.fenced(["one\ntwo", "````"], "bash") == "`````bash\none two\n````\n`````"


def page(source: str, **values: object) -> str:
    return environment().from_string(source).render(**values)


def test_the_template_escapes_by_default() -> None:
    assert page("{{ words }}", words="<!-- x -->") == "&lt;!-- x --&gt;"
    assert page("{{ words | code }}", words="<!-- x -->") == "<code>&lt;!-- x --&gt;</code>"
    assert page("{{ count }} {{ made }}", count=1_281_167, made=Markdown("**b**")) == "1,281,167 **b**"


@pytest.mark.parametrize("value", [0.1, None, True, ["a"]])
def test_nothing_reaches_the_page_without_a_format(value: object) -> None:
    with pytest.raises(TypeError, match="without a filter"):
        page("{{ value }}", value=value)


def test_undefined_names_stop() -> None:
    with pytest.raises(UndefinedError):
        page("{{ missing }}")
