"""Checkpoints: damage is detected, the previous one is used, a full disk loses nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from recipe.errors import DiskError, UserError
from recipe.models.build import weights_sha256
from recipe.models.checkpoint import (
    checkpoint_files,
    eval_weights,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from tests.builders.training import state_of


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with the checkpoints of steps 1, 2 and 3."""
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, state_of(step))
    return tmp_path


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def newest_step(directory: Path) -> int:
    state = newest_checkpoint(directory)
    assert state is not None
    return int(state["progress"]["step"])


# ---- saving and loading -----------------------------------------------------------------------------


def test_a_saved_checkpoint_is_loaded(saved: Path) -> None:
    state, original = load_checkpoint(saved / "step-00000002.pt"), state_of(2)
    assert state["progress"] == original["progress"]
    assert state["optimizer"]["param_groups"] == original["optimizer"]["param_groups"]
    assert weights_sha256(state["model"]) == weights_sha256(original["model"])
    assert newest_step(saved) == 3


def test_the_file_beside_it_is_sha256sums_own_answer(saved: Path) -> None:
    for path in checkpoint_files(saved):
        stored = path.with_name(f"{path.name}.sha256").read_text().split()[0]
        assert stored == hashlib.sha256(path.read_bytes()).hexdigest()


def test_nothing_but_checkpoints_and_their_hashes_is_left(saved: Path) -> None:
    files = {f"step-{step:08d}.pt" for step in (1, 2, 3)}
    assert names(saved) == files | {f"{name}.sha256" for name in files}


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    one, other = save_checkpoint(tmp_path / "a", 7, state_of(7)), save_checkpoint(tmp_path / "other", 8, state_of(7))
    assert one.read_bytes() == other.read_bytes()
    assert one.read_bytes() != save_checkpoint(tmp_path, 7, state_of(8)).read_bytes()


