"""How much energy a training took, where the accelerators' driver counts it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from recipe.distributed import World
from recipe.energy import accelerator_joules
from recipe.records import EnergyRecord, Session


class Meter:
    """Counts from its making on, over the accelerators of this run; silent where they are not all on one machine."""

    def __init__(self, world: World) -> None:
        self.uuids = accelerator_uuids(world)
        self.began, self.joules = time.perf_counter(), self.read()

    def read(self) -> float | None:
        """The counter now."""
        return accelerator_joules(self.uuids) if self.uuids else None

    def record(self, sessions: Sequence[Session]) -> EnergyRecord | None:
        """What was used since; None without a counter, and where another session did a part of the work."""
        now = self.read()
        if self.joules is None or now is None or len(sessions) != 1:
            return None
        return EnergyRecord(
            inputs={},
            joules=round(now - self.joules, 3),
            seconds=time.perf_counter() - self.began,
            accelerators=len(self.uuids),
            counter="NVML",
        )


def accelerator_uuids(world: World) -> list[str]:
    """Names by which the driver knows the devices of this run; none on a CPU and where several machines run it."""
    if not world.is_first or world.device.type != "cuda" or world.size != world.local_size:
        return []
    uuids = [getattr(torch.cuda.get_device_properties(index), "uuid", None) for index in range(world.local_size)]
    return [f"GPU-{uuid}" for uuid in uuids] if all(uuids) else []
