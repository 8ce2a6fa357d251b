"""Weights that people have: from whichever script a file comes, its tensors under the names that a network gives them.

Read are a state dictionary or a checkpoint that holds one: of this project, of torchvision and its reference script, of
timm, Lightning and pytorch/examples, saved by torch or as safetensors; content decides, not the suffix. Where a file
holds averaged weights beside those that were trained, the average is taken, as those scripts evaluate it.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from recipe.checkpoint import FORMAT, released_entry
from recipe.errors import NonFiniteError, UserError
from recipe.files import WEIGHTS_BYTES_MAX, display_path, opened
from recipe.plain import ZIP, is_plain, named_tensors, unpickled

AVERAGES = ("model_ema", "state_dict_ema")  # torchvision's references, timm
ENTRIES = (*AVERAGES, "state_dict", "model", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel and AveragedModel, torch.compile, Lightning
AVERAGE_COUNT = "n_averaged"  # of torch's AveragedModel, beside its module
DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")  # torchvision's files have a dot more
PICKLE, SAFETENSORS = b"\x80", b"{"
HEADER_BYTES_MAX = 100_000_000  # safetensors' own limit
EXAMPLES = 3
LONGEST_NAME = 100


@dataclass(frozen=True)
class GivenWeights:
    """The tensors of one file by name, and how they stood in it."""

    where: str  # the setting and the file
    tensors: dict[str, Tensor]
    entry: str | None  # of the file's dictionary; None where the file is the state dictionary
    prefix: str  # that every name had

    def __str__(self) -> str:
        """For a person: what was taken."""
        taken = f"the entry {self.entry!r}" if self.entry else "its tensors"
        return f"{self.where}: took {taken}" + (f" without the prefix {self.prefix!r}" if self.prefix else "")


def read_weights(path: Path, key: str = "model.weights") -> GivenWeights:
    """Read a file of weights; raises `UserError` that names the setting `key`, the file and what is wrong with it."""
    where = f"{key}={display_path(path)}"
    with opened(path, where, WEIGHTS_BYTES_MAX) as handle:
        start, size = handle.read(9), handle.seek(0, 2)
        handle.seek(0)
        if start[8:] == SAFETENSORS and int.from_bytes(start[:8], "little") <= HEADER_BYTES_MAX:
            found = _safetensors(f"/dev/fd/{handle.fileno()}", where)  # first: its length may begin like a pickle
        elif start.startswith((ZIP, PICKLE)):
            found = unpickled(handle, where, is_mapped=True)
        else:
            what = "is empty" if not size else "was written neither by torch.save nor by safetensors"
            raise UserError(f"{where} is not a file of plain tensors: it {what}")
    entry, tensors = _state_dictionary(found, where)
    prefix, tensors = _without_prefix(tensors)
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > 2 * size:
        raise UserError(f"{where} claims tensors that are larger than the file")
    return GivenWeights(where, tensors, entry, prefix)


def _safetensors(path: str, where: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}
    except Exception as error:  # the library has a type of its own, torch refuses some of its types
        raise UserError(
            f"{where} is not a file of plain tensors: its header and its data do not fit together; copy it again"
        ) from error


def _state_dictionary(found: Any, where: str) -> tuple[str | None, dict[str, Tensor]]:
    """The dictionary of tensors that counts, and the entry that it stands under."""
    if named_tensors(found):
        return None, _plain(found, where)
    if isinstance(found, dict):
        if found.get("format") == FORMAT:
            return _entry_of_ours(found, where)
        for entry in ENTRIES:
            if named_tensors(found.get(entry)):
                return entry, _plain(found[entry], where)
    keys = [str(key) for key in found] if isinstance(found, dict) else []
    holds = f"a dictionary of {_listed(keys)}" if keys else f"a {type(found).__name__}"
    raise UserError(
        f"{where} holds no dictionary of tensors, but {holds}; looked for are a state dictionary and the entries "
        f"{', '.join(ENTRIES)}"
    )


def _entry_of_ours(found: dict[str, Any], where: str) -> tuple[str, dict[str, Tensor]]:
    entry, tensors = released_entry(found)
    if not named_tensors(tensors):
        raise UserError(f"{where} is a checkpoint that holds no dictionary of tensors as {entry!r}")
    return entry, _plain(tensors, where)


def _plain(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if not is_plain(tensor):
            raise UserError(
                f"{where} holds {_shown(name)} as a tensor of {tensor.dtype}, {tensor.layout} on {tensor.device}: "
                "save dense real numbers"
            )
    return tensors


def _without_prefix(tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The names as the network has them; what modules noted of their versions keeps its place beside them."""
    prefix = ""
    names = [name for name in tensors if name != AVERAGE_COUNT]
    while more := _usual_prefix([name for name in names if name.startswith(prefix)], len(prefix)):
        prefix += more
    kept = names if prefix and len(names) < len(tensors) else tensors
    renamed = OrderedDict((DENSENET.sub(r"\1\2", name.removeprefix(prefix)), tensors[name].detach()) for name in kept)
    if len(renamed) < len(kept):  # names that only the prefix keeps apart
        return "", OrderedDict(tensors)
    renamed._metadata = {  # type: ignore[attr-defined]  # where torch keeps them
        name[len(prefix) :]: version for name, version in _versions(tensors) if f"{name}.".startswith(prefix)
    }
    return prefix, renamed


