"""The document as a whole: what it says about a run, how it keeps up with the run's records, what it refuses."""

import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from recipe.config import identity as configuration
from recipe.document import figures
from recipe.document.recipe_json import as_json
from recipe.document.render import check_document, json_file, write_document
from recipe.document.run_data import sections
from recipe.errors import UserError
from recipe.run.directory import Run
from recipe.run.files import CHECKOUT
from recipe.run.records import ClassCounts, LeftOut, TrainingRecord, TreeState, UnusualImage
from tests.builders.documents import HOSTILE, assert_tables_are_even, changed_blocks, document, outside_code, section
from tests.builders.records import (
    COMMIT,
    CONFIG,
    epoch_records,
    evaluation_record,
    facts,
    metric_rows,
    preprocessing_record,
    provenance,
    sha,
    training_record,
)
from tests.builders.runs import write_run

# What the guideline asks for

HEADINGS = [
    "# ResNet-50 on demo (not ILSVRC2012)",
    "## How to run it again",
    "## Where it ran",
    "## Data",
    "### Raw data",
    "### Processing methods",
    "## Training",
    "### Optimization methods",
    "#### Hyperparameters",
    "#### Dynamics",
    "#### Outputs",
    "### Performance metrics",
    "## Inference",
    "### Code",
    "### Timing information",
    "### Serialization",
    "## Miscellaneous",
    "### Papers",
    "### Journal",
    "### Action items",
    "### Hashes",
    "## The recipe for programs",
]


def headings(text: str) -> list[str]:
    return re.findall(r"^#{1,6} .*$", outside_code(text), re.MULTILINE)


def test_every_heading_of_the_guideline_is_there_in_its_order() -> None:
    assert headings(document()) == HEADINGS


@pytest.mark.parametrize(
    "missing",
    [("evaluation",), ("training", "evaluation"), ("preprocessing",), ("preprocessing", "training", "evaluation")],
)
def test_headings_stay_where_stages_are_missing(missing: tuple[str, ...]) -> None:
    assert headings(document(**dict.fromkeys(missing)))[1:] == HEADINGS[1:]


def test_ilsvrc2012_is_named_only_where_it_was_verified() -> None:
    text = document(preprocessing=preprocessing_record(is_ilsvrc2012=True, data_set="imagenet"))
    assert "# ResNet-50 on imagenet (ILSVRC2012)\n" in text


@pytest.mark.parametrize(
    ("missing", "block_id", "command"),
    [
        ("preprocessing", "raw_data", "`python preprocess.py experiment=demo`"),
        ("training", "dynamics", "`python train.py experiment=demo`"),
        ("evaluation", "performance_metrics", "`python evaluate.py run_dir=runs/demo`"),
    ],
)
def test_a_missing_stage_names_its_command(missing: str, block_id: str, command: str) -> None:
    assert f"Not measured yet: run {command}." in section(document(**{missing: None}), block_id)


def test_later_chapters_say_that_this_release_lacks_them() -> None:
    assert "Not measured yet: run `python serialize.py run_dir=" in document()


def test_only_the_data_chapter_after_preprocessing_alone() -> None:
    text = document(config=None, training=None, evaluation=None, metrics=[], run_dir="runs/x", name="x")
    assert text.splitlines()[1] == "# Data set demo (not ILSVRC2012)"
    assert "| train | 1,200 | 12 |" in section(text, "raw_data")
    assert "`python train.py experiment=demo run_dir=runs/x`" in section(text, "optimization_methods")
    assert re.findall(r"\(figures/(.*?)\)", text) == ["images_per_class.png"]


def test_the_next_command_keeps_the_words_of_a_data_set_of_ones_own() -> None:
    """Its name has no file in conf/experiment; paths are quoted for the shell."""
    words = """data=folder data.raw_dir="$RAW_DIR" 'data.directory=my data (2)' name=mine 'run_dir=my runs/x y'"""
    text = document(
        config=None,
        name="mine",
        run_dir="my runs/x y",
        preprocessing=preprocessing_record(provenance=provenance(f"python preprocess.py {words}")),
        training=None,
        evaluation=None,
    )
    kept = words.partition(" 'run_dir")[0]
    assert f"`python train.py {kept} run_dir='my runs/x y'`" in section(text, "optimization_methods")


