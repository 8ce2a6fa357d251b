"""Launch a function on all processes, and the collective operations that the pipeline needs.

`launch` calls the worker in this process for one process or under torchrun, and starts processes with torch's elastic
engine for `trainer.gpus=N`. Inside the worker, `World` has the rank, the device and the collectives. Launching,
rendezvous and restarts are left to torch.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from recipe.config.schema import Accelerator, Config, Precision, TrainerConfig
from recipe.errors import SAVED, UserError, WorkerError, how_to_continue
from recipe.run.directory import Run
from recipe.run.environment import machine, usable_cores
from recipe.run.files import display_path
from recipe.run.launcher import launched
from recipe.run.records import Hardware, Setting
from recipe.run.terminal import FROM_OUTSIDE, handlers_put_back, heeded, protect_streams, start_resource_tracker

Result = TypeVar("Result")
GRACE_SECONDS = "120"  # to finish a step and save after a signal, before the launcher kills
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
BEGUN_FILE = "RECIPE_BEGUN_FILE"  # set by our launcher: a file that exists once a worker answers signals
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # set by torch's launcher: the file for the reason of a failure


def launch(worker: Callable[[Config], Result], config: Config) -> Result:
    """Call `worker(config)` once per process and return the first one's result.

    Started workers import the calling script again, so it must guard its `main`. They receive the launcher's signals
    and ignore those that it ignores, as under nohup. Raises `WorkerError` with the message and exit code of the first
    worker that failed. Exits with code 75 if the workers were stopped and saved.
    """
    if launched().is_elastic:
        return worker(config)
    processes = processes_per_node(config.trainer)
    if processes == 1:
        return worker(config)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", GRACE_SECONDS)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=config.trainer.max_restarts,
        signals_to_handle=",".join(number.name for number in heeded(FROM_OUTSIDE)),
    )
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # twenty lines about an error that we report in one
    with TemporaryDirectory() as folder:
        return _launched(settings, worker, config, Path(folder, "saved"))


def _launched(settings: LaunchConfig, worker: Callable[[Config], Result], config: Config, saved: Path) -> Result:
    """The result of rank 0. Workers create the file `saved` if they stop with a checkpoint."""
    start_resource_tracker()
    started = time.time()
    with handlers_put_back():  # the engine does not restore them
        try:
            results: dict[int, Result] = elastic_launch(settings, _started_worker)(worker, config, saved)
        except ChildFailedError as failure:
            if saved.exists():
                raise SystemExit(SAVED) from None
            raise _as_worker_error(failure, _stacks(Run(config.run_dir), started)) from None
        except SignalException as stopped:
            if saved.exists():
                raise SystemExit(SAVED) from None
            if not _begun(saved).exists():
                print(f"stopped before the start; {how_to_continue()}", file=sys.stderr)
                raise SystemExit(SAVED) from None
            print(f"stopped by {signal.Signals(stopped.sigval).name}; {how_to_continue()}", file=sys.stderr)
            raise SystemExit(128 + stopped.sigval) from None
    return results[0]


def _started_worker(worker: Callable[[Config], Result], config: Config, saved: Path) -> Result:
    """Run the worker in a started process, and write the reason of a failure to the launcher's error file."""
    protect_streams()
    saved.unlink(missing_ok=True)  # of an earlier attempt
    os.environ[BEGUN_FILE] = str(_begun(saved))
    try:
        return worker(config)
    except SystemExit as end:
        if end.code == SAVED:
            saved.touch()
        raise
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except UserError as error:
        leave_reason(str(error))
        raise SystemExit(error.exit_code) from None
    except Exception:
        leave_reason(_traceback_of_rank())
        raise SystemExit(1) from None


def _begun(saved: Path) -> Path:
    """The file that exists once a process has joined the others: from then on the worker answers signals."""
    return saved.with_name("begun")


def _traceback_of_rank() -> str:
    return f"rank {os.environ.get('RANK', 0)} failed:\n{traceback.format_exc()}"


def leave_reason(message: str) -> None:
    """Write the elastic engine's error file. It reports the earliest of all processes."""
    file = os.environ.get(ERROR_FILE)
    if file is not None:
        with open(file, "w") as handle:
            json.dump({"message": message, "timestamp": str(int(time.time()))}, handle)


def _stacks(run: Run, started: float) -> str:
    """A hint to the stack traces of a hang. NCCL ends a hung process before it can print one itself."""
    new = [path for path in run.hangs.glob("*.txt") if path.stat().st_size and path.stat().st_mtime >= started]
    return f"stack traces of the processes are in {display_path(run.hangs)}; " if new else ""


