"""The commands as a user types them, in processes of their own and in a directory of their own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from recipe.errors import SAVED
from recipe.run.files import CHECKOUT
from tests.builders.commands import run_python
from tests.builders.configs import SMALL_DEMO
from tests.builders.images import jpeg
from tests.builders.layouts import write_files

pytestmark = pytest.mark.process

Command = Callable[..., subprocess.CompletedProcess[str]]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
FASTER = ["optimization.batch_size=24"]


@pytest.fixture
def run_command(data_directory: Path, tmp_path: Path) -> Command:
    """Run a script of the checkout from an empty directory, on the small data set."""
    return command_in(tmp_path, data_directory)


@pytest.fixture(scope="session")
def trained_once(data_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which `train.py` has left the run `x`."""
    directory = tmp_path_factory.mktemp("trained")
    command_in(directory, data_directory)("train.py", "run_dir=x", "optimization.epochs=1")
    return directory


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    """A copy of that run, `x` in the test's own directory."""
    shutil.copytree(trained_once / "x", tmp_path / "x")
    return tmp_path / "x"


def command_in(directory: Path, data_directory: Path) -> Command:
    """Runs scripts as a user who stands in `directory`."""

    def run(
        script: str,
        *words: str,
        launcher: tuple[str, ...] = (sys.executable,),
        data: bool = True,
        experiment: str = "smoke",
        code: int = 0,
    ) -> subprocess.CompletedProcess[str]:
        common = [f"data.directory={data_directory}"] if data else []
        if script != "evaluate.py":
            common += [f"experiment={experiment}", *SMALL_DEMO, *FASTER]
        command = [str(CHECKOUT / script), *flags(words), *common, *settings(words)]
        if launcher == (sys.executable,):
            done = run_python(*command, cwd=directory)
        else:
            done = subprocess.run(
                [*launcher, *command], cwd=directory, text=True, capture_output=True, timeout=240, check=False
            )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


def flags(words: tuple[str, ...]) -> list[str]:
    """Hydra wants these before the values."""
    return [word for word in words if word.startswith("-")]


def settings(words: tuple[str, ...]) -> list[str]:
    """The values, of which later ones win."""
    return [word for word in words if not word.startswith("-")]


def last_hash(done: subprocess.CompletedProcess[str]) -> str:
    """The weights hash: the last line of training."""
    name, value = done.stdout.strip().splitlines()[-1].split()
    assert name == "weights_sha256"
    return value


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.slow
def test_two_processes_by_either_launch_give_the_same_weights_and_leave_nothing_else(
    run_command: Command, tmp_path: Path
) -> None:
    ours = run_command("train.py", "trainer.accelerator=cpu", "trainer.gpus=2", "run_dir=A")
    torchs = run_command("train.py", "trainer.accelerator=cpu", "run_dir=B", launcher=(*TORCHRUN, "--nproc-per-node=2"))
    assert last_hash(ours) == last_hash(torchs)
    assert names(tmp_path) == {"A", "B", "runs"}
    known = {
        "config.yaml",
        "records",
        "metrics.jsonl",
        "checkpoints",
        "figures",
        "tensorboard",
        "recipe.md",
        "recipe.json",
        "lock",
    }
    assert names(tmp_path / "A") == names(tmp_path / "B") == known
    assert "torchrun --nnodes=1 --nproc-per-node=2 train.py" in (tmp_path / "B" / "recipe.md").read_text()
    assert "python train.py" in (tmp_path / "A" / "recipe.md").read_text()


def test_a_multirun_gets_a_directory_for_each_value(run_command: Command, tmp_path: Path) -> None:
    run_command("train.py", "-m", "seed=1,2", "optimization.epochs=1")
    assert names(tmp_path) == {"runs"}
    assert names(tmp_path / "runs") == {"smoke-seed-1", "smoke-seed-2", "journal.jsonl", "multirun"}
    assert (tmp_path / "runs" / "smoke-seed-2" / "recipe.md").exists()


