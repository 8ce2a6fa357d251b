"""The energy of a training, in joules, from the counter of the GPUs' driver (NVML)."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pynvml
import torch

from recipe.distributed import World
from recipe.run.records import EnergyRecord, Session


def accelerator_joules(uuids: Sequence[str] | None = None) -> float | None:
    """The sum over these devices (`GPU-...`), or over all of the machine, since the driver was loaded.

    It counts everything that uses a device. None without a driver, a device, or a counter (before Volta).
    """
    try:
        pynvml.nvmlInit()
        try:
            if uuids is None:
                devices = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
            else:
                devices = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
            millijoules: int = sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, devices))
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    return millijoules / 1000 if devices else None


class EnergyMeter:
    """Reads the counter of this run's accelerators now, for the difference later; off where several machines run it."""

    def __init__(self, world: World) -> None:
        self.uuids = accelerator_uuids(world)
        self.began, self.joules = time.perf_counter(), self.read()

    def read(self) -> float | None:
        return accelerator_joules(self.uuids) if self.uuids else None

    def record(self, sessions: Sequence[Session]) -> EnergyRecord | None:
        """The energy since the start; None without a counter, and where another session trained a part."""
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
    """NVML's names of this run's devices; none on a CPU and where several machines run it."""
    if not world.is_rank0 or world.device.type != "cuda" or world.size != world.local_size:
        return []
    uuids = [getattr(torch.cuda.get_device_properties(index), "uuid", None) for index in range(world.local_size)]
    return [f"GPU-{uuid}" for uuid in uuids] if all(uuids) else []
