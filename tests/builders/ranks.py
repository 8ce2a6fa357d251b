"""Runs a function in several processes joined by gloo, as torchrun would, and gives every rank's result."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def spawn_ranks(size: int, worker: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`worker(*arguments)` in `size` fresh processes; the results in the order of ranks."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    port = free_port()
    processes = [
        context.Process(target=_run, args=(rank, size, port, results, worker, arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
    failed = [value for is_result, value in found.values() if not is_result]
    assert not failed, "\n".join(failed)
    return [found[rank][1] for rank in range(size)]


def _run(rank: int, size: int, port: int, results: Any, worker: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= torchrun_environment(rank, size) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        results.put((rank, (True, worker(*arguments))))
    except BaseException:
        results.put((rank, (False, traceback.format_exc())))


def torchrun_environment(rank: int, size: int, nodes: int = 1) -> dict[str, str]:
    """What torchrun sets in each of its processes, as far as it says which of how many that is."""
    local_size = size // nodes
    return {
        "TORCHELASTIC_RUN_ID": "1",
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank % local_size),
        "LOCAL_WORLD_SIZE": str(local_size),
    }


def use_next_port() -> None:
    """Before ranks join again in the same processes: the first one's old store may still be there."""
    if "MASTER_PORT" in os.environ:
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
