"""Progress output cannot stop the work, for any state of the standard streams."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.run.files import CHECKOUT
from recipe.run.terminal import LossyFile, protect_streams

WORK = """
import subprocess, sys, warnings
from pathlib import Path
sys.path.insert(0, {checkout!r})
from recipe.run.terminal import protect_streams
from tqdm import tqdm

protect_streams()
for number in tqdm(range(1000), file=sys.stderr, mininterval=0):
    print("caf\\xe9 \\udcff", number, "x" * 100)
    print("warning", number, file=sys.stderr, flush=True)
warnings.warn("late")
with open("result", "w") as result:
    assert result.fileno() > 2
    subprocess.run([sys.executable, "-c", "import os; [os.fstat(number) for number in range(3)]"], check=True)
    result.write("done")
sys.stdout.write("no newline at the end")
sys.exit(75)
"""


def outcome(directory: Path, shell: str, **variables: str) -> tuple[int, str]:
    """The exit code of the work started by a shell, and its stderr, which is written to `err` by default."""
    script = directory / "work.py"
    script.write_text(WORK.format(checkout=str(CHECKOUT)))
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; exec 2> err; {shell}", sys.executable, str(script)],
        cwd=directory,
        env=os.environ | variables,
        check=False,
        timeout=60,
    )
    assert (directory / "result").read_text() == "done"
    return done.returncode, (directory / "err").read_text()


@pytest.mark.parametrize(
    "shell",
    [
        '"$0" "$1" | head -n 3 > /dev/null',
        '"$0" "$1" 2>&1 | head -n 3 > /dev/null',
        '"$0" "$1" > /dev/full',
        '"$0" "$1" > /dev/full 2>&1',
        '"$0" "$1" >&-',
        '"$0" "$1" 2>&- > out',
        '"$0" "$1" >&- 2>&- <&-',
        '"$0" -u "$1" > /dev/full 2>&1',
        '"$0" "$1" 1< /dev/null',  # open, but not for writing
    ],
)
def test_unwritable_streams_do_not_change_the_exit_code(tmp_path: Path, shell: str) -> None:
    code, errors = outcome(tmp_path, shell)
    assert code == 75
    assert "Error" not in errors
    assert "Exception ignored" not in errors


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1:strict"}])
def test_words_that_do_not_fit_the_encoding_are_escaped(tmp_path: Path, variables: dict[str, str]) -> None:
    code, errors = outcome(tmp_path, '"$0" "$1" > out', **variables)
    assert code == 75
    assert "warning 999" in errors
    assert b"caf\xe9" in (tmp_path / "out").read_bytes().replace(b"\\xe9", b"\xe9")
    assert (tmp_path / "out").read_bytes().count(b"\\udcff") == 1000
    assert (tmp_path / "out").read_bytes().endswith(b"no newline at the end")


def test_output_to_a_reader_is_complete(tmp_path: Path) -> None:
    code, errors = outcome(tmp_path, '"$0" "$1" | cat > out', PYTHONUTF8="1")
    assert code == 75
    assert errors.count("warning ") == 1000
    lines = (tmp_path / "out").read_text().splitlines()
    assert len(lines) == 1001
    assert lines[0].startswith("café \\udcff 0 ")
    assert lines[-1] == "no newline at the end"


def test_redirected_streams_stay() -> None:
    for kind in (contextlib.redirect_stdout, contextlib.redirect_stderr):
        with kind(io.StringIO()) as caught:
            protect_streams()
            assert caught in (sys.stdout, sys.stderr)


@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ('"$0" -m recipe check "$1" | head -n 1', 0, ""),
        ('"$0" -m recipe --help | head -n 0', 0, ""),
        (
            '"$0" -m recipe check "$1" > /dev/full',
            74,
            "error: the output could not be written: No space left on device",
        ),
    ],
)
def test_a_verb_reports_lost_output_unless_the_reader_left(shell: str, code: int, said: str) -> None:
    words = ["bash", "-c", f"set -o pipefail; {shell}", sys.executable, str(CHECKOUT / "recipes" / "demo")]
    done = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (code, said)


def test_a_reader_that_stands_still_costs_lines_and_no_time() -> None:
    reading, writing = os.pipe()
    file = LossyFile(writing, "w", closefd=False)
    file.patience_seconds = 0.01
    line = b"x" * 999 + b"\n"
    for _ in range(1000):  # a pipe has room for some 64 of them
        assert file.write(line) == len(line)
    assert file.is_stuck
    assert file.failure is None
    held = len(os.read(reading, 2**20))
    file.write(line)  # somebody reads again
    assert os.read(reading, 2**20) == line
    assert 0 < held < 1000 * len(line)
    os.close(reading), os.close(writing)


@pytest.mark.process
def test_a_long_line_is_written_to_a_reader_in_full(tmp_path: Path) -> None:
    line = "y" * 100_000
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from recipe.run.terminal import protect_streams; protect_streams(); print('y' * {len(line)})",
        ],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == line + "\n"
