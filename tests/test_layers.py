"""Imports point one way: the layers as a table, checked against the source."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipe.run.files import CHECKOUT

FLOORS = (
    "errors < run < config < models distributed document < data < evaluation preprocessing < training inference"
    " < stages < review < __main__"
)
LEVELS = {name: level for level, names in enumerate(FLOORS.split(" < ")) for name in names.split()}
ENTRY_POINTS = {"main", "add_arguments", "run"}  # of a script or a verb
WITHOUT_TORCH = [
    *("run.provenance", "config.compose", "document.render", "preprocessing.pipeline", "preprocessing.demo"),
    *("review.check.command", "review.diff.command"),
]
MODULES = sorted((CHECKOUT / "recipe").rglob("*.py"))


def imported_modules(source: str) -> set[str]:
    """The second names of everything imported from this package: `recipe.data.shards` -> `data`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "recipe":
            names |= {f"recipe.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("recipe.")}


def test_a_file_imports_only_from_floors_below() -> None:
    above = {}
    for path in MODULES:
        relative = path.relative_to(CHECKOUT / "recipe")
        if str(relative) != "__init__.py":
            own = relative.parts[0].removesuffix(".py")
            imported = imported_modules(path.read_text()) - {own}
            above[str(relative)] = {name for name in imported if LEVELS[name] >= LEVELS[own]}
    assert len(above) > 90
    assert not {file: names for file, names in above.items() if names}


def test_no_test_module_imports_another() -> None:
    """Shared code of tests is in tests/builders, tests/faults/inject.py and tests/faults/launched.py."""
    importers = [
        str(path.relative_to(CHECKOUT))
        for path in sorted((CHECKOUT / "tests").rglob("*.py"))
        if any(name.startswith(("test_", "conftest")) for name in names_imported_from_tests(path.read_text()))
    ]
    assert not importers


def names_imported_from_tests(source: str) -> set[str]:
    """`from tests.data import test_images as x` -> data, test_images."""
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {f"{getattr(node, 'module', '')}.{alias.name}" for node in imports for alias in node.names}
    return {part for name in names if name.lstrip(".").startswith("tests.") for part in name.split(".")}


def test_no_modules_import_one_another() -> None:
    """Within a package, at import time, too: Python would show half of a module."""
    imports = {path: set(imported_files(path)) for path in MODULES}
    finished: set[Path] = set()
    while ready := {path for path, files in imports.items() if path not in finished and files <= finished}:
        finished |= ready
    circles = [str(path.relative_to(CHECKOUT)) for path in MODULES if path not in finished]
    assert not circles


def imported_files(path: Path) -> Iterator[Path]:
    """The files of this package that a file imports when it is imported, not later in a function."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("recipe."):
            file = CHECKOUT / Path(*node.module.split("."))
            for name in [file, *(file / alias.name for alias in node.names)]:
                if name.with_suffix(".py").is_file():
                    yield name.with_suffix(".py")


def test_only_the_command_line_imports_review() -> None:
    """Training is handed `watch` as a function by its script; nothing else knows what readers do with a recipe."""
    scripts = {path.name for path in CHECKOUT.glob("*.py") if "review" in imported_modules(path.read_text())}
    assert scripts == {"train.py"}


def test_few_names_stand_in_two_modules() -> None:
    modules = Counter(
        node.name if isinstance(node, ast.FunctionDef | ast.ClassDef) else target.id
        for path in MODULES
        for node in ast.parse(path.read_text()).body
        for target in (node.targets if isinstance(node, ast.Assign) else [node])
        if isinstance(node, ast.FunctionDef | ast.ClassDef) or isinstance(target, ast.Name)
    )
    twice = sorted(name for name, count in modules.items() if count > 1 and name not in ENTRY_POINTS)
    assert len(twice) <= 15, twice


def test_no_module_is_named_for_nothing() -> None:
    assert not {"utils", "common", "helpers", "misc"} & {path.stem for path in MODULES}


@pytest.mark.process
@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_the_ground_floor_and_the_document_need_no_torch(module: str) -> None:
    program = f"import sys; sys.modules['torch'] = None; import recipe.{module}"
    subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, check=True)
