"""Fault injection: train.py, with a fault at one place of one process.

    FAULT=kill@1:13 python tests/faults/inject.py experiment=smoke trainer.gpus=2

`FAULT=<name>@<rank>:<step>` strikes the process of that rank once its run has completed that many steps. A `+` at the
end repeats it in every attempt of an elastic launch, else only the first attempt is struck. The names:

    kill          SIGKILL
    stop          SIGTERM, as from a scheduler
    hang          the process sleeps for an hour
    nan           the weights of this process become NaN
    joining       SIGTERM before the processes join their group
    beginning     SIGTERM after that, before anything is built (step 0, as for joining)
    naming        SIGKILL when a file is written and not renamed yet (the step counts such files of a process)
    validation    SIGTERM as the next validation begins

`stop`, `joining`, `beginning` and `validation` with `-launcher` after them strike the parent process instead, with
`-group` the process group. This process goes on once the signal has reached it.

The functions are wrapped in the modules from which `train` takes them, so production code has no hook. Processes that
`launch` spawns import the script that was started, this one, and so are wrapped too. torchrun runs it.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PosixPath
from types import FrameType
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(CHECKOUT)  # as for train.py

import pytest  # noqa: E402
import torch.distributed  # noqa: E402

from recipe.run import files  # noqa: E402
from recipe.training import loop  # noqa: E402

VARIABLE = "FAULT"
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"


def inject(patch: pytest.MonkeyPatch) -> None:
    """Wrap everything that a fault can strike. Each wrapper reads the environment."""
    join, build, take_step, validate = (
        torch.distributed.init_process_group,
        loop.build_training,
        loop.take_step,
        loop.validate,
    )

    def joining(*arguments: Any, **options: Any) -> Any:
        stop("joining", int(os.environ.get("RANK", "0")), 0)
        return join(*arguments, **options)

    def beginning(config: Any, world: Any, *rest: Any) -> Any:
        stop("beginning", world.rank, 0)
        return build(config, world, *rest)

    def stepping(training: Any, batches: Any) -> None:
        strike(training.world.rank, training.progress.step, training.model.parameters())
        take_step(training, batches)

    def validating(training: Any, predict: Any) -> None:
        stop("validation", training.world.rank, training.progress.step)
        validate(training, predict)

    patch.setattr(torch.distributed, "init_process_group", joining)
    patch.setattr(loop, "build_training", beginning)
    patch.setattr(loop, "take_step", stepping)
    patch.setattr(loop, "validate", validating)
    patch.setattr(files, "temporary_sibling", naming(files.temporary_sibling))


@contextmanager
def injected(fault: str) -> Iterator[None]:
    """The same in this process, inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, fault)
        inject(patch)
        yield


def is_due(name: str, rank: int, step: int) -> bool:
    """Whether the fault of this name strikes here and now."""
    fault = os.environ.get(VARIABLE, "")
    is_first_attempt = os.environ.get(ATTEMPT, "0") == "0"
    return (is_first_attempt or fault.endswith("+")) and fault.rstrip("+") == f"{name}@{rank}:{step}"


def strike(rank: int, step: int, weights: Iterable[torch.Tensor]) -> None:
    """A fault between two steps."""
    if is_due("kill", rank, step):
        os.kill(os.getpid(), signal.SIGKILL)
    stop("stop", rank, step)
    if is_due("nan", rank, step):
        for tensor in weights:
            tensor.detach().fill_(float("nan"))
    if is_due("hang", rank, step):
        time.sleep(3600)


def stop(place: str, rank: int, step: int) -> None:
    """SIGTERM at this place, to this process, its launcher or its group."""
    if is_due(place, rank, step):
        os.kill(os.getpid(), signal.SIGTERM)
    if is_due(f"{place}-launcher", rank, step):
        _send_and_wait(lambda: os.kill(os.getppid(), signal.SIGTERM))
    if is_due(f"{place}-group", rank, step):
        _send_and_wait(lambda: os.killpg(0, signal.SIGTERM))


def naming(temporary_sibling: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """`recipe.run.files.temporary_sibling` whose n-th file ends the process before it is renamed."""
    numbers = itertools.count()

    class Unnamed(PosixPath):
        def replace(self, target: Any) -> Any:
            if is_due("naming", int(os.environ.get("RANK", "0")), next(numbers)):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().replace(target)

    @contextmanager
    def sibling(path: Path) -> Iterator[Path]:
        with temporary_sibling(path) as temporary:
            yield Unnamed(temporary)

    return sibling


def _send_and_wait(send: Callable[[], None]) -> None:
    """Send SIGTERM to others and wait for it to be handed on to this process, which it may end."""
    handler, has_come = signal.getsignal(signal.SIGTERM), [False]

    def noting(number: int, frame: FrameType | None) -> None:
        has_come[0] = True
        if callable(handler):
            handler(number, frame)

    if handler is not signal.SIG_DFL:
        signal.signal(signal.SIGTERM, noting)
    send()
    while not has_come[0]:
        time.sleep(0.01)
    signal.signal(signal.SIGTERM, handler)


if __name__ in ("__main__", "__mp_main__"):  # this script, and a process that it spawns
    inject(pytest.MonkeyPatch())
if __name__ == "__main__":
    sys.argv[0] = str(CHECKOUT / "train.py")
    exec(compile(Path(sys.argv[0]).read_bytes(), sys.argv[0], "exec"))
