"""Commands in processes of their own, forked from one that has imported PyTorch: that saves seconds for each."""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]  # nothing of `recipe` is imported here: each process imports it for itself
SECONDS = 240
IMPORTED = ("torchvision.transforms.v2", "hydra", "matplotlib.figure", "torch.utils.tensorboard", "scipy.io")


def run_python(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python COMMAND` in a folder: a script of the checkout, or `-m` and a module, with their words."""
    with TemporaryDirectory() as folder:
        return _ordered(list(command), cwd, Path(folder, "out"), Path(folder, "err"))


def _ordered(command: list[str], cwd: Path, out: Path, err: Path) -> subprocess.CompletedProcess[str]:
    order = {
        "command": command,
        "cwd": str(cwd),
        "streams": [str(out), str(err)],
        "environment": dict(os.environ),
    }
    starter = _starter()
    assert starter.stdin is not None
    assert starter.stdout is not None
    starter.stdin.write(json.dumps(order) + "\n")
    starter.stdin.flush()
    code = int(starter.stdout.readline())
    return subprocess.CompletedProcess([sys.executable, *command], code, out.read_text(), err.read_text())


@cache
def _starter() -> subprocess.Popen[str]:
    starter = subprocess.Popen(
        [sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(starter.communicate)  # it ends with its input
    return starter


def _forked() -> list[str]:
    """In the starter: fork for each order and answer with the exit code. In a forked process: return its command."""
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            signal.alarm(SECONDS)
            os.chdir(order["cwd"])
            os.environ.clear()
            os.environ.update(order["environment"])
            for number, path in enumerate((os.devnull, *order["streams"])):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666), number)
            command: list[str] = order["command"]
            return command
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    raise SystemExit


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    for name in IMPORTED:
        import_module(name)
    sys.argv = _forked()
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
