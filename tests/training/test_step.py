"""One optimizer step: groups, loss, accumulation, mixed precision, processes (T17, T21, T23, T24, T26, T29)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from recipe.config.schema import Config, OptimizationConfig, Precision
from recipe.data.augment.crop import build_augmentation
from recipe.data.augment.mixup import BatchPlace
from recipe.data.batches import Batch, BatchLayout
from recipe.data.transforms import Normalisation
from recipe.distributed import World, start_world
from recipe.errors import UserError
from recipe.models.build import build_model, weights_sha256
from recipe.training.ema import build_ema
from recipe.training.optim import build_loss, build_optimizer, loss_facts, optimizer_facts, parameters_by_kind
from recipe.training.step import TrainStep, compiled, replicate
from tests.builders.configs import compose_config
from tests.builders.ranks import spawn_ranks
from tests.builders.training import ALONE, CPU, GLOBAL_BATCH, global_batch, network, step_of

RATES = [0.05, 0.04, 0.03]


def configuration(*overrides: str) -> Config:
    return compose_config("experiment=smoke", "trainer.torch_threads=1", "optimization.weight_decay=0.01", *overrides)


@pytest.fixture(scope="module")
def config() -> Config:
    return configuration()


def parts_of(batch: Batch, layout: BatchLayout, rank: int = 0) -> list[Batch]:
    """The forward passes of one process."""
    size = layout.images_per_forward
    return [
        Batch(*(tensor[part * size : (part + 1) * size] for tensor in batch[:3]))
        for part in range(rank, layout.processes * layout.accumulation_steps, layout.processes)
    ]


def trained(train_step: TrainStep, layout: BatchLayout, rank: int = 0) -> TrainStep:
    for number, rate in enumerate(RATES):
        train_step(parts_of(global_batch(number), layout, rank), rate)
    return train_step


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.dtype is torch.float64
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)


# ---- parameter groups -------------------------------------------------------------------------------


def test_resnet50_decays_its_weights_and_nothing_else() -> None:
    """T17: 53 batch norms give 106 tensors without decay, those called `downsample.1` included, and the bias of fc."""
    config = compose_config().optimization
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    weight_group, exempt_group = build_optimizer(config, model, CPU).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    norms = {
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for kind in ("weight", "bias")
    }
    assert len(norms) == 106
    assert {names[id(parameter)] for parameter in exempt_group["params"]} == norms | {"fc.bias"}
    assert {"layer1.0.downsample.1.weight", "layer4.0.downsample.1.bias"} <= norms
    assert len(weight_group["params"]) == 54
    assert (weight_group["weight_decay"], exempt_group["weight_decay"]) == (config.weight_decay, 0.0)


CLASSIFIERS = [
    "resnet18",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "vgg11_bn",
    "alexnet",
    "convnext_tiny",
    "swin_t",
    "vit_b_16",
]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_parameter_is_in_exactly_one_group(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    grouped = [id(parameter) for group in parameters_by_kind(model) for parameter in group]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_no_norm_and_no_bias_decays(name: str) -> None:
    """The oracle is timm's rule: everything of one dimension is a norm or a bias."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    decayed = {id(parameter) for parameter in parameters_by_kind(model)[0]}
    wrong = [key for key, parameter in model.named_parameters() if parameter.dim() <= 1 and id(parameter) in decayed]
    assert wrong == []
    assert decayed >= {
        id(parameter) for key, parameter in model.named_parameters() if parameter.dim() == 4 and key.endswith("weight")
    }


def test_norms_and_biases_decay_when_asked() -> None:
    asked = configuration("optimization.decay_norms_and_biases=true").optimization
    groups = build_optimizer(asked, network(configuration(), "batch"), CPU).param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.01]


