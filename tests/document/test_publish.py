"""A published recipe: a page that is a model card, the records behind it, nobody's words lost, nothing half written."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipe.__main__ import main
from recipe.document import figures
from recipe.document import publish as publishing
from recipe.document.blocks import Block, split
from recipe.document.model_card import CARD_END
from recipe.document.publish import RECIPES, publish, thinned, with_table
from recipe.document.render import render, write_document
from recipe.document.run_data import load
from recipe.errors import UserError
from recipe.review.opening import contradictions, open_recipe
from recipe.run.directory import Run
from recipe.run.files import CHECKOUT
from recipe.run.provenance import GIT_REFUSED, NoCommitError
from recipe.run.records import PublicationRecord, SeedsRecord, TreeState
from tests.builders.documents import assert_tables_are_even, section
from tests.builders.records import (
    CONFIG,
    evaluation_record,
    metric_rows,
    preprocessing_record,
    provenance,
    sha,
    training_record,
)
from tests.builders.runs import write_run

LINK = re.compile(r"\]\(([^)#\s]+)\)")


@pytest.fixture(autouse=True)
def clean_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the developer's working tree is like; tests of it say otherwise."""
    monkeypatch.setattr(publishing, "modified_files", lambda outside: [])


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes most of the time; tests/document/test_document.py looks at them."""
    names = ("accuracy", "images_per_class", "learning_rate", "loss", "throughput")
    monkeypatch.setattr(figures, "draw", lambda facts: {f"{name}.png": b"png" for name in names})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with its document, which holds words of somebody's."""
    run = write_run(tmp_path / "runs" / "demo")
    write_document(run, "runs/demo")
    text = run.document.read_text()
    text = text.replace("<!-- recipe:begin legend", "\r\n| mine | too |\r\n|--|--|\r\n\n<!-- recipe:begin legend", 1)
    run.document.write_bytes(f"First words.\n\n{text}\n## My last words\n".encode())
    return run


def page(folder: Path) -> str:
    return (folder / "README.md").read_bytes().decode()


def front_matter(text: str) -> dict[str, Any]:
    """By the expression with which huggingface_hub cuts it off."""
    found = re.match(r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\r|\n|$))", text)
    assert found
    values = yaml.safe_load(found[2])
    assert isinstance(values, dict)
    return values


def prose(text: str) -> str:
    body = text.split("\n---\n", 1)[1] if text.startswith("---\n") else text
    return "".join(piece.text for piece in split(body) if not isinstance(piece, Block))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what is written --------------------------------------------------------------------------------


def test_the_folder_holds_the_recipe_and_no_weights(run: Run) -> None:
    for name in ("checkpoints/step-1.pt", "tensorboard/events", "predictions/x.npz", "onnx/m.onnx", "lock"):
        (run.directory / name).parent.mkdir(exist_ok=True)
        (run.directory / name).write_bytes(b"large")
    folder = publish(run)
    assert folder == Path("recipes", "demo")
    assert {path.split("/")[0] for path in tree(folder)} == {
        *("README.md", "config.yaml", "metrics.jsonl", "recipe.json", "records", "figures"),
    }
    assert sorted(Path("recipes").iterdir()) == [folder]


def test_every_link_of_the_page_works_from_its_folder(run: Run) -> None:
    folder = publish(run, artefacts="https://example.org/weights")
    links = [link for link in LINK.findall(page(folder)) if "://" not in link]
    assert {"records/evaluation.json", "metrics.jsonl", "recipe.json", "figures/accuracy.png"} <= set(links)
    assert not [link for link in links if not (folder / link).is_file()]
    assert "<https://example.org/weights>" in page(folder)


def test_a_published_recipe_says_what_its_run_says(run: Run) -> None:
    folder = publish(run)
    published, facts = load(Run(folder), "elsewhere"), load(run, "runs/demo")
    assert dataclasses.replace(published, publication=None, run_dir=facts.run_dir) == facts
    subject = open_recipe(folder)
    assert subject.document_path == folder / "README.md"
    assert subject.facts() == published
    assert contradictions(subject.required_block()) == []
    assert subject.required_block()["config"] == CONFIG
    body = page(folder).split("\n---\n", 1)[1]
    assert render(published, body) == body
    assert json.loads((folder / "recipe.json").read_bytes())["claims"] == subject.required_block()["claims"]


