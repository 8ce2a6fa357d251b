"""The commands of the document: to run a recipe again, and to fill a section that was not measured yet."""

from __future__ import annotations

import re
import shlex

from recipe.document.run_data import RunData
from recipe.run.environment import PLACES
from recipe.run.files import CHECKOUT, is_elsewhere
from recipe.run.records import Provenance

SHELL_WORD = re.compile(r"""(?:[^\s'"]|'[^']*'|"[^"]*")+""")  # with its quotes
EXPERIMENTS = CHECKOUT / "conf" / "experiment"
DATA_DIRECTORY = re.compile(
    r"""(?<= )(?:data\.directory=(?:"\$DATA_DIR"|[\w./+@%-]+)|'data\.directory=[^'\n]*')(?= |$)"""
)


def again(facts: RunData) -> list[str]:
    """A shell script that clones the code, sets it up and runs the stages as recorded.

    A stage that ran on another commit than the one before it gets its own checkout.
    """
    lines = ['git clone "$REPOSITORY" recipe && cd recipe']
    code_before: list[str] | None = None
    stages = (facts.preprocessing, facts.training, facts.evaluation, facts.serialization, facts.inference)
    for record in stages:
        if record is not None:
            code = checkout_commands(record.provenance)
            lines += code if code != code_before else []
            if record.provenance.command != lines[-1]:  # `reproduce` runs every stage by one command
                lines.append(record.provenance.command)
            code_before = code
    return lines


def checkout_commands(provenance: Provenance) -> list[str]:
    """The commands that bring the working tree to the state in which a stage began."""
    setup = "make setup && . .venv/bin/activate"
    if provenance.commit is None:
        return [f"# no commit was recorded: take the code with source SHA-256 {provenance.source_sha256}", setup]
    lines = [f"git checkout --force --detach {shlex.quote(provenance.commit)}"]
    if patch := provenance.tree_at_start.patch_sha256:
        lines.append(f'git apply "$DOCUMENT"/records/patches/{shlex.quote(patch[:16])}.patch')
    return [*lines, setup]


def to_preprocess(facts: RunData) -> str:
    return f"python preprocess.py {experiment(facts)}"


def to_train(facts: RunData) -> str:
    """The command that fills the Training chapter, with the words of preprocess.py if the experiment has no file."""
    if facts.config is None and facts.preprocessing is not None and not (EXPERIMENTS / f"{facts.name}.yaml").exists():
        _, _, given = facts.preprocessing.provenance.command.partition("preprocess.py ")
        words = [word for word in SHELL_WORD.findall(given) if not word.lstrip("'").startswith("run_dir=")]
        return " ".join(["python train.py", *words, run_dir(facts)])
    return f"python train.py {experiment(facts)}"


def to_evaluate(facts: RunData) -> str:
    """The command that fills the performance metrics. The run's pinned configuration has all other settings."""
    return f"python evaluate.py {places(facts)}"


def to_serialize(facts: RunData) -> str:
    return f"python serialize.py {places(facts)}"


def to_infer(facts: RunData) -> str:
    """The command that fills Inference / Code and adds this machine to the timing information."""
    return f"python -m recipe.stages.infer {places(facts)}"


def experiment(facts: RunData) -> str:
    """The arguments that name this run. Without its directory where that is the default."""
    usual = facts.run_dir == f"runs/{facts.name}"
    return f"experiment={shlex.quote(facts.name)}" + ("" if usual else f" {run_dir(facts)}")


def places(facts: RunData) -> str:
    """The arguments of a stage after training: the run's directory, and the data directory where it was given."""
    given = DATA_DIRECTORY.search(facts.training.provenance.command) if facts.training else None
    return " ".join([run_dir(facts), *([given[0]] if given else [])])


def run_dir(facts: RunData) -> str:
    """The argument that names this run's directory. One outside the checkout is a variable."""
    if is_elsewhere(facts.run_dir):
        return f'run_dir="{PLACES["run_dir"]}"'
    return f"run_dir={shlex.quote(facts.run_dir)}"
