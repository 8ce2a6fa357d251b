"""Pretrained weights: read files of other training scripts, with the names of this project's networks.

Supported are state dictionaries and checkpoints of this project, torchvision and its reference script, timm, Lightning
and pytorch/examples, saved by torch or as safetensors. The content decides, not the suffix. If a file has averaged
weights beside the trained ones, the average is read, as those scripts evaluate it.

`evaluation.weights=IMAGENET1K_V2` names weights that torchvision publishes, to check this evaluator on ImageNet. They
have their own protocol (resize, crop, interpolation).
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import safe_open
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from recipe.config.schema import Config, Interpolation, Precision
from recipe.errors import NonFiniteError, UserError
from recipe.models.checkpoint import CHECKPOINT_FORMAT, ZIP, eval_entry, is_plain, named_tensors, unpickled
from recipe.run.files import WEIGHTS_BYTES_MAX, display_path, opened

AVERAGES = ("model_ema", "state_dict_ema")  # torchvision's references, timm
ENTRIES = (*AVERAGES, "state_dict", "model", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel and AveragedModel, torch.compile, Lightning
AVERAGE_COUNT = "n_averaged"  # of torch's AveragedModel, beside its module
DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")  # torchvision's files have another dot
PICKLE, SAFETENSORS = b"\x80", b"{"
HEADER_BYTES_MAX = 100_000_000  # safetensors' own limit
METRICS_KEY = "ImageNet-1K"  # torchvision's key of the accuracies
FILE_HASH_DIGITS = 8  # of the SHA-256, at the end of the published file's name
EXAMPLES = 3
LONGEST_NAME = 100


@dataclass(frozen=True)
class GivenWeights:
    """The tensors of one file by name, and their entry in it."""

    where: str  # the setting and the file
    tensors: dict[str, Tensor]
    entry: str | None  # of the file's dictionary. None if the file is the state dictionary
    prefix: str  # of every name

    def __str__(self) -> str:
        """The line that training prints."""
        taken = f"the entry {self.entry!r}" if self.entry else "its tensors"
        return f"{self.where}: took {taken}" + (f" without the prefix {self.prefix!r}" if self.prefix else "")


def read_weights(path: Path, key: str = "model.weights") -> GivenWeights:
    """Read a file of weights. Raises `UserError` with the setting `key`, the file and the reason."""
    where = f"{key}={display_path(path)}"
    with opened(path, where, WEIGHTS_BYTES_MAX) as handle:
        start, size = handle.read(9), handle.seek(0, 2)
        handle.seek(0)
        if start[8:] == SAFETENSORS and int.from_bytes(start[:8], "little") <= HEADER_BYTES_MAX:
            content = _safetensors(f"/dev/fd/{handle.fileno()}", where)  # first: its length may begin like a pickle
        elif start.startswith((ZIP, PICKLE)):
            content = unpickled(handle, where, is_mapped=True)
        else:
            problem = "is empty" if not size else "was written neither by torch.save nor by safetensors"
            raise UserError(f"{where} is not a file of plain tensors: it {problem}")
    entry, tensors = _state_dictionary(content, where)
    prefix, tensors = _without_prefix(tensors)
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > 2 * size:
        raise UserError(f"{where} has tensors that are larger than the file")
    return GivenWeights(where, tensors, entry, prefix)


def _safetensors(path: str, where: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}
    except Exception as error:  # the library has its own exception, and torch refuses some of its types
        raise UserError(
            f"{where} is not a file of plain tensors: its header and its data do not fit together; copy it again"
        ) from error


def _state_dictionary(content: Any, where: str) -> tuple[str | None, dict[str, Tensor]]:
    """(entry of the weights in the file, weights)."""
    if named_tensors(content):
        return None, _plain(content, where)
    if isinstance(content, dict):
        if content.get("format") == CHECKPOINT_FORMAT:
            return _entry_of_ours(content, where)
        for entry in ENTRIES:
            if named_tensors(content.get(entry)):
                return entry, _plain(content[entry], where)
    keys = [str(key) for key in content] if isinstance(content, dict) else []
    found = f"a dictionary of {_examples(keys)}" if keys else f"a {type(content).__name__}"
    raise UserError(
        f"{where} contains {found}, not a dictionary of tensors; it must be a state dictionary or have one of the "
        f"entries {', '.join(ENTRIES)}"
    )


def _entry_of_ours(content: dict[str, Any], where: str) -> tuple[str, dict[str, Tensor]]:
    entry, tensors = eval_entry(content)
    if not named_tensors(tensors):
        raise UserError(f"{where} is a checkpoint without a dictionary of tensors as {entry!r}")
    return entry, _plain(tensors, where)


def _plain(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if not is_plain(tensor):
            raise UserError(
                f"{where} has {_shortened(name)} as a tensor of {tensor.dtype}, {tensor.layout} on {tensor.device}: "
                "save dense real numbers"
            )
    return tensors


def _without_prefix(tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Remove the common prefix of all names, and keep the versions of modules."""
    prefix = ""
    names = [name for name in tensors if name != AVERAGE_COUNT]
    while more := _usual_prefix([name for name in names if name.startswith(prefix)], len(prefix)):
        prefix += more
    kept = names if prefix and len(names) < len(tensors) else tensors
    renamed = OrderedDict((DENSENET.sub(r"\1\2", name.removeprefix(prefix)), tensors[name].detach()) for name in kept)
    if len(renamed) < len(kept):  # two names differ by the prefix only
        return "", OrderedDict(tensors)
    renamed._metadata = {  # type: ignore[attr-defined]  # where torch keeps them
        name[len(prefix) :]: version for name, version in _versions(tensors) if f"{name}.".startswith(prefix)
    }
    return prefix, renamed