@pytest.mark.slow
def test_a_sweep_goes_on_after_jobs_that_are_refused_or_diverge(run_command: Command, tmp_path: Path) -> None:
    """What a failed job leaves in the process changes nothing in the next: its weights are those of a run alone."""
    words = ("optimization.epochs=1", "optimization.learning_rate")
    done = run_command("train.py", "-m", words[0], f"{words[1]}=0,1e30,0.05", code=2)
    assert names(tmp_path / "runs") >= {f"smoke-{words[1]}-{rate}" for rate in ("1e+30", "0.05")}
    assert not list((tmp_path / "runs").glob("failed-jobs-*"))
    *_, headline, first, second = done.stderr.splitlines()
    assert headline == "2 of the jobs failed:"
    assert first.startswith(f"  {words[1]}=0 (exit code 2): {words[1]}=0.0 is invalid: must be above 0")
    assert second.startswith(f"  {words[1]}=1e+30 (exit code 65): ")
    alone = run_command("train.py", words[0], f"{words[1]}=0.05", "run_dir=alone")
    assert last_hash(done) == last_hash(alone)


@pytest.mark.parametrize("wrong", ["optimization.batch_size=abc", "model=nosuch"])
def test_a_value_that_cannot_be_composed_is_a_failed_job_like_others(
    wrong: str, run_command: Command, tmp_path: Path
) -> None:
    key, right = wrong.partition("=")[0], "16" if "batch_size" in wrong else "small"
    done = run_command("train.py", "-m", "optimization.epochs=1", f"{wrong},{right}", code=2)
    assert names(tmp_path / "runs") == {f"smoke-{key}-{right}", "journal.jsonl", "multirun"}
    *_, headline, failed = done.stderr.splitlines()
    assert headline == "1 of the jobs failed:"
    assert failed.startswith(f"  {wrong} (exit code 2): ")


def test_a_sweep_without_a_value_that_can_be_composed_is_refused(run_command: Command, tmp_path: Path) -> None:
    assert "nosuch" in run_command("train.py", "-m", "model=nosuch,neither", code=2).stderr
    assert names(tmp_path / "runs") == {"multirun"}


def test_sweeps_of_the_other_stages_go_on_too(run_command: Command, trained: Path, tmp_path: Path) -> None:
    done = run_command("evaluate.py", "-m", "run_dir=nowhere,x", code=2)
    assert "top-1" in done.stdout
    assert "1 of the jobs failed:\n  run_dir=nowhere (exit code 2): nowhere is not a run" in done.stderr
    done = run_command("preprocess.py", "-m", "data.directory=/dev/null/new,new", data=False, code=74)
    assert "1 of the jobs failed:\n  data.directory=/dev/null/new (exit code 74): cannot write" in done.stderr
    assert (tmp_path / "new" / "manifest.json").exists()


SCRIPT = """
import signal
import hydra
from recipe.config.compose import one_job, run_command

@hydra.main(version_base="1.3", config_path={conf!r}, config_name="config")
def main(composed):
    with one_job():
        if composed.seed == 1:
            raise TypeError("a fault of ours")
        if composed.seed == 2:
            raise SystemExit(75)
        if composed.seed == 3:
            signal.raise_signal(signal.SIGINT)
        print("job", composed.seed)

run_command(main)
"""


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize(
    ("seeds", "code", "ran"), [("0,1,4", 1, ["job 0", "job 4"]), ("1,0,2,4", 75, ["job 0"]), ("0,3,4", 130, ["job 0"])]
)
def test_a_bug_ends_its_job_and_a_signal_ends_the_sweep(tmp_path: Path, seeds: str, code: int, ran: list[str]) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(conf=str(CHECKOUT / "conf")))
    done = subprocess.run(
        [sys.executable, "script.py", "-m", f"seed={seeds}"],
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        text=True,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()) == (code, ran), done.stderr
    if "1" in seeds:
        assert done.stderr.count("Traceback") == 1
        assert "1 of the jobs failed:\n  seed=1 (exit code 1): TypeError: a fault of ours\n" in done.stderr
    else:
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.slow
def test_a_sweep_of_several_processes_goes_on(run_command: Command, tmp_path: Path) -> None:
    words = ("trainer.gpus=2", "trainer.accelerator=cpu", "optimization.epochs=1")
    done = run_command("train.py", "-m", *words, "optimization.learning_rate=1e30,0.05", code=65)
    alone = run_command("train.py", *words, "optimization.learning_rate=0.05", "run_dir=alone")
    assert last_hash(done) == last_hash(alone)