def test_without_checkpoints_there_is_no_newest_one(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(tmp_path / "step-00000001.pt")


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (9, 10, 100_000, 2):
        save_checkpoint(tmp_path, step, state_of(step))
    assert newest_step(tmp_path) == 100_000


def test_the_average_is_released_if_there_is_one() -> None:
    state = state_of(1)
    assert eval_weights(state) is state["model"]
    assert eval_weights({**state, "average": {"model": {"a": 1}, "updates": 3}}) == {"a": 1}


# ---- damage -----------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero_a_block(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:8192] = bytes(4096)
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lose_the_checksum(path: Path) -> None:
    path.with_name(f"{path.name}.sha256").unlink()


def empty_the_checksum(path: Path) -> None:
    path.with_name(f"{path.name}.sha256").write_bytes(b"")


def flip_a_bit_of_the_checksum(path: Path) -> None:
    checksum = path.with_name(f"{path.name}.sha256")
    content = bytearray(checksum.read_bytes())
    content[5] ^= 0x80
    checksum.write_bytes(content)


Damage = Callable[[Path], None]
DAMAGES: list[Damage] = [
    truncate,
    flip_one_bit,
    zero_a_block,
    empty,
    lose_the_checksum,
    empty_the_checksum,
    flip_a_bit_of_the_checksum,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    damage: Damage, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(saved / "step-00000003.pt")
    damaged = (saved / "step-00000003.pt").read_bytes()
    assert newest_step(saved) == 2
    assert (saved / "step-00000003.pt.corrupt").read_bytes() == damaged
    assert "step-00000003.pt.corrupt" in capsys.readouterr().err
    assert [path.name for path in checkpoint_files(saved)] == ["step-00000001.pt", "step-00000002.pt"]
    save_checkpoint(saved, 3, state_of(3))
    assert newest_step(saved) == 3


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_reported_with_the_file(damage: Damage, saved: Path) -> None:
    damage(saved / "step-00000002.pt")
    with pytest.raises(UserError, match=r"step-00000002\.pt") as refused:
        load_checkpoint(saved / "step-00000002.pt")
    assert "\n" not in str(refused.value)


def test_every_byte_is_covered(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"model": {"w": torch.zeros(2)}})
    content = path.read_bytes()
    for place in range(0, len(content), 37):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(UserError, match="is damaged"):
            load_checkpoint(path)


def test_if_all_are_damaged_training_stops_and_nothing_is_lost(saved: Path) -> None:
    for path, damage in zip(checkpoint_files(saved), DAMAGES, strict=False):
        damage(path)
    with pytest.raises(UserError, match=r"no valid checkpoint is left .*step-00000003.*trainer\.start_over=true"):
        newest_checkpoint(saved)
    assert {f"step-0000000{step}.pt.corrupt" for step in (1, 2, 3)} <= names(saved)


def test_it_still_stops_when_the_command_is_given_again(saved: Path) -> None:
    """Training does not start over unnoticed if checkpoints existed, also not at the second attempt."""
    for path in checkpoint_files(saved):
        empty(path)
    for _ in range(2):
        with pytest.raises(UserError, match="no valid checkpoint is left"):
            newest_checkpoint(saved)


# ---- what is no checkpoint --------------------------------------------------------------------------


def with_checksum(directory: Path, content: bytes) -> Path:
    path = directory / "step-00000001.pt"
    path.write_bytes(content)
    path.with_name(f"{path.name}.sha256").write_text(hashlib.sha256(content).hexdigest())
    return path


class Hostile:
    """Unpickling this runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    victim = tmp_path / "executed"
    torch.save({"format": "checkpoint/2", "model": Hostile(victim)}, tmp_path / "hostile")
    for content in ((tmp_path / "hostile").read_bytes(), pickle.dumps(Hostile(victim), protocol=2)):
        with pytest.raises(UserError, match=r"is not a file of plain tensors: it contains an object of posix\.system"):
            load_checkpoint(with_checksum(tmp_path, content))
    assert not victim.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(60), b"\x80\x02}q\x00.", bytes(5000)])
def test_another_file_with_a_valid_checksum_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        load_checkpoint(with_checksum(tmp_path, content))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [[1], {"format": "checkpoint/0"}, {"model": {}}, torch.zeros(2)])
def test_another_format_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other")
    with pytest.raises(UserError, match="is not of format 'checkpoint/2'"):
        load_checkpoint(with_checksum(tmp_path, (tmp_path / "other").read_bytes()))


# ---- pruning ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, 2, [2, 4, 5]),
        (2, 5, [4, 5]),
        (1, 1, [1, 5]),
        (9, 1, [1, 2, 3, 4, 5]),
        (3, 0, [3, 4, 5]),
    ],
)
def test_the_newest_and_the_best_are_kept(keep: int, best: int, left: list[int], tmp_path: Path) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, state_of(step))
    prune_checkpoints(tmp_path, keep, best)
    files = [f"step-{step:08d}.pt" for step in left]
    assert names(tmp_path) == {*files, *(f"{name}.sha256" for name in files)}
    assert newest_step(tmp_path) == 5


# ---- the disk ---------------------------------------------------------------------------------------


@contextmanager
def no_file_beyond(bytes_max: int) -> Iterator[None]:
    """Limit the size of files, so that writing fails as on a full disk. Python ignores the signal.

    Use it around the tested writing only: the limit is for the process, and the file of the test report is longer.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_max, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_refused_without_loss(saved: Path, disk: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
    before = {path: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(DiskError, match="cannot write") as refused, disk():
        save_checkpoint(saved, 4, state_of(4))
    assert refused.value.exit_code == 74
    assert {path: path.read_bytes() for path in saved.iterdir()} == before
    assert newest_step(saved) == 3


def test_a_file_too_large_for_the_disk_leaves_the_old_ones(saved: Path) -> None:
    assert_refused_without_loss(saved, lambda: no_file_beyond(8192))


def test_a_full_disk_leaves_the_old_ones(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert_refused_without_loss(saved)
    with pytest.raises(DiskError, match="No space left on device; free some space"):
        save_checkpoint(saved, 4, state_of(4))


def test_a_kill_between_checksum_and_file_uses_the_one_before(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted at the second rename: the checksum file is there, the checkpoint is not."""
    renames: list[Path] = []
    rename = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        renames.append(target)
        if len(renames) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, 4, state_of(4))
    assert renames[0].name == "step-00000004.pt.sha256"
    assert newest_step(saved) == 3


def test_a_directory_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"cannot write .*Not a directory"):
        save_checkpoint(tmp_path / "file" / "checkpoints", 1, state_of(1))