def test_facts_are_the_live_groups(config: Config) -> None:
    model = network(config, "batch")
    optimizer = build_optimizer(config.optimization, model, CPU)
    optimizer.param_groups[1]["momentum"] = 0.123  # a change in code only must show
    facts = optimizer_facts(optimizer)
    assert sum(group.parameters for group in facts) == sum(parameter.numel() for parameter in model.parameters())
    assert sum(group.tensors for group in facts) == len(list(model.parameters()))
    assert [group.settings["momentum"] for group in facts] == [config.optimization.momentum, 0.123]
    assert [group.settings["weight_decay"] for group in facts] == [0.01, 0.0]
    assert not {"lr", "params"} & facts[0].settings.keys()


# ---- the loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_is_its_closed_form(smoothing: float) -> None:
    """(1 - s) x cross entropy + s x the mean over all classes of -log p, once (T29)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 7, (9,), generator=generator)
    logs = logits - logits.exp().sum(dim=1, keepdim=True).log()
    expected = (-(1 - smoothing) * logs[range(9), labels] - smoothing * logs.mean(dim=1)).mean()
    loss = build_loss(configuration(f"optimization.label_smoothing={smoothing}").optimization)
    torch.testing.assert_close(loss(logits, labels), expected)
    assert loss_facts(loss) == {"class": "CrossEntropyLoss", "label_smoothing": smoothing, "reduction": "mean"}


# ---- one step ---------------------------------------------------------------------------------------


def by_hand(config: OptimizationConfig, normalisation: Normalisation, model: nn.Module) -> dict[str, Tensor]:
    """SGD with momentum, written out: Sutskever's form as torch documents it, decay added to the gradient."""
    velocities: dict[str, Tensor] = {}
    for number, rate in enumerate(RATES):
        batch = global_batch(number)
        loss = functional.cross_entropy(
            model(normalisation(batch.images)), batch.labels, label_smoothing=config.label_smoothing
        )
        names, parameters = zip(*model.named_parameters(), strict=True)
        for name, parameter, gradient in zip(names, parameters, torch.autograd.grad(loss, parameters), strict=True):
            decay = 0.0 if name.endswith("bias") else config.weight_decay
            gradient = gradient + decay * parameter.detach()
            velocity = velocities[name] = config.momentum * velocities[name] + gradient if number else gradient
            with torch.no_grad():
                parameter -= rate * (gradient + config.momentum * velocity if config.nesterov else velocity)
    return weights(model)


