"""One optimizer step: forward and backward over the micro-batches of a process, then the update."""

from __future__ import annotations

from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recipe.config.schema import Precision, TrainerConfig
from recipe.data.augment.mixup import MixParameters, dominant_labels, mix, soft_targets
from recipe.data.batches import Batch
from recipe.data.transforms import Normalisation
from recipe.distributed import World, memory_format
from recipe.evaluation import autocast
from recipe.training.optim import Loss


def compiled(model: nn.Module, trainer: TrainerConfig) -> nn.Module:
    """Apply `trainer.compile`, with CUDA graphs if `trainer.cuda_graphs` is set."""
    if not trainer.compile:
        return model
    return cast(nn.Module, torch.compile(model, mode="reduce-overhead" if trainer.cuda_graphs else None))


def replicate(model: nn.Module, world: World, example: Tensor, precision: Precision) -> nn.Module:
    """Wrap in DistributedDataParallel if there are several processes: gradients are averaged over them.

    DDP changes the layout of its gradient buckets after the first backward pass, so a continued run would sum in
    another order than an uninterrupted one. One pass over `example` ([N, 3, H, W], in the arithmetic of the steps)
    before the first step settles the layout. Buffers are put back and gradients dropped. It takes three processes to
    show the difference.
    """
    if world.size == 1:
        return model
    devices = [world.device] if world.device.type == "cuda" else None
    replicated = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with autocast(precision, world.device):
        loss = replicated(example).float().sum()
    loss.backward()
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    model.zero_grad(set_to_none=True)
    return replicated


class TrainStep:
    """One optimizer step from the forward passes of this process. Its counts stay on the device."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        normalisation: Normalisation,
        trainer: TrainerConfig,
        world: World,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss = loss
        self.normalisation = normalisation
        self.precision = trainer.precision
        self.device = world.device
        self.layout = memory_format(trainer)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=trainer.precision is Precision.fp16)
        self.skipped_steps = 0
        self.tally = torch.zeros(4, dtype=torch.float64, device=world.device)  # loss x images, top-1, top-5, images

    def __call__(self, batches: list[Batch], learning_rate: float) -> None:
        """Forward and backward over all batches, then one update. The gradient is that of the mean over all images."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        for number, batch in enumerate(batches, start=1):
            is_exchanged = number == len(batches) or not isinstance(self.model, DistributedDataParallel)
            with nullcontext() if is_exchanged else self.model.no_sync():  # type: ignore[operator]
                self.scaler.scale(self._forward(batch) / len(batches)).backward()  # type: ignore[no-untyped-call]
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped_steps += self.scaler.is_enabled() and self.scaler.get_scale() < scale
        self.optimizer.zero_grad(set_to_none=True)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor, MixParameters | None]:
        """What the network is given: normalised, mixed images [N, 3, H, W], and labels [N] with their mixing."""
        images = batch.images.to(self.device, non_blocking=True, memory_format=self.layout)
        labels = batch.labels.to(self.device, non_blocking=True)
        parameters = batch.mix_parameters and batch.mix_parameters.to(self.device)
        return mix(self.normalisation(images), parameters), labels, parameters

    def _forward(self, batch: Batch) -> Tensor:
        with autocast(self.precision, self.device):
            images, labels, parameters = self.inputs(batch)
            logits = self.model(images)
            loss: Tensor = self.loss(logits, soft_targets(labels, parameters, logits.shape[1]))
        self._count(loss.detach(), logits.detach(), dominant_labels(labels, parameters))
        return loss

    @torch.no_grad()
    def _count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add to the tally without waiting for the device."""
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices.eq(labels[:, None])
        images = torch.full_like(loss, len(labels), dtype=torch.float64)  # made on the device: a copy would wait for it
        self.tally += torch.stack([loss.double() * images, hits[:, 0].sum().double(), hits.sum().double(), images])

    def take_tally(self) -> Tensor:
        """The sums since the last call: loss x images, correct within 1 and 5, images."""
        taken = self.tally
        self.tally = torch.zeros_like(taken)
        return taken
