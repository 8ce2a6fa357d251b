"""Checkpoints: plain tensors and JSON-able values, saved so that a kill at any point costs nothing.

A checkpoint is `step-00000312.pt` with its SHA-256 in `step-00000312.pt.sha256`; it counts only if both are there
and agree, since `torch.load` does not notice a flipped bit. Both are written to temporary names, flushed and
renamed. There is no `latest` link: the newest *valid* one is found by looking.
"""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from recipe.errors import DiskError, UserError
from recipe.files import WEIGHTS_BYTES_MAX, display_path, opened, read_file, write_atomically
from recipe.plain import is_plain, named_tensors, unpickled
from recipe.records import Interface

State = dict[str, Any]
FORMAT = "checkpoint/2"
CHECKSUMS_BYTES_MAX = 2**20
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class Position(msgspec.Struct):
    """The part of a training's progress that other stages read."""

    epoch: Count
    step: Count
    best_step: Count


class Entries(msgspec.Struct):
    """The types of a checkpoint's entries; weights are looked at beside it, the rest by who restores it."""

    config: dict[str, Any]
    config_sha256: str
    interface: dict[str, Any]
    manifest_sha256: str
    determinism_context: dict[str, Any]
    progress: Position
    model: dict[str, Any]
    average: dict[str, Any] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    skipped_steps: Count


def save_checkpoint(directory: Path, step: int, state: State) -> Path:
    """Write `state` durably under the number of its step; raises `DiskError` and leaves no half file."""
    buffer = io.BytesIO()  # a file name would become part of the archive's bytes
    torch.save({"format": FORMAT, **state}, buffer)
    content = buffer.getvalue()
    path = directory / f"step-{step:08d}.pt"
    checksum, new = _checksum_file(path), f"{hashlib.sha256(content).hexdigest()}\n".encode()
    old = checksum.read_bytes() if path.exists() and checksum.exists() else b""  # of the same step: valid until the end
    write_atomically(checksum, new + old)
    try:
        write_atomically(path, content)  # last: whoever finds it finds its checksum too
    except DiskError:
        if not old:
            checksum.unlink()
        raise
    if old:
        write_atomically(checksum, new)
    return path


def load_checkpoint(path: Path) -> State:
    """Read and verify one checkpoint; raises `UserError` that names what is wrong with it."""
    where = display_path(path)
    if not path.exists():
        raise UserError(f"{where} does not exist")
    if not _checksum_file(path).exists():
        raise UserError(f"{where} has no checksum beside it: its writing did not finish")
    known = read_file(_checksum_file(path), f"{where}.sha256", CHECKSUMS_BYTES_MAX).split()
    with opened(path, where, WEIGHTS_BYTES_MAX) as handle:
        if hashlib.file_digest(handle, "sha256").hexdigest().encode() not in known:
            raise UserError(f"{where} is damaged: its SHA-256 is not the one written beside it")
        handle.seek(0)
        state: State = unpickled(handle, where)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{where} is not of format {FORMAT!r}")
    _require_entries(state, where)
    return state


def _require_entries(state: State, where: str) -> None:
    try:
        msgspec.convert(state, Entries)
    except (msgspec.ValidationError, RecursionError, AttributeError) as error:  # a tensor looks like a mapping
        raise UserError(f"{where} was not written by training, or its entries were changed: {error}") from error
    for name, tensors in (("model", state["model"]), ("average", released_entry(state)[1])):
        if not named_tensors(tensors) or not all(map(is_plain, tensors.values())):
            raise UserError(f"{where} was not written by training: its entry {name!r} does not hold plain weights")


def released_weights(state: State) -> dict[str, Tensor]:
    """The weights that count: the moving average's where the run keeps one."""
    weights: dict[str, Tensor] = released_entry(state)[1]
    return weights


def released_entry(state: State) -> tuple[str, Any]:
    """The name of the entry that counts, and its weights."""
    average = state.get("average")
    if average is None:
        return "model", state.get("model")
    return "average", average.get("model") if isinstance(average, dict) else None


def write_released_weights(directory: Path, step: int, weights: dict[str, Tensor], digest: str) -> Path:
    """The weights alone, beside the checkpoint of their step, in a format that anybody can read and that runs no code.

    The digest (`model.weights_sha256`) travels with them, since the format itself does not notice a flipped bit.
    """
    path = directory / f"step-{step:08d}.safetensors"
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()
    }
    write_atomically(path, safetensors.torch.save(plain, {"weights_sha256": digest}))
    return path


def interface_of(state: State, where: str) -> Interface:
    """How the pixels of these weights are made and what their outputs mean; raises `UserError` where it is not said."""
    try:
        return msgspec.convert(state["interface"], Interface)
    except (KeyError, AttributeError, msgspec.ValidationError) as error:
        raise UserError(f"{where} does not say how its pixels are made and what its classes are ({error})") from error


def newest_checkpoint(directory: Path) -> State | None:
    """The newest valid checkpoint's state, or None where there is none at all.

    Damaged ones are set aside as `.corrupt` and named. Where all are damaged it stops: training never starts anew in
    silence where checkpoints exist.
    """
    for path in checkpoint_files(directory)[::-1]:
        try:
            return load_checkpoint(path)
        except UserError as error:
            path.rename(path.with_name(f"{path.name}.corrupt"))
            print(f"warning: {error}; set aside as {path.name}.corrupt, trying the one before", file=sys.stderr)
    damaged = sorted(path.name.removesuffix(".corrupt") for path in directory.glob("step-????????.pt.corrupt"))
    if damaged:
        raise UserError(
            f"no valid checkpoint is left in {display_path(directory)} (damaged: {', '.join(damaged)}); "
            "trainer.restart=true moves this run aside and begins anew"
        )
    return None


def checkpoint_files(directory: Path) -> list[Path]:
    """All checkpoints by name, oldest first, valid or not."""
    return sorted(directory.glob("step-????????.pt"))


def prune_checkpoints(directory: Path, keep: int, best_step: int) -> None:
    """Delete all but the newest `keep` and the best one; called only after a newer one is safely on the disk."""
    for path in checkpoint_files(directory)[:-keep]:
        if path.name != f"step-{best_step:08d}.pt":
            path.unlink()
            _checksum_file(path).unlink(missing_ok=True)


def _checksum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
