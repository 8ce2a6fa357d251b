"""Provenance: the tree at start and end of a stage, the patch, the command, and no private paths."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest

from recipe.run import provenance
from recipe.run.environment import command, machine, variables, versions
from recipe.run.provenance import NoCommitError, Stage, commit, modified_files, source_sha256, tree_state
from recipe.run.records import TreeState, to_json
from tests.builders.ranks import torchrun_environment


def git(repository: Path, *arguments: str) -> str:
    return os.fsdecode(subprocess.run(["git", *arguments], cwd=repository, check=True, capture_output=True).stdout)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small checkout with a clean commit, independent of the machine's git settings."""
    checkout = tmp_path / "checkout"
    for name, content in (
        ("recipe/__init__.py", ""),
        ("recipe/model.py", "width = 16\n"),
        ("conf/model/small.yaml", "name: small\n"),
        ("train.py", "print('train')\n"),
        ("README.md", "words\n"),
        (".gitignore", "/runs/\n"),
    ):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(content)
    for variable in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    git(checkout, "init", "-q")
    git(checkout, "add", "-A")
    git(checkout, "-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "-m", "first")
    monkeypatch.setattr(provenance, "CHECKOUT", checkout)
    return checkout


def outputs(repository: Path) -> Path:
    return repository / "runs" / "x"


def kept_patch(repository: Path, state: TreeState) -> bytes:
    """The patch of this state, checked against its hash."""
    assert state.patch_sha256 is not None
    content = (outputs(repository) / "records" / "patches" / f"{state.patch_sha256[:16]}.patch").read_bytes()
    assert hashlib.sha256(content).hexdigest() == state.patch_sha256
    return content


def applied(repository: Path, patch: bytes, tmp_path: Path) -> Path:
    """A fresh clone of the commit with the patch applied."""
    clone = tmp_path / "clone"
    git(repository.parent, "clone", "-q", str(repository), str(clone))
    (tmp_path / "the.patch").write_bytes(patch)
    git(clone, "apply", "--binary", str(tmp_path / "the.patch"))
    return clone


# ---- the tree ---------------------------------------------------------------------------------------


def test_a_clean_tree_is_clean(repository: Path) -> None:
    assert tree_state(outputs(repository)) == TreeState(state="clean")
    assert commit() == git(repository, "rev-parse", "HEAD").strip()
    assert not outputs(repository).exists()


def test_untracked_files_are_named_and_only_source_makes_a_patch(repository: Path) -> None:
    (repository / "notes.txt").write_text("mine")
    assert tree_state(outputs(repository)) == TreeState(state="untracked", untracked=["notes.txt"], untracked_files=1)
    (repository / "recipe" / "new.py").write_text("x = 1\n")
    state = tree_state(outputs(repository))
    assert (state.state, state.untracked) == ("untracked", ["notes.txt", "recipe/new.py"])
    patch = kept_patch(repository, state)
    assert b"recipe/new.py" in patch
    assert b"mine" not in patch


@pytest.mark.parametrize(
    "name", ["conf/experiment/mine.yaml", "conf/experiment/my own.yaml", "conf/experiment/m\u00e9.yaml"]
)
def test_commit_and_patch_together_are_the_code_that_ran(
    name: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "recipe" / "model.py").write_text("width = 32\n")
    (repository / "conf" / "model" / "small.yaml").unlink()
    (repository / name).parent.mkdir(parents=True)
    (repository / name).write_text("name: mine\n")
    state, ran = tree_state(outputs(repository)), source_sha256()
    assert (state.state, state.untracked) == ("modified", [name])
    clone = applied(repository, kept_patch(repository, state), tmp_path)
    monkeypatch.setattr(provenance, "CHECKOUT", clone)
    assert source_sha256() == ran


@pytest.mark.parametrize("before", [b"a = 'caf\xe9'\r\nb = 1\r\n", b"\x00\xff binary", "é\r\n\n\r".encode()])
def test_a_patch_is_kept_byte_by_byte(
    before: bytes, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latin-1, Windows line ends and binary content, in a changed file and in a new one."""
    changed, new = repository / "recipe" / "model.py", repository / "recipe" / os.fsdecode(b"caf\xe9.py")
    changed.write_bytes(before)
    git(repository, "add", "-A")
    git(repository, "-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "-m", "odd bytes")
    changed.write_bytes(before + b"c = '\xe9'\r\n")
    new.write_bytes(before + b"\r")
    state, ran = tree_state(outputs(repository)), source_sha256()
    assert state.untracked == ["recipe/caf\\xe9.py"]
    assert b"caf\\\\xe9" in to_json(state)
    clone = applied(repository, kept_patch(repository, state), tmp_path)
    monkeypatch.setattr(provenance, "CHECKOUT", clone)
    assert source_sha256() == ran


def test_many_untracked_files_are_counted_and_few_are_named(repository: Path) -> None:
    for number in range(120):
        (repository / f"note-{number:03d}.txt").write_text("")
    (repository / "recipe" / "new.py").write_text("x = 1\n")
    state = tree_state(outputs(repository))
    assert state.untracked_files == 121
    assert state.untracked == [f"note-{number:03d}.txt" for number in range(50)]
    assert b"recipe/new.py" in kept_patch(repository, state)


def test_a_modified_file_is_modified_whether_staged_or_not(repository: Path) -> None:
    (repository / "train.py").write_text("print('other')\n")
    before = tree_state(outputs(repository))
    git(repository, "add", "-A")
    assert tree_state(outputs(repository)) == before
    assert before.state == "modified"
    assert b"other" in kept_patch(repository, before)


def test_the_stages_own_outputs_do_not_count(repository: Path) -> None:
    inside = repository / "results" / "x"
    inside.mkdir(parents=True)
    (inside / "weights.pt").write_bytes(b"1")
    assert tree_state(inside) == TreeState(state="clean")
    assert tree_state(repository / "results" / "other").untracked == ["results/x/weights.pt"]


def change(repository: Path) -> None:
    """Changes: a changed file, a deleted one, a new source, a link, an image and a long name."""
    (repository / "recipe" / "model.py").write_text("width = 32\n")
    (repository / "conf" / "model" / "small.yaml").unlink()
    (repository / "recipe" / "new.py").write_bytes(b"x = 1\r\ny = '\xe9'")
    (repository / "recipe" / os.fsdecode(b"caf\xe9 \n.py")).write_text("z = 1\n")
    (repository / "puppy.jpg").write_bytes(b"\x00\xff\xd8 other")
    (repository / "README.md").unlink()
    (repository / "README.md").symlink_to("train.py")


def commit_all(repository: Path) -> None:
    git(repository, "add", "-A")
    git(repository, "-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "-m", "more")


SETTINGS = [
    *("color.ui=always", "color.diff=always", "diff.noprefix=true", "diff.mnemonicPrefix=true", "diff.context=0"),
    *("diff.srcPrefix=x/", "diff.dstPrefix=y/", "diff.external=echo", "diff.orderFile=order", "diff.relative=true"),
    *("diff.renames=copies", "diff.submodule=log", "diff.ignoreSubmodules=all", "diff.algorithm=patience"),
    *("diff.wsErrorHighlight=all", "diff.interHunkContext=9", "diff.colorMoved=zebra", "diff.statGraphWidth=3"),
    *("status.showUntrackedFiles=no", "status.relativePaths=false", "core.quotePath=false", "core.abbrev=4"),
    *("core.autocrlf=true", "core.autocrlf=input", "core.eol=crlf", "core.safecrlf=true", "core.fileMode=false"),
    *("core.fsmonitor=/bin/false", "core.pager=false", "core.excludesFile=ignored", "core.attributesFile=attributes"),
    *("core.ignoreStat=true", "core.trustctime=false", "core.checkStat=minimal"),
]


@pytest.mark.parametrize(
    ("scope", "settings"), [*(("global", [setting]) for setting in SETTINGS), ("local", SETTINGS)], ids=str
)
def test_the_settings_of_the_user_change_nothing(
    scope: str, settings: list[str], repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "puppy.jpg").write_bytes(b"\x00\xff\xd8")
    commit_all(repository)
    change(repository)
    expected, ran = tree_state(outputs(repository)), source_sha256()
    patch = kept_patch(repository, expected)
    (tmp_path / "ignored").write_text("*\n")
    (tmp_path / "order").write_text("train.py\n*.jpg\n")
    (tmp_path / "attributes").write_text("* text diff=mine filter=mine ident\n*.jpg -text diff=mine\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "settings"))
    for setting in [*settings, "diff.mine.textconv=wc", "filter.mine.clean=tr a-z A-Z"]:
        key, _, value = setting.partition("=")
        git(repository, "config", f"--{scope}", key, str(tmp_path / value) if (tmp_path / value).is_file() else value)
    assert commit() is not None
    assert tree_state(outputs(repository)) == expected
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    (repository / ".git" / "config").write_text("")
    monkeypatch.setattr(provenance, "CHECKOUT", applied(repository, patch, tmp_path))
    assert source_sha256() == ran
    assert (tmp_path / "clone" / "puppy.jpg").read_bytes() == b"\x00\xff\xd8 other"
    assert (tmp_path / "clone" / "README.md").is_symlink()


OTHER = [
    {"GIT_DIR": "{other}/.git"},
    {"GIT_DIR": "{other}/.git", "GIT_WORK_TREE": "{other}"},
    {"GIT_WORK_TREE": "{other}"},
    {"GIT_INDEX_FILE": "{other}/.git/index"},
    {"GIT_COMMON_DIR": "{other}/.git"},
    {"GIT_OBJECT_DIRECTORY": "{other}/.git/objects"},
    {"GIT_NAMESPACE": "other"},
    {"GIT_CEILING_DIRECTORIES": "{other}"},
    {"GIT_EXTERNAL_DIFF": "echo"},
    {"GIT_DIFF_OPTS": "--unified=0"},
    {"GIT_LITERAL_PATHSPECS": "1", "GIT_PREFIX": "recipe/", "GIT_PAGER": "false", "GIT_TRACE": "1"},
    {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "diff.noprefix", "GIT_CONFIG_VALUE_0": "true"},
    {"GIT_CONFIG_PARAMETERS": "'diff.external'='echo'"},
]


@pytest.mark.parametrize("variables", OTHER, ids=lambda variables: "+".join(variables))
def test_the_callers_git_variables_change_nothing(
    variables: dict[str, str], repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Git sets them itself for hooks and for `git rebase --exec`."""
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    (other / "theirs.py").write_text("")
    commit_all(other)
    change(repository)
    expected, head = tree_state(outputs(repository)), commit()
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(other=other))
    assert (tree_state(outputs(repository)), commit()) == (expected, head)


@pytest.mark.parametrize("mark", ["--assume-unchanged", "--skip-worktree"])
def test_an_edit_hidden_by_a_mark_in_the_index_is_seen(mark: str, repository: Path) -> None:
    git(repository, "update-index", mark, "recipe/model.py")
    assert tree_state(outputs(repository)).state == "clean"
    (repository / "recipe" / "model.py").write_text("width = 32\n")
    assert tree_state(outputs(repository)).state == "modified"


def test_a_source_that_git_ignores_is_part_of_the_patch(repository: Path) -> None:
    (repository / ".git" / "info" / "exclude").write_text("*\n")
    (repository / "notes.txt").write_text("mine")
    assert tree_state(outputs(repository)).state == "clean"
    (repository / "recipe" / "new.py").write_text("x = 1\n")
    state = tree_state(outputs(repository))
    assert (state.state, state.untracked) == ("untracked", ["recipe/new.py"])
    assert b"new.py" in kept_patch(repository, state)


def test_touched_files_are_clean_and_the_index_stays_as_it_was(repository: Path) -> None:
    index = (repository / ".git" / "index").read_bytes()
    for path in repository.rglob("*.py"):
        os.utime(path, (1, 1))
        path.chmod(0o755)
    assert tree_state(outputs(repository)) == TreeState(state="clean")
    assert (repository / ".git" / "index").read_bytes() == index


@pytest.mark.parametrize("kind", ["worktree", "submodule", "link", "sha256", "shallow", "detached"])
def test_every_kind_of_checkout_is_one(
    kind: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / kind
    if kind == "worktree":
        git(repository, "worktree", "add", "-q", str(place))
    elif kind == "submodule":
        parent = tmp_path / "parent"
        parent.mkdir()
        git(parent, "init", "-q")
        git(parent, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(repository), "inner")
        commit_all(parent)
        place = parent / "inner"
    elif kind == "link":
        place.symlink_to(repository)
    elif kind == "sha256":
        shutil.copytree(repository, place, ignore=shutil.ignore_patterns(".git"))
        git(place, "init", "-q", "--object-format=sha256")
        commit_all(place)
    else:
        words = ("--depth=1", repository.as_uri()) if kind == "shallow" else (str(repository),)
        git(tmp_path, "clone", "-q", *words, str(place))
        git(place, "checkout", "-q", "--detach")
    monkeypatch.setattr(provenance, "CHECKOUT", place)
    assert commit() == git(place, "rev-parse", "HEAD").strip()
    assert tree_state(tmp_path / "out") == TreeState(state="clean")
    (place / "recipe" / "model.py").write_text("width = 32\n")
    assert tree_state(tmp_path / "out").state == "modified"


# ---- no commit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("parent", ["ignores everything", "tracks everything", "has no commit"])
def test_the_repository_around_an_unpacked_archive_is_not_ours(parent: str, repository: Path, tmp_path: Path) -> None:
    """A dotfiles repository in the home directory, a monorepo's third_party/."""
    shutil.rmtree(repository / ".git")
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text("*\n" if parent == "ignores everything" else "")
    if parent != "has no commit":
        git(tmp_path, "add", "-f", ".gitignore")
        commit_all(tmp_path)
    assert tree_state(outputs(repository)) == TreeState(state="not a repository of ours")
    assert commit() is None
    with pytest.raises(NoCommitError):
        modified_files()


def test_a_repository_of_other_files_in_the_same_folder_is_not_ours(repository: Path) -> None:
    shutil.rmtree(repository / ".git")
    git(repository, "init", "-q")
    git(repository, "add", "README.md")
    git(repository, "-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "-m", "mine")
    assert tree_state(outputs(repository)) == TreeState(state="not a repository of ours")


def test_without_git_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "CHECKOUT", tmp_path)
    assert tree_state(tmp_path / "out") == TreeState(state="no git")
    assert commit() is None


def test_without_the_git_program_it_says_so(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert shutil.which("git") is None
    assert tree_state(outputs(repository)) == TreeState(state="no git")
    assert commit() is None


def test_a_repository_without_a_commit_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q")
    monkeypatch.setattr(provenance, "CHECKOUT", tmp_path)
    assert tree_state(tmp_path / "out").state == "no git"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_repository_of_another_user_is_refused_until_the_user_trusts_it(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (repository, *repository.rglob("*")):
        os.chown(path, 4321, 4321)
    monkeypatch.delenv("GIT_CONFIG_GLOBAL")
    monkeypatch.setenv("HOME", str(tmp_path))
    reason = "detected dubious ownership in repository at '...'"
    assert tree_state(outputs(repository)) == TreeState(state="git refused", reason=reason)
    assert commit() is None
    (tmp_path / ".gitconfig").write_text(f'[safe]\n\tdirectory = "{repository}"\n')
    assert tree_state(outputs(repository)) == TreeState(state="clean")


@pytest.mark.parametrize("damage", ["HEAD", "index", "config", "objects", "pointer"])
def test_a_damaged_repository_is_refused_with_gits_reason(damage: str, repository: Path) -> None:
    folder = repository / ".git"
    if damage == "HEAD":
        (folder / "HEAD").unlink()
    elif damage == "objects":
        shutil.rmtree(folder / "objects")
        (folder / "objects").mkdir()
    elif damage == "pointer":
        shutil.rmtree(folder)
        folder.write_text("gitdir: /home/alice smith/gone\n")
    else:
        (folder / damage).write_bytes(b"[nonsense\n")
    found = tree_state(outputs(repository))
    assert found.state == "git refused"
    assert found.reason
    assert "alice" not in found.reason


@pytest.mark.parametrize(
    ("complaint", "reason"),
    [
        ("fatal: detected dubious ownership in repository at '/home/o'neil/x'\nTo add", "detected dubious ownership in "
         "repository at '...'"),
        ("fatal: not a git repository: /home/o neil/.git/worktrees/x", "not a git repository: ..."),
        ("warning: slow\nfatal: unable to access '/root/.gitconfig': Permission denied", "unable to access '...': "
         "Permission denied"),
        ("xcrun: error: invalid developer path (/home/oneil)", "xcrun: error: invalid developer path (..."),
        ("", "it ended with 128"),
    ],
)  # fmt: skip
def test_the_reason_is_one_line_that_names_no_place(
    complaint: str, reason: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "git"
    program.parent.mkdir()
    (tmp_path / "complaint").write_text(complaint)
    program.write_text(f"#!/bin/sh\n/bin/cat '{tmp_path}/complaint' >&2\nexit 128\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    assert tree_state(outputs(repository)) == TreeState(state="git refused", reason=reason)


# ---- a stage ----------------------------------------------------------------------------------------


def test_an_edit_during_a_stage_is_visible(repository: Path) -> None:
    """dvc#11058: the state at the end only, or at the start only, would be recorded as the code that ran."""
    stage = Stage(outputs(repository))
    (repository / "recipe" / "model.py").write_text("width = 64\n")
    found = stage.finish(machine())
    assert found.tree_at_start.state == "clean"
    assert found.tree_at_end.state == "modified"
    assert found.source_sha256 != found.source_sha256_at_end
    assert b"+width = 64" in kept_patch(repository, found.tree_at_end)


def test_an_edit_that_is_taken_back_during_a_stage_is_visible(repository: Path) -> None:
    (repository / "recipe" / "model.py").write_text("width = 64\n")
    stage = Stage(outputs(repository))
    git(repository, "checkout", "-q", "--", ".")
    found = stage.finish(machine())
    assert (found.tree_at_start.state, found.tree_at_end.state) == ("modified", "clean")
    assert b"+width = 64" in kept_patch(repository, found.tree_at_start)


def test_a_stage_without_edits_ends_as_it_began(repository: Path) -> None:
    found = Stage(outputs(repository)).finish(machine(), {"cuda": "13.0"})
    assert found.tree_at_start == found.tree_at_end == TreeState(state="clean")
    assert found.source_sha256 == found.source_sha256_at_end == source_sha256()
    assert found.versions == versions() | {"cuda": "13.0"}
    assert found.seconds >= 0
    assert str(repository.parent).encode() not in to_json(found)


# ---- the source's hash ------------------------------------------------------------------------------


def test_the_source_hash_depends_on_names_and_content_of_sources_only(repository: Path) -> None:
    before = source_sha256()
    os.utime(repository / "train.py", (1, 1))
    os.chmod(repository / "train.py", 0o600)
    (repository / "README.md").write_text("other words\n")
    git(repository, "add", "-A")
    git(repository, "-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "-m", "second")
    assert source_sha256() == before
    found = {before}
    for name in (
        "recipe/model.py",
        "recipe/document/recipe.md.j2",
        "conf/model/small.yaml",
        "train.py",
        "constraints.txt",
    ):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("changed\n")
        found.add(source_sha256())
    (repository / "recipe" / "model.py").rename(repository / "recipe" / "network.py")
    found.add(source_sha256())
    assert len(found) == 7


# ---- the command ------------------------------------------------------------------------------------


def typed(monkeypatch: pytest.MonkeyPatch, *words: str, **variables: str) -> str:
    for name in torchrun_environment(0, 1):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", list(words))
    return command()


def test_the_command_is_recorded_as_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert typed(monkeypatch, "/somewhere/train.py", "experiment=demo", "optimization.epochs=2") == (
        "python train.py experiment=demo optimization.epochs=2"
    )
    assert typed(monkeypatch, "train.py", "a='b c'", "d=[1,2]") == """python train.py 'a='"'"'b c'"'"'' 'd=[1,2]'"""


def test_a_command_of_any_bytes_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = typed(monkeypatch, "train.py", os.fsdecode(b"name=caf\xe9"))
    assert shown == "python train.py 'name=caf\\xe9'"
    assert shown.encode("utf-8")


def test_the_command_names_no_other_place(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = typed(monkeypatch, "/home/alice/checkout/train.py", "data.raw_dir=/home/alice/ilsvrc2012", "seed=3")
    assert shown == 'python train.py data.raw_dir="$RAW_DIR" seed=3'
    for place in ("../../home/alice/runs", "/home/alice smith/runs", "/home/o'neil/runs", "~alice/runs"):
        shown = typed(monkeypatch, "train.py", f"run_dir={place}", f"data.directory={place}")
        assert shown == 'python train.py run_dir="$RUN_DIR" data.directory="$DATA_DIR"'
    for word in ("++data.raw_dir=/home/alice/x", "data.raw_dir='/home/alice/my x'", 'data.raw_dir="/home/alice/x"'):
        assert typed(monkeypatch, "preprocess.py", word).endswith('data.raw_dir="$RAW_DIR"')
    assert typed(monkeypatch, "train.py", "~data.description.papers").endswith("train.py '~data.description.papers'")
    shown = typed(monkeypatch, "train.py", "reference=/home/alice/r", "evaluation.weights=/home/alice/w.pt")
    assert shown == 'python train.py reference="$REFERENCE" evaluation.weights="$EVALUATED_WEIGHTS"'


def test_a_place_that_is_quoted_for_hydra_is_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = typed(monkeypatch, "train.py", "data.raw_dir='/home/alice/my images'", "data.directory=/home/alice/a, b")
    assert shown == 'python train.py data.raw_dir="$RAW_DIR" data.directory="$DATA_DIR"'
    assert typed(monkeypatch, "train.py", "run_dir=my runs (2)") == "python train.py 'run_dir=my runs (2)'"


def test_under_torchrun_the_command_says_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = typed(monkeypatch, "train.py", "experiment=smoke", **torchrun_environment(9, 32, nodes=4))
    assert shown == "torchrun --nnodes=4 --nproc-per-node=8 train.py experiment=smoke"


def test_a_worker_that_was_started_here_gives_the_parents_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "parent_process", multiprocessing.current_process)
    shown = typed(monkeypatch, "train.py", "trainer.gpus=2", **torchrun_environment(1, 2))
    assert shown == "python train.py trainer.gpus=2"


# ---- the environment --------------------------------------------------------------------------------


def test_only_the_white_list_of_the_environment_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("NCCL", "TORCH_NCCL", "CUDA", "OMP", "CUBLAS", "PYTHONHASH")):
            monkeypatch.delenv(name)
    for name, value in (
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("HF_TOKEN", "secret"),
        ("MY_NCCL_X", "secret"),
        ("USER", "alice"),
        ("HOSTNAME", "host"),
        ("PATH", os.environ["PATH"]),
    ):
        monkeypatch.setenv(name, value)
    assert variables() == {}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("NCCL_TOPO_FILE", "/home/alice/topology.xml")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert variables() == {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "NCCL_DEBUG": "INFO",
        "NCCL_TOPO_FILE": ".../topology.xml",
        "OMP_NUM_THREADS": "3",
    }


def test_machine_and_versions_are_this_ones() -> None:
    assert machine().cores == len(os.sched_getaffinity(0))
    assert machine().memory_gib > 0
    assert machine(accelerator="X", accelerators=8).accelerators == 8
    assert versions()["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (versions()["numpy"], versions()["pillow"]) == (np.__version__, PIL.__version__)
    assert "not installed" not in versions().values()


@pytest.mark.parametrize("script", ["/some/where/recipe/__main__.py", "/opt/bin/recipe"])
def test_a_verb_is_shown_as_a_module(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, "reproduce", "recipes/demo/README.md", "--yes"])
    assert command() == "python -m recipe reproduce recipes/demo/README.md --yes"
    words = [
        "reproduce",
        "/home/alice/my recipe.md",
        "--run-dir",
        "/home/alice/run",
        "--raw-dir=/home/alice/raw",
        "--yes",
    ]
    monkeypatch.setattr(sys, "argv", [script, *words])
    assert command() == 'python -m recipe reproduce "$RECIPE" --run-dir "$RUN_DIR" --raw-dir="$RAW_DIR" --yes'
