"""Everything that a machine with a GPU is wanted for, in one command: python benchmarks/hardware.py --raw-dir DIR

DIR holds CIFAR-10 as conf/data/cifar10.yaml describes it. The parts, the most valuable first where time is short: the
step beside its peers with floors and profile; the step of the reference recipe; with `--images` the loaders; then
`resnet50_cifar10` from raw images to a published recipe (several seeds, evaluation, export, latency, dynamics),
and `check`, `drift` and `verify` of it; last the best batch. Begin on a clean commit: `publish` refuses
any other.

Each part is a command that is printed and can be typed alone. A part that ended well is not run again by the same code,
so the same line continues where it stopped; one that fails costs only those that need it. `--seconds 540` stops what
runs then (training saves, and continues at the next call) and starts nothing more. What was printed, seconds and, where
the driver counts it, the energy of the machine's GPUs are kept for each part in runs/hardware/; only `publish` writes
where git looks.

`--small` is the same list with a network and images that a CPU trains in seconds, into runs/hardware-small/ and
nowhere else: it shows that the commands fit together, and none of its numbers means anything.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from recipe.run.provenance import source_sha256  # noqa: E402
from recipe.training.record import accelerator_joules  # noqa: E402

SAVED = 75  # exit code of a training that was stopped and can be continued
PATIENCE_SECONDS = 60  # for a part that was told to stop


@dataclass(frozen=True)
class Part:
    """One command, and the parts without which it makes no sense."""

    name: str
    words: list[str]  # what follows `python`
    needs: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        return " ".join(["python", *(f"'{word}'" if " " in word else word for word in self.words)])


@dataclass
class Outcome:
    """How a part went; `code` is None where it was not started."""

    name: str
    command: str
    said: str
    code: int | None = None
    seconds: float | None = None
    source: str = ""  # hash of the code that ran: a part of other code is run again
    joules: float | None = None  # of all GPUs of the machine, by the driver's own counter; None: it has none

    @property
    def is_done(self) -> bool:
        return self.code == 0


def main() -> None:
    """Run what is not done yet, and leave the report."""
    arguments = parsed()
    os.chdir(CHECKOUT)
    until = time.monotonic() + arguments.seconds if arguments.seconds else None
    work = Path("runs", "hardware-small" if arguments.small else "hardware")
    parts = chosen((small_parts if arguments.small else parts_of)(arguments, work), arguments.skip)
    if arguments.list:
        print("\n".join(part.command for part in parts))
        return
    outcomes: dict[str, Outcome] = {}
    for part in parts:
        outcomes[part.name] = outcome = one(part, outcomes, work, until)
        print(f"-- {part.name}: {outcome.said}", flush=True)
    report = work / "report.md"
    report.write_text(table(list(outcomes.values())))
    print(f"wrote {report}; what is to be kept: cp {work}/results/* benchmarks/results/")
    raise SystemExit(0 if all(outcome.is_done for outcome in outcomes.values()) else 1)


def chosen(parts: Iterable[Part], skipped: list[str]) -> list[Part]:
    """All but those to leave out; what needs one of these is not started."""
    every = list(parts)
    if unknown := set(skipped) - {part.name for part in every}:
        raise SystemExit(f"--skip {' '.join(sorted(unknown))}: the parts are {', '.join(part.name for part in every)}")
    return [part for part in every if part.name not in skipped]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw-dir", type=Path, help="CIFAR-10 as train/<class>/ and val/<class>/ (not with --small)")
    parser.add_argument("--images", type=Path, help="a folder of JPEG files of ImageNet's size, for the loaders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--words", nargs="*", default=[], help="key=value for train.py, such as trainer.compile=true")
    parser.add_argument("--seconds", type=float, default=0, help="start nothing after so long; 0: no limit")
    parser.add_argument("--small", action="store_true", help="a rehearsal on a CPU; publishes nothing into recipes/")
    parser.add_argument("--skip", nargs="*", default=[], metavar="PART", help="names of parts to leave out")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    arguments = parser.parse_args()
    if not arguments.small and arguments.raw_dir is None:
        parser.error("give --raw-dir DIR, or --small")
    arguments.raw_dir = arguments.raw_dir and arguments.raw_dir.resolve()
    arguments.images = arguments.images and arguments.images.resolve()
    return arguments


# ---- the parts --------------------------------------------------------------------------------------


def parts_of(arguments: argparse.Namespace, work: Path) -> Iterator[Part]:
    """On a machine with a GPU."""
    step = ["benchmarks/step.py", "--results", f"{work}/results"]
    yield Part("step", [*step, "--profile", "--evaluation-pixels", "224"])
    ours = ["--only", "this project", "--batches", "128", "--evaluation-pixels", "224"]
    yield Part("step-reference", [*step, "--pixels", "176", *ours])
    words = ["experiment=resnet50_cifar10", f"data.raw_dir={arguments.raw_dir}"]
    runs = {seed: f"runs/resnet50_cifar10-seed-{seed}" for seed in arguments.seeds}
    if arguments.images:
        yield loading(arguments.images, work)
    yield from recipe_parts(words, arguments.words, runs, work, "recipes/resnet50_cifar10")
    yield Part("best-batch", [*step, "--batch", "512", "--batches", "128", "256", "1024", "--rounds", "3"])


def loading(images: Path, work: Path) -> Part:
    """The loaders that need no other package than the pipeline's and timm's."""
    words = ["--images", str(images), "--peers", "ours-processes,ours-threads,torchvision,timm", "--rounds", "3"]
    return Part("loading", ["benchmarks/loading.py", *words, "--results", f"{work}/results"])


def small_parts(arguments: argparse.Namespace, work: Path) -> Iterator[Part]:
    """The same on a CPU, in minutes."""
    small = ["--batch", "4", "--batches", "2", "--pixels", "32", "--rounds", "1", "--steps", "1", "--precision", "fp32"]
    step = ["benchmarks/step.py", "--results", f"{work}/results", *small]
    yield Part("step", [*step, "--only", "eager", "--profile", "--evaluation-pixels", "32"])
    words = ["experiment=smoke", f"data.directory={work}/data", f"data.raw_dir={work}/raw"]
    runs = {seed: f"{work}/seed-{seed}" for seed in arguments.seeds[:2]}
    yield from recipe_parts(words, arguments.words, runs, work, f"{work}/recipes/smoke")


def recipe_parts(
    words: list[str], of_training: list[str], runs: dict[int, str], work: Path, output: str
) -> Iterator[Part]:
    """From raw images to a published recipe that was looked through; the first seed's is the one that is shown."""
    yield Part("preprocess", ["preprocess.py", *words, f"run_dir={next(iter(runs.values()))}"])
    yield Part("doctor", ["-m", "recipe", "doctor", *words, *of_training], ("preprocess",))
    for seed, run in runs.items():
        train = ["train.py", *words, *of_training, f"seed={seed}", f"run_dir={run}"]
        yield Part(f"train-{seed}", train, ("preprocess",))
        yield Part(f"evaluate-{seed}", ["evaluate.py", f"run_dir={run}", data_word(words)], (f"train-{seed}",))
    first, *others = runs
    shown, evaluated = runs[first], tuple(f"evaluate-{seed}" for seed in runs)
    is_small = words[0] == "experiment=smoke"
    # a network that has hardly begun to learn loses more to int8
    gate = ["serialization.int8_accuracy_drop_max=0.2"] if is_small else []
    yield Part("serialize", ["serialize.py", f"run_dir={shown}", data_word(words), *gate], (f"evaluate-{first}",))
    timing = ["timing.seconds_per_cell=0.2", "timing.batch_sizes=[1]"] if is_small else []
    notebook = ["-m", "recipe.stages.infer", f"run_dir={shown}", data_word(words), *timing]
    yield Part("latency", notebook, (f"evaluate-{first}",))
    dynamics = ["-m", "recipe", "watch", "--against", *runs.values(), "--save", f"{work}/seeds.json"]
    yield Part("dynamics", dynamics, evaluated)
    publish = ["-m", "recipe", "publish", shown, "--output", output]
    yield Part("publish", [*publish, *(["--seeds", *(runs[seed] for seed in others)] if others else [])], evaluated)
    for verb in ("check", "drift", "verify"):
        yield Part(verb, ["-m", "recipe", verb, output], ("publish",))
    data = [f"--data-dir={work}/data", f"--raw-dir={work}/raw"] if is_small else []
    yield Part("verify-run", ["-m", "recipe", "verify", shown, *data], evaluated)  # with weights and data beside it


