"""The package as a wheel, without its checkout: the verbs work, or say in one line that they need the checkout."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.run.files import CHECKOUT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip is not installed"),
]
NEEDS_CHECKOUT = "pip install --editable"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel of a copy of the sources: a build leaves files beside them."""
    place = tmp_path_factory.mktemp("wheel")
    sources, wheels, packages = (place / name for name in ("sources", "wheels", "packages"))
    sources.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, sources)
    shutil.copytree(CHECKOUT / "recipe", sources / "recipe", ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(wheels), str(sources))
    (wheel,) = wheels.glob("recipe-*.whl")
    pip("install", "--target", str(packages), str(wheel))
    return packages


def pip(verb: str, *words: str) -> None:
    command = [sys.executable, "-m", "pip", verb, "--no-deps", "--no-index", "--disable-pip-version-check", *words]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def python(packages: Path, place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python in `place` with the installed package on its path, before an editable one."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(packages)},
        text=True,
        capture_output=True,
        check=False,
    )


def test_the_installed_package_is_the_one_that_runs(installed: Path, tmp_path: Path) -> None:
    done = python(installed, tmp_path, "-c", "import recipe; print(recipe.__file__)")
    assert Path(done.stdout.strip()).is_relative_to(installed), done.stdout + done.stderr


def test_every_module_is_in_the_wheel(installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".py", ".j2")}

    assert files(installed / "recipe") == files(CHECKOUT / "recipe")


def test_the_help_of_every_verb_is_printed(installed: Path, tmp_path: Path) -> None:
    done = python(installed, tmp_path, "-m", "recipe", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(verb in done.stdout for verb in ("check", "drift", "verify", "diff", "watch", "reproduce", "doctor"))


def test_check_reads_a_published_recipe(installed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(CHECKOUT / "recipes" / "demo", folder)
    done = python(installed, tmp_path, "-m", "recipe", "check", str(folder))
    assert done.stderr == ""
    assert done.returncode in (0, 1)  # the published run may be of an older version
    assert "present" in done.stdout


def test_what_needs_the_checkout_says_so_in_one_sentence(installed: Path, tmp_path: Path) -> None:
    composes = "from recipe.config.compose import config_from_overrides as compose; compose(['experiment=smoke'])"
    done = python(
        installed,
        tmp_path,
        "-c",
        f"from recipe.run.terminal import report_user_errors as one\nwith one():\n    {composes}",
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert NEEDS_CHECKOUT in done.stderr
    assert len(done.stderr.splitlines()) == 1