def test_accuracy_is_one_number_everywhere_with_its_counts() -> None:
    text = document()
    found = re.findall(r"89\.\d+ %(?: \([^)]*\))?", section(text, "summary") + section(text, "performance_metrics"))
    assert [words for words in found if "of" in words] == ["89.79 % (431 of 480)"] * 2
    assert {words.partition(" (")[0] for words in found} == {"89.79 %"}
    assert "1 run, spread unknown" in section(text, "summary")
    assert "`resize72-crop64-bilinear`" in section(text, "summary")


def test_declared_facts_are_marked_and_missing_ones_are_unknown() -> None:
    text = section(document(), "raw_data")
    assert "| Data set (*declared*) | |" in text
    assert "| Licence | That of this project (MIT) |" in text
    assert "| Adding samples | *unknown* |" in text
    assert section(document(), "miscellaneous").count("*unknown*") == 1  # action items


@pytest.mark.parametrize(
    ("mutate", "printed"),
    [
        ({"optimizer": "AdamW"}, "`AdamW`"),
        ({"loss": {"label_smoothing": 0.25}}, "label_smoothing 0.25"),
        ({"averaging": {"decay": 0.9995}}, "| Weight averaging | decay 0.9995 |"),
        ({"seed": 12345}, "| Seed | 12345 |"),
        ({"processes": 6}, "over 6 processes"),
        ({"skipped_steps": 17}, "gradient scaler | 17 |"),
    ],
)
def test_hyperparameters_come_from_the_record(mutate: dict[str, Any], printed: str) -> None:
    assert printed not in document()
    assert printed in document(training=training_record(**mutate))


def test_alterations_of_the_network_are_shown_where_there_are_any() -> None:
    plain = training_record()
    altered = msgspec.structs.replace(plain.model, alterations={"blurred_convolutions": 6})
    assert "| Alterations |" not in document()
    assert "| Alterations | blurred_convolutions 6 |" in document(training=training_record(model=altered))


