"""Golden outputs, to compare before and after a refactor: python tests/golden.py OUTPUT [--demo]

Writes weights hashes (1, 2 and 3 processes), the composed configuration of every experiment, a document rendered from
the test records, and the help of every verb into OUTPUT; then `diff -r BEFORE AFTER`. Weights depend on the machine, so
no golden output is committed. `--demo` also trains the demo, which takes minutes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import safetensors.torch

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))
HASH_LINE = re.compile(r"^(weights|manifest)_sha256 [0-9a-f]{64}$", re.MULTILINE)


def output_of(*command: str) -> str:
    ran = subprocess.run([sys.executable, *command], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    return ran.stdout if ran.returncode == 0 else f"exit code {ran.returncode}\n{ran.stdout}{ran.stderr}"


def trained(experiment: str, processes: int, scratch: Path) -> str:
    """The hashes that preprocessing and training print."""
    words = [f"experiment={experiment}", f"run_dir={scratch}/{experiment}-{processes}"]
    words.append(f"data.directory={scratch}/data-{experiment}")
    printed = output_of("preprocess.py", *words)
    printed += output_of("train.py", *words, f"trainer.gpus={processes}", "trainer.accelerator=cpu")
    return "".join(f"{match[0]}\n" for match in HASH_LINE.finditer(printed)) or printed


def configurations() -> dict[str, str]:
    names = sorted(path.stem for path in (CHECKOUT / "conf/experiment").glob("*.yaml"))
    return {name: output_of("train.py", f"experiment={name}", "--cfg", "job", "--resolve") for name in names}


def helps() -> dict[str, str]:
    verbs = re.findall(r"^    (\w+)(?= |$)", output_of("-m", "recipe", "--help"), re.MULTILINE)
    return {"recipe": output_of("-m", "recipe", "--help")} | {
        verb: output_of("-m", "recipe", verb, "--help") for verb in verbs
    }


def documents(scratch: Path) -> dict[str, str]:
    """Pages of the test records; the commit, the source's hash and the markers' hashes differ with every commit."""
    from recipe.models.build import weights_sha256
    from recipe.run.provenance import commit, source_sha256
    from tests.builders.runs import complete_run

    run = complete_run(scratch / "demo", lambda path: weights_sha256(safetensors.torch.load_file(path)))
    pages = {}
    for page in (run.document, run.json_file):
        text = page.read_text().replace(str(commit()), "COMMIT").replace(source_sha256(), "SOURCE")
        pages[page.name] = re.sub(r"(<!--.*?)\b[0-9a-f]{64}\b", r"\1HASH", text)
    return pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--demo", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cases = [("smoke", 1), ("smoke", 2), ("smoke", 3)] + [("demo", 1)] * arguments.demo
        weights = {f"{name}-{count}": trained(name, count, Path(scratch)) for name, count in cases}
        folders = {
            "weights": weights,
            "configurations": configurations(),
            "help": helps(),
            "documents": documents(Path(scratch)),
        }
    for folder, files in folders.items():
        (arguments.output / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (arguments.output / folder / name).write_text(text)
        print(f"{folder}: {len(files)} files")


if __name__ == "__main__":
    main()
