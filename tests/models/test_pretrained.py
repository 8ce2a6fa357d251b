"""Files of weights from other projects: read by content, or refused with a message."""

from __future__ import annotations

import argparse
import io
import json
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from recipe.config.schema import ModelConfig
from recipe.errors import NonFiniteError, UserError
from recipe.models.build import build_model, weights_sha256
from recipe.models.checkpoint import save_checkpoint
from recipe.models.pretrained import load_state, read_weights

State = dict[str, Tensor]


def network(seed: int = 5, classes: int = 10) -> nn.Module:
    return build_model(ModelConfig(name="small"), classes, seed)


STATE: State = network().state_dict()
TRAINED: State = network(6).state_dict()  # beside the averaged weights
EXPECTED = weights_sha256(STATE)
OPTIMIZER = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
ARGUMENTS = argparse.Namespace(model="small", lr=0.1, nested=argparse.Namespace(a=[1]))


def named(prefix: str, state: State = STATE) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(path: Path, content: Any, **how: Any) -> Path:
    torch.save(content, path, **how)
    return path


def averaged() -> State:
    """The state of `model_ema` as saved by torchvision's references."""
    return AveragedModel(network()).state_dict()


PEOPLES_FILES: dict[str, tuple[Any, str | None, str]] = {
    "a state dictionary": (STATE, None, ""),
    "DistributedDataParallel": (named("module."), None, "module."),
    "torch.compile": (named("_orig_mod."), None, "_orig_mod."),
    "both": (named("module._orig_mod."), None, "module._orig_mod."),
    "pytorch/examples": (
        {
            "epoch": 90,
            "arch": "x",
            "state_dict": named("module."),
            "best_acc1": torch.tensor(7.0),
            "optimizer": OPTIMIZER,
        },
        "state_dict",
        "module.",
    ),
    "torchvision's references": (
        {"model": TRAINED, "model_ema": averaged(), "optimizer": OPTIMIZER, "lr_scheduler": {}, "args": ARGUMENTS},
        "model_ema",
        "module.",
    ),
    "torchvision's references, no average": ({"model": STATE, "args": ARGUMENTS, "epoch": 3}, "model", ""),
    "timm": (
        {"state_dict": TRAINED, "state_dict_ema": STATE, "version": 2, "args": ARGUMENTS, "metric": 7.0},
        "state_dict_ema",
        "",
    ),
    "timm, no average": ({"state_dict": STATE, "state_dict_ema": None, "arch": "x"}, "state_dict", ""),
    "Lightning": (
        {"state_dict": named("model."), "pytorch-lightning_version": "2.0", "hyper_parameters": {}},
        "state_dict",
        "model.",
    ),
    "Lightning, compiled": ({"state_dict": named("model._orig_mod."), "loops": {}}, "state_dict", "model._orig_mod."),
    "a tutorial": ({"epoch": 1, "model_state_dict": STATE, "loss": 0.5}, "model_state_dict", ""),
    "parameters": (
        {name: nn.Parameter(t, t.is_floating_point()) if t.dim() else t for name, t in STATE.items()},
        None,
        "",
    ),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("file", PEOPLES_FILES)
def test_common_weight_files_are_read_and_described(file: str, legacy: bool, tmp_path: Path) -> None:
    content, entry, prefix = PEOPLES_FILES[file]
    path = saved(tmp_path / "w.any", content, _use_new_zipfile_serialization=not legacy)
    found = read_weights(path)
    assert weights_sha256(found.tensors) == EXPECTED
    assert (found.entry, found.prefix) == (entry, prefix)
    assert all(repr(word) in str(found) for word in (entry, prefix) if word)
    model = network(0)
    load_state(model, found.tensors, found.where)
    assert weights_sha256(model.state_dict()) == EXPECTED


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w"])
def test_the_content_decides_and_not_the_suffix(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(safetensors.torch.save(STATE, {"format": "pt"}))
    assert weights_sha256(read_weights(tmp_path / name).tensors) == EXPECTED
    saved(tmp_path / name, STATE)
    assert weights_sha256(read_weights(tmp_path / name).tensors) == EXPECTED


def test_a_header_with_a_length_that_begins_like_a_pickle(tmp_path: Path) -> None:
    for padding in range(256):
        content = safetensors.torch.save(STATE, {"padding": "x" * padding})
        if content[:1] == b"\x80":
            break
    assert content[:1] == b"\x80"
    (tmp_path / "w").write_bytes(content)
    assert weights_sha256(read_weights(tmp_path / "w").tensors) == EXPECTED


@pytest.mark.parametrize("average", [None, {"updates": 3, "model": STATE}], ids=["trained", "averaged"])
def test_a_checkpoint_of_this_project_gives_its_evaluated_weights(average: State | None, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"model": TRAINED if average else STATE, "average": average})
    found = read_weights(path)
    assert weights_sha256(found.tensors) == EXPECTED
    assert found.entry == ("average" if average else "model")


def test_torchvisions_densenet_has_names_of_its_old_versions(tmp_path: Path) -> None:
    network = torchvision.models.densenet121(weights=None)
    state = network.state_dict()
    old = {name.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): tensor for name, tensor in state.items()}
    assert old.keys() != state.keys()
    found = read_weights(saved(tmp_path / "densenet.pth", old))
    load_state(network, found.tensors, found.where)
    assert weights_sha256(found.tensors) == weights_sha256(state)


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_modules_that_ask_for_their_version_get_it(kind: str, tmp_path: Path) -> None:
    """MNASNet refuses weights of an unknown version, and files of safetensors have none."""
    network = torchvision.models.mnasnet0_5(weights=None)
    state = network.state_dict()
    if kind == "torch":
        saved(tmp_path / "w", nn.ModuleDict({"module": network}).state_dict())
    else:
        safetensors.torch.save_file(state, tmp_path / "w")
    found = read_weights(tmp_path / "w")
    load_state(torchvision.models.mnasnet0_5(weights=None), found.tensors, found.where)
    assert weights_sha256(found.tensors) == weights_sha256(state)


