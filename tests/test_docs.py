"""README, docs/ and the other pages for people: commands, links, paths, numbers and exit codes are true."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from docs import generate
from recipe.__main__ import VERBS, _parse_arguments, main
from recipe.config.schema import schema_keys
from recipe.errors import SAVED, DiskError, HangError, NonFiniteError, UserError
from recipe.inference.parity import ParityError
from recipe.run.directory import Run
from recipe.run.files import CHECKOUT
from recipe.run.records import RECORDS
from recipe.stages.infer import NOTEBOOK
from tests.builders.configs import compose_config

DOCS = sorted(str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "docs").glob("**/*.md"))
PAGES = ["README.md", *DOCS, "CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md", "benchmarks/README.md"]
LINES_MAX = 150  # of the README
SCRIPTS = ("preprocess.py", "train.py", "evaluate.py", "serialize.py")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:python \S+\.py|make) ?[^`]*)`")
GENERATED = re.compile(r"<!-- recipe:begin .*?<!-- recipe:end [^>]*>", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
STATEMENT = re.compile(r"\n\n|\n(?=\s*(?:[-|]|\d+\.) )")  # between two of them: a paragraph, a row, an item of a list
PERCENT = re.compile(r"\d ?%")
MARKS = ("measured", "published", "declared")


def text_of(page: str) -> str:
    return (CHECKOUT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The code of one language."""
    return [code for name, code in FENCE.findall(text_of(page)) if name == language]


