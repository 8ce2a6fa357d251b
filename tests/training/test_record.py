"""The driver's counter of energy, by fake functions of pynvml, and its way into a recipe."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from recipe.distributed import World
from recipe.review.check.records import energy_findings
from recipe.run.records import EnergyRecord
from recipe.training import record
from recipe.training.record import EnergyMeter, accelerator_joules, accelerator_uuids
from tests.builders import documents, records

USED = {"GPU-a": 1_500, "GPU-b": 40_000}  # millijoules


class Driver:
    """pynvml's functions on a machine with two GPUs. The one named by `refused` raises."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.refused = ""
        self.is_open = False
        for name, answer in (
            ("nvmlInit", lambda: setattr(self, "is_open", True)),
            ("nvmlShutdown", lambda: setattr(self, "is_open", False)),
            ("nvmlDeviceGetCount", lambda: len(USED)),
            ("nvmlDeviceGetHandleByIndex", lambda index: list(USED)[index]),
            ("nvmlDeviceGetHandleByUUID", self.named),
            ("nvmlDeviceGetTotalEnergyConsumption", lambda device: USED[device]),
        ):
            patch.setattr(record.pynvml, name, self.answering(name, answer))

    def answering(self, name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if name == self.refused:
                raise record.pynvml.NVMLError(record.pynvml.NVML_ERROR_NOT_SUPPORTED)
            return answer(*arguments)

        return call

    def named(self, uuid: str) -> str:
        if uuid not in USED:
            raise record.pynvml.NVMLError(record.pynvml.NVML_ERROR_NOT_FOUND)
        return uuid


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def test_the_counters_of_all_or_of_named_devices_add_up(driver: Driver) -> None:
    assert accelerator_joules() == 41.5
    assert accelerator_joules(["GPU-b"]) == 40
    assert accelerator_joules(["GPU-a", "GPU-b"]) == 41.5
    assert accelerator_joules([]) is None
    assert accelerator_joules(["GPU-a", "GPU-c"]) is None
    assert not driver.is_open


@pytest.mark.parametrize("refused", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetTotalEnergyConsumption"])
def test_what_the_driver_refuses_is_unknown(driver: Driver, refused: str) -> None:
    driver.refused = refused
    assert accelerator_joules() is None
    assert not driver.is_open


def test_without_a_driver_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(record.pynvml, "CDLL", absent)
    assert accelerator_joules() is None


def test_a_training_counts_the_difference_unless_another_session_did_a_part(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = World(0, 1, 0, 1, torch.device("cpu"), "none")
    assert accelerator_uuids(alone) == []
    assert EnergyMeter(alone).record([records.session()]) is None
    monkeypatch.setattr("recipe.training.record.accelerator_uuids", lambda world: ["GPU-a"])
    meter = EnergyMeter(alone)
    monkeypatch.setitem(USED, "GPU-a", 9_000)
    record = meter.record([records.session()])
    assert record is not None
    assert (record.joules, record.accelerators) == (7.5, 1)
    assert record.seconds > 0
    assert meter.record([records.session(), records.session(is_exact=True)]) is None


def test_the_dynamics_name_the_energy_of_the_weights_that_are_here() -> None:
    trained = records.training_record().outputs["weights"]
    spent = EnergyRecord(inputs={"weights": trained}, joules=90_000, seconds=300, accelerators=1, counter="NVML")
    assert "Energy of" not in documents.document()
    row = "| Energy of 1 accelerator, validation included (NVML) | 90.0 kJ in 5 min 00 s, 300 W in the mean |"
    assert row in documents.section(documents.document(energy=spent), "dynamics")
    other = msgspec.structs.replace(spent, inputs={"weights": records.sha("other")})
    assert "Energy of" not in documents.document(energy=other)
    assert len(energy_findings(records.facts(energy=other))) == 1
    assert energy_findings(records.facts(energy=spent)) == []