def test_modules_rename_tensors_of_older_versions(tmp_path: Path) -> None:
    """torchvision's files of vision transformers are of the first version."""
    model = torchvision.models.VisionTransformer(32, 16, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8)
    new = model.state_dict()
    old = {key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): new[key] for key in new}
    assert old.keys() != new.keys()
    load_state(model, read_weights(saved(tmp_path / "w", old)).tensors, "w")


def test_counters_of_batches_may_be_absent(tmp_path: Path) -> None:
    old = {name: tensor for name, tensor in STATE.items() if not name.endswith("num_batches_tracked")}
    model = network(0)
    load_state(model, read_weights(saved(tmp_path / "w", old)).tensors, "w")
    assert torch.equal(model.state_dict()["head.weight"], STATE["head.weight"])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_are_loaded(kind: torch.dtype, tmp_path: Path) -> None:
    found = read_weights(saved(tmp_path / "w", {name: tensor.to(kind) for name, tensor in STATE.items()}))
    model = network(0)
    load_state(model, found.tensors, found.where)
    assert torch.equal(model.state_dict()["head.weight"], STATE["head.weight"].to(kind).float())


# ---- what does not fit ------------------------------------------------------------------------------


def misfit(state: State, tmp_path: Path) -> str:
    found = read_weights(saved(tmp_path / "w", state))
    with pytest.raises(UserError) as refused:
        load_state(network(), found.tensors, found.where)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_tensors_that_do_not_fit_are_named_three_and_counted(tmp_path: Path) -> None:
    lacks = [name for name in STATE if name.startswith("blocks.0.norm") and not name.endswith("tracked")]
    assert len(lacks) == 8
    message = misfit({name: tensor for name, tensor in STATE.items() if name not in lacks}, tmp_path)
    assert f"it lacks {', '.join(lacks[:3])} and 5 more;" in message
    message = misfit(STATE | {f"extra.{k}": torch.zeros(1) for k in range(4)}, tmp_path)
    assert "it has extra.0, extra.1, extra.2 and 1 more, which the model has not;" in message
    assert "lacks" not in message