@pytest.mark.slow
def test_a_failed_job_of_a_scheduler_is_named_too(run_command: Command, tmp_path: Path) -> None:
    words = ("optimization.epochs=1", "hydra/launcher=submitit_local")
    done = run_command("train.py", "-m", *words, "optimization.learning_rate=0.05,0,1e30", code=2)
    assert (tmp_path / "runs" / "smoke-optimization.learning_rate-0.05" / "recipe.md").exists()
    *_, headline, first, second = done.stderr.splitlines()
    assert headline == "2 of the jobs failed:"
    assert "learning_rate=0 (exit code 2)" in first
    assert "learning_rate=1e+30 (exit code 65)" in second
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.slow
def test_a_sweep_that_a_scheduler_runs_has_the_same_directories_and_commands(
    run_command: Command, tmp_path: Path
) -> None:
    """Submitit as for Slurm, its jobs on this machine: in a job the command line is the launcher's own."""
    run_command("train.py", "-m", "seed=1,2", "optimization.epochs=1", "hydra/launcher=submitit_local")
    assert names(tmp_path) == {"runs"}
    assert names(tmp_path / "runs") == {"smoke-seed-1", "smoke-seed-2", "journal.jsonl", "multirun"}
    document = (tmp_path / "runs" / "smoke-seed-2" / "recipe.md").read_text()
    assert "python train.py -m" in document
    assert "submitit.core" not in document


@pytest.mark.parametrize("name", ["my images (v2)=[a], b's", "x$HOME ${name} `id` \\", '-n "50%" #;*&', "caf\udce9"])
def test_every_stage_finds_a_folder_of_any_name(run_command: Command, tmp_path: Path, name: str) -> None:
    for class_id in ("cat", "dog"):
        write_files(tmp_path / name / class_id, {f"{number:02d}": jpeg(f"{number:02d}") for number in range(60)})
    words = (f"data.raw_dir={name}", "data=folder", "data.name=mine", f"data.directory={name} out", "name=mine")
    words = (*words, f"run_dir={name} run", "optimization.epochs=1")
    for script in ("preprocess.py", "train.py"):
        run_command(script, *words, data=False)
    run_command("evaluate.py", f"run_dir={name} run", f"data.directory={name} out", data=False)
    assert names(tmp_path) == {name, f"{name} out", f"{name} run", "runs"}