def test_the_page_is_a_valid_model_card(run: Run) -> None:
    values = front_matter(page(publish(run)))
    assert values["license"] == "mit"
    assert values["pipeline_tag"] == "image-classification"
    assert "datasets" not in values  # not of the Hub
    [entry] = values["model-index"]
    assert entry["name"] == "demo"
    [result] = entry["results"]
    assert result["task"]["type"] == "image-classification"
    assert result["dataset"]["type"] == "demo"
    assert {(metric["type"], metric["value"]) for metric in result["metrics"]} == {
        ("accuracy", round(431 / 480, 6)),
        ("top-5-accuracy", round(476 / 480, 6)),
    }
    assert all(isinstance(value, str) for value in (result["dataset"]["name"], result["metrics"][0]["name"]))


def test_ilsvrc2012_is_named_to_the_hub_only_where_it_was_verified(run: Run) -> None:
    run.write(preprocessing_record(is_ilsvrc2012=True))
    write_document(run, "runs/demo")
    assert front_matter(page(publish(run)))["datasets"] == ["ILSVRC/imagenet-1k"]


@pytest.mark.parametrize("hostile", ["a: b\n---\nlicense: evil", "'\"#|>", "\u2028---\u202e"])
def test_hostile_names_stay_inside_the_front_matter(run: Run, hostile: str) -> None:
    run.write(preprocessing_record(data_set=hostile))
    write_document(run, "runs/demo")
    text = page(publish(run))
    assert front_matter(text)["license"] == "mit"
    assert text.count("\n---\n") == 1


# ---- words ------------------------------------------------------------------------------------------


def test_words_of_the_run_and_of_the_published_page_both_survive(run: Run) -> None:
    folder = publish(run)
    assert prose(page(folder)).strip("\n") == prose(run.document.read_bytes().decode()).strip("\n")
    text = page(folder).replace("<!-- recipe:begin outputs", "Seen by a reviewer.\r\n\n<!-- recipe:begin outputs", 1)
    (folder / "README.md").write_bytes(text.encode())
    run.document.write_bytes(run.document.read_bytes() + b"\r\nAdded later.\r\n")
    run.write(evaluation_record(correct_top5=470))
    publish(run)
    again = page(folder)
    for words in (
        "First words.\n",
        "\r\n| mine | too |\r\n|--|--|\r\n",
        "Seen by a reviewer.\r\n",
        "\r\nAdded later.\r\n",
    ):
        assert again.count(words) == 1
    assert "470 of 480" in again
    publish(run)
    assert page(folder) == again


@pytest.mark.parametrize("seed", range(12))
def test_random_words_survive_republication_byte_for_byte(run: Run, seed: int) -> None:
    """As long as the structure can be told; else the page is refused, not guessed at."""
    generator = random.Random(seed)
    folder = publish(run)
    text = page(folder)
    letters = [
        "`",
        "```",
        "~~~",
        "|",
        "-",
        "#",
        "<!--",
        "-->",
        " ",
        "    ",
        "\r\n",
        "\n",
        "\n\n",
        "word",
        "- ",
        "\u00e9",
    ]
    at = text.index("<!-- recipe:begin dynamics")
    text = text[:at] + "".join(generator.choices(letters, k=40)) + "\n" + text[at:]
    (folder / "README.md").write_bytes(text.encode())
    before = tree(folder)
    try:
        words = prose(text)
        publish(run)
    except UserError:
        assert tree(folder) == before
        return
    assert prose(page(folder)) == words