def data_word(words: list[str]) -> str:
    """Where the processed data are, where that is not the usual place; else a word that changes nothing."""
    return next((word for word in words if word.startswith("data.directory=")), "experiment=resnet50_cifar10")


# ---- running ----------------------------------------------------------------------------------------


def one(part: Part, outcomes: dict[str, Outcome], work: Path, until: float | None) -> Outcome:
    """Run a part, unless it is done, cannot be, or time is up."""
    kept = work / "parts" / f"{part.name}.json"
    before = Outcome(**json.loads(kept.read_text())) if kept.exists() else None
    print(f"$ {part.command}", flush=True)
    source = source_sha256()
    same = before is not None and (before.command, before.source) == (part.command, source)
    if before is not None and before.is_done and same:
        before.said = f"done before, {before.seconds:.0f} s"
        return before
    missing = [name for name in part.needs if name not in outcomes or not outcomes[name].is_done]
    if missing:
        return Outcome(part.name, part.command, f"not started: it needs {', '.join(missing)}")
    if until is not None and time.monotonic() >= until:
        return Outcome(part.name, part.command, "not started: time is up")
    outcome = run(part, work / "logs" / f"{part.name}.txt", until)
    outcome.source = source
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(asdict(outcome), indent=2) + "\n")
    return outcome


def run(part: Part, log: Path, until: float | None) -> Outcome:
    """The command, with its words shown and kept."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    joules, started = accelerator_joules(), time.monotonic()
    with log.open("w") as kept:
        process = subprocess.Popen(
            [sys.executable, *part.words], env=environment, stdout=kept, stderr=subprocess.STDOUT
        )
        code = ended(process, until)
    print(log.read_text(errors="replace")[-4000:], flush=True)
    after = accelerator_joules()
    spent = None if joules is None or after is None else round(after - joules, 1)
    seconds = time.monotonic() - started
    said = "done" if code == 0 else "stopped, to be continued" if code == SAVED else f"FAILED with exit code {code}"
    return Outcome(part.name, part.command, f"{said}, {seconds:.0f} s", code, round(seconds, 1), spent)


def ended(process: subprocess.Popen[bytes], until: float | None) -> int:
    """The exit code; a command that runs when time is up is told to stop, and training saves."""
    try:
        return process.wait(None if until is None else max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def table(outcomes: list[Outcome]) -> str:
    """One row for each part."""
    lines = ["| Part | How it went | Seconds | Energy of the GPUs | Command |", "|:--|:--|--:|--:|:--|"]
    for found in outcomes:
        seconds = "–" if found.seconds is None else f"{found.seconds:,.1f}"
        energy = "no counter" if found.joules is None else f"{found.joules:,.0f} J"
        lines.append(f"| {found.name} | {found.said} | {seconds} | {energy} | `{found.command}` |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
