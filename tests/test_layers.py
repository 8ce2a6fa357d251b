"""Imports point one way: the layers as a table, checked against the source."""

import ast
import re
import subprocess
import sys

import pytest

from recipe.run.files import CHECKOUT

# A module may import its own layer's siblings only where the layer says so, and any layer named behind it.
GROUND = [
    *("streams", "errors", "launcher", "signals", "config", "files", "metrics", "records", "run"),
    *("experiment_log", "environment", "provenance"),
]
ALLOWED = {
    "streams": [],
    "errors": ["streams"],
    "launcher": ["errors"],
    "signals": ["errors"],
    "config": ["errors", "launcher", "streams", "files", "experiment_log", "run", "environment", "config"],
    "files": ["errors"],
    "metrics": ["errors"],
    "records": ["errors"],
    "run": ["errors", "files", "metrics", "records"],
    "experiment_log": ["files", "records", "run"],
    "environment": ["files", "launcher", "records"],
    "provenance": ["environment", "files", "records"],
    "distributed": GROUND,
    "alterations": GROUND,
    "weights": [*GROUND, "checkpoint"],
    "model": [*GROUND, "alterations", "checkpoint", "weights"],
    "checkpoint": GROUND,
    "data": [*GROUND, "distributed", "data"],
    "preprocessing": [*GROUND, "distributed", "data", "preprocessing"],
    "evaluation": [*GROUND, "distributed", "model", "data"],
    "inference": [*GROUND, "distributed", "model", "checkpoint", "data", "evaluation", "inference"],
    "performance": [
        *GROUND,
        *("distributed", "model", "checkpoint", "weights", "data", "evaluation", "inference"),
    ],
    "training": [
        *GROUND,
        *(
            "distributed",
            "alterations",
            "model",
            "checkpoint",
            "weights",
            "data",
            "preprocessing",
            "evaluation",
            "training",
        ),
    ],
    "doctor": [*GROUND, "distributed", "model", "data", "training", "document"],
    "document": [*GROUND, "document"],
    "demonstration": [*GROUND, "distributed", "data", "inference", "document"],
    "review": [
        *GROUND,
        *(
            "distributed",
            "model",
            "checkpoint",
            "weights",
            "data",
            "preprocessing",
            "evaluation",
            "inference",
            "training",
        ),
        *("document", "performance", "review"),
    ],
    "__main__": ["streams", "errors"],  # names the verbs, and imports the one that is asked for
}
WITHOUT_TORCH = [
    *(*GROUND, "config.schema", "config.compose", "document.render", "preprocessing.pipeline", "preprocessing.demo"),
    *("review.check.command", "review.diff.command"),
]
MODULES = sorted((CHECKOUT / "recipe").rglob("*.py"))


def imported_modules(source: str) -> set[str]:
    """The second names of everything imported from this package: `recipe.data.shards` -> `data`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("recipe.")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_imports_point_one_way(path: object) -> None:
    relative = path.relative_to(CHECKOUT / "recipe")  # type: ignore[attr-defined]
    if relative.name == "__init__.py":
        return
    layer = relative.parts[0].removesuffix(".py")
    assert layer in ALLOWED, f"{relative} belongs to no layer: add it to this table"
    wrong = imported_modules(path.read_text()) - set(ALLOWED[layer])  # type: ignore[attr-defined]
    assert not wrong, f"{relative} imports {wrong}"


def test_only_the_command_line_imports_review() -> None:
    """Training is handed `watch` as a function by its script; nothing else knows what readers do with a recipe."""
    assert {layer for layer, below in ALLOWED.items() if "review" in below} == {"review"}
    scripts = {path.name for path in CHECKOUT.glob("*.py") if "review" in imported_modules(path.read_text())}
    assert scripts == {"train.py"}


def test_the_augmentation_knows_nothing_of_the_loader() -> None:
    below = {"augment", "decoding", "transforms"}  # modules of recipe.data
    for path in (CHECKOUT / "recipe/data/augment").glob("*.py"):
        assert set(re.findall(r"recipe\.data\.(\w+)", path.read_text())) <= below, path.name


def test_no_module_is_named_for_nothing() -> None:
    assert not {"utils", "common", "helpers", "misc"} & {path.stem for path in MODULES}


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_the_ground_floor_and_the_document_need_no_torch(module: str) -> None:
    program = f"import sys; sys.modules['torch'] = None; import recipe.{module}"
    subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, check=True)
