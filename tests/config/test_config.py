"""The configuration: every experiment composes, and errors name the key before any work."""

import re
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException

from recipe.config import schema as configuration
from recipe.config.compose import config_from_overrides, stage_config_from_overrides
from recipe.config.identity import (
    RENAMED,
    RUNTIME_KEYS,
    canonical_json,
    config_sha256,
    differences,
    flatten,
    recipe_id,
    to_dict,
    unflatten,
)
from recipe.config.schema import PATHS, Config, config_from_pinned, schema_keys
from recipe.errors import UserError
from recipe.run.directory import Run
from recipe.run.files import CHECKOUT
from tests.builders.configs import compose_config

EXPERIMENTS = sorted(path.stem for path in (CHECKOUT / "conf" / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_under_its_own_name(experiment: str) -> None:
    config = compose_config(f"experiment={experiment}")
    assert config.name == experiment
    assert config.run_dir == f"runs/{experiment}"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_opens_with_its_contract(experiment: str) -> None:
    header = (CHECKOUT / "conf" / "experiment" / f"{experiment}.yaml").read_text()
    for item in ("# command:", "# hardware:", "# time:", "# expected:"):
        assert item in header


def test_the_reference_is_the_default() -> None:
    assert compose_config().name == "resnet50_imagenet"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("trainer.gpsu=8", "trainer.gpsu"),
        ("trainer.gpus=many", "trainer.gpus"),
        ("optimization.schedule=cosin", "optimization.schedule"),
        ("experiment=resnet51", "resnet51"),
    ],
)
def test_hydra_refuses_keys_that_are_not_in_the_schema(override: str, named: str) -> None:
    with pytest.raises(HydraException, match=named):
        compose_config(override)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("+optimization.foo=1", "optimization.foo"),
        ("model=torchvision", "model.name|name"),
        ("seed=-1", "seed=-1"),
        ("name=../x", "name=../x"),
        ("optimization.learning_rate=inf", "optimization.learning_rate=inf"),
        ("optimization.step_factor=nan", "optimization.step_factor=nan"),
        ("optimization.step_epochs=[0]", "optimization.step_epochs"),
        ("serialization.variants=[int8]", "serialization.variants"),
        ("optimization.warmup_epochs=91", "optimization.epochs=90"),
        ("optimization.learning_rate=0", "optimization.learning_rate=0"),
        ("optimization.label_smoothing=1", "optimization.label_smoothing=1"),
        ("model.stochastic_depth=1", "model.stochastic_depth=1"),
        ("model.stochastic_depth=-0.1", "model.stochastic_depth=-0.1"),
        ("optimization.bce.init_head_bias=true", "optimization.bce.init_head_bias=True"),
        ("optimization.ema.precise_bn_images=10", "optimization.ema.precise_bn_images=10"),
        ("optimization.ema.decay=1.0", "optimization.ema.decay=1.0"),
        ("optimization.step_epochs=[60,30]", "optimization.step_epochs"),
        ("augmentation.scale_min=1.1", "augmentation.scale_min=1.1"),
        ("evaluation.crop_pixels=300", "evaluation.resize_pixels=232"),
        ("trainer.gpus=0", "trainer.gpus=0"),
        ("data.jpeg_quality=101", "data.jpeg_quality=101"),
        ("data.std=[0,1,1]", "data.std"),
    ],
)
def test_an_invalid_value_is_named(override: str, named: str) -> None:
    with pytest.raises(UserError, match=named.replace("+", r"\+").replace("[", r"\[")):
        compose_config(override)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["evaluation.flip=true", "evaluation.backend=onnx"], r"evaluation\.flip=True .* an exported model sees one"),
        (
            ["optimization.loss=binary_cross_entropy", "optimization.bce.init_head_bias=true", "model.weights=w.pt"],
            r"optimization\.bce\.init_head_bias=True .* model\.weights",
        ),
    ],
)
def test_an_invalid_combination_is_named(overrides: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        compose_config(*overrides)


@pytest.mark.parametrize("key", ["run_dir", "data.raw_dir", "data.directory", "model.weights", "reference"])
def test_a_path_from_an_unset_variable_is_refused(key: str) -> None:
    """Otherwise `run_dir="$RUN_DIR"` of a document would mean the current directory."""
    with pytest.raises(UserError, match=rf"{key}= is invalid: must be a path \(is the variable set"):
        compose_config(f"{key}=")


def test_machine_facts_do_not_change_the_recipe() -> None:
    plain = compose_config("experiment=demo")
    moved = compose_config(
        "experiment=demo",
        "run_dir=/x",
        "data.raw_dir=/y",
        "data.directory=/z",
        "trainer.gpus=2",
        "trainer.accelerator=cuda",
        "loader.threads=9",
        "data.processes=3",
    )
    assert plain.pinned.values == moved.pinned.values


NAMES = [
    *(
        "my images (v2)",
        "a=b",
        "a,b",
        "photos [2024]",
        "50% off",
        "bilder_übung",
        "it's",
        "a&b",
        "a#b",
        "a;b",
        "x$HOME",
    ),
    *(
        "${name}",
        "${oc.env:HOME}",
        "x${",
        r"\${name}",
        r"a\\${name}",
        r"a\b",
        "a\\",
        r"\'",
        '"x"',
        "'x'",
        "'x",
        "x'y\"z",
    ),
    *(
        "007",
        "1e3",
        "true",
        "none",
        "[a]",
        "{a: b}",
        "choice(a,b)",
        "-x",
        "~",
        "*",
        " lead",
        "trail ",
        "tab\there",
        "\r",
    ),
    *("a:b", "?", "???", "@x", "!", "e\u0301 \u00e9", "日本語", "\udcff", "a\u202eb"),
]


NEW_NAMES = [name for name in NAMES if "\\" not in name and "${" not in name and name[0] not in "'\""]


def in_threes(names: list[str]) -> list[tuple[str, ...]]:
    """Groups of three keys for one composition, which is slow. The last group is filled up from the first names."""
    return [(*names, *names)[first : first + 3] for first in range(0, len(names), 3)]


@pytest.mark.parametrize("names", in_threes(NAMES))
def test_an_existing_path_is_used_as_typed(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).mkdir(exist_ok=True)
    relative = dict(zip(("data.raw_dir", "data.directory", "run_dir"), names, strict=True))
    absolute = dict(zip(("model.weights", "evaluation.weights", "reference"), names, strict=True))
    words = [f"{key}={name}" for key, name in relative.items()]
    config = config_from_overrides([*words, *(f"{key}={tmp_path}/{name}" for key, name in absolute.items())])
    for name, path in zip(names, (config.data.raw_dir, config.data.directory, config.run_dir), strict=True):
        assert path in (name, f"./{name}")
    paths = (config.model.weights, config.evaluation.weights, config.reference)
    assert paths == tuple(f"{tmp_path}/{name}" for name in names)


@pytest.mark.parametrize("names", in_threes(NEW_NAMES))
def test_a_folder_that_is_to_be_made_has_the_name_that_was_typed(names: tuple[str, ...]) -> None:
    config = config_from_overrides(
        [f"{key}={name}" for key, name in zip(("run_dir", "data.directory", "data.raw_dir"), names, strict=True)]
    )
    paths = (config.run_dir, config.data.directory, config.data.raw_dir)
    assert tuple(path.removeprefix("./") for path in paths) == names


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("'a b, c'", "a b, c"),
        ('"a=b"', "a=b"),
        (r"'it\'s'", "it's"),
        (r"a\,b\ c", "a,b c"),
        ("runs/${name}-${seed}", "runs/resnet50_imagenet-0"),
        (r"'\${name}'", "${name}"),
    ],
)
def test_quotes_for_hydra_and_references_keep_their_meaning(typed: str, meant: str) -> None:
    assert config_from_overrides([f"run_dir={typed}"]).run_dir == meant