@pytest.mark.parametrize(
    "name", ["my images", "my(images)", "a;b", "x$HOME", "$(HOME)$$", "it's", 'a"b`id`', "a=b", "-x", "~", "*", "#\\"]
)
def test_make_hands_the_folder_on_as_it_was_given(tmp_path: Path, name: str) -> None:
    """By make's own grammar and the environment's. A program that prints its words stands in for Python."""
    shutil.copy(CHECKOUT / "Makefile", tmp_path)
    for file in ("pyproject.toml", "constraints.txt", ".venv/installed-constraints.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)

    def words_of(*given: str, **environment: str) -> list[str]:
        done = subprocess.run(
            ["make", "-s", *given],
            cwd=tmp_path,
            env=os.environ | environment,
            text=True,
            capture_output=True,
            check=True,
        )
        return done.stdout.splitlines()

    words = ["train.py", "experiment=smoke", f"data.raw_dir={name}", "seed=3", "name=a b", "trainer.gpus=2"]
    others = ("EXPERIMENT=smoke", "ARGS=seed=3 name='a b'", "GPUS=2")
    assert words_of("train", f"RAW_DIR={name}", *others) == words
    assert words_of("train", *others, RAW_DIR=name) == words
    assert words_of("train") == ["train.py", "experiment=demo"]
    assert words_of("hardware", f"RAW_DIR={name}") == ["benchmarks/hardware.py", f"--raw-dir={name}"]
    assert f"RAW_DIR={name} " in words_of("help", f"RAW_DIR={name}")[-1]


def test_evaluation_repeats_nothing_and_names_its_protocol(run_command: Command, trained: Path) -> None:
    plain = run_command("evaluate.py", "run_dir=x")
    assert "resize28-crop24-bilinear" in plain.stdout
    other = run_command("evaluate.py", "run_dir=x", "evaluation.resize_pixels=24", "evaluation.checkpoint=best")
    assert "resize24-crop24-bilinear-best" in other.stdout
    assert "stale" not in (trained / "recipe.md").read_text()
    refused = run_command("evaluate.py", "run_dir=x", "optimization.epochs=7", code=2)
    assert "optimization.epochs: 1 -> 7" in refused.stderr
    refused = run_command("evaluate.py", "run_dir=x", "experiment=demo", code=2)
    assert "experiment=smoke" in refused.stderr
    assert one_sentence(refused)


@pytest.mark.slow
def test_a_run_killed_after_an_epoch_ends_with_the_uninterrupted_weights(
    run_command: Command, data_directory: Path, tmp_path: Path
) -> None:
    whole = run_command("train.py", "run_dir=whole", "optimization.epochs=6")
    process = started_training(data_directory, tmp_path, "run_dir=cut", "optimization.epochs=6")
    wait_until(lambda: any((tmp_path / "cut" / "checkpoints").glob("step-*.pt")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "cut" / "records" / "training.json").exists()
    continued = run_command("train.py", "run_dir=cut", "optimization.epochs=6")
    assert "continuing in epoch" in continued.stderr
    assert last_hash(continued) == last_hash(whole)
    again = run_command("train.py", "run_dir=cut", "optimization.epochs=6")
    assert last_hash(again) == last_hash(whole)
    assert "epoch 1/6" not in again.stdout


def started_training(data_directory: Path, directory: Path, *words: str) -> subprocess.Popen[str]:
    """A training that is still going on, to be stopped from outside."""
    common = ["experiment=smoke", *SMALL_DEMO, *FASTER, f"data.directory={data_directory}"]
    return subprocess.Popen(
        [sys.executable, str(CHECKOUT / "train.py"), *common, *words],
        cwd=directory,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def one_sentence(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether the output is one line, without a traceback."""
    lines = done.stderr.strip().splitlines()
    return len(lines) == 1 and lines[0].startswith("error: ")


@pytest.mark.parametrize(
    ("script", "words", "named", "code"),
    [
        ("train.py", ["data.directory=nowhere"], "python preprocess.py", 2),
        (
            "train.py",
            ["optimization.batch_size=25", "trainer.max_micro_batch_size=10"],
            "nearest valid: 24 or 27",
            2,
        ),
        ("train.py", ["optimization.batch_size=1000"], "optimization.batch_size=1000", 2),
        ("train.py", ["trainer.accelerator=auto", "trainer.gpus=8"], "trainer.gpus=8, but torch", 2),
        ("train.py", ["trainer.accelerator=cuda"], "trainer.accelerator=cuda, but torch", 2),
        ("train.py", ["data.images_per_shard=7"], "images_per_shard: 40 -> 7", 2),
        ("train.py", ["run_dir=/dev/null/run"], "cannot write", 74),
        ("train.py", ["+trainer.foo=1"], "trainer.foo", 2),
        ("train.py", ["trainer.gpsu=8"], "did you mean trainer.gpus?", 2),
        ("train.py", ["trainer.gpus=many"], "trainer.gpus=many", 2),
        ("train.py", ["experiment=nope"], "resnet50_imagenet", 2),
        ("train.py", ["trainer"], "trainer", 2),
        ("train.py", ["model=torchvision", "model.name=resnet51"], "model.name=resnet51", 2),
        ("evaluate.py", ["run_dir=nowhere"], "python train.py", 2),
        ("preprocess.py", ["data=imagenet", "data.directory=new", "data.raw_dir=nowhere"], "nowhere", 2),
        ("preprocess.py", ["data=imagenet", "data.directory=new"], "data.raw_dir", 2),
    ],
)
def test_bad_input_gets_one_line(run_command: Command, script: str, words: list[str], named: str, code: int) -> None:
    done = run_command(script, *words, code=code, data=not any("data.directory" in word for word in words))
    assert named in done.stderr
    assert one_sentence(done), done.stderr


@pytest.mark.slow
def test_a_full_disk_is_reported_in_one_sentence(run_command: Command, data_directory: Path, tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "import os; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    done = run_command("train.py", "run_dir=full", launcher=(sys.executable, "-c", program), code=74)
    assert "cannot write" in done.stderr
    assert not list((tmp_path / "full").rglob("*.tmp-*"))


def in_shell(streams: str) -> tuple[str, ...]:
    """A launcher whose standard streams a shell has set up."""
    return ("bash", "-c", f'set -o pipefail; "$0" "$@" {streams}', sys.executable)


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("streams", ["2>&1 | head -n 1", "> /dev/full 2>&1", ">&- 2>&-"])
def test_training_goes_on_with_closed_output_streams(
    run_command: Command, tmp_path: Path, streams: str, gpus: int
) -> None:
    words = ("run_dir=x", "optimization.epochs=3", "trainer.log_every_steps=1", f"trainer.gpus={gpus}")
    run_command("train.py", *words, "trainer.accelerator=cpu", launcher=in_shell(streams))
    assert (tmp_path / "x" / "records" / "training.json").exists()
    assert (tmp_path / "x" / "recipe.md").exists()


@pytest.mark.slow
def test_the_other_stages_go_on_with_closed_output_streams(run_command: Command, trained: Path) -> None:
    launcher = in_shell("> /dev/full 2>&1")
    run_command("preprocess.py", "run_dir=x", launcher=launcher)
    run_command("evaluate.py", "run_dir=x", launcher=launcher)
    run_command("serialize.py", "run_dir=x", launcher=launcher)
    assert {"evaluation.json", "serialization.json"} <= {path.name for path in (trained / "records").iterdir()}


@pytest.mark.parametrize(
    ("variables", "code", "said"),
    [
        ({"WORLD_SIZE": "2"}, 2, "error: WORLD_SIZE=2 in the environment"),
        ({"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "1"}, 2, "error: WORLD_SIZE=4"),
        ({"WORLD_SIZE": "1", "RANK": "1", "LOCAL_RANK": "1"}, 0, "ignored, as torchrun did not start this: RANK=1"),
    ],
)
def test_variables_of_another_launcher_are_refused_or_ignored(
    run_command: Command, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], code: int, said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    words = ("run_dir=x", "optimization.epochs=1", "trainer.gpus=2", "trainer.accelerator=cpu")
    done = run_command("train.py", *words, code=code)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("default_signals")
def test_ctrl_c_ends_with_a_sentence_and_can_be_continued(data_directory: Path, tmp_path: Path) -> None:
    process = started_training(data_directory, tmp_path, "run_dir=x", "optimization.epochs=200")
    wait_until(lambda: any((tmp_path / "x" / "checkpoints").glob("*.sha256")))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == SAVED
    assert "run the same command to continue" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_run_outside_the_checkout_is_sound_and_its_commands_can_be_typed(
    run_command: Command, data_directory: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("out") / "my run"
    run_command("train.py", f"run_dir={run}", "optimization.epochs=1")
    (command,) = set(re.findall(r"run `(python evaluate[^`]+)`", (run / "recipe.md").read_text()))
    for name in ("evaluate.py", "conf"):  # a checkout whose journal is the test's own
        (tmp_path / name).symlink_to(CHECKOUT / name)
    places = {"RUN_DIR": str(run), "DATA_DIR": str(data_directory)}
    environment = os.environ | places | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True)
    checked = [sys.executable, "-m", "recipe", "check", str(run)]
    done = subprocess.run(checked, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("FINDING")]
    expected = ("not measured yet", "records/preprocessing.json, provenance.command")  # pytest made the data set
    assert not [line for line in found if not any(words in line for words in expected)]
    assert not done.stderr


@pytest.mark.slow
def test_no_file_of_a_run_names_a_path_a_host_or_a_user(run_command: Command, tmp_path: Path) -> None:
    run_command("preprocess.py", "run_dir=x")
    run_command("train.py", "run_dir=x", "optimization.epochs=1")
    run_command("evaluate.py", "run_dir=x")
    forbidden = [str(tmp_path), str(CHECKOUT), str(Path.home()), socket.gethostname(), sys.prefix]
    for path in (tmp_path / "x").rglob("*"):
        if path.is_file() and path.suffix != ".patch":  # a patch is the text of somebody's own files
            content = path.read_bytes()
            assert not [word for word in forbidden if len(word) > 5 and word.encode() in content], path
            assert socket.gethostname() not in path.name


@pytest.mark.slow
def test_a_run_with_a_name_of_its_own_is_evaluated_by_the_same_words(run_command: Command) -> None:
    words = ("name=mine", "run_dir=x", "optimization.epochs=1")
    run_command("train.py", *words)
    done = run_command("evaluate.py", "experiment=smoke", *SMALL_DEMO, *FASTER, *words)
    assert "top-1" in done.stdout


@pytest.mark.slow
def test_a_restart_moves_an_edited_document_aside(run_command: Command, trained: Path, tmp_path: Path) -> None:
    document = trained / "recipe.md"
    edited = document.read_text().replace("## Training", "## My training")
    document.write_text(edited)
    run_command("train.py", "run_dir=x", "optimization.epochs=1", code=2)
    run_command("train.py", "run_dir=x", "optimization.epochs=1", "trainer.start_over=true")
    assert (tmp_path / "x.old-1" / "recipe.md").read_text() == edited


@pytest.mark.slow
def test_a_first_try_that_stopped_before_training_can_be_corrected(run_command: Command) -> None:
    run_command("train.py", "run_dir=x", "optimization.batch_size=1000", code=2)
    run_command("train.py", "run_dir=x", "optimization.epochs=1")


@pytest.mark.parametrize(
    ("line", "changed", "named"),
    [
        ("seed: 0", "seed: zero", "seed"),
        ("seed: 0", "seed: 0\nfoo: 1", "foo is unknown"),
        ("seed: 0", "", "seed is missing"),
        ("name: smoke", "name: ../x", "name"),
    ],
)
def test_a_damaged_configuration_is_refused_in_one_sentence(
    run_command: Command, trained: Path, line: str, changed: str, named: str
) -> None:
    config = trained / "config.yaml"
    config.write_text(config.read_text().replace(line, changed, 1))
    refused = run_command("evaluate.py", "run_dir=x", code=2)
    assert named in refused.stderr
    assert one_sentence(refused), refused.stderr


@pytest.mark.slow
def test_a_failure_of_one_process_of_two_is_one_sentence(run_command: Command, tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
        "import os; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    words = ("run_dir=x", "trainer.gpus=2", "optimization.epochs=1")  # the last checkpoint is not tried again
    done = run_command("train.py", *words, launcher=(sys.executable, "-c", program), code=74)
    start, error = done.stderr.splitlines()
    assert start == "training small on demo, 1 epoch, 2 x cpu: x"
    assert error.startswith("error: cannot write x/checkpoints/")
