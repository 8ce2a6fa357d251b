"""The configuration: every experiment composes; what cannot be stops before any work and names the key."""

from pathlib import Path

import pytest
from hydra.errors import HydraException

from recipe.composition import config_of
from recipe.config import (
    MACHINE_FACTS,
    PATHS,
    canonical_json,
    config_sha256,
    differences,
    leaves,
    pinned,
    recipe_id,
    untyped,
)
from recipe.errors import UserError
from recipe.files import CHECKOUT
from tests.conftest import compose_config

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
def test_hydra_refuses_what_the_schema_does_not_know(override: str, named: str) -> None:
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
        ("optimization.binary_head_bias=true", "optimization.binary_head_bias=True"),
        ("optimization.averaging.recalibrate_images=10", "optimization.averaging.recalibrate_images=10"),
        ("optimization.averaging.decay=1.0", "optimization.averaging.decay=1.0"),
        ("optimization.step_epochs=[60,30]", "optimization.step_epochs"),
        ("augmentation.scale_min=1.1", "augmentation.scale_min=1.1"),
        ("evaluation.crop_pixels=300", "evaluation.resize_pixels=232"),
        ("trainer.gpus=0", "trainer.gpus=0"),
        ("data.quality=101", "data.quality=101"),
        ("data.std=[0,1,1]", "data.std"),
    ],
)
def test_what_cannot_be_is_named(override: str, named: str) -> None:
    with pytest.raises(UserError, match=named.replace("+", r"\+").replace("[", r"\[")):
        compose_config(override)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["evaluation.flip=true", "evaluation.backend=onnx"], r"evaluation\.flip=True .* an exported model sees one"),
        (
            ["optimization.loss=binary_cross_entropy", "optimization.binary_head_bias=true", "model.weights=w.pt"],
            r"optimization\.binary_head_bias=True .* model\.weights",
        ),
    ],
)
def test_what_cannot_be_together_is_named(overrides: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        compose_config(*overrides)


@pytest.mark.parametrize("key", ["run_dir", "data.raw_dir", "data.directory", "model.weights", "reference"])
def test_a_place_whose_variable_is_not_set_is_refused(key: str) -> None:
    """`run_dir="$RUN_DIR"` of a document would else mean the current directory."""
    with pytest.raises(UserError, match=rf"{key}= cannot be: it must be not empty: is the variable set"):
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
        "trainer.data_threads=9",
        "data.processes=3",
    )
    assert pinned(plain) == pinned(moved)


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


@pytest.mark.parametrize("name", NAMES)
def test_a_path_that_exists_is_what_was_typed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    config = config_of([f"data.raw_dir={name}", f"evaluation.weights={tmp_path}/{name}"])
    assert config.data.raw_dir in (name, f"./{name}")
    assert config.evaluation.weights == f"{tmp_path}/{name}"


@pytest.mark.parametrize(
    "name", [name for name in NAMES if "\\" not in name and "${" not in name and name[0] not in "'\""]
)
def test_a_folder_that_is_to_be_made_has_the_name_that_was_typed(name: str) -> None:
    assert config_of([f"run_dir={name}"]).run_dir.removeprefix("./") == name


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
def test_what_is_quoted_for_hydra_and_references_keep_their_meaning(typed: str, meant: str) -> None:
    assert config_of([f"run_dir={typed}"]).run_dir == meant


def test_a_line_break_in_a_path_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.raw_dir='a\\nb' holds a line break: rename"):
        config_of(["data.raw_dir=a\nb"])


def test_every_path_is_a_machine_fact() -> None:
    assert set(PATHS) <= set(MACHINE_FACTS)


def test_every_machine_fact_exists() -> None:
    assert set(MACHINE_FACTS) <= leaves(untyped(compose_config())).keys()


def test_seeds_share_a_recipe() -> None:
    one, two = (pinned(compose_config("experiment=demo", f"seed={seed}")) for seed in (1, 2))
    assert config_sha256(one) != config_sha256(two)
    assert recipe_id(one) == recipe_id(two)
    assert differences(one, two) == ["seed: 1 -> 2"]


def test_no_absolute_path_is_pinned() -> None:
    assert not [
        value
        for value in leaves(pinned(compose_config("data.raw_dir=/data/x"))).values()
        if isinstance(value, str) and Path(value).is_absolute()
    ]


def test_canonical_json_is_one_spelling() -> None:
    assert canonical_json({"b": 1.0, "a": [True, None, "é"]}) == b'{"a":[true,null,"\\u00e9"],"b":1.0}'