def _as_worker_error(failure: ChildFailedError, stacks: str = "") -> WorkerError:
    """The earliest failure, but a message for the user is preferred to the errors that it caused in other processes."""
    _, first = failure.get_first_failure()
    for other in failure.failures.values():
        if first.exitcode in (1, -signal.SIGABRT) and other.exitcode > 1:
            first = other
    if first.exitcode < 0 and Path(first.error_file).is_file():  # aborted by threads of its process group as it ended
        return WorkerError(str(first.message), 1)
    if first.exitcode < 0:
        return WorkerError(
            f"the process of rank {first.local_rank} was ended by {first.signal_name()}; {stacks}{how_to_continue()}",
            128 - first.exitcode,
        )
    return WorkerError(str(first.message), first.exitcode)


def processes_per_node(trainer: TrainerConfig) -> int:
    """The number of processes on this node: torchrun's, else `trainer.gpus`, else all GPUs, else one."""
    place = launched()
    started = place.local_size if place.is_elastic else None
    if started is not None and trainer.gpus not in (None, started):
        raise UserError(
            f"trainer.gpus={trainer.gpus}, but torchrun started {started} processes on this node: "
            "leave trainer.gpus out, or give the same number"
        )
    wanted = started if started is not None else trainer.gpus
    if trainer.accelerator is Accelerator.cpu:
        return wanted or 1
    visible = torch.cuda.device_count()
    if visible == 0 and (trainer.accelerator is Accelerator.cuda or trainer.gpus is not None):
        asked = "trainer.accelerator=cuda" if trainer.gpus is None else f"trainer.gpus={trainer.gpus}"
        raise UserError(
            f"{asked}, but torch {torch.__version__} sees no GPU; "
            "trainer.accelerator=cpu runs that many processes on the CPU"
        )
    if visible and wanted is not None and wanted > visible:
        raise UserError(
            f"trainer.gpus={wanted}, but this machine shows {visible}; use trainer.gpus={visible} or fewer "
            "(the batch size stays the same: gradients are accumulated)"
        )
    return wanted or max(1, visible)


def device_type(trainer: TrainerConfig) -> str:
    if trainer.accelerator is Accelerator.auto:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(trainer.accelerator.value)


@dataclass(frozen=True)
class World:
    """The rank and device of this process, and collective operations over all processes."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    backend: str  # nccl, gloo, or "none" for one process

    @property
    def is_rank0(self) -> bool:
        """True for the one process that writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over all processes, on every process."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any] | None:
        """The values of all processes in the order of ranks, on rank 0. None elsewhere."""
        if self.size == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.size if self.is_rank0 else None
        dist.gather_object(value, gathered)
        return gathered

    def broadcast_from_rank0(self, value: Any) -> Any:
        """The value of rank 0, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def read_on_rank0(self, read: Callable[[], Any]) -> Any:
        """The result of `read` on rank 0, on every process. Its error stops every process."""
        found = None
        with self.rank0_errors_everywhere():
            found = read() if self.is_rank0 else None
        return self.broadcast_from_rank0(found)

    def broadcast_module(self, module: nn.Module) -> None:
        """Copy parameters and buffers of rank 0 to every process."""
        if self.size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    def assert_equal_across_ranks(self, what: str, value: str) -> None:
        """Raise on every process unless all have the same value (one node may have an old checkout)."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        if len(set(values)) > 1:
            raise UserError(
                f"{what} differs between processes: "
                + ", ".join(f"rank {rank}: {found[:16]}" for rank, found in enumerate(values))
            )

    @contextmanager
    def rank0_errors_everywhere(self) -> Iterator[None]:
        """A block that does work on rank 0 only. Its error stops every process."""
        problem: BaseException | None = None
        try:
            yield
        except Exception as error:
            problem = error
        reason = None if problem is None else (str(problem), getattr(problem, "exit_code", 1))
        stopped = self.broadcast_from_rank0(reason)
        if problem is not None:
            raise problem
        if stopped is not None:
            raise WorkerError(*stopped)


@contextmanager
def start_world(trainer: TrainerConfig) -> Iterator[World]:
    """Join the other processes, choose the device and the arithmetic, and leave the process group at the end."""
    place = launched()
    if place.is_elastic:
        _end_with_launcher()
        _check_addresses()
    processes_per_node(trainer)
    kind = device_type(trainer)
    device = torch.device(kind, place.local_rank) if kind == "cuda" else torch.device("cpu")
    backend = "none" if place.size == 1 else "nccl" if kind == "cuda" else "gloo"
    world = World(place.rank, place.size, place.local_rank, place.local_size, device, backend)
    _check_device(trainer, device)
    _choose_arithmetic(trainer, world)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # of an earlier job of the same multirun
    if world.size > 1:
        _join(world, timedelta(seconds=trainer.timeout_seconds))
    try:
        yield world
    except SystemExit:  # all processes leave together
        _leave_group(world, has_failed=False)
        raise
    except BaseException as error:
        if isinstance(error, Exception):  # before leaving the group, which breaks the others
            leave_reason(str(error) if isinstance(error, UserError) else _traceback_of_rank())
        _leave_group(world, has_failed=True)
        raise
    _leave_group(world, has_failed=False)


