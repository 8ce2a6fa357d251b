"""Checkpoint files: plain tensors and JSON-able values, saved so that a kill at any point loses nothing.

A checkpoint is `step-00000312.pt` with its SHA-256 in `step-00000312.pt.sha256`. It is valid if both are there and
agree, since `torch.load` does not notice a flipped bit. Both are written to temporary names, flushed and renamed. The
newest *valid* checkpoint is found by looking, not by a `latest` link.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import sys
import warnings
import zipfile
from io import BufferedReader
from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from recipe.errors import DiskError, UserError
from recipe.run.files import WEIGHTS_BYTES_MAX, display_path, opened, read_file, write_atomically
from recipe.run.metric_rows import Count
from recipe.run.records import Interface

State = dict[str, Any]
CHECKPOINT_FORMAT = "checkpoint/2"
CHECKSUMS_BYTES_MAX = 2**20
ZIP = b"PK\x03\x04"
REFUSED_CLASS = re.compile(r"GLOBAL ([\w.]{1,100})")  # in torch's message


class Position(msgspec.Struct):
    """The progress of a training, as far as other stages read it."""

    epoch: Count
    step: Count
    best_step: Count


class Entries(msgspec.Struct):
    """The types of a checkpoint's entries. `_check_entries` checks the weights, `restore` the rest."""

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
    """Write `state` durably under the number of its step. Raises `DiskError` without leaving a partial file."""
    buffer = io.BytesIO()  # a file name would become part of the archive's bytes
    torch.save({"format": CHECKPOINT_FORMAT, **state}, buffer)
    content = buffer.getvalue()
    path = directory / f"step-{step:08d}.pt"
    checksum, new = _checksum_file(path), f"{hashlib.sha256(content).hexdigest()}\n".encode()
    old = checksum.read_bytes() if path.exists() and checksum.exists() else b""  # of the same step: valid until the end
    write_atomically(checksum, new + old)
    try:
        write_atomically(path, content)  # after its checksum
    except DiskError:
        if not old:
            checksum.unlink()
        raise
    if old:
        write_atomically(checksum, new)
    return path


def load_checkpoint(path: Path) -> State:
    """Read and verify one checkpoint. Raises `UserError` with the reason if it is invalid."""
    where = display_path(path)
    if not path.exists():
        raise UserError(f"{where} does not exist")
    if not _checksum_file(path).exists():
        raise UserError(f"{where} has no checksum file: writing did not finish")
    known = read_file(_checksum_file(path), f"{where}.sha256", CHECKSUMS_BYTES_MAX).split()
    with opened(path, where, WEIGHTS_BYTES_MAX) as handle:
        if hashlib.file_digest(handle, "sha256").hexdigest().encode() not in known:
            raise UserError(f"{where} is damaged: its SHA-256 is not the one in its .sha256 file")
        handle.seek(0)
        state: State = unpickled(handle, where)
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{where} is not of format {CHECKPOINT_FORMAT!r}")
    _check_entries(state, where)
    return state


def _check_entries(state: State, where: str) -> None:
    try:
        msgspec.convert(state, Entries)
    except (msgspec.ValidationError, RecursionError, AttributeError) as error:  # a tensor looks like a mapping
        raise UserError(f"{where} was not written by training, or its entries were changed: {error}") from error
    for name, tensors in (("model", state["model"]), ("average", eval_entry(state)[1])):
        if not named_tensors(tensors) or not all(map(is_plain, tensors.values())):
            raise UserError(f"{where} was not written by training: its entry {name!r} does not contain plain weights")


def eval_weights(state: State) -> dict[str, Tensor]:
    """The evaluated weights: the moving average if the run has one."""
    weights: dict[str, Tensor] = eval_entry(state)[1]
    return weights


def eval_entry(state: State) -> tuple[str, Any]:
    """The evaluated weights with the name of their entry."""
    average = state.get("average")
    if average is None:
        return "model", state.get("model")
    return "average", average.get("model") if isinstance(average, dict) else None


def write_eval_weights(directory: Path, step: int, weights: dict[str, Tensor], digest: str) -> Path:
    """Write the evaluated weights as safetensors beside the checkpoint of their step.

    The metadata has their hash (`model.weights_sha256`), since the format does not detect a flipped bit.
    """
    path = directory / f"step-{step:08d}.safetensors"
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()
    }
    write_atomically(path, safetensors.torch.save(plain, {"weights_sha256": digest}))
    return path