def test_a_line_break_in_a_path_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.raw_dir='a\\nb' contains a line break: rename"):
        config_from_overrides(["data.raw_dir=a\nb"])


def test_every_path_is_a_machine_fact() -> None:
    assert set(PATHS) <= set(RUNTIME_KEYS)


def test_every_machine_fact_exists() -> None:
    assert set(RUNTIME_KEYS) <= flatten(to_dict(compose_config())).keys()


def test_seeds_share_a_recipe() -> None:
    one, two = (compose_config("experiment=demo", f"seed={seed}").pinned.values for seed in (1, 2))
    assert config_sha256(one) != config_sha256(two)
    assert recipe_id(one) == recipe_id(two)
    assert differences(one, two) == ["seed: 1 -> 2"]


def test_no_absolute_path_is_pinned() -> None:
    assert not [
        value
        for value in flatten(compose_config("data.raw_dir=/data/x").pinned.values).values()
        if isinstance(value, str) and Path(value).is_absolute()
    ]


def test_canonical_json_is_one_spelling() -> None:
    assert canonical_json({"b": 1.0, "a": [True, None, "é"]}) == b'{"a":[true,null,"\\u00e9"],"b":1.0}'


# ---- every Config is checked, however it is made ---------------------------------------------------------


def test_a_replaced_configuration_is_checked_too() -> None:
    config = compose_config("experiment=demo")
    with pytest.raises(UserError, match=r"^seed=-1 is invalid: must be between 0 and 4294967295$"):
        replace(config, seed=-1)
    with pytest.raises(UserError, match=r"^optimization\.epochs=0 is invalid: must be 1 or more$"):
        replace(config, optimization=replace(config.optimization, epochs=0))
    with pytest.raises(UserError, match=r"^optimization\.warmup_epochs=7\.0 is invalid: must be at most optimi"):
        replace(config, optimization=replace(config.optimization, warmup_epochs=7))
    assert replace(config).pinned == config.pinned
    assert replace(config, seed=1).pinned != config.pinned


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("seed", "1", "int, not str"),
        ("seed", True, "int, not bool"),
        ("trainer.gpus", "8", "int or null, not str"),
        ("data.source", "web", "one of imagenet, imagenette, folder, demo"),
        ("data.std", [1.0, 0.0, 1.0], r"above 0"),
        ("data.mean", [0.5], r"three numbers \(R, G, B\)"),
    ],
)
def test_plain_values_of_another_type_or_out_of_bounds_are_named(key: str, value: Any, allowed: str) -> None:
    values = flatten(to_dict(compose_config()))
    with pytest.raises(UserError, match=rf"^{key}(\[1\])?=.* is invalid: must be {allowed}$"):
        Config(**unflatten(values | {key: value}))