def test_the_json_block_holds_the_pinned_configuration() -> None:
    blocks = re.findall(r"^```json\n(.*?)^```$", document(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    block = json.loads(blocks[0])
    assert block["format"] == "recipe/1"
    assert block["config"] == CONFIG
    assert block["config_sha256"] == configuration.config_sha256(CONFIG)
    assert block["recipe_id"] == configuration.recipe_id(CONFIG)


def test_the_json_block_claims_what_the_records_hold() -> None:
    claims = json.loads(re.findall(r"^```json\n(.*?)^```$", document(), re.DOTALL | re.MULTILINE)[0])["claims"]
    evaluation, training = evaluation_record(), training_record()
    assert claims["evaluation"]["correct_top1"] == evaluation.correct_top1
    assert claims["training"]["weights_sha256"] == training.outputs["weights"]
    assert claims["training"]["epochs"]["epoch"] == [epoch.epoch for epoch in training.epochs]
    assert claims["data"]["splits"].keys() == preprocessing_record().splits.keys()


def test_many_epochs_are_thinned_out_with_a_note() -> None:
    text = section(document(training=training_record(epochs=epoch_records(90)), metrics=metric_rows(90)), "dynamics")
    rows = re.findall(r"^\| (\d+) \|", text, re.MULTILINE)
    assert len(rows) == 20
    assert (rows[0], rows[-1]) == ("1", "90")
    assert "20 of 90 epochs, evenly chosen" in text


def test_long_lists_are_cut_with_a_note() -> None:
    shards = {"manifest": sha("manifest")} | {f"train-{number:06d}.tar": sha(str(number)) for number in range(1282)}
    rejected = [
        UnusualImage(split="train", key=f"n{number}", what="truncated", done="left out") for number in range(30)
    ]
    record = preprocessing_record(outputs=shards, rejected=rejected)
    text = section(document(preprocessing=record), "processing_methods")
    assert "| 1,282, " not in text
    assert text.count("| truncated |") == 20
    assert "20 of 30 rejected images;" in text
    listed = section(document(preprocessing=record), "hashes")
    assert listed.count("| `train-") == 19
    assert "20 of 1,283 shards and indexes; all are in [records/preprocessing.json]" in listed


def test_many_classes_show_the_best_and_the_worst_five() -> None:
    classes = [
        ClassCounts(
            index=index,
            class_id=f"n{index:08d}",
            name=f"class {index}",
            images=50,
            correct_top1=index % 50,
            correct_top5=50,
        )
        for index in range(1000)
    ]
    text = section(document(evaluation=evaluation_record(per_class=classes)), "performance_metrics")
    assert len(re.findall(r"\| `n\d{8}` \|", text)) == 10
    assert "| Best five classes (*measured*) |" in text
    assert "| Worst five classes (*measured*) |" in text


def test_cold_and_warm_epochs_are_kept_apart() -> None:
    text = section(document(), "dynamics")
    assert "| 41.3 images/s in the first (cold) epoch, 49.2 in warm epochs (median of 7);" in text
    assert "2.10 % of the time waiting for data" in text


# The working tree


@pytest.mark.parametrize(
    ("state", "printed"),
    [
        (TreeState(state="clean"), f"clean at commit `{COMMIT}`"),
        (TreeState(state="untracked", untracked=["notes.txt"]), f"commit `{COMMIT}` with untracked files: `notes.txt`"),
        (
            TreeState(state="modified", patch_sha256=sha("patch")),
            f"**MODIFIED** after commit `{COMMIT}`: patch `records/patches/{sha('patch')[:16]}.patch`",
        ),
        (TreeState(state="no git"), "no git: the code is identified by its content only"),
        (
            TreeState(state="git refused", reason="detected dubious ownership in repository at '...'"),
            "git refused, because detected dubious ownership in repository at '...': the code is identified by its",
        ),
        (
            TreeState(state="not a repository of ours"),
            "not a repository of ours: the code is identified by its content only",
        ),
    ],
)
def test_states_of_the_tree(state: TreeState, printed: str) -> None:
    record = training_record(provenance=provenance("python train.py", tree_at_start=state, tree_at_end=state))
    assert printed in section(document(training=record), "summary")
    assert "source changed during the stage" not in document(training=record)


def test_a_modified_tree_is_patched_before_it_runs_again() -> None:
    state = TreeState(state="modified", patch_sha256=sha("patch"))
    record = training_record(provenance=provenance("python train.py", tree_at_start=state, tree_at_end=state))
    text = section(document(training=record), "run_again")
    assert f'git apply "$DOCUMENT"/records/patches/{sha("patch")[:16]}.patch\n' in text
    assert text.count(f"git checkout --force --detach {COMMIT}\n") == 3  # clean, patched, clean again


@pytest.mark.parametrize(
    "change",
    [
        {"source_sha256_at_end": sha("edited")},
        {"tree_at_end": TreeState(state="modified", patch_sha256=sha("patch"))},
    ],
)
def test_an_edit_during_the_stage_is_reported(change: dict[str, Any]) -> None:
    text = document(training=training_record(provenance=provenance("python train.py", **change)))
    assert "**source changed during the stage**" in section(text, "summary")
    assert "**source changed during the stage**" in section(text, "optimization_methods")
    assert "**source changed during the stage**" not in section(text, "performance_metrics")


# The chain of hashes


@pytest.mark.parametrize(
    ("changes", "stale"),
    [
        ({}, set()),
        (
            {"preprocessing": preprocessing_record(outputs={"manifest": sha("other")})},
            {"optimization_methods", "dynamics", "outputs", "performance_metrics"},
        ),
        ({"config": {**CONFIG, "seed": 1}}, {"optimization_methods", "dynamics", "outputs", "performance_metrics"}),
        ({"training": training_record(outputs={"weights": sha("retrained")})}, {"performance_metrics"}),
        ({"training": training_record(outputs={"weights": sha("last"), "best_weights": sha("weights")})}, set()),
    ],
)
def test_stale_sections_are_headed_so_with_the_reason(changes: dict[str, Any], stale: set[str]) -> None:
    states = sections(facts(**changes))
    assert {name for name, state in states.items() if state.state == "stale"} == stale
    text = document(**changes)
    assert ("### Performance metrics (stale)" in text) == ("performance_metrics" in stale)
    assert ("### Optimization methods (stale)" in text) == ("optimization_methods" in stale)
    assert text.count("> **Stale**") == len(stale)


# Regeneration


@pytest.mark.parametrize(
    ("change", "blocks"),
    [
        ({"evaluation": evaluation_record(correct_top5=477)}, {"summary", "performance_metrics", "recipe"}),
        ({"preprocessing": preprocessing_record(images_per_second=1.0)}, {"processing_methods"}),
        ({"training": training_record(peak_accelerator_memory_gib=3.0)}, {"dynamics"}),
    ],
)
def test_a_stage_that_ran_again_changes_its_own_blocks_only(change: dict[str, Any], blocks: set[str]) -> None:
    assert changed_blocks(facts(), facts(**change)) == blocks


def test_equal_inputs_give_equal_bytes() -> None:
    assert document() == document()
    assert json_file(facts()) == json_file(facts())
    assert document(existing=document()) == document()


def test_blocks_of_later_stages_take_their_places_between_prose() -> None:
    first = document(evaluation=None)
    cut = first.replace(section(first, "performance_metrics") + "\n", "My own words.\r\n")
    text = document(existing=cut)
    places = [text.index(words) for words in ("end outputs", "begin performance_metrics", "My own words")]
    assert places == sorted(places)


def test_hostile_words_stay_words() -> None:
    config = json.loads(json.dumps(CONFIG))
    config["data"]["description"]["summary"] = config["description"]["summary"] = HOSTILE
    config["description"]["action_items"] = config["model"]["description"]["papers"] = [HOSTILE]
    patched = TreeState(state="untracked", untracked=[HOSTILE])
    records = {
        "preprocessing": preprocessing_record(
            data_set=HOSTILE,
            unusual_images={HOSTILE: 1},
            raw_path=HOSTILE,
            outputs={"manifest": sha("manifest"), HOSTILE: HOSTILE},
            rejected=[UnusualImage(split=HOSTILE, key=HOSTILE, what=HOSTILE, done=HOSTILE)],
            left_out={HOSTILE: LeftOut(count=1, examples=[HOSTILE])},
            lost_images={HOSTILE: LeftOut(count=1, examples=[HOSTILE])},
        ),
        "training": training_record(
            config,
            loss={HOSTILE: HOSTILE},
            optimizer=HOSTILE,
            augmentation={HOSTILE: [HOSTILE]},
            provenance=provenance(HOSTILE, tree_at_start=patched, tree_at_end=patched, commit=HOSTILE),
        ),
        "evaluation": evaluation_record(
            config,
            per_class=[ClassCounts(index=0, class_id=HOSTILE, name=HOSTILE, images=1, correct_top1=1, correct_top5=1)],
        ),
    }
    plain, text = document(), document(config=config, name=HOSTILE, run_dir=HOSTILE, **records)
    assert headings(text)[1:] == headings(plain)[1:]
    assert re.findall(r"^<!-- recipe:\w+ \w+", text, re.MULTILINE) == re.findall(
        r"^<!-- recipe:\w+ \w+", plain, re.MULTILINE
    )
    page = outside_code(text)
    assert not re.search(r"<(?!/?(details|summary|code)>|!-- recipe:(begin|end) )", page)
    assert page.count("[link") == page.count("\\[link\\](javascript:1)") > 0
    assert page.count("|b ") == page.count("a\\|b ") > 0
    assert_tables_are_even(page)
    assert document(existing=text) == plain


def test_tables_are_even() -> None:
    assert_tables_are_even(document())
    for missing in ("preprocessing", "training", "evaluation"):
        assert_tables_are_even(document(**{missing: None}))


def test_no_trailing_blanks_and_no_double_blank_lines() -> None:
    text = document()
    assert not re.search(r"[ \t]$", text, re.MULTILINE)
    assert "\n\n\n" not in text


# The files


def test_written_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    write_document(run, "runs/demo")
    text = run.document.read_text()
    assert text == document()
    drawn = sorted(path.name for path in run.figures.iterdir())
    assert drawn == ["accuracy.png", "images_per_class.png", "learning_rate.png", "loss.png", "throughput.png"]
    assert sorted(re.findall(r"\]\(figures/(.*?)\)", text)) == drawn
    for content in (text, run.json_file.read_text()):
        assert str(CHECKOUT) not in content
        assert str(tmp_path) not in content


def test_the_twin_holds_the_same_facts() -> None:
    values = json.loads(json_file(facts()))
    assert values["format"] == "recipe/1"
    assert values["config"] == CONFIG
    assert msgspec.convert(values["records"]["training"], TrainingRecord) == training_record()
    assert values["sections"]["performance_metrics"] == {"state": "present", "reasons": []}
    assert values["sections"]["serialization"]["state"] == "not measured"
    assert list(values) == sorted(values)
    assert values["metrics"]["last"]["validation"]["top1_accuracy"] == pytest.approx(431 / 480)


def test_what_people_wrote_survives_further_stages(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    (run.records / "evaluation.json").unlink()
    write_document(run, "runs/demo")
    run.document.write_bytes(run.document.read_bytes() + b"\r\n## My notes\r\n\r\n| a |\r\n|---|\r\n")
    run.write(evaluation_record())
    check_document(run)
    write_document(run, "runs/demo")
    content = run.document.read_bytes()
    assert content.endswith(b"\r\n## My notes\r\n\r\n| a |\r\n|---|\r\n")
    assert b"89.79 %" in content


def test_an_edited_block_is_refused_before_and_after_the_work(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    check_document(run)
    write_document(run, "runs/demo")
    check_document(run)
    edited = run.document.read_text().replace("89.79 %", "99.79 %")
    run.document.write_text(edited)
    for refused in (lambda: check_document(run), lambda: write_document(run, "runs/demo")):
        with pytest.raises(UserError, match=r"(?s)block 'summary'.*\n-.*99\.79 %.*\n\+.*89\.79 %"):
            refused()
    assert run.document.read_text() == edited


def test_a_document_that_is_no_text_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.document.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        check_document(run)


@pytest.mark.process
def test_the_document_needs_no_torch() -> None:
    script = (
        "import sys, recipe.document.render; assert not {'torch', 'torchvision', 'matplotlib.pyplot'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, check=True)


# Figures


def test_figures_are_light_deterministic_and_without_traces() -> None:
    drawn = figures.draw(facts(metrics=metric_rows(90)))
    assert drawn == figures.draw(facts(metrics=metric_rows(90)))
    for content in drawn.values():
        assert len(content) < 60_000
        assert png_chunks(content) <= {b"IHDR", b"pHYs", b"IDAT", b"IEND"}


def png_chunks(content: bytes) -> set[bytes]:
    kinds, position = set(), 8
    while position < len(content):
        (length,) = struct.unpack(">I", content[position : position + 4])
        kinds.add(content[position + 4 : position + 8])
        position += 12 + length
    return kinds


@pytest.mark.process
def test_figures_do_not_follow_the_users_style(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, ''); from recipe.document import figures; from tests.builders import records; "
        "drawn = figures.draw(records.facts()); "
        "print({name: records.sha(content) for name, content in drawn.items()})"
    )
    (tmp_path / "matplotlibrc").write_text("figure.dpi: 33\naxes.facecolor: black\nfont.size: 30\n")
    printed = [
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=CHECKOUT,
            check=True,
            capture_output=True,
            text=True,
            env={"PATH": "/usr/bin", "HOME": str(tmp_path), **environment},
        ).stdout
        for environment in ({}, {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc")})
    ]
    assert printed[0] == printed[1]


def test_rows_with_holes_are_drawn_as_far_as_they_go_and_change_no_epoch() -> None:
    empty = [
        {**row, **dict.fromkeys(("loss", "top1_accuracy", "top5_accuracy", "data_wait_fraction"))}
        for row in metric_rows()
    ]
    drawn = (figures.draw(facts(metrics=rows, preprocessing=None)) for rows in (empty, []))
    assert [list(made) for made in drawn] == [
        ["accuracy.png", "learning_rate.png", "throughput.png"],
        ["accuracy.png", "learning_rate.png"],
    ]
    assert figures.draw(facts(training=None, preprocessing=None, metrics=[])) == {}
    row = "| 1 | 0.0973 | 2.0153 | 27.94 % | 1.8453 | 28.61 % | 99.17 % | 41.3 | 6.40 % | 28.7 |"
    assert row in document()
    assert row in document(metrics=empty)
    assert row in document(metrics=[])


def test_the_commands_are_a_shell_script() -> None:
    script = re.search(r"```bash\n(.*?)```", section(document(), "run_again"), re.DOTALL)
    assert script
    subprocess.run(["bash", "-n"], input=script[1], text=True, check=True)
    assert script[1].splitlines() == [
        'git clone "$REPOSITORY" recipe && cd recipe',
        f"git checkout --force --detach {COMMIT}",
        "make setup && . .venv/bin/activate",
        "python preprocess.py experiment=demo",
        "python train.py experiment=demo",
        "python evaluate.py run_dir=runs/demo",
    ]


@pytest.mark.parametrize(
    ("given", "printed"),
    [
        ('data.directory="$DATA_DIR" seed=3', ' data.directory="$DATA_DIR"'),
        ("data.directory=sets/mine", " data.directory=sets/mine"),
        ("'data.directory=my sets/a' seed=3", " 'data.directory=my sets/a'"),
        ("data.directory=x;id", ""),
        ("data.directory=$(id)", ""),
        ("seed=3", ""),
    ],
)
def test_a_later_stage_is_given_the_data_set_that_training_was_given(given: str, printed: str) -> None:
    record = training_record(provenance=provenance(f"python train.py experiment=demo {given}"))
    text = section(document(training=record, evaluation=None, run_dir=".../demo"), "performance_metrics")
    assert f'run `python evaluate.py run_dir="$RUN_DIR"{printed}`' in text


def test_a_command_that_ran_several_stages_stands_once() -> None:
    command = "python -m recipe reproduce recipe.md --yes"
    records = {"preprocessing": preprocessing_record, "training": training_record, "evaluation": evaluation_record}
    made = {name: make(provenance=provenance(command)) for name, make in records.items()}
    assert section(document(**made), "run_again").count(command) == 1


# The size of the page


def test_the_page_is_short_whatever_the_run_has() -> None:
    """Its text is read, and its folds opened: neither grows with epochs, classes, shards or a large configuration."""
    classes = [
        ClassCounts(index=i, class_id=f"n{i:08d}", name=str(i), images=50, correct_top1=40, correct_top5=45)
        for i in range(1000)
    ]
    shards = {f"train-{number:06d}.tar": sha(str(number)) for number in range(1282)}
    records: dict[str, Any] = {
        "training": training_record(epochs=epoch_records(200)),
        "metrics": metric_rows(200),
        "evaluation": evaluation_record(per_class=classes),
        "preprocessing": preprocessing_record(outputs={"manifest": sha("manifest")} | shards),
    }
    text = document(**records)
    folded = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    assert len(folded.splitlines()) <= 320
    assert len(text.splitlines()) <= 650
    block = re.findall(r"^```json\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[0]
    assert len(block.splitlines()) <= 150
    assert max(map(len, block.splitlines())) <= 400


def test_the_json_block_has_a_line_for_each_short_group() -> None:
    values = {
        "config": {
            "loader": {"order": "random"},
            "long": {"text": "x" * 300, "more": "y" * 300, "n": 1},
            "z": 1,
            "empty": {},
        }
    }
    text = as_json(values)
    assert json.loads(text) == values
    assert '    "loader": {"order": "random"},\n' in text
    assert '"n": 1\n' in text
    assert all(line.startswith(" ") for line in text.splitlines()[1:-1])
