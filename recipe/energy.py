"""What GPUs have used, by the counter of their driver (NVML), in joules; None wherever it cannot be asked.

The counter is of the whole device since the driver was loaded: differences count, and whoever shares the device is in
them. NVML is called as it lies beside the driver, so that no package is needed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

LIBRARY = "libnvidia-ml.so.1"
DONE = 0  # of every call


def accelerator_joules(uuids: Sequence[str] | None = None) -> float | None:
    """The sum over these devices (`GPU-...`), or over all of the machine; there is no counter before Volta."""
    try:
        library = ctypes.CDLL(LIBRARY)
        if library.nvmlInit_v2() != DONE:
            return None
        try:
            devices = _all(library) if uuids is None else [_named(library, uuid) for uuid in uuids]
            return sum(_millijoules(library, device) for device in devices) / 1000 if devices else None
        finally:
            library.nvmlShutdown()
    except (OSError, AttributeError, LookupError):  # no driver, an old one, a device without a counter
        return None


def _all(library: ctypes.CDLL) -> list[ctypes.c_void_p]:
    count = ctypes.c_uint()
    _must(library.nvmlDeviceGetCount_v2(ctypes.byref(count)))
    devices = [ctypes.c_void_p() for _ in range(count.value)]
    for index, device in enumerate(devices):
        _must(library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)))
    return devices


def _named(library: ctypes.CDLL, uuid: str) -> ctypes.c_void_p:
    device = ctypes.c_void_p()
    _must(library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(device)))
    return device


def _millijoules(library: ctypes.CDLL, device: ctypes.c_void_p) -> int:
    used = ctypes.c_ulonglong()
    _must(library.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(used)))
    return used.value


def _must(code: int) -> None:
    if code != DONE:
        raise LookupError(f"NVML answered {code}")
