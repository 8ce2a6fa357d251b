"""An untrusted recipe, and the actions that it must never cause."""

from __future__ import annotations

import copy
import json
import os
import re
import socket
import subprocess
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from recipe.__main__ import main
from recipe.config.identity import RUNTIME_KEYS, config_sha256, flatten, recipe_id
from recipe.config.schema import Config
from recipe.document.recipe_json import as_json
from recipe.errors import UserError
from recipe.review.opening import json_block
from recipe.review.reproduce import adapt as fitting
from recipe.review.reproduce import command as reproduce
from recipe.review.reproduce.command import DOCUMENT_HASH_FILE, plan_reproduction
from recipe.review.reproduce.parse import parse_config, parse_recipe
from recipe.run.files import CHECKOUT
from recipe.run.provenance import source_sha256
from tests.builders.configs import compose_config
from tests.builders.records import evaluation_record, facts, preprocessing_record, training_record

Change = Callable[[dict[str, Any]], Any]
COMPOSED, SOURCE = cache(compose_config), cache(source_sha256)
ESCAPES = "\x1b]0;title\x07\x1b[31mred\x1b[0m\u202eoverride\x9b"


@pytest.fixture(autouse=True)
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra takes most of the time. Its result is only read."""
    monkeypatch.setattr(fitting, "config_from_overrides", lambda words: COMPOSED(*words))
    monkeypatch.setattr(fitting, "source_sha256", SOURCE)


@pytest.fixture(scope="module")
def smoke_config() -> dict[str, Any]:
    return json.loads(json.dumps(compose_config("experiment=smoke").pinned.values))  # type: ignore[no-any-return]


@pytest.fixture
def block(smoke_config: dict[str, Any]) -> dict[str, Any]:
    """The JSON block of an honest recipe of this checkout."""
    from recipe.document.recipe_json import recipe_claims

    determinism_context = {"the number of processes": 1, "images per forward pass": 32, "CPU threads": 1}
    found = recipe_claims(
        facts(
            config=smoke_config,
            preprocessing=preprocessing_record(),
            training=training_record(smoke_config, determinism_context=determinism_context),
            evaluation=evaluation_record(smoke_config),
        )
    )
    found["code"]["source_sha256"] = SOURCE()
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def document(block: dict[str, Any], rehash: bool = True) -> str:
    """A page with this block and hashes that fit, as a clever attacker would make it."""
    if rehash and isinstance(block.get("config"), dict):
        block = block | {"config_sha256": config_sha256(block["config"]), "recipe_id": recipe_id(block["config"])}
    return f"# A recipe\n\n```json\n{json.dumps(block, indent=1)}\n```\n"


def arguments(*words: str) -> Namespace:
    parser = ArgumentParser()
    reproduce.add_arguments(parser)
    return parser.parse_args(["recipe.md", *words])


def plan_of(text: str, *words: str) -> reproduce.ReproductionPlan:
    Path("recipe.md").write_bytes(text.encode("utf-8", "surrogatepass"))
    return plan_reproduction(arguments(*words))


def put(key: str, value: Any) -> Change:
    """Set a dotted key of the configuration."""

    def change(block: dict[str, Any]) -> None:
        *groups, leaf = key.split(".")
        section = block["config"]
        for group in groups:
            section = section[group]
        section[leaf] = value

    return change


def refused(block: dict[str, Any], *words: str) -> str:
    with pytest.raises(UserError) as error:
        plan_of(document(block), *words)
    assert "Traceback" not in str(error.value)
    assert list(Path.cwd().iterdir()) == [Path.cwd() / "recipe.md"], "something was written"
    return str(error.value)


def test_an_honest_recipe_is_planned_and_nothing_is_written(block: dict[str, Any]) -> None:
    plan = plan_of(document(block))
    assert plan.config.pinned.values == block["config"]
    assert plan.stages == ["preprocess", "train", "evaluate"]
    assert re.fullmatch(r"runs/reproduction-[0-9a-f]{12}", str(plan.run_dir))
    assert list(Path.cwd().iterdir()) == [Path.cwd() / "recipe.md"]


# ---- 1 and 3: nothing of it is run, imported, downloaded ---------------------------------------------


def test_nothing_is_run_imported_or_fetched(block: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a recipe made this project do that")

    for module, name in (
        *((subprocess, name) for name in ("run", "Popen", "call", "check_output")),
        *((os, name) for name in ("system", "execv", "execvp", "popen")),
        (socket, "socket"),
    ):
        monkeypatch.setattr(module, name, never)
    block["code"]["commit"] = "$(touch pwned); git checkout evil"
    block["determinism_context"]["torch"] = "2.0; pip install evil"
    text = document(block) + "\n```bash\ntouch pwned\n```\n\n    touch pwned\n"
    plan_of(text)
    assert not Path("pwned").exists()


@pytest.mark.parametrize("name", ["os.system", "../../evil", "https://example.org/x", "torch.hub.load", "resnet50\n"])
def test_a_network_is_one_of_a_known_list(block: dict[str, Any], name: str) -> None:
    put("model.name", name)(block)
    assert "model.name" in refused(block)


def test_initial_weights_come_from_the_user_by_hash(block: dict[str, Any]) -> None:
    put("model.weights_sha256", "0" * 64)(block)
    assert "--weights" in refused(block)
    assert plan_of(document(block), "--weights", "mine.safetensors").config.model.weights == "mine.safetensors"


# ---- 2: no Hydra ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "key"),
    [
        *(("", key) for key in ("hydra", "hydra/launcher", "+seed", "~seed", "--config-path", "-m", "_target_")),
        *(("model", key) for key in ("_target_", "_partial_", "++name", "weights ")),
        ("trainer", "callbacks"),
    ],
)
def test_unknown_keys_are_refused_by_name(block: dict[str, Any], group: str, key: str) -> None:
    section = block["config"][group] if group else block["config"]
    section[key] = "os.system"
    assert key in refused(block)


@pytest.mark.parametrize("key", RUNTIME_KEYS)
def test_facts_of_the_machine_are_no_business_of_a_recipe(block: dict[str, Any], key: str) -> None:
    put(key, "/etc")(block)
    assert f"{key} is a fact of the machine" in refused(block)


@pytest.mark.parametrize(
    "value", ["${oc.env:SECRET}", "${name}", "a ${hydra:runtime.cwd}", "$${x}", "${oc.decode:${oc.env:HOME}}"]
)
@pytest.mark.parametrize("key", ["name", "description.summary", "data.description.papers", "model.name"])
def test_interpolations_are_refused_everywhere(block: dict[str, Any], key: str, value: str) -> None:
    put(key, [value] if key.endswith("papers") else value)(block)
    assert "'${'" in refused(block)


# ---- 4: places ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "~/x", "a/b", "a\\b", ".hidden", "..", "", "x" * 65, "a b", "a\n", "a\x00", "é", "-rf"],
)
@pytest.mark.parametrize("key", ["name", "data.name"])
def test_names_are_names(block: dict[str, Any], key: str, name: str) -> None:
    put(key, name)(block)
    assert key in refused(block)


@pytest.mark.parametrize("value", ["../../x.pt", "/tmp/x.pt", "step-00000001.pt", "step-00000001", "latest"])
def test_no_file_is_named_by_a_recipe(block: dict[str, Any], value: str) -> None:
    put("evaluation.checkpoint", value)(block)
    assert "evaluation.checkpoint" in refused(block)


def test_the_run_directory_is_new_and_never_the_recipes_own(block: dict[str, Any]) -> None:
    text = document(block)
    plan = plan_of(text)
    assert plan_of(text, "--run-dir", "fresh").run_dir == Path("fresh")
    with pytest.raises(UserError, match="is not a reproduction of this document"):
        plan_of(text, "--run-dir", ".")
    plan.run_dir.mkdir(parents=True)
    (plan.run_dir / DOCUMENT_HASH_FILE).write_text("0" * 64)
    with pytest.raises(UserError, match="is not a reproduction of this document"):
        plan_of(text)
    (plan.run_dir / DOCUMENT_HASH_FILE).write_text(plan.document_sha256)
    assert plan_of(text).run_dir == plan.run_dir


# ---- 5: the environment -----------------------------------------------------------------------------


def test_variables_stay_words(block: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    for key in ("description.summary", "data.description.origin"):
        put(key, "$SECRET $HOME ~ %SECRET% {SECRET} `echo $SECRET`")(block)
    plan = plan_of(document(block))
    assert plan.config.description.summary == "$SECRET $HOME ~ %SECRET% {SECRET} `echo $SECRET`"
    assert "hunter2" not in str(plan)


# ---- 6: the terminal --------------------------------------------------------------------------------


def texts_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every text of a block, nested or not."""
    if isinstance(value, str):
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in items:
        yield from texts_of(entry, (*path, key))