def _usual_prefix(names: list[str], at: int) -> str | None:
    """The prefix of more than half of the names. Others, such as those of a criterion, are not of the network."""
    return next(
        (prefix for prefix in PREFIXES if 2 * sum(name.startswith(prefix, at) for name in names) > len(names)), None
    )


def _versions(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, int]]]:
    """(module, its version) as torch.save stores them. Other content of a file is ignored."""
    metadata = getattr(tensors, "_metadata", None)
    for name, facts in metadata.items() if isinstance(metadata, dict) else ():
        version = facts.get("version") if isinstance(facts, dict) else None
        if isinstance(name, str) and isinstance(version, int):
            yield name, {"version": version}


# ---- into the network -------------------------------------------------------------------------------


def load_state(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load weights into `model`. Counters of batches may be absent, as in files of old versions of torch.

    Raises `UserError` with the tensors that do not fit, `NonFiniteError` for weights that are not finite.
    """
    own = model.state_dict()
    unlike = [name for name in state if name in own and not _is_alike(state[name], own[name])]
    given = OrderedDict((name, tensor) for name, tensor in state.items() if name not in unlike)
    given._metadata = {"": own._metadata[""], **dict(_versions(state))}  # type: ignore[attr-defined]
    try:
        absent, extra = model.load_state_dict(given, strict=False)
    except (RuntimeError, ValueError, KeyError) as error:  # of a module that renames tensors of older versions
        raise UserError(f"{where} does not fit the model: its tensors are those of another version of it") from error
    missing = [name for name in absent if name not in unlike and not name.endswith(".num_batches_tracked")]
    shapes = [f"{_shortened(name)} ({_kind(state[name])}, the model's {_kind(own[name])})" for name in unlike]
    problems = [f"it lacks {_examples(missing)}"] if missing else []
    problems += [f"it has {_examples(list(extra))}, which the model has not"] if extra else []
    problems += [f"of another shape or type: {_examples(shapes)}"] if shapes else []
    if problems:
        raise UserError(f"{where} does not fit the model: {'; '.join(problems)}; give weights of this network")
    nonfinite = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if nonfinite:
        raise NonFiniteError(f"{where} has weights that are not finite: {_examples(nonfinite)}")


def _is_alike(given: Tensor, own: Tensor) -> bool:
    """True for equal shapes, except integers for floating weights."""
    return given.shape == own.shape and (given.is_floating_point() or not own.is_floating_point())


def _kind(tensor: Tensor) -> str:
    shape = " x ".join(map(str, tensor.shape)) or "a number"
    return shape if tensor.is_floating_point() else f"{shape} of {str(tensor.dtype).removeprefix('torch.')}"


def _examples(names: Iterable[str]) -> str:
    """Three examples and a count."""
    shown = [_shortened(name) for name in names]
    more = len(shown) - EXAMPLES
    return ", ".join(shown[:EXAMPLES]) + (f" and {more:,} more" if more > 0 else "")


def _shortened(name: str) -> str:
    line = " ".join(name.split())
    return line if len(line) <= LONGEST_NAME else f"{line[:LONGEST_NAME]}..."


# ---- published by torchvision ------------------------------------------------------------------------


def published_config(config: Config) -> Config:
    """The configuration with the protocol of the weights, in fp32 as published."""
    weights = named_weights(config.model.name, config.evaluation.weights)
    config = replace(config, trainer=replace(config.trainer, precision=Precision.fp32))
    if weights is None:
        return config
    view = weights.transforms()
    protocol = replace(
        config.evaluation,
        resize_pixels=view.resize_size[0],
        crop_pixels=view.crop_size[0],
        interpolation=Interpolation(view.interpolation.value),
    )
    return replace(config, evaluation=protocol)


def published_weights(model_name: str, asked: str) -> GivenWeights:
    """Read the weights of that name or file. A download is checked by the hash in its name and read as plain data."""
    weights = named_weights(model_name, asked)
    if weights is None:
        return read_weights(Path(asked), "evaluation.weights")
    path = Path(torch.hub.get_dir(), "checkpoints", weights.url.rsplit("/", 1)[1])
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(weights.url, str(path), path.stem[-FILE_HASH_DIGITS:])
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"evaluation.weights={asked} could not be downloaded from {weights.url} ({error}); fetch that file by "
                "other means and give its path"
            ) from error
    return read_weights(path, "evaluation.weights")


def published_accuracy(model_name: str, asked: str | None) -> dict[str, float]:
    """Top-1 and top-5 as fractions, from torchvision's metadata. Empty if none are published."""
    weights = named_weights(model_name, asked)
    metrics: dict[str, float] = {} if weights is None else weights.meta["_metrics"].get(METRICS_KEY, {})
    return {f"top{within}_accuracy": metrics[f"acc@{within}"] / 100 for within in (1, 5) if f"acc@{within}" in metrics}


def named_weights(model_name: str, asked: str | None) -> Any | None:
    """torchvision's weights of that name for this network. None for a file. Raises `UserError` for neither."""
    if asked is None or os.path.exists(asked):  # `read_weights` refuses other files
        return None
    if model_name not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(
            f"evaluation.weights={display_path(asked)} does not exist, and torchvision has no weights of {model_name}"
        )
    known: type[WeightsEnum] = torchvision.models.get_model_weights(model_name)
    names = list(known.__members__)
    if asked not in names:
        raise UserError(
            f"evaluation.weights={display_path(asked)} is neither a file nor weights of {model_name}; torchvision "
            f"{torchvision.__version__} knows {', '.join(names)}"
        )
    return known[asked]
