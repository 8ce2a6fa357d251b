"""Reads files of torch.save as plain data: tensors, numbers, text, and containers of these. Runs no code of a file.

The only class that a file may hold is `argparse.Namespace`, in which training scripts save their arguments.
"""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from io import BufferedReader
from typing import Any

import torch
from torch import Tensor

from recipe.errors import UserError

ZIP = b"PK\x03\x04"
REFUSED_CLASS = re.compile(r"GLOBAL ([\w.]{1,100})")  # in torch's words


def unpickled(handle: BufferedReader, where: str, is_mapped: bool = False) -> Any:
    """The content of a file; raises `UserError` for damage, and for an object that is not plain data, with its class.

    The tensors of a mapped file are read where they are used; files older than torch 1.6 cannot be mapped.
    """
    start, size = handle.read(len(ZIP)), handle.seek(0, 2)
    handle.seek(0)
    is_archive = start == ZIP
    if is_archive:
        _refuse_zip_bomb(handle, where, size)
    source = f"/dev/fd/{handle.fileno()}" if is_mapped and is_archive else handle  # torch decides by a path's suffix
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of tensors that are refused by name later
            return torch.load(source, map_location="cpu", weights_only=True, mmap=source is not handle)
    except Exception as error:  # for a damaged or hostile file torch raises about anything
        refused = REFUSED_CLASS.search(str(error))
        problem = f"holds an object of {refused[1]}" if refused else "is damaged, or holds more than data"
        raise UserError(
            f"{where} is not a file of plain tensors: it {problem}; save the weights alone, as "
            "torch.save(model.state_dict(), FILE)"
        ) from error


def _refuse_zip_bomb(handle: BufferedReader, where: str, size: int) -> None:
    """torch.save does not compress: an archive that unpacks to more than its size is a zip bomb."""
    try:
        with zipfile.ZipFile(handle) as archive:
            entries = archive.infolist()
    except Exception as error:  # zip, struct or value errors, depending on the damage
        raise UserError(f"{where} is not a file of plain tensors: it is cut short or damaged; copy it again") from error
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise UserError(f"{where} is not a file of plain tensors: it holds a TorchScript program")
    if sum(entry.file_size for entry in entries) > size:
        raise UserError(f"{where} is not a file of plain tensors: it unpacks to more than its {size:,} bytes")
    handle.seek(0)


def named_tensors(value: Any) -> bool:
    """Whether `value` is a dictionary of tensors by name, with at least one."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether a network can compute with a tensor: dense real numbers on the CPU."""
    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_complex()
    )