def test_own_keys_of_the_front_matter_stay(run: Run) -> None:
    folder = publish(run)
    text = page(folder).replace(f"{CARD_END}\n", f"{CARD_END}\nbase_model: none/none  # mine\n", 1)
    (folder / "README.md").write_text(text)
    run.write(evaluation_record(correct_top5=470))
    publish(run)
    assert "\nbase_model: none/none  # mine\n---\n" in page(folder)
    assert front_matter(page(folder))["base_model"] == "none/none"
    (folder / "README.md").write_text(page(folder).replace("base_model:", "tags:"))
    with pytest.raises(UserError, match="key 'tags' twice"):
        publish(run)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("license: mit", "license: apache-2.0", r"(?s)edited by hand.*-license: apache-2.0.*\+license: mit"),
        ("# recipe:begin card", "# card", "lost its marks"),
        ("89.79 %", "99.79 %", r"(?s)block 'summary'.*-.*99\.79 %.*\+.*89\.79 %"),
    ],
)
def test_an_edit_of_what_is_generated_is_shown_and_never_overwritten(
    run: Run, old: str, new: str, message: str
) -> None:
    folder = publish(run)
    (folder / "README.md").write_text(page(folder).replace(old, new, 1))
    before = tree(folder)
    with pytest.raises(UserError, match=message):
        publish(run)
    assert tree(folder) == before


def test_files_of_others_stay(run: Run) -> None:
    folder = publish(run)
    (folder / "notes.md").write_text("mine")
    (folder / "figures" / "mine.png").write_bytes(b"png")
    publish(run)
    assert (folder / "notes.md").read_text() == "mine"
    assert (folder / "figures" / "mine.png").read_bytes() == b"png"


# ---- what is refused --------------------------------------------------------------------------------

MODIFIED = TreeState(state="modified", patch_sha256=sha("patch"))


@pytest.mark.parametrize("stage", ["preprocessing", "training", "evaluation"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tree_at_start": MODIFIED, "tree_at_end": MODIFIED}, "ran on a modified tree"),
        ({"tree_at_start": TreeState(state="no git")}, "ran on code without a commit: no git"),
        (
            {"tree_at_end": TreeState(state="git refused", reason="detected dubious ownership")},
            "without a commit: git refused, because detected dubious ownership",
        ),
        ({"tree_at_start": TreeState(state="not a repository of ours")}, "without a commit: not a repository of ours"),
        ({"tree_at_end": TreeState(state="untracked", patch_sha256=sha("new"))}, "ran on a modified tree"),
        ({"source_sha256_at_end": sha("edited")}, "the source changed during"),
    ],
)
def test_code_that_is_no_commit_is_refused_unless_allowed(
    run: Run, stage: str, change: dict[str, Any], named: str
) -> None:
    make = {
        "preprocessing": preprocessing_record,
        "training": training_record,
        "evaluation": evaluation_record,
    }[stage]
    run.write(make(provenance=provenance("python x.py", **change)))
    write_document(run, "runs/demo")
    with pytest.raises(UserError, match=rf"{stage}.*{named}|{named} {stage}") as refused:
        publish(run)
    assert "--allow-modified" in str(refused.value)
    assert not Path("recipes").exists() or not any(Path("recipes").iterdir())
    folder = publish(run, allow_modified=True)
    assert "> - Published although " in page(folder)


def test_a_tree_that_is_modified_now_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "modified_files", lambda outside: ["recipe/models/build.py"])
    with pytest.raises(UserError, match=r"modified now \(recipe/models/build.py\)"):
        publish(run)
    publish(run, allow_modified=True)


def test_a_checkout_that_no_commit_names_now_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(outside: Any) -> list[str]:
        raise NoCommitError(GIT_REFUSED, "detected dubious ownership")

    monkeypatch.setattr(publishing, "modified_files", refused)
    with pytest.raises(UserError, match=r"git refused, because detected dubious ownership.*--allow-modified"):
        publish(run)
    assert "git refused, because detected dubious ownership" in page(publish(run, allow_modified=True))


def test_stale_sections_are_refused_unless_allowed(run: Run) -> None:
    run.write(training_record(outputs={"weights": sha("retrained")}))
    write_document(run, "runs/demo")
    with pytest.raises(UserError, match=r"performance_metrics is stale.*--allow-stale"):
        publish(run, allow_modified=True)
    publish(run, allow_stale=True)


@pytest.mark.parametrize(("missing", "named"), [("training", "python train.py"), ("evaluation", "python evaluate.py")])
def test_an_unfinished_run_is_refused_with_the_command(run: Run, missing: str, named: str) -> None:
    (run.records / f"{missing}.json").unlink()
    with pytest.raises(UserError, match=named):
        publish(run)


