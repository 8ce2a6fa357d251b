"""Stops training at random steps and continues it, again and again: is what comes out the same, bit by bit?

`python benchmarks/cuts.py` trains the smoke network once without and once with 20 random cuts, by 1 and by 3 processes
on the CPU, and prints both hashes of the weights. Each cut is a SIGTERM to the whole program from inside a step; what
continues is the same command. Needs `python preprocess.py experiment=smoke` first; works in a temporary directory.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
SAVED = 75
BATCH_SIZE = 24


def main() -> None:
    """Compare, for each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("words", nargs="*", help="further key=value for train.py")
    options = parser.parse_args()
    same = [compare(processes, options) for processes in options.processes]
    raise SystemExit(0 if all(same) else 1)


def compare(processes: int, options: argparse.Namespace) -> bool:
    """One uninterrupted run and one that is cut; prints both hashes."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"trainer.gpus={processes}", f"optimization.epochs={options.epochs}", *options.words]
        steps, whole = finished(words, f"{folder}/whole")
        cuts = sorted(random.Random(options.seed).sample(range(steps), options.cuts))
        for number, step in enumerate(cuts):
            rank = number % processes  # one process alone is told
            code, output = train([*words, f"run_dir={folder}/cut"], fault=f"stop@{rank}:{step}")
            assert code == SAVED, output
        _, cut = finished(words, f"{folder}/cut")
    print(f"{processes} processes, {steps} steps, cut after {', '.join(map(str, cuts))}")
    print(
        f"  uninterrupted {whole}\n  cut {len(cuts)} times  {cut}\n  {'SAME' if whole == cut else 'DIFFERENT'}",
        flush=True,
    )
    return whole == cut


def finished(words: list[str], run_dir: str) -> tuple[int, str]:
    """Steps and weights hash of a run that trains to its end."""
    code, output = train([*words, f"run_dir={run_dir}"])
    assert code == 0, output
    *_, steps_line, hash_line = output.strip().splitlines()
    return int(steps_line.split()[2]), hash_line.split()[1]


def train(words: list[str], fault: str | None = None) -> tuple[int, str]:
    """Exit code and output of one command."""
    environment = {name: value for name, value in os.environ.items() if name != "FAULT"}
    command = [
        sys.executable,
        str(CHECKOUT / "tests" / "faults" / "inject.py"),
        "experiment=smoke",
        f"optimization.batch_size={BATCH_SIZE}",
    ]
    done = subprocess.run(
        [*command, "trainer.accelerator=cpu", *words],
        env=environment | ({"FAULT": fault} if fault else {}),
        stdout=subprocess.PIPE,
        stderr=None if fault is None else subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


if __name__ == "__main__":
    main()