def test_no_text_of_it_moves_the_terminal(block: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """In any of them, with a recipe that is refused for it or shown."""
    places = list(texts_of(block))
    assert len(places) > 50
    for place in places:
        changed = copy.deepcopy(block)
        section = changed
        for key in place[:-1]:
            section = section[key]
        section[place[-1]] = f"x{ESCAPES}"
        Path("recipe.md").write_text(document(changed, rehash=place[0] == "config"))
        with pytest.raises(SystemExit) as stopped:
            main(["reproduce", "recipe.md"])
        assert stopped.value.code == 2
        printed = capsys.readouterr()
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", printed.out + printed.err), place


def test_keys_of_it_do_not_either(block: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for place in ((), ("config",), ("determinism_context",), ("claims",), ("claims", "data", "splits")):
        changed = copy.deepcopy(block)
        section = changed
        for key in place:
            section = section[key]
        section[ESCAPES] = 1
        Path("recipe.md").write_text(document(changed))
        with pytest.raises(SystemExit):
            main(["reproduce", "recipe.md"])
        printed = capsys.readouterr()
        assert "\x1b" not in printed.out + printed.err


# ---- 7: limits, trust, the recipe itself ------------------------------------------------------------


def test_the_plan_shows_what_the_work_costs(block: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for key, value in (("epochs", 10**6), ("batch_size", 2**20)):
        put(f"optimization.{key}", value)(block)
    Path("recipe.md").write_text(document(block))
    with pytest.raises(SystemExit):
        main(["reproduce", "recipe.md"])
    assert "1000000 epochs, batches of 1048576 images of 24 pixels" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["the number of processes", "images per forward pass", "CPU threads"])
@pytest.mark.parametrize("value", [10**9, 0, -1, True, "8", 1.5, None])
def test_processes_and_threads_have_caps_too(block: dict[str, Any], name: str, value: Any) -> None:
    block["determinism_context"][name] = value
    trainer = plan_of(document(block)).config.trainer
    assert trainer.gpus == 1
    assert trainer.max_micro_batch_size <= 4096
    assert (trainer.torch_threads or 1) <= 4 * max(2, os.cpu_count() or 1)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CHECKOUT / "conf" / "experiment").glob("*.yaml")))