def test_a_head_of_another_number_of_classes_is_reported_with_both_shapes(tmp_path: Path) -> None:
    message = misfit(network(classes=7).state_dict(), tmp_path)
    assert "head.weight (7 x 64, the model's 10 x 64), head.bias (7, the model's 10)" in message
    assert "lacks" not in message


def test_integers_are_not_weights(tmp_path: Path) -> None:
    message = misfit(STATE | {"head.weight": STATE["head.weight"].to(torch.int8)}, tmp_path)
    assert "head.weight (10 x 64 of int8, the model's 10 x 64)" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_end_with_65(value: float, tmp_path: Path) -> None:
    state = STATE | {"head.bias": torch.full((10,), value, dtype=torch.float64)}
    found = read_weights(saved(tmp_path / "w", state))
    with pytest.raises(NonFiniteError, match=r"weights that are not finite: head\.bias$") as refused:
        load_state(network(), found.tensors, found.where)
    assert refused.value.exit_code == 65


# ---- what is refused --------------------------------------------------------------------------------


class Hostile:
    """Unpickling this runs a command."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        read_weights(path, "evaluation.weights")
    message = str(refused.value)
    assert message.startswith("evaluation.weights=")
    assert "\n" not in message
    assert not any(word in message for word in ("weights_only", "\x1b", "safe_globals", "torch.load", "Traceback"))
    return message


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (Hostile(), "posix.system"),
        ({"model": STATE, "args": Hostile()}, "posix.system"),
        (argparse.Namespace(model=STATE, x=Hostile()), "posix.system"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"state_dict": STATE, "callbacks": io.StringIO}, "_io.StringIO"),
        ({"model": STATE, "path": Path("x")}, "pathlib.PosixPath"),
    ],
)
def test_a_class_is_refused_by_name_and_nothing_runs(content: Any, named: str, legacy: bool, tmp_path: Path) -> None:
    path = saved(tmp_path / "w", content, _use_new_zipfile_serialization=not legacy)
    assert f"it contains an object of {named}; save the weights alone" in refusal(path)
    assert not Path("executed").exists()


@pytest.mark.filterwarnings("ignore")  # torch's, about new or deprecated types of tensors
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: torch.eye(3).to_sparse(), "torch.sparse_coo"),
        (lambda: torch.eye(3).to_sparse_csr(), "torch.sparse_csr"),
        (lambda: torch.eye(3) * 1j, "torch.complex64"),
        (lambda: torch.zeros(3, device="meta"), "on meta"),
        (lambda: torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.quint8), "torch.quint8"),
    ],
)
def test_tensors_that_no_network_computes_with_are_refused(
    make: Callable[[], Tensor], named: str, tmp_path: Path
) -> None:
    message = refusal(saved(tmp_path / "w", {"model": STATE | {"head.weight": make()}}))
    assert "has head.weight as a tensor of" in message
    assert named in message


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"model": {"backbone": STATE, "head": STATE}}, "a dictionary of model"),
        ({0: torch.zeros(1)}, "a dictionary of 0"),
        ({}, "a dict"),
        ({"state_dict": {}}, "a dictionary of state_dict"),
        ([STATE], "a list"),
        (torch.zeros(3), "a Tensor"),
        ({f"k{n}": n for n in range(9)}, "a dictionary of k0, k1, k2 and 6 more"),
        (ARGUMENTS, "a Namespace"),
        ({"format": "checkpoint/2", "model": 3}, "is a checkpoint without a dictionary of tensors as 'model'"),
        ({"format": "checkpoint/2", "model": STATE, "average": 3}, "without a dictionary of tensors as 'average'"),
    ],
)
def test_another_structure_is_refused_with_its_content(content: Any, named: str, tmp_path: Path) -> None:
    message = refusal(saved(tmp_path / "w", content))
    assert "a dictionary of tensors" in message
    assert named in message


def test_an_archive_that_unpacks_to_more_than_itself_is_refused(tmp_path: Path) -> None:
    source = zipfile.ZipFile(saved(tmp_path / "plain", {"a": torch.zeros(10**6)}))
    with source, zipfile.ZipFile(tmp_path / "w", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    assert "unpacks to more than its" in refusal(tmp_path / "w")


def test_a_view_that_claims_a_terabyte_is_refused(tmp_path: Path) -> None:
    assert "larger than the file" in refusal(saved(tmp_path / "w", {"a": torch.zeros(1).expand(10**12)}))


def test_tensors_may_share_their_storage(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    found = read_weights(saved(tmp_path / "w", {"a": shared, "b": shared.view(2, 3)}))
    assert torch.equal(found.tensors["b"], shared.view(2, 3))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_refused(kind: str, share: float, tmp_path: Path) -> None:
    content = safetensors.torch.save(STATE)
    if kind != "safetensors":
        content = saved(tmp_path / "w", STATE, _use_new_zipfile_serialization=kind == "zip").read_bytes()
    (tmp_path / "w").write_bytes(content[: int(len(content) * share)])
    assert "is not a file of plain tensors" in refusal(tmp_path / "w")


def safetensors_of(header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], begin: int, end: int, kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        safetensors_of({"a": entry([2], 0, 80)}, bytes(8)),
        safetensors_of({"a": entry([10**12], 0, 8)}, bytes(8)),
        safetensors_of({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
        safetensors_of({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)),
        safetensors_of({"a": entry([2], 8, 0)}, bytes(8)),
        safetensors_of({"a": entry([2], 0, 8)}, bytes(9)),
        safetensors_of({"a": entry([1], 0, 8, "C64")}, bytes(8)),
        safetensors_of({"a": 1}, b""),
        safetensors_of(b'{"a":' * 10**5, b""),
        safetensors_of(b"{}", b"", length=10**8),
        safetensors_of(b"{}", b"", length=2**63),
    ],
)
def test_a_malformed_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(content)
    refusal(tmp_path / "w")


def test_a_torchscript_program_is_refused_by_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w", "w") as archive:
        archive.writestr("w/data.pkl", b"")
        archive.writestr("w/constants.pkl", b"")
    assert "TorchScript program" in refusal(tmp_path / "w")


def test_a_tar_archive_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "w.pth.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    assert "written neither by torch.save nor by safetensors" in refusal(tmp_path / "w.pth.tar")


def test_other_than_regular_files_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    assert "pipe or a device" in refusal(tmp_path / "pipe")
    assert "pipe or a device" in refusal(tmp_path / "link")
    assert "Is a directory" in refusal(tmp_path)
    (tmp_path / "empty").touch()
    assert "it is empty" in refusal(tmp_path / "empty")
    with (tmp_path / "sparse").open("wb") as handle:
        handle.truncate(2**40)
    assert "has 1,099,511,627,776 bytes; at most" in refusal(tmp_path / "sparse")
    assert "cannot be read: No such file or directory" in refusal(tmp_path / "none")


def test_a_tensor_beside_the_network_s_own_is_named_alone(tmp_path: Path) -> None:
    """A Lightning module also has its criterion."""
    tensors = {f"model.{name}": tensor for name, tensor in STATE.items()} | {"criterion.weight": torch.ones(3)}
    torch.save({"state_dict": tensors}, tmp_path / "w.ckpt")
    given = read_weights(tmp_path / "w.ckpt")
    assert given.prefix == "model."
    assert given.tensors.keys() == STATE.keys() | {"criterion.weight"}