def commands(page: str) -> list[str]:
    """Every `python ...`, `torchrun ...` and `make ...` of a page, from its shell blocks and its sentences."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines = [re.sub(r"^(srun |\.venv/bin/(?=python))", "", line.strip()) for line in lines]
    lines += INLINE.findall(FENCE.sub("", text_of(page)))
    return [line for line in lines if re.match(r"(python|torchrun) .*(\.py|-m recipe)|make( |$)", line)]


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def overrides(words: list[str]) -> list[str]:
    """The words that Hydra composes; of a sweep its first value, of a placeholder any name."""
    settings = [word for word in words if "=" in word and not word.startswith("-")]
    if "-m" in words:
        settings = [setting.partition(",")[0] for setting in settings]
    return [re.sub(r"<\w+>", "name", setting) for setting in settings]


composed_once = cache(compose_config)

# ---- commands ---------------------------------------------------------------------------------------


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        check_module(words[1], words[2:])
        return
    script = next(word for word in words if word.endswith(".py"))
    assert (CHECKOUT / script).is_file()
    if "/" in script:  # of benchmarks/ and docs/: they have flags of their own
        return
    assert script in SCRIPTS
    given = words[words.index(script) + 1 :]
    assert given == sorted(given, key=lambda word: "=" in word), "the command line takes flags before values"
    composed_once(*overrides(given))


def check_module(module: str, words: list[str]) -> None:
    assert importlib.util.find_spec(module)
    if module == "recipe.stages.infer":
        composed_once(*overrides(words))
    if module != "recipe":
        return
    arguments = _parse_arguments(words)  # SystemExit where a verb or an option is unknown
    if arguments.verb == "doctor":
        composed_once(*overrides(arguments.words))


def check_make(words: list[str]) -> None:
    makefile = text_of("Makefile")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) \?=", makefile, re.MULTILINE))
    given = dict(word.split("=", 1) for word in words if "=" in word)
    assert {word for word in words if "=" not in word} - {"..."} <= targets
    assert given.keys() <= variables
    assert (CHECKOUT / (given.get("CONSTRAINTS") or "constraints.txt")).is_file()
    experiment = given.get("EXPERIMENT", "demo").replace("NAME", "demo")
    composed_once(f"experiment={experiment}", *shlex.split(given.get("ARGS", "")))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_names_what_exists(page: str) -> None:
    for command in commands(page):
        check_command(command)


def check_command(command: str) -> None:
    """Raise an error that names the command, where it would not be accepted."""
    first, *words = words_of(command)
    try:
        check_make(words) if first == "make" else check_python(words)
    except (Exception, SystemExit) as error:
        raise AssertionError(f"{command}: {error}") from error


@pytest.mark.parametrize(
    "command",
    [
        "make preproces",
        "make train GPU=8",
        "python train.py trainer.gpsu=8",
        "python -m recipe chekc runs/demo",
        "python -m recipe check --exceute runs/demo",
    ],
)
def test_a_wrong_command_would_be_found(command: str) -> None:
    with pytest.raises(AssertionError):
        check_command(command)


def test_every_verb_has_its_section_and_its_line() -> None:
    named = {verb for page in PAGES for verb in re.findall(r"python -m recipe ([a-z]+)", text_of(page))}
    assert named == VERBS.keys()
    for verb in VERBS:
        assert f"\n## {verb}\n" in text_of("docs/verbs.md")
        assert f"\npython -m recipe {verb} " in text_of("README.md")


def test_the_readme_shows_every_kind_of_command() -> None:
    shown = commands("README.md")
    assert shown[0] == "make preprocess train evaluate"
    assert all(any(word in command for command in shown) for word in (*SCRIPTS[:3], "make serialize", "make inference"))


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_runs(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    options = set(re.findall(r"(?<![\w-])--[a-z-]+", capsys.readouterr().out))
    section = text_of("docs/verbs.md").partition(f"\n## {verb}\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(--[a-z-]+)", section)) <= options


@pytest.mark.parametrize("verb", ["check", "verify", "diff"])
def test_the_quick_verbs_run_as_the_readme_shows_them(verb: str) -> None:
    [command] = [line for line in commands("README.md") if line.startswith(f"python -m recipe {verb} ")]
    demo = str(CHECKOUT / "recipes" / "demo")
    words = [re.sub(r"^(runs|recipes)/\w+$", demo, word) for word in words_of(command)[3:]]
    assert main([*words, *(["--skip", "trace"] if verb == "verify" else [])]) == 0


@pytest.mark.process
def test_the_settings_are_printed_as_the_pages_show() -> None:
    command = "python train.py --cfg job experiment=demo"
    assert command in commands("docs/quickstart.md")
    printed = subprocess.run([sys.executable, *words_of(command)[1:]], cwd=CHECKOUT, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    assert yaml.safe_load(printed.stdout)["optimization"]["epochs"] == 6


def test_make_help_lists_the_targets_of_the_pages() -> None:
    printed = subprocess.run(["make", "help"], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    shown = {word for page in PAGES for line in commands(page) if line.startswith("make ") for word in line.split()[1:]}
    targets = {word for word in shown if re.fullmatch(r"[a-z-]+", word)}
    assert {"preprocess", "serialize", "inference", "reproduce"} <= targets
    assert all(re.search(rf"^{target} ", printed, re.MULTILINE) for target in targets)


def test_python_on_the_pages_compiles_and_finds_its_imports() -> None:
    code = [block for page in PAGES for block in blocks(page, "python")]
    assert code
    for block in code:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)


# ---- links and paths --------------------------------------------------------------------------------


@cache
def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives to the headings of a page."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page: str) -> None:
    for link in LINK.findall(FENCE.sub("", text_of(page))):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = (CHECKOUT / page).parent / target if target else CHECKOUT / page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


def test_every_path_that_is_named_exists() -> None:
    """Code, configuration and pages; files of a run are in a test of their own."""
    folders = r"recipe|conf|tests|docs|\.ci|\.github"
    named = {name for page in PAGES for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", text_of(page))}
    assert len(named) > 20
    assert not [name for name in sorted(named) if not (CHECKOUT / name).exists()]


def test_the_index_lists_every_page() -> None:
    linked = {f"docs/{link}" for link in LINK.findall(text_of("docs/README.md")) if "/" not in link}
    assert linked == {page for page in DOCS if page != "docs/README.md"}
    assert "(docs/README.md)" in text_of("README.md")


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= LINES_MAX


def test_the_picture_is_small_and_is_there() -> None:
    for name in ("recipe.png", "recipe-dark.png"):
        picture = CHECKOUT / "docs" / name
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size < 300_000
        assert f'"docs/{name}"' in text_of("README.md")


# ---- what the pages say of the code ------------------------------------------------------------------


@pytest.mark.parametrize("name", generate.PAGES)
def test_generated_pages_are_those_of_the_code(name: str) -> None:
    assert text_of(f"docs/{name}") == generate.PAGES[name](), "run `python docs/generate.py`"


def test_every_setting_has_a_meaning_and_every_experiment_a_section() -> None:
    meanings = generate.meanings()
    assert [key for key in schema_keys() if not meanings.get(key)] == []
    rows = re.findall(r"^\| `([\w.]+)` \|", text_of("docs/configuration.md"), re.MULTILINE)
    assert sorted(rows) == sorted(schema_keys())
    experiments = {path.stem for path in (CHECKOUT / "conf" / "experiment").glob("*.yaml")}
    assert set(re.findall(r"^## (\w+)$", text_of("docs/experiments.md"), re.MULTILINE)) == experiments
    assert f"lists all {len(experiments)}," in " ".join(text_of("README.md").split())


def section_table() -> list[list[str]]:
    """The rows of the table from the document to the code, each as its five cells."""
    table = text_of("docs/files-of-a-run.md").partition("| Section |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_section_table_names_scripts_code_configuration_and_records() -> None:
    run = Run("run")
    left = {f"records/{name}.json" for name in RECORDS}
    left |= {"records/timing"} | {path.name for path in (run.metrics, run.config, run.json_file, run.document)}
    rows = section_table()
    assert len(rows) >= 7
    for _, script, code, configuration, record in rows:
        assert script.strip("`") in (*SCRIPTS, NOTEBOOK.name, "every script")
        assert "recipe/" in code
        assert configuration == "–" or "conf/" in configuration
        assert set(re.findall(r"`([^`]+)`", record)) <= left


def test_every_configuration_group_and_every_file_of_a_run_has_its_place() -> None:
    page = text_of("docs/files-of-a-run.md")
    assert all(f"`conf/{path.name}/`" in page for path in (CHECKOUT / "conf").iterdir() if path.is_dir())
    run = Run("run")
    files = {path.name for path in vars(run).values() if path not in (run.directory, run.lock_file)}
    files -= {run.timing.name, run.other_evaluations.name}  # inside records/
    assert not [name for name in files if not re.search(rf"^  {re.escape(name)}/? ", page, re.MULTILINE)]


def test_the_picture_of_the_layers_is_the_table_of_the_imports() -> None:
    floors = re.search(r"FLOORS = \((.*?)\n\)", text_of("tests/test_layers.py"), re.DOTALL)
    assert floors
    expected = [set(names.split()) for names in "".join(re.findall(r'"(.*)"', floors[1])).split(" < ")]
    picture = text_of("docs/design.md").partition("## The layers")[2].partition("```text\n")[2].partition("```")[0]
    left = [set(line[:44].split()) for line in picture.splitlines()[1:]]
    assert left == expected[::-1]


def test_exit_codes_are_those_of_the_code() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", text_of("docs/resuming.md"), re.MULTILINE))
    assert rows.keys() == {"0", "2", "65", "69", "70", "74", "75", "130"}
    assert "bad input" in rows[str(UserError.exit_code)]
    assert "not finite" in rows[str(NonFiniteError.exit_code)]
    assert "did not answer" in rows[str(HangError.exit_code)]
    assert "written" in rows[str(DiskError.exit_code)]
    assert "does not agree" in rows[str(ParityError.exit_code)]
    assert "saved" in rows[str(SAVED)]
    codes = {
        word for page in PAGES for word in re.findall(r"(?:exits? with (?:code )?|exit code )(\d+)", text_of(page))
    }
    assert codes <= rows.keys() | {"1", "3"}  # of the verbs


# ---- numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", *DOCS])
def test_every_accuracy_says_where_it_is_from(page: str) -> None:
    """Printed output is in blocks of its own; the table of published recipes has the mark in its head."""
    by_hand = GENERATED.sub("", FENCE.sub("", text_of(page)))
    about = re.compile(r"top-[15]|accuracy|\*\*Expected\*\*")
    accuracies = [text for text in STATEMENT.split(by_hand) if PERCENT.search(text) and about.search(text)]
    assert not [text for text in accuracies if not any(mark in text for mark in MARKS)]


def test_an_accuracy_without_a_source_would_be_found() -> None:
    assert len([text for text in STATEMENT.split("It is good.\n\n- top-1 76 %\n- other") if PERCENT.search(text)]) == 1


def test_the_printed_accuracy_is_the_published_one() -> None:
    readme = text_of("README.md")
    [(percent, correct, images)] = re.findall(r"^\| \[demo\].*?\| ([\d.]+) % \((\d+) of (\d+)\)", readme, re.MULTILINE)
    assert float(percent) == round(100 * int(correct) / int(images), 2)
    printed = "\n".join(blocks("README.md", "text"))
    assert f"top-1 {percent}% ({correct} of {images}), resize" in printed
    assert f"validation  loss 0.2320  top-1 {percent}%" in printed


@pytest.mark.parametrize("path", sorted((CHECKOUT / "conf" / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_head_of_an_experiment_has_the_numbers_of_its_description(path: Path) -> None:
    described = yaml.safe_load(path.read_text(encoding="utf-8"))["description"].get("expected_accuracy", "")
    expected = generate.header_of(path)["expected"]
    assert not [number for number in re.findall(r"\d+(?:\.\d+)?(?= ?%)", described) if number not in expected]


# ---- other files ------------------------------------------------------------------------------------


def test_the_workflow_of_github_runs_the_checks() -> None:
    workflow = yaml.safe_load(text_of(".github/workflows/ci.yml"))
    assert workflow[True].keys() == {"push", "pull_request"}  # YAML reads `on` so
    checkout, *_, run = workflow["jobs"]["test"]["steps"]
    assert checkout["with"]["fetch-depth"] == 0
    assert (CHECKOUT / run["run"]).stat().st_mode & 0o100
    assert run["env"].keys() <= set(re.findall(r"^([A-Z_]+) \?=", text_of("Makefile"), re.MULTILINE))


@pytest.mark.parametrize("path", sorted(CHECKOUT.glob("constraints*.txt")), ids=lambda path: path.name)
def test_constraints_hold_versions_only(path: Path) -> None:
    assert "//" not in path.read_text()
    assert "torch==" in path.read_text()
