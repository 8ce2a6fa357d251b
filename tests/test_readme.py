"""What the pages for people say is there: commands, links, the table from the document to the code, marked numbers."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from recipe.__main__ import VERBS
from recipe.errors import SAVED, DiskError, HangError, NonFiniteError, UserError
from recipe.inference.parity import ParityError
from recipe.run.directory import Run
from recipe.run.files import CHECKOUT
from recipe.run.records import RECORDS
from recipe.stages.infer import NOTEBOOK
from tests.builders.configs import compose_config

PAGES = ["README.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md"]
SCRIPTS = ("preprocess.py", "train.py", "evaluate.py", "serialize.py")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:python \S+\.py|make) ?[^`]*)`")
GENERATED = re.compile(r"<!-- recipe:begin .*?<!-- recipe:end [^>]*>", re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")
ACCURACY = re.compile(r"\d(?:\.\d+)? ?%")
MARKS = ("measured", "published", "declared")


def text_of(page: str) -> str:
    return (CHECKOUT / page).read_text(encoding="utf-8")


def commands(page: str) -> list[str]:
    """Every `python ...py`, `torchrun ... .py` and `make ...` of a page, from its shell blocks and its sentences."""
    text = text_of(page)
    blocks = [block.replace("\\\n", " ") for language, block in FENCE.findall(text) if language == "bash"]
    lines = [line for block in blocks for line in block.splitlines()]
    lines += INLINE.findall(FENCE.sub("", text))
    return [line for line in lines if re.match(r"(python|torchrun) .*\.py|make( |$)", line)]


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def overrides(words: list[str]) -> list[str]:
    """The words that Hydra composes; of a sweep its first value, of a placeholder any name."""
    settings = [word for word in words if "=" in word and not word.startswith("-")]
    if "-m" in words:
        settings = [setting.partition(",")[0] for setting in settings]
    return [re.sub(r"<\w+>", "name", setting) for setting in settings]


def check_script(words: list[str]) -> None:
    script = next(word for word in words if word.endswith(".py"))
    assert (CHECKOUT / script).is_file()
    if script.startswith("benchmarks/"):  # they have flags of their own
        return
    assert script in SCRIPTS
    given = words[words.index(script) + 1 :]
    assert given == sorted(given, key=lambda word: "=" in word), "the command line takes flags before values"
    compose_config(*overrides(given))


def check_make(words: list[str]) -> None:
    makefile = text_of("Makefile")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) \?=", makefile, re.MULTILINE))
    given = dict(word.split("=", 1) for word in words if "=" in word)
    assert {word for word in words if "=" not in word} <= targets
    assert given.keys() <= variables
    assert (CHECKOUT / (given.get("CONSTRAINTS") or "constraints.txt")).is_file()
    compose_config(f"experiment={given.get('EXPERIMENT') or 'demo'}", *shlex.split(given.get("ARGS", "")))


ALL_COMMANDS = [pytest.param(command, id=f"{page}: {command}") for page in PAGES for command in commands(page)]


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_every_command_names_what_exists(command: str) -> None:
    first, *words = words_of(command)
    check = check_make if first == "make" else check_script
    check(words)


def test_every_verb_that_is_named_exists() -> None:
    named = {verb for page in PAGES for verb in re.findall(r"python -m recipe (\w+)", text_of(page))}
    assert {"reproduce", "publish", "watch"} <= named <= VERBS.keys()


def test_the_readme_shows_every_script_and_the_first_command() -> None:
    shown = commands("README.md")
    assert shown[0] == "make preprocess train evaluate"
    assert all(any(script in command for command in shown) for script in SCRIPTS)


@pytest.mark.parametrize("command", ["make preproces", "make train GPU=8", "python train.py trainer.gpsu=8"])
def test_a_wrong_command_would_be_found(command: str) -> None:
    with pytest.raises(Exception, match=r"preproces|GPU|gpsu"):
        test_every_command_names_what_exists(command)


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page: str) -> None:
    links = [link for link in LINK.findall(text_of(page)) if "://" not in link]
    assert all((CHECKOUT / link).exists() for link in links), links


def test_every_path_that_is_named_exists() -> None:
    """Code and configuration anywhere on the pages; files of a run by what `Run` calls them."""
    named = {name for page in PAGES for name in re.findall(r"`((?:recipe|conf|tests)/[\w./-]*)`", text_of(page))}
    assert len(named) > 20
    assert not [name for name in sorted(named) if not (CHECKOUT / name).exists()]


def section_table() -> list[list[str]]:
    """The rows of the table from the document to the code, each as its five cells."""
    table = text_of("README.md").partition("| Section |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_section_table_names_scripts_code_configuration_and_records() -> None:
    run = Run("run")
    left = {f"records/{name}.json" for name in RECORDS}
    left |= {"records/timing"} | {path.name for path in (run.metrics, run.config, run.json_file, run.document)}
    rows = section_table()
    assert len(rows) >= 7
    for _, script, code, configuration, record in rows:
        verbs = (f"python -m recipe {verb}" for verb in VERBS)
        assert script.strip("`") in (*SCRIPTS, NOTEBOOK.name, "every script", *verbs)
        assert "recipe/" in code
        assert configuration == "–" or "conf/" in configuration
        assert set(re.findall(r"`([^`]+)`", record)) <= left


def test_every_configuration_group_and_every_experiment_has_its_place() -> None:
    readme = text_of("README.md")
    assert all(f"`conf/{path.name}/`" in readme for path in (CHECKOUT / "conf").iterdir() if path.is_dir())
    experiments = [path.stem for path in (CHECKOUT / "conf" / "experiment").glob("*.yaml")]
    assert all(f"| `{name}`" in readme for name in experiments)


def test_every_accuracy_says_where_it_is_from() -> None:
    """In tables and sentences; printed output stands in a block of its own and agrees with the table."""
    readme = text_of("README.md")
    by_hand = GENERATED.sub("", FENCE.sub("", readme))  # the table of published recipes has the mark in its head
    lines = [line for line in by_hand.splitlines() if ACCURACY.search(line)]
    assert lines
    assert all(any(mark in line for mark in MARKS) for line in lines), lines
    correct, images = re.findall(r"\((\d+) of (\d+)\)\*\*, n = 1, spread unknown", readme)[0]
    assert f"**{int(correct) / int(images):.2%}".replace("%", " %") in readme
    assert f"top-1 {int(correct) / int(images):.2%} ({correct} of {images}), resize" in readme


def test_published_numbers_are_those_of_the_experiments() -> None:
    readme = text_of("README.md")
    assert "76.130 %" in compose_config("experiment=resnet50_classic").description.expected_accuracy
    assert "77.12 +- 0.11 %" in compose_config().description.expected_source
    assert "76.130 %" in readme
    assert "77.12 ± 0.11 %" in readme


def test_exit_codes_are_those_of_the_code() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", text_of("README.md"), re.MULTILINE))
    assert rows.keys() == {"0", "2", "65", "69", "70", "74", "75", "130"}
    assert "bad input" in rows[str(UserError.exit_code)]
    assert "not finite" in rows[str(NonFiniteError.exit_code)]
    assert "did not answer" in rows[str(HangError.exit_code)]
    assert "written" in rows[str(DiskError.exit_code)]
    assert "does not agree" in rows[str(ParityError.exit_code)]
    assert "saved" in rows[str(SAVED)]


def test_the_picture_is_small_and_is_there() -> None:
    picture = CHECKOUT / "docs" / "recipe.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 300_000


@pytest.mark.parametrize("path", sorted(CHECKOUT.glob("constraints*.txt")), ids=lambda path: path.name)
def test_constraints_hold_versions_only(path: Path) -> None:
    assert "//" not in path.read_text()
    assert "torch==" in path.read_text()