@pytest.mark.parametrize("nesterov", ["true", "false"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_steps_are_those_written_by_hand(accumulation: int, nesterov: str) -> None:
    config = configuration(f"optimization.nesterov={nesterov}", "optimization.label_smoothing=0.1")
    model = network(config)
    train_step = trained(step_of(config, model), BatchLayout(GLOBAL_BATCH, 1, accumulation))
    assert_close(weights(model), by_hand(config.optimization, train_step.normalisation, network(config)))


def test_four_accumulated_parts_are_one_batch(config: Config) -> None:
    models = [network(config), network(config)]
    for model, accumulation in zip(models, (1, 4), strict=True):
        trained(step_of(config, model), BatchLayout(GLOBAL_BATCH, 1, accumulation))
    assert_close(weights(models[1]), weights(models[0]))
    assert weights_sha256(models[0].state_dict()) != weights_sha256(network(config).state_dict())


def test_no_gradient_is_left_for_the_next_step(config: Config) -> None:
    model = network(config)
    trained(step_of(config, model), BatchLayout(GLOBAL_BATCH, 1, 2))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_given_learning_rate_is_the_one_that_is_applied() -> None:
    config = configuration("optimization.momentum=0", "optimization.weight_decay=0", "optimization.nesterov=false")
    moved = []
    for rate in (0.01, 0.03):
        model = network(config)
        before = weights(model)
        train_step = step_of(config, model)
        train_step([global_batch()], rate)
        assert [group["lr"] for group in train_step.optimizer.param_groups] == [rate, rate]
        moved.append({name: value - before[name] for name, value in weights(model).items()})
    assert_close(moved[1], {name: 3 * value for name, value in moved[0].items()})


def test_the_tally_counts_losses_hits_and_images(config: Config) -> None:
    model = network(config, "batch")
    train_step = step_of(config, model)
    oracle = copy.deepcopy(model).train()
    loss = hits = best_five = 0.0
    batch = global_batch()
    for part in parts_of(batch, BatchLayout(GLOBAL_BATCH, 1, 3)):
        logits = oracle(train_step.normalisation(part.images)).detach()
        loss += 8 * float(
            functional.cross_entropy(logits, part.labels, label_smoothing=config.optimization.label_smoothing)
        )
        ranks = (logits > logits.gather(1, part.labels[:, None])).sum(dim=1)
        hits, best_five = hits + int((ranks < 1).sum()), best_five + int((ranks < 5).sum())
    train_step(parts_of(batch, BatchLayout(GLOBAL_BATCH, 1, 3)), 0.1)
    found = train_step.take_tally().tolist()
    assert found[0] == pytest.approx(loss, rel=1e-5)
    assert found[1:] == [hits, best_five, GLOBAL_BATCH]
    assert train_step.take_tally().tolist() == [0, 0, 0, 0]


def test_with_fewer_than_five_classes_the_tally_still_counts(config: Config) -> None:
    train_step = step_of(config, build_model(config.model, 3, 0).double())
    batch = global_batch()
    train_step([batch._replace(labels=batch.labels % 3)], 0.1)
    assert train_step.take_tally()[2:].tolist() == [GLOBAL_BATCH, GLOBAL_BATCH]


# ---- mixed precision --------------------------------------------------------------------------------


def movement(config: Config, precision: str) -> Tensor:
    """The movement of all parameters in one step."""
    config = replace(config, trainer=replace(config.trainer, precision=Precision(precision)))
    model = network(config, "batch").float()
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    train_step = step_of(config, model)
    train_step([global_batch()], 0.1)
    assert train_step.skipped_steps == 0
    assert all(parameter.dtype is torch.float32 for parameter in model.parameters())
    return nn.utils.parameters_to_vector(model.parameters()).detach() - before


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_in_mixed_precision_is_close_to_one_in_fp32(precision: str, config: Config) -> None:
    """T24: the gradient scaler's factor is taken out again before the update."""
    exact, mixed = movement(config, "fp32"), movement(config, precision)
    assert float((mixed - exact).norm() / exact.norm()) < 0.15
    assert not torch.equal(mixed, exact)


def test_an_overflow_in_fp16_skips_the_step_and_counts_it(config: Config) -> None:
    """T23: nothing moves, the scale is lowered, and the skipped steps are recorded."""
    config = replace(config, trainer=replace(config.trainer, precision=Precision.fp16))
    model = network(config).float()
    train_step = step_of(config, model)
    assert train_step.scaler.is_enabled()
    before = weights(model)
    train_step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    train_step([global_batch()], 0.1)
    assert train_step.skipped_steps == 1
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert train_step.scaler.get_scale() == 2.0**59
    train_step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    train_step([global_batch()], 0.1)
    assert train_step.skipped_steps == 1
    assert any(not torch.equal(value, before[name]) for name, value in weights(model).items())


def test_only_fp16_scales_gradients(config: Config) -> None:
    for precision in Precision:
        trainer = replace(config.trainer, precision=precision)
        train_step = step_of(replace(config, trainer=trainer), network(config))
        assert train_step.scaler.is_enabled() is (precision is Precision.fp16)


# ---- several processes ------------------------------------------------------------------------------


def all_checks(config: Config) -> dict[str, Any]:
    """Runs in every process. The tests below judge the result."""
    with start_world(config.trainer) as world:
        return _checks_of_replicas(config, world) | _checks_of_training(config, world) | _checks_of_world(world)


def _checks_of_replicas(config: Config, world: World) -> dict[str, Any]:
    """The traces of the throw-away pass of `replicate`."""
    model = network(config, "batch", seed=0)
    shaken = network(config, "batch", seed=0)
    with torch.no_grad():
        for buffer in itertools.chain(model.buffers(), shaken.buffers()):
            buffer.add_(3)
    before, mode = weights_sha256(model.state_dict()), model.training
    replicate(model, world, torch.rand(4, 3, 16, 16, dtype=torch.float64), Precision.fp32)
    return {
        "untouched": before == weights_sha256(model.state_dict()) == weights_sha256(shaken.state_dict()),
        "gradients": [name for name, parameter in model.named_parameters() if parameter.grad is not None],
        "training": mode and model.training,
    }


def _checks_of_training(config: Config, world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for norm in ("none", "batch"):
        for accumulation in (1, 2):
            layout = BatchLayout(GLOBAL_BATCH, world.size, accumulation)
            model = network(config, norm, seed=world.rank)  # only the first process's initial weights may count
            example = torch.zeros(layout.images_per_forward, 3, 16, 16, dtype=torch.float64)
            stepped = replicate(model, world, example, Precision.fp32)
            train_step = trained(step_of(config, model, world, stepped), layout, world.rank)
            tally = world.sum(train_step.take_tally()).tolist()
            trainable = weights_sha256(dict(model.named_parameters()))
            buffers = weights_sha256(dict(model.named_buffers()))
            world.broadcast_module(model)
            found[f"{norm}-{accumulation}"] = {
                "weights": {name: value.numpy() for name, value in weights(model).items()},
                "tally": tally,
                "parameters": trainable,
                "buffers": buffers,
                "after": weights_sha256(model.state_dict()),
            }
    return found


def _checks_of_world(world: World) -> dict[str, Any]:
    return {
        "sum": world.sum(torch.tensor([1, world.rank])).tolist(),
        "gather": world.gather(world.rank * 10),
        "first": world.broadcast_from_rank0({"rank": world.rank}),
    }


@pytest.fixture(scope="module")
def two_and_three(config: Config) -> dict[int, list[dict[str, Any]]]:
    """The results of every process, with two and with three."""
    return {size: spawn_ranks(size, all_checks, config) for size in (2, 3)}


Found = dict[int, list[dict[str, Any]]]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_any_number_of_processes_reaches_the_weights_of_one(
    accumulation: int, two_and_three: Found, config: Config
) -> None:
    """T21, without batch norm, which would see the size of a part. The counts of all processes add up to one's."""
    model = network(config)
    alone = trained(step_of(config, model), BatchLayout(GLOBAL_BATCH, 1, 1))
    tally = alone.take_tally().tolist()
    for ranks in two_and_three.values():
        found = ranks[0][f"none-{accumulation}"]
        assert_close({name: torch.from_numpy(value) for name, value in found["weights"].items()}, weights(model))
        np.testing.assert_allclose(found["tally"], tally, rtol=1e-5)


@pytest.mark.parametrize("case", ["none-1", "none-2", "batch-1", "batch-2"])
def test_all_processes_have_the_weights_of_rank_0(case: str, two_and_three: Found) -> None:
    """T26: parameters stay equal by themselves, running statistics only once the first process's are copied."""
    for ranks in two_and_three.values():
        assert len({rank[case]["parameters"] for rank in ranks}) == 1
        assert len({rank[case]["after"] for rank in ranks}) == 1
        if case.startswith("batch"):
            assert len({rank[case]["buffers"] for rank in ranks}) == len(ranks), "the trap is not there to be seen"


def test_replicating_leaves_no_trace(two_and_three: Found) -> None:
    for rank in itertools.chain(*two_and_three.values()):
        assert rank["untouched"]
        assert rank["training"]
        assert rank["gradients"] == []


def test_one_process_needs_no_replica(config: Config) -> None:
    model = network(config)
    assert replicate(model, ALONE, torch.zeros(1, 3, 16, 16), Precision.fp32) is model


def test_reductions_over_processes(two_and_three: Found) -> None:
    for size, ranks in two_and_three.items():
        assert [rank["sum"] for rank in ranks] == [[size, sum(range(size))]] * size
        assert [rank["gather"] for rank in ranks] == [[10 * rank for rank in range(size)], *[None] * (size - 1)]
        assert [rank["first"] for rank in ranks] == [{"rank": 0}] * size


# ---- no waiting for the device ----------------------------------------------------------------------

WAITS = {"item", "cpu", "tolist", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__", "__array__"}
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::unique")


class Calls(TorchFunctionMode):
    """Notes calls that would make the host read a number from a device, even if they do nothing on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in WAITS:
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Notes operators with a result that the host waits for, also in the backward pass and the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name().startswith(READS) or self.is_by_mask(function.name(), args):
            self.found.append(function.name())
        return function(*args, **(kwargs or {}))

    @staticmethod
    def is_by_mask(name: str, args: Any) -> bool:
        """An index of booleans: the size of the result depends on their number."""
        indices = args[1] if name.startswith("aten::index") and len(args) > 1 else []
        return isinstance(indices, list | tuple) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices
        )


def waits_of(work: Callable[[], object]) -> list[str]:
    """The waits for a GPU, found by the same work on a CPU."""
    with Calls() as calls, Operators() as operators:
        work()
    return calls.found + operators.found


MIXED = ["augmentation.mixup.mixup_alpha=0.2", "augmentation.mixup.cutmix_alpha=1.0"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["trainer.precision=bf16"],
        ["optimization.ema.decay=0.9", "augmentation.random_erasing.probability=0.5", *MIXED],
        ["optimization.loss=binary_cross_entropy", "optimization.bce.target_threshold=0.2", *MIXED],
        ["optimization.optimizer=sgdw"],
    ],
    ids=lambda overrides: " ".join(overrides)[:60] or "plain",
)
def test_no_step_waits_for_the_device(overrides: list[str]) -> None:
    """A proxy on a CPU: over accumulated steps with counting and averaging the host reads nothing back."""
    config = configuration(*overrides)
    model = network(config, "batch").float()
    train_step, average = step_of(config, model), build_ema(model, config.optimization, 1)
    augmentation = build_augmentation(config.augmentation, 0)
    indices = np.arange(GLOBAL_BATCH)
    place = BatchPlace(0, 0, 0, augmentation.pixels(0))
    parameters = augmentation.mix_parameters(place, indices, np.zeros(GLOBAL_BATCH, np.int64))
    batch = global_batch()._replace(mix_parameters=parameters)
    train_step([batch], 0.1)  # the optimizer makes its state

    def work() -> None:
        for step in (1, 2):
            train_step([batch, batch], 0.1)
            average.update(step)

    assert waits_of(work) == []
    assert (parameters is not None) is any(word in " ".join(overrides) for word in ("mixup", "erasing"))


@pytest.mark.parametrize(
    "work",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: float(tensor.sum()),
        lambda tensor: bool(tensor.sum() > 0),
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: torch.equal(tensor, tensor),
    ],
    ids=["item", "float", "bool", "cpu", "tolist", "mask", "equal"],
)
def test_waiting_would_be_seen(work: Callable[[Tensor], object]) -> None:
    assert waits_of(lambda: work(torch.ones(3))) != []


# ---- compilation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("graphs", "mode"), [("false", None), ("true", "reduce-overhead")])
def test_the_network_is_compiled_as_asked(graphs: str, mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs replay the same kernels, so they are a fact of the machine and no part of the recipe."""
    model, asked = nn.Identity(), []
    monkeypatch.setattr(torch, "compile", lambda model, mode: asked.append(mode) or model)
    config = configuration("trainer.compile=true", f"trainer.cuda_graphs={graphs}")
    assert compiled(model, config.trainer) is model
    assert asked == [mode]
    assert config.pinned.config_sha256 == configuration("trainer.compile=true").pinned.config_sha256


def test_graphs_without_compilation_are_refused_and_neither_is_the_default(config: Config) -> None:
    with pytest.raises(UserError, match=r"trainer\.cuda_graphs=True is invalid"):
        configuration("trainer.cuda_graphs=true")
    model = nn.Identity()
    assert compiled(model, config.trainer) is model
    assert not config.trainer.compile
