"""One way to run a function on all processes, three ways to start it.

`launch` calls the worker in this process where one is enough, through torch's own elastic engine for
`trainer.gpus=N`, and simply calls it where torchrun already started us. Inside, a `World` says who we are and holds
the few reductions that the pipeline needs. There is no home-made launcher, rendezvous or retry.
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
BEGUN_FILE = "RECIPE_BEGUN_FILE"  # names, in a process that we launched, what shows that there is something to lose
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # names, in a process that was launched, where its reason is looked for


def launch(worker: Callable[[Config], Result], config: Config) -> Result:
    """Call `worker(config)` once per process and return the first one's result.

    Workers that are started here import the calling script again, so it must guard its `main`. A signal that reaches
    the launcher is handed on to all of them; one that it ignores, as under nohup, they ignore too. Raises `WorkerError`
    with the first failing worker's sentence and exit code, and leaves with exit code 75 where they were stopped and
    saved.
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
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the one sentence says what they would say in twenty lines
    with TemporaryDirectory() as folder:
        return _launched(settings, worker, config, Path(folder, "saved"))


def _launched(settings: LaunchConfig, worker: Callable[[Config], Result], config: Config, saved: Path) -> Result:
    """The first process's result; the file `saved` says afterwards whether they left in order."""
    start_resource_tracker()
    started = time.time()
    with handlers_put_back():  # the engine leaves its own
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
                print(f"stopped before anything began; {how_to_continue()}", file=sys.stderr)
                raise SystemExit(SAVED) from None
            print(f"stopped by {signal.Signals(stopped.sigval).name}; {how_to_continue()}", file=sys.stderr)
            raise SystemExit(128 + stopped.sigval) from None
    return results[0]


def _started_worker(worker: Callable[[Config], Result], config: Config, saved: Path) -> Result:
    """Runs in each started process: leaves the reason of a failure where the launcher looks for it."""
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
    """Exists once a process has met the others: from then on the worker answers signals."""
    return saved.with_name("begun")


def _traceback_of_rank() -> str:
    return f"rank {os.environ.get('RANK', 0)} failed:\n{traceback.format_exc()}"


def leave_reason(message: str) -> None:
    """Write the elastic engine's error file; it reports the earliest of all processes."""
    file = os.environ.get(ERROR_FILE)
    if file is not None:
        with open(file, "w") as handle:
            json.dump({"message": message, "timestamp": str(int(time.time()))}, handle)


def _stacks(run: Run, started: float) -> str:
    """Where to look after a hang: NCCL ends a process that waited in vain before it could say so itself."""
    new = [path for path in run.hangs.glob("*.txt") if path.stat().st_size and path.stat().st_mtime >= started]
    return f"where the processes stood is in {display_path(run.hangs)}; " if new else ""


def _as_worker_error(failure: ChildFailedError, stacks: str = "") -> WorkerError:
    """The earliest failure; a sentence for people goes before what broke in other processes because of it."""
    _, first = failure.get_first_failure()
    for other in failure.failures.values():
        if first.exitcode in (1, -signal.SIGABRT) and other.exitcode > 1:
            first = other
    if first.exitcode < 0 and Path(first.error_file).is_file():  # threads of its group aborted it as it ended
        return WorkerError(str(first.message), 1)
    if first.exitcode < 0:
        return WorkerError(
            f"the process of rank {first.local_rank} was ended by {first.signal_name()}; {stacks}{how_to_continue()}",
            128 - first.exitcode,
        )
    return WorkerError(str(first.message), first.exitcode)