def test_an_edited_block_of_the_run_is_refused_also_when_it_is_published_again(run: Run) -> None:
    publish(run)
    run.document.write_text(run.document.read_text().replace("89.79 %", "99.79 %"))
    with pytest.raises(UserError, match="block 'summary'"):
        publish(run)


def test_another_recipe_is_never_overwritten(run: Run, tmp_path: Path) -> None:
    folder = publish(run)
    before = tree(folder)
    other_config = json.loads(json.dumps({**CONFIG, "optimization": {"epochs": 9}}))
    other = Run(tmp_path / "runs" / "other")
    other.write_config(other_config)
    for record in (preprocessing_record(), training_record(other_config), evaluation_record(other_config)):
        other.write(record)
    with pytest.raises(UserError, match="contains another recipe"):
        publish(other)
    assert tree(folder) == before
    Path("recipes", "mine").mkdir()
    Path("recipes", "mine", "thesis.md").write_text("mine")
    with pytest.raises(UserError, match="contains no published recipe"):
        publish(run, Path("recipes", "mine"))
    with pytest.raises(UserError, match="published recipe already"):
        publish(Run(folder), Path("recipes", "copy"))


@pytest.mark.parametrize(
    "address",
    [
        *("http://example.org/x", "ftp://example.org", "javascript:alert(1)", "file:///etc/passwd", "https://", "x"),
        *("https://user:secret@example.org", "https://example.org/a b", "https://example.org/)\n# x", "https://[::1"),
        "https://example.org/" + "x" * 3000,
    ],
)
def test_only_plain_https_addresses(run: Run, address: str) -> None:
    with pytest.raises(UserError, match="--artefacts"):
        publish(run, artefacts=address)


def test_a_failure_in_the_middle_changes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = publish(run)
    before = tree(folder)
    run.write(evaluation_record(correct_top5=470))
    for name in ("json_file", "copy_figures"):
        with monkeypatch.context() as patch:
            patch.setattr(publishing, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                publish(run)
        assert tree(folder) == before
        assert sorted(Path("recipes").iterdir()) == [folder]


# ---- rows and seeds ---------------------------------------------------------------------------------


def test_very_many_rows_are_thinned_with_a_note(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "METRIC_ROWS_MAX", 10)
    rows = metric_rows()
    kept = thinned(rows)
    assert Counter(row["split"] for row in kept) == {"train": 8, "validation": 8}
    folder = publish(run)
    assert f"Of the run's {len(rows)} rows it has 16" in page(folder)
    whole, thin = (load(Run(at), "x") for at in (run.directory, folder))
    assert [row for row in whole.metrics if row["split"] == "validation"] == [
        row for row in thin.metrics if row["split"] == "validation"
    ]
    claims = [open_recipe(path).required_block()["claims"]["training"]["epochs"] for path in (run.document, folder)]
    for name, column in claims[0].items():
        assert claims[1][name] == pytest.approx(column), name


def seed_run(directory: Path, seed: int, correct: int) -> Run:
    schedule = {"schedule": "cosine", "warmup_epochs": 1.0, "step_epochs": []}
    config = {**CONFIG, "seed": seed, "optimization": CONFIG["optimization"] | schedule}
    run = Run(directory)
    run.write_config(config)
    weights = sha(f"weights {seed}")
    counts = evaluation_record().per_class
    for record in (
        preprocessing_record(),
        training_record(config, seed=seed, outputs={"weights": weights}),
        evaluation_record(
            config, inputs={"manifest": sha("manifest"), "weights": weights}, correct_top1=correct, per_class=counts
        ),
    ):
        run.write(record)
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in metric_rows()))
    write_document(run, f"runs/{directory.name}")
    return run