def test_every_experiment_comes_back_from_its_json(name: str) -> None:
    pinned = compose_config(f"experiment={name}").pinned
    values = json.loads(as_json(pinned.values))
    hashes = {"config_sha256": pinned.config_sha256, "recipe_id": pinned.recipe_id}
    assert parse_config({"config": values} | hashes).pinned == pinned


def test_without_a_terminal_nothing_runs_unasked(block: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.md").write_text(document(block))
    before = Path("recipe.md").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        main(["reproduce", "recipe.md"])
    assert stopped.value.code == 2
    assert "--yes" in capsys.readouterr().err
    assert Path("recipe.md").read_bytes() == before
    assert list(Path.cwd().iterdir()) == [Path.cwd() / "recipe.md"]


@pytest.mark.parametrize("said", ["", "n", "no", "Y E S", "\x1b[A"])
def test_only_yes_is_yes(block: dict[str, Any], monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    Path("recipe.md").write_text(document(block))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: said)
    with pytest.raises(SystemExit):
        main(["reproduce", "recipe.md"])
    assert list(Path.cwd().iterdir()) == [Path.cwd() / "recipe.md"]


def test_data_of_others_are_asked_for_with_their_hashes_before_anything_is_written(block: dict[str, Any]) -> None:
    put("data.source", "imagenet")(block)
    message = refused(block)
    split = block["claims"]["data"]["splits"]["train"]
    assert f"{split['images']:,} images of train with the hash {split['raw_sha256'][:16]}" in message
    assert "--raw-dir" in message


# ---- the block itself -------------------------------------------------------------------------------


def wrong_values(kind: Any) -> list[Any]:
    """Values that are not of a type of the schema."""
    if type(None) in get_args(kind):
        [other] = [choice for choice in get_args(kind) if choice is not type(None)]
        return [value for value in wrong_values(other) if value is not None]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ["no such choice", 1, None, []]
    words: dict[Any, list[Any]] = {
        int: [1.5, "1", True, [], {}, 10**30],
        float: ["0.1", True, [], {}, 10**30],
        bool: [0, 1, "true", None, []],
        str: [1, True, None, [], {}, "x" * 30_000],
    }
    return words.get(kind, [1, "x", {}, None, [{}], ["x"] * 2000])


def kinds(schema: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, kind in get_type_hints(schema).items():
        if hasattr(kind, "__dataclass_fields__"):
            yield from kinds(kind, f"{prefix}{name}.")
        elif f"{prefix}{name}" not in RUNTIME_KEYS:
            yield f"{prefix}{name}", kind


def test_every_value_of_every_key_is_checked(block: dict[str, Any]) -> None:
    keys = dict(kinds())
    assert keys.keys() == flatten(block["config"]).keys()
    for key, kind in keys.items():
        for value in wrong_values(kind):
            changed = {"config": copy.deepcopy(block["config"])}
            put(key, value)(changed)
            with pytest.raises(UserError, match=re.escape(key)):
                parse_config(changed)
        changed = {"config": copy.deepcopy(block["config"])}
        *groups, leaf = key.split(".")
        section = changed["config"]
        for group in groups:
            section = section[group]
        del section[leaf]
        with pytest.raises(UserError, match=f"{re.escape(key)} is missing"):
            parse_config(changed)


@pytest.mark.parametrize("name", ["config_sha256", "recipe_id"])
def test_hashes_are_those_of_the_configuration(block: dict[str, Any], name: str) -> None:
    block[name] = "0" * 64
    with pytest.raises(UserError, match=f"the recipe's {name} is 0000"):
        plan_of(document(block, rehash=False))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("claims.training.weights_sha256", "../x"),
        ("claims.training.weights_sha256", "0" * 64 + "\n"),
        ("claims.training.steps", -1),
        ("claims.training.steps", 10**30),
        ("claims.training.is_exact", 1),
        ("claims.training.epochs", [1]),
        ("claims.data.manifest_sha256", None),
        ("claims.evaluation.correct_top1", "431"),
        ("claims.evaluation.protocol", "x" * 1000),
        ("claims", None),
        ("code", None),
        ("determinism_context", []),
        ("determinism_context.torch", {"a": 1}),
    ],
)
def test_claims_are_checked_by_type_and_place(block: dict[str, Any], place: str, value: Any) -> None:
    section = block
    *groups, leaf = place.split(".")
    for group in groups:
        section = section[group]
    section[leaf] = value
    with pytest.raises(UserError, match=r"does not fit|nothing was trained"):
        parse_recipe(block)