def processes_per_node(trainer: TrainerConfig) -> int:
    """How many processes this node runs: torchrun's number, else `trainer.gpus`, else every GPU, else one."""
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
    """All processes of a run, seen from one of them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    backend: str  # nccl, gloo, or "none" where there is one process

    @property
    def is_rank0(self) -> bool:
        """Whether this process writes files: only one does."""
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
        """Every process's value, in the order of ranks, on the first process; None on the others."""
        if self.size == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.size if self.is_rank0 else None
        dist.gather_object(value, gathered)
        return gathered

    def broadcast_from_rank0(self, value: Any) -> Any:
        """The first process's value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def read_on_rank0(self, read: Callable[[], Any]) -> Any:
        """What `read` returns on the first process, on every process; if it fails there, every process stops."""
        found = None
        with self.rank0_errors_everywhere():
            found = read() if self.is_rank0 else None
        return self.broadcast_from_rank0(found)

    def broadcast_module(self, module: nn.Module) -> None:
        """Make parameters and buffers equal to the first process's, which are the truth."""
        if self.size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    def assert_equal_across_ranks(self, what: str, value: str) -> None:
        """Stop on every process unless all of them hold the same value (a stale checkout on one node, say)."""
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
        """A block that only the first process fills; if it fails there, every process stops."""
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
    """Join the other processes, choose the device and the arithmetic; leave them at the end."""
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
    """Find the other processes; where we launched them ourselves, note that they have met."""
    _meet(world.backend, timeout, world.device if world.device.type == "cuda" else None)
    if BEGUN_FILE in os.environ:
        Path(os.environ[BEGUN_FILE]).touch()


def join(timeout: timedelta) -> dist.Store:  # type: ignore[name-defined]
    """Join the other processes by gloo alone, without a device; returns a store for messages between them.

    Raises `UserError` where they cannot be reached.
    """
    _end_with_launcher()
    _check_addresses()
    try:
        _meet("gloo", timeout)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False)  # type: ignore[attr-defined]
    except RuntimeError as error:
        raise UserError(
            f"the processes of this launch cannot reach each other ({str(error).splitlines()[0]}); where the name of a "
            "node does not lead to its network address, name its interface in GLOO_SOCKET_IFNAME"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"messages{attempt}", store)  # type: ignore[attr-defined]


def _meet(backend: str, timeout: timedelta, device: torch.device | None = None) -> None:
    """Find the other processes through the launcher's store, apart from what those of an earlier attempt left there.

    The store of torch 2.15 outlives a restart and hands out the addresses of the dead (pytorch#167288).
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
    """On several nodes each counts restarts for itself, so the count cannot tell attempts apart there."""
    nodes, restarts = (int(os.environ.get(name, "0")) for name in ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"))
    if nodes > 1 and restarts > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            f"torchrun --max-restarts={restarts} on {nodes} nodes cannot restart with torch {torch.__version__} as it "
            "is: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node, or leave --max-restarts out"
        )


def _end_with_launcher() -> None:
    """Have the kernel end this process when its launcher is gone (Linux): torchrun leaves orphans when it is killed."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it went in between
        os.kill(os.getpid(), signal.SIGKILL)


def _leave_group(world: World, has_failed: bool) -> None:
    """A launched process that failed does not leave: it ends, and the launcher ends the others.

    With NCCL, leaving waits for the others, who wait for this one in a collective until the time-out.
    """
    if world.size > 1 and not (has_failed and ERROR_FILE in os.environ):
        dist.destroy_process_group()


def _check_device(trainer: TrainerConfig, device: torch.device) -> None:
    """Stop with one sentence where this torch or this GPU cannot do what is asked."""
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
    """Threads, determinism and the current device: the same for torchrun and for our own start."""
    torch.set_num_threads(threads_per_process(trainer.torch_threads, world))
    torch.use_deterministic_algorithms(trainer.deterministic)
    torch.backends.cudnn.benchmark = not trainer.deterministic
    if world.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # only read in deterministic mode
        torch.cuda.set_device(world.device)


def memory_format(trainer: TrainerConfig) -> torch.memory_format:
    return torch.channels_last if trainer.channels_last else torch.contiguous_format


def threads_per_process(asked: int | None, world: World) -> int:
    """The asked number of threads, else this process's share of the cores."""
    return asked or max(1, usable_cores() // world.local_size)


def hardware_of(world: World) -> Hardware:
    """The machine, with the facts of the accelerator that torch knows."""
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
    """Torch's own switches that change the digits of a result, as they stand."""
    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolution": torch.backends.cudnn.allow_tf32,
        "cpu_threads_per_process": torch.get_num_threads(),
    }


def device_versions(world: World) -> dict[str, str]:
    """Torch with its build, which package versions leave out; CUDA, cuDNN and NCCL where they are used."""
    build = {"torch": str(torch.__version__)}
    if world.device.type != "cuda":
        return build
    return build | {
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        "nccl": ".".join(str(part) for part in torch.cuda.nccl.version()),  # type: ignore[no-untyped-call]
    }