def test_a_message_quotes_a_value_that_looks_like_a_message() -> None:
    """The message of an enum quotes the value, which may look like the end of msgspec's message."""
    values = flatten(to_dict(compose_config())) | {"data.source": "x - at `$.model.name`"}
    with pytest.raises(UserError, match=r"^data\.source=x - at `\$\.model\.name` is invalid: must be one of imagenet"):
        Config(**unflatten(values))


def test_unknown_and_missing_keys_are_named() -> None:
    values = flatten(to_dict(compose_config()))
    del values["seed"]
    values = {key: value for key, value in values.items() if key not in RUNTIME_KEYS}
    faults = r"optimization\.foo is unknown; trainer\.gpus is a fact of the machine; seed is missing"
    with pytest.raises(UserError, match=f"^{faults}$"):
        config_from_pinned(unflatten(values | {"optimization.foo": 1, "trainer.gpus": 8}))


@pytest.mark.parametrize("given", [[], ["data=folder"]])
def test_a_later_stage_finds_the_data_set_of_the_run(given: list[str]) -> None:
    trained = compose_config("data=folder", "data.name=my_images", "name=my_images")
    Run("runs/my_images").write_config(trained.pinned.values)
    config = stage_config_from_overrides(["run_dir=runs/my_images", *given], "evaluation")
    assert config.data.directory == "data/my_images"
    assert config.pinned == trained.pinned
    elsewhere = stage_config_from_overrides(["run_dir=runs/my_images", "data.directory=elsewhere"], "evaluation")
    assert elsewhere.data.directory == "elsewhere"
    with pytest.raises(UserError, match=r"data\.name: my_images -> other"):
        stage_config_from_overrides(["run_dir=runs/my_images", "data.name=other"], "evaluation")


@pytest.mark.parametrize("wrong", [-1e9, 1e9, 10**9, -(10**9), "", "?", [], [-1], [0.5] * 4, None])
def test_every_bound_has_words(wrong: Any) -> None:
    values = flatten(to_dict(compose_config()))
    for key in values:
        with suppress(UserError):  # no other error
            Config(**unflatten(values | {key: wrong}))


def test_enums_are_named_as_their_values() -> None:
    """Hydra reads the names, msgspec the values."""
    kinds = [kind for kind in vars(configuration).values() if isinstance(kind, type) and issubclass(kind, Enum)]
    assert len(kinds) > 10
    assert not [member for kind in kinds for member in kind if member.name != member.value]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["optimization.old_rate=1"], "it is now optimization.learning_rate"),
        (["optimization.old_group.decay=0.5"], "it is now optimization.ema.decay"),
        (["+optimization.old_rate=1"], "it is now optimization.learning_rate"),
        (["trainer.gpsu=8"], "did you mean trainer.gpus?"),
        (["+zzz=8"], "zzz is not a setting; `python train.py --cfg job` prints all of them"),
    ],
)
def test_an_old_key_is_answered_with_its_new_name(monkeypatch: pytest.MonkeyPatch, words: list[str], hint: str) -> None:
    monkeypatch.setitem(RENAMED, "optimization.old_rate", "optimization.learning_rate")
    monkeypatch.setitem(RENAMED, "optimization.old_group", "optimization.ema")
    with pytest.raises(UserError, match=rf"{re.escape(hint)}$"):
        config_from_overrides(words)


def test_new_names_are_in_the_schema_and_old_ones_are_not() -> None:
    keys = schema_keys()
    for old, new in RENAMED.items():
        assert any(f"{key}.".startswith(f"{new}.") for key in keys)
        assert not any(f"{key}.".startswith(f"{old}.") for key in keys)