def interface_of(state: State, where: str) -> Interface:
    """The preprocessing and classes of these weights. Raises `UserError` if missing."""
    try:
        return msgspec.convert(state["interface"], Interface)
    except (KeyError, AttributeError, msgspec.ValidationError) as error:
        raise UserError(f"{where} does not describe its preprocessing and classes ({error})") from error


def newest_checkpoint(directory: Path) -> State | None:
    """The state of the newest valid checkpoint. None without checkpoints.

    Damaged ones are renamed to `.corrupt` with a warning. Raises `UserError` if all are damaged, so that training
    does not start over unnoticed.
    """
    for path in checkpoint_files(directory)[::-1]:
        try:
            return load_checkpoint(path)
        except UserError as error:
            path.rename(path.with_name(f"{path.name}.corrupt"))
            print(f"warning: {error}; renamed to {path.name}.corrupt, trying the previous one", file=sys.stderr)
    damaged = sorted(path.name.removesuffix(".corrupt") for path in directory.glob("step-????????.pt.corrupt"))
    if damaged:
        raise UserError(
            f"no valid checkpoint is left in {display_path(directory)} (damaged: {', '.join(damaged)}); "
            "trainer.start_over=true renames this run and starts over"
        )
    return None


def checkpoint_files(directory: Path) -> list[Path]:
    """All checkpoints by name, oldest first, valid or not."""
    return sorted(directory.glob("step-????????.pt"))


def prune_checkpoints(directory: Path, keep: int, best_step: int) -> None:
    """Delete all but the newest `keep` and the best one. Call it after a newer one is on the disk."""
    for path in checkpoint_files(directory)[:-keep]:
        if path.name != f"step-{best_step:08d}.pt":
            path.unlink()
            _checksum_file(path).unlink(missing_ok=True)


def _checksum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


# ---- files of torch.save as plain data ---------------------------------------------------------------


def unpickled(handle: BufferedReader, where: str, is_mapped: bool = False) -> Any:
    """Load a file of tensors, numbers, text and containers of these. No code of the file is run.

    The only allowed class is `argparse.Namespace`, in which training scripts save their arguments. Raises `UserError`
    for damage, and for other objects with their class. Tensors of a mapped file are read when they are used. Files
    older than torch 1.6 cannot be mapped.
    """
    start, size = handle.read(len(ZIP)), handle.seek(0, 2)
    handle.seek(0)
    is_archive = start == ZIP
    if is_archive:
        _check_zip_bomb(handle, where, size)
    source = f"/dev/fd/{handle.fileno()}" if is_mapped and is_archive else handle  # torch decides by the suffix
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about types of tensors that are refused later, with their name
            return torch.load(source, map_location="cpu", weights_only=True, mmap=source is not handle)
    except Exception as error:  # torch raises many types for a damaged or hostile file
        refused = REFUSED_CLASS.search(str(error))
        problem = f"contains an object of {refused[1]}" if refused else "is damaged, or contains more than data"
        raise UserError(
            f"{where} is not a file of plain tensors: it {problem}; save the weights alone, as "
            "torch.save(model.state_dict(), FILE)"
        ) from error


def _check_zip_bomb(handle: BufferedReader, where: str, size: int) -> None:
    """torch.save does not compress: an archive that unpacks to more than its size is a zip bomb."""
    try:
        with zipfile.ZipFile(handle) as archive:
            entries = archive.infolist()
    except Exception as error:  # zip, struct or value errors, depending on the damage
        raise UserError(f"{where} is not a file of plain tensors: it is cut short or damaged; copy it again") from error
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise UserError(f"{where} is not a file of plain tensors: it is a TorchScript program")
    if sum(entry.file_size for entry in entries) > size:
        raise UserError(f"{where} is not a file of plain tensors: it unpacks to more than its {size:,} bytes")
    handle.seek(0)


def named_tensors(value: Any) -> bool:
    """True if `value` is a non-empty dictionary of tensors by name."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def is_plain(tensor: Tensor) -> bool:
    """True for dense real numbers on the CPU, with which a network can compute."""
    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_complex()
    )