def raw(block: dict[str, Any], old: str, new: str) -> str:
    text = document(block)
    assert old in text
    return text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"seed": 0', '"seed": 0, "seed": 1', "the key 'seed' twice"),
        ('"format"', '"format": "recipe/1", "format"', "the key 'format' twice"),
        ('"seed": 0', '"seed": NaN', "has no"),
        ('"seed": 0', '"seed": Infinity', "has no"),
        ('"seed": 0', '"seed": 1e999', "has no"),
        ('"seed": 0', f'"seed": {"9" * 5000}', "has no"),
        ('"seed": 0', f'"seed": {"9" * 300}', "seed=a huge number"),
        ('"seed": 0', f'"seed": {"[" * 100_000}{"]" * 100_000}', "has no"),
        ('"seed": 0', f'"seed": {"[" * 400}{"]" * 400}', "seed=a list of 1"),
        ('"seed": 0', '"seed": 0, // a comment\n', "has no"),
        ("# A recipe", '```json\n{"format": "recipe/1"}\n```\n', "has 2 ```json blocks"),
        ('"recipe/1"', '"recipe/2"', "has no"),
        ("```json\n{", "```json\n[{", "has no"),
    ],
)
def test_malformed_blocks(block: dict[str, Any], old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        plan_of(raw(block, old, new))


def test_lone_surrogates_are_refused(block: dict[str, Any]) -> None:
    put("description.summary", "\ud800")(block)
    with pytest.raises(UserError, match=r"description\.summary"):
        parse_config(block)


def test_documents_that_are_no_text_or_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("recipe.md").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        plan_reproduction(arguments())
    with Path("recipe.md").open("wb") as handle:
        handle.truncate(17 * 2**20)
    with pytest.raises(UserError, match="has 17,825,792 bytes; at most 16,777,216 are read"):
        plan_reproduction(arguments())


def test_other_fences_and_prose_are_not_read(block: dict[str, Any]) -> None:
    text = document(block)
    noise = '```json\n{broken\n```\n```json\n[1]\n```\n```yaml\nformat: recipe/1\n```\n{"format": "recipe/1"}\n'
    assert json_block(noise + text) == json_block(text)