def test_seeds_give_n_mean_and_spread(tmp_path: Path) -> None:
    runs = [
        seed_run(tmp_path / "runs" / f"demo-{seed}", seed, correct) for seed, correct in ((3, 430), (1, 436), (2, 442))
    ]
    folder = publish(runs[0], seeds=runs[1:])
    record = Run(folder).read(SeedsRecord)
    assert record is not None
    assert record.evaluation is not None
    assert [run.seed for run in record.runs] == [1, 2, 3]
    assert record.evaluation.correct_top1 == [436, 442, 430]
    assert "top-1 over n = 3 seeds: mean 90.83 %, standard deviation 1.25 %" in page(folder)  # 6 of 480
    assert open_recipe(folder).required_block()["claims"]["seeds"]["correct_top1"] == [436, 442, 430]
    publish(runs[0])
    assert Run(folder).read(SeedsRecord) == record
    with pytest.raises(UserError, match="a seed of its own"):
        publish(runs[0], seeds=[runs[0]])


def test_runs_of_another_recipe_or_protocol_are_no_seeds(run: Run, tmp_path: Path) -> None:
    other = seed_run(tmp_path / "runs" / "other", 1, 400)
    other.write_config({**CONFIG, "seed": 1, "optimization": {"epochs": 9}})
    other.write(training_record({**CONFIG, "seed": 1, "optimization": {"epochs": 9}}, seed=1))
    with pytest.raises(UserError, match="another recipe_id"):
        publish(run, seeds=[other])


def test_what_to_commit_is_printed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", str(run.directory)]) == 0
    printed = capsys.readouterr().out
    assert "git add recipes/demo\n" in printed
    assert str(CHECKOUT) not in printed
    assert Run("recipes/demo").read(PublicationRecord) is not None
    assert Path("recipes") == RECIPES


# ---- the table of published recipes -----------------------------------------------------------------

BEGIN, END = "<!-- recipe:begin published_recipes", "<!-- recipe:end published_recipes -->"


@pytest.fixture
def readme() -> Path:
    """The repository's own page, copied here."""
    copy = Path("README.md")
    copy.write_bytes((CHECKOUT / "README.md").read_bytes())
    return copy


def test_the_table_of_this_repository_is_true() -> None:
    path = CHECKOUT / "README.md"
    assert with_table(path).decode() == path.read_bytes().decode(), "publish a recipe again: that writes the table"


def test_a_published_recipe_gets_its_row(run: Run, readme: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = readme.read_text()
    words = ["publish", str(run.directory)]
    assert main([*words, "--output", "elsewhere"]) == 0
    assert "README.md" not in capsys.readouterr().out
    assert readme.read_text() == before
    assert main([*words, "--artefacts", "https://example.org/demo"]) == 0
    printed = capsys.readouterr().out
    assert "wrote the table of published recipes in README.md" in printed
    assert "git add recipes/demo README.md\n" in printed
    after = readme.read_bytes().decode()
    [row] = [line for line in after.splitlines() if line.startswith("| [demo](recipes/demo/README.md)")]
    assert "89.79 % (431 of 480)" in row
    assert "1, spread unknown" in row
    assert "(https://example.org/demo)" in row
    assert_tables_are_even(section(after, "published_recipes"))
    assert after.partition(BEGIN)[0] == before.partition(BEGIN)[0]
    assert after.partition(END)[2] == before.partition(END)[2]
    assert with_table(readme).decode() == after
    Path("recipes", "demo").rename("gone")
    assert "No recipe is published yet." in with_table(readme).decode()


def test_an_edited_table_is_refused_before_anything_is_written(run: Run, readme: Path) -> None:
    folder = publish(run)
    edited = readme.read_bytes().replace(b"89.79 %", b"99.79 %")
    readme.write_bytes(edited)
    before = tree(folder)
    run.write(evaluation_record(correct_top5=470))
    with pytest.raises(UserError, match=r"(?s)'published_recipes'.*edited by hand.*-.*99\.79 %"):
        publish(run)
    assert readme.read_bytes() == edited
    assert tree(folder) == before


def test_a_page_without_a_place_for_the_table_stays_and_another_folder_is_refused(run: Run, readme: Path) -> None:
    Path("recipes", "thesis").mkdir(parents=True)
    with pytest.raises(UserError, match="recipes/thesis contains no published recipe"):
        publish(run)
    readme.write_text("# words\n")
    publish(run)
    assert readme.read_text() == "# words\n"
