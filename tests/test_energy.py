"""The driver's counter of energy, through a driver that is made up, and how it reaches a recipe."""

from __future__ import annotations

import ctypes
from typing import Any

import msgspec
import pytest
import torch

from recipe import energy
from recipe.distributed import World
from recipe.energy import accelerator_joules
from recipe.records import EnergyRecord
from recipe.review.check.records import energy_findings
from recipe.training.energy import Meter, accelerator_uuids
from tests.document import test_document as document

USED = {"GPU-a": 1_500, "GPU-b": 40_000}  # millijoules


class Driver:
    """Answers as NVML does: a code, and the value where a pointer says."""

    def __init__(self, refused: str = "") -> None:
        self.refused = refused
        self.is_open = False

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            return 3 if name == self.refused else getattr(self, f"answer_{name}")(*arguments)

        return call

    def answer_nvmlInit_v2(self) -> int:  # noqa: N802
        self.is_open = True
        return 0

    def answer_nvmlShutdown(self) -> int:  # noqa: N802
        self.is_open = False
        return 0

    def answer_nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(USED)
        return 0

    def answer_nvmlDeviceGetHandleByIndex_v2(self, index: Any, device: Any) -> int:  # noqa: N802
        device._obj.value = index.value + 1
        return 0

    def answer_nvmlDeviceGetHandleByUUID(self, uuid: bytes, device: Any) -> int:  # noqa: N802
        if uuid.decode() not in USED:
            return 6
        device._obj.value = list(USED).index(uuid.decode()) + 1
        return 0

    def answer_nvmlDeviceGetTotalEnergyConsumption(self, device: Any, used: Any) -> int:  # noqa: N802
        used._obj.value = list(USED.values())[device.value - 1]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(energy.ctypes, "CDLL", lambda name: made)
    return made


def test_the_counters_of_all_or_of_named_devices_add_up(driver: Driver) -> None:
    assert accelerator_joules() == 41.5
    assert accelerator_joules(["GPU-b"]) == 40
    assert accelerator_joules(["GPU-a", "GPU-b"]) == 41.5
    assert accelerator_joules([]) is None
    assert accelerator_joules(["GPU-a", "GPU-c"]) is None
    assert not driver.is_open


@pytest.mark.parametrize(
    "refused", ["nvmlInit_v2", "nvmlDeviceGetCount_v2", "nvmlDeviceGetTotalEnergyConsumption", "nvmlShutdown"]
)
def test_what_the_driver_refuses_is_unknown(driver: Driver, refused: str) -> None:
    driver.refused = refused
    assert accelerator_joules() == (41.5 if refused == "nvmlShutdown" else None)


def test_without_a_driver_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(energy.ctypes, "CDLL", absent)
    assert accelerator_joules() is None


def test_a_training_counts_the_difference_unless_another_session_did_a_part(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = World(0, 1, 0, 1, torch.device("cpu"), "none")
    assert accelerator_uuids(alone) == []
    assert Meter(alone).record([document.session()]) is None
    monkeypatch.setattr("recipe.training.energy.accelerator_uuids", lambda world: ["GPU-a"])
    meter = Meter(alone)
    monkeypatch.setitem(USED, "GPU-a", 9_000)
    record = meter.record([document.session()])
    assert record is not None
    assert (record.joules, record.accelerators) == (7.5, 1)
    assert record.seconds > 0
    assert meter.record([document.session(), document.session(is_exact=True)]) is None


def test_the_dynamics_name_the_energy_of_the_weights_that_are_here() -> None:
    trained = document.training_record().outputs["weights"]
    spent = EnergyRecord(inputs={"weights": trained}, joules=90_000, seconds=300, accelerators=1, counter="NVML")
    assert "Energy of" not in document.document()
    row = "| Energy of 1 accelerator, validation included (NVML) | 90.0 kJ in 5 min 00 s, 300 W in the mean |"
    assert row in document.section(document.document(energy=spent), "dynamics")
    other = msgspec.structs.replace(spent, inputs={"weights": document.sha("other")})
    assert "Energy of" not in document.document(energy=other)
    assert len(energy_findings(document.facts(energy=other))) == 1
    assert energy_findings(document.facts(energy=spent)) == []