def _usual_prefix(names: list[str], at: int) -> str | None:
    """The prefix that more than half of the names have; the others, such as a criterion's, are not the network's."""
    return next(
        (prefix for prefix in PREFIXES if 2 * sum(name.startswith(prefix, at) for name in names) > len(names)), None
    )


def _versions(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, int]]]:
    """(module, its version) as torch.save keeps them; a file may hold anything in their place."""
    found = getattr(tensors, "_metadata", None)
    for name, facts in found.items() if isinstance(found, dict) else ():
        version = facts.get("version") if isinstance(facts, dict) else None
        if isinstance(name, str) and isinstance(version, int):
            yield name, {"version": version}


# ---- into the network -------------------------------------------------------------------------------


def load_state(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Give `model` these weights; counters of batches may be absent, as in files of old versions of torch.

    Raises `UserError` that names tensors which do not fit, `NonFiniteError` for weights that are not finite.
    """
    own = model.state_dict()
    unlike = [name for name in state if name in own and not _is_alike(state[name], own[name])]
    given = OrderedDict((name, tensor) for name, tensor in state.items() if name not in unlike)
    given._metadata = {"": own._metadata[""], **dict(_versions(state))}  # type: ignore[attr-defined]
    try:
        absent, extra = model.load_state_dict(given, strict=False)
    except (RuntimeError, ValueError, KeyError) as error:  # of a module that renames what older versions had
        raise UserError(f"{where} does not fit the model: its tensors are those of another version of it") from error
    missing = [name for name in absent if name not in unlike and not name.endswith(".num_batches_tracked")]
    shapes = [f"{_shown(name)} ({_kind(state[name])}, the model's {_kind(own[name])})" for name in unlike]
    faults = [f"it lacks {_listed(missing)}"] if missing else []
    faults += [f"it has {_listed(list(extra))}, which the model has not"] if extra else []
    faults += [f"of another shape or type: {_listed(shapes)}"] if shapes else []
    if faults:
        raise UserError(f"{where} does not fit the model: {'; '.join(faults)}; give weights of this network")
    wrong = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise NonFiniteError(f"{where} holds weights that are not finite: {_listed(wrong)}")


def _is_alike(given: Tensor, own: Tensor) -> bool:
    """Any floating type serves; whole numbers do not serve as weights."""
    return given.shape == own.shape and (given.is_floating_point() or not own.is_floating_point())


def _kind(tensor: Tensor) -> str:
    shape = " x ".join(map(str, tensor.shape)) or "a number"
    return shape if tensor.is_floating_point() else f"{shape} of {str(tensor.dtype).removeprefix('torch.')}"


def _listed(names: Iterable[str]) -> str:
    """Three examples and a count."""
    shown = [_shown(name) for name in names]
    more = len(shown) - EXAMPLES
    return ", ".join(shown[:EXAMPLES]) + (f" and {more:,} more" if more > 0 else "")


def _shown(name: str) -> str:
    line = " ".join(name.split())
    return line if len(line) <= LONGEST_NAME else f"{line[:LONGEST_NAME]}..."