def _join(world: World, timeout: timedelta) -> None:
    """Join the process group. Processes of our own launcher note that they have joined."""
    _meet(world.backend, timeout, world.device if world.device.type == "cuda" else None)
    if BEGUN_FILE in os.environ:
        Path(os.environ[BEGUN_FILE]).touch()


def join(timeout: timedelta) -> dist.Store:  # type: ignore[name-defined]
    """Join the process group with gloo, without a device, and return a store for messages.

    Raises `UserError` if they cannot be reached.
    """
    _end_with_launcher()
    _check_addresses()
    try:
        _meet("gloo", timeout)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False)  # type: ignore[attr-defined]
    except RuntimeError as error:
        raise UserError(
            f"the processes of this launch cannot reach each other ({str(error).splitlines()[0]}); if the name of a "
            "node does not resolve to its network address, name its interface in GLOO_SOCKET_IFNAME"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"messages{attempt}", store)  # type: ignore[attr-defined]


def _meet(backend: str, timeout: timedelta, device: torch.device | None = None) -> None:
    """Join the process group through the launcher's store, with its own keys for each restart.

    The store of torch 2.15 outlives a restart and returns addresses of ended processes (pytorch#167288).
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=timeout, device_id=device)
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    kept = dist.TCPStore(address, port, size, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    store = dist.PrefixStore(f"attempt{attempt}", kept)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device)


def _check_addresses() -> None:
    """Raise `UserError` for restarts on several nodes, where each node counts its own attempts."""
    nodes, restarts = (int(os.environ.get(name, "0")) for name in ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"))
    if nodes > 1 and restarts > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            f"torchrun --max-restarts={restarts} on {nodes} nodes cannot restart with torch {torch.__version__} as it "
            "is: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node, or leave --max-restarts out"
        )


def _end_with_launcher() -> None:
    """Have the kernel end this process with its launcher (Linux): a killed torchrun leaves orphans."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def _leave_group(world: World, has_failed: bool) -> None:
    """Destroy the process group, except in a launched process that failed: its launcher ends the others.

    With NCCL the call waits for the other processes, and they wait in a collective until the time-out.
    """
    if world.size > 1 and not (has_failed and ERROR_FILE in os.environ):
        dist.destroy_process_group()


def _check_device(trainer: TrainerConfig, device: torch.device) -> None:
    """Raise `UserError` if this torch or this GPU cannot run the configuration."""
    if device.type != "cuda":
        return
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    built_for = [int(arch.split("_")[1].rstrip("af")) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
    if built_for and capability[0] * 10 + capability[1] < min(built_for):
        raise UserError(
            f"{name} has compute capability {capability[0]}.{capability[1]}, but torch {torch.__version__} "
            f"is built for {min(built_for) / 10} and newer; docs/older-gpus.md has the commands"
        )
    if trainer.precision is Precision.bf16 and capability < (8, 0):
        raise UserError(f"trainer.precision=bf16, but {name} has no bf16 arithmetic; use trainer.precision=fp16")


def _choose_arithmetic(trainer: TrainerConfig, world: World) -> None:
    """Set torch's threads, determinism and current device."""
    torch.set_num_threads(threads_per_process(trainer.torch_threads, world))
    torch.use_deterministic_algorithms(trainer.deterministic)
    torch.backends.cudnn.benchmark = not trainer.deterministic
    if world.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read in deterministic mode only
        torch.cuda.set_device(world.device)


def memory_format(trainer: TrainerConfig) -> torch.memory_format:
    return torch.channels_last if trainer.channels_last else torch.contiguous_format


def threads_per_process(asked: int | None, world: World) -> int:
    """The configured number of threads, else this process's share of the cores."""
    return asked or max(1, usable_cores() // world.local_size)


def hardware_of(world: World) -> Hardware:
    """The machine, with its accelerator as torch reports it."""
    if world.device.type != "cuda":
        return machine()
    properties = torch.cuda.get_device_properties(world.device)
    return machine(
        accelerator=properties.name,
        accelerators=world.size,
        accelerator_memory_gib=round(properties.total_memory / 2**30, 1),
        compute_capability=f"{properties.major}.{properties.minor}",
    )


def arithmetic_switches() -> dict[str, Setting]:
    """The current values of torch's switches that can change a result."""
    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolution": torch.backends.cudnn.allow_tf32,
        "cpu_threads_per_process": torch.get_num_threads(),
    }


def device_versions(world: World) -> dict[str, str]:
    """Versions of torch with its build, and of CUDA, cuDNN and NCCL on a GPU."""
    build = {"torch": str(torch.__version__)}
    if world.device.type != "cuda":
        return build
    return build | {
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        "nccl": ".".join(str(part) for part in torch.cuda.nccl.version()),  # type: ignore[no-untyped-call]
    }
