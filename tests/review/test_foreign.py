"""Unusable files in an untrusted folder (not regular, endless, another user's): every verb ends with one line."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from recipe.__main__ import main
from recipe.errors import UserError
from recipe.review.check.files import read_predictions
from recipe.review.opening import open_recipe
from recipe.review.verify.files import BROKEN, links
from recipe.run.directory import Run
from recipe.run.files import CHECKOUT, file_name, is_inside, read_file
from tests.builders.records import timing
from tests.builders.runs import change_record

pytestmark = pytest.mark.timeout(120)
Damage = Callable[[Path], None]


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def sparse(path: Path) -> None:
    with path.open("wb") as handle:
        handle.truncate(2**42)


def of_another(path: Path) -> None:
    secret = Path("secret")
    secret.write_text('{"a": 1}\n')
    path.symlink_to(secret.absolute())


def looping(path: Path) -> None:
    path.symlink_to(path.name)


def code_of(verb: str, words: list[str]) -> object:
    """The exit code of a verb. Anything else is a failure."""
    try:
        return main([verb, *words])
    except SystemExit as ended:
        return ended.code


OUTPUTS = ("predictions/*.npz", "checkpoints/*.safetensors", "onnx/*-fp32.onnx")
DAMAGES = [endless, pipe, sparse, of_another, looping]
FILES = ["config.yaml", "metrics.jsonl", "records/training.json", "records/evaluation.json", "recipe.md", "recipe.json"]
VERBS: dict[str, list[str]] = {
    "check": ["demo"],
    "verify": ["--skip", "trace", "demo"],
    "diff": ["demo", "whole"],
    "drift": ["demo"],
    "watch": ["demo", "--against", "whole", "demo", "--save", "out.json"],
    "publish": ["demo", "--output", "out", "--allow-modified", "--allow-stale"],
    "reproduce": ["demo"],
}
OF_THE_DOCUMENT = ("drift", "reproduce")  # they read nothing else


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("file", FILES)
def test_every_verb_ends_in_one_sentence(
    file: str, damage: Damage, whole: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, "whole")
    (run.directory / file).unlink()
    damage(run.directory / file)
    verbs = VERBS if file == "recipe.md" else {verb: VERBS[verb] for verb in VERBS if verb not in OF_THE_DOCUMENT}
    for verb, words in verbs.items():
        code, printed = code_of(verb, words), capsys.readouterr()
        assert code in (0, 1, 2, 3), verb
        assert printed.err.count("\n") <= 1, (verb, printed.err)
        if verb == "check":
            assert code in (1, 2)
            assert Path(file).name in printed.out + printed.err


@pytest.mark.parametrize(("pattern", "damage"), list(zip(itertools.cycle(OUTPUTS), DAMAGES, strict=False)))
def test_outputs_and_figures_that_are_no_files_break_the_chain(
    pattern: str, damage: Damage, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    path, figure = sorted(run.directory.glob(pattern))[0], sorted(run.figures.glob("*.png"))[0]
    for each in (path, figure):
        each.unlink()
        damage(each)
    for verb in ("check", "verify"):
        words = [*VERBS[verb], *(["--execute"] if verb == "check" else [])]
        code, printed = code_of(verb, words), capsys.readouterr()
        assert code in (0, 1)
        assert not printed.err
        assert path.name in printed.out
        assert verb != "check" or figure.name in printed.out


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_published_folder_with_such_a_file_is_refused_by_publish(
    damage: Damage, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.directory, "recipes/other")
    damage(Path("recipes/other/records/publication.json"))
    shutil.copy(CHECKOUT / "README.md", "README.md")
    assert code_of("publish", ["demo", "--allow-modified", "--allow-stale"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "publication.json" in error
    assert not Path("recipes/demo").exists()


# ---- what verify makes of damage ----------------------------------------------------------------------


def broken(run: Run) -> dict[str, str]:
    return {link.name: link.detail for link in links(open_recipe(run.directory), None, None) if link.state == BROKEN}


def array(descr: str, shape: tuple[int, ...], data: bytes) -> bytes:
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def archive(compression: int = zipfile.ZIP_STORED, **arrays: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as target:
        for name, content in arrays.items():
            target.writestr(f"{name}.npy", content)
    return buffer.getvalue()


KEY, LABEL, TOP = array("<U1", (2,), bytes(8)), array("<i8", (2,), bytes(16)), array("<i8", (2, 1), bytes(16))
TERABYTES = array("<i8", (10**14,), bytes(64))


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def zeros() -> bytes:
    """A small file that decompresses to 512 MiB; it takes a second to make."""
    return archive(zipfile.ZIP_DEFLATED, key=KEY, label=array("<i8", (2**26,), bytes(2**29)), top5=TOP)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04" + bytes(100),
        archive(key=KEY, label=LABEL, top5=TOP)[:300],
        archive(key=TERABYTES, label=TERABYTES, top5=TERABYTES),
        archive(key=KEY, label=array("<i8", (2**62, 4), bytes(64)), top5=TOP),
        archive(key=KEY, label=array("<i8", (-1,), bytes(64)), top5=TOP),
        archive(key=array("<U0", (10**15,), b""), label=LABEL, top5=TOP),
        archive(key=KEY, label=pickled(), top5=TOP),
        archive(key=KEY, label=array("<f8", (2,), bytes(16)), top5=TOP),
        archive(key=KEY, label=LABEL, top5=LABEL),
        archive(key=KEY, label=LABEL, top5=array("<i8", (3, 1), bytes(24))),
        archive(key=KEY, label=LABEL),
        archive(key=KEY, label=b"\x93NUMPY\x09\x00", top5=TOP),
        archive(key=KEY, label=b"no array", top5=TOP),
        zeros,
        archive(key=KEY, label=LABEL, top5=TOP).replace(bytes(16), b"\x01" * 16, 1),  # another checksum
    ],
)
def test_a_damaged_file_of_predictions_is_one_broken_link(content: bytes | Callable[[], bytes], run: Run) -> None:
    path = next(run.predictions.glob("*.npz"))
    path.write_bytes(content if isinstance(content, bytes) else content())
    with pytest.raises(UserError) as refused:
        read_predictions(path)
    assert "\n" not in str(refused.value)
    assert any(path.name in detail for detail in broken(run).values())


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"split": "train", "epoch": {"a": 1}, "step": 1, "loss": 1}', "metrics.jsonl"),
        ('{"split": "train", "epoch": 1, "step": 1, "loss": "x"}', "metrics.jsonl"),
        ('{"split": "train"', "metrics.jsonl"),
        ("[" * 10**5, "metrics.jsonl"),
        ("7", "metrics.jsonl"),
    ],
)
def test_a_damaged_row_is_one_broken_link_and_hides_no_other(line: str, named: str, run: Run) -> None:
    rows = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join([f"{line}\n", *rows[1:]]))
    change_record(run, "evaluation.json", lambda record: record["outputs"].update({"../../secret": "0" * 64}))
    found = broken(run)
    assert any(name.startswith(named) for name in found)
    assert "../../secret" in found


@pytest.mark.parametrize("name", ["training.json", "evaluation.json", "preprocessing.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[" * 10**5, b"null", b"\xff"])
def test_a_damaged_record_is_one_broken_link(name: str, content: bytes, run: Run) -> None:
    (run.records / name).write_bytes(content)
    assert f"records/{name}" in broken(run)


# ---- names --------------------------------------------------------------------------------------------


NAMES = [
    "",
    ".",
    "..",
    "../x",
    "/etc/x",
    "a/b",
    "a\\b",
    ".hidden",
    "a b",
    "a\n",
    "a\0",
    "é",
    "x" * 201,
    "~/x",
    "$X",
    "a:b",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_elsewhere_names_no_file(name: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    for make in (run.predictions_file, run.timing_file, run.onnx_file):
        with pytest.raises(UserError, match="cannot name a file"):
            make(name)
    with pytest.raises(UserError):
        run.patch_file(f"../{name}")


@pytest.mark.parametrize("name", ["resize28-crop24-bilinear-small-timm.pth", "nvidia-h200", "fp32", "a_b+c", "x" * 200])
def test_names_of_this_project_name_files(name: str) -> None:
    assert file_name(name, "it") == name


@pytest.mark.parametrize("name", NAMES)
def test_a_record_of_such_a_name_is_not_written(name: str, run: Run) -> None:
    record, before = msgspec.structs.replace(timing(), machine=name), sorted(run.directory.rglob("*"))
    with pytest.raises(UserError, match="cannot name a file"):
        run.write_timing(record)
    assert sorted(run.directory.rglob("*")) == before


def test_inside_follows_links(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "near").symlink_to("file")
    assert is_inside(tmp_path / "a" / "near", tmp_path / "a")
    assert not is_inside(tmp_path / "a" / "up" / "b", tmp_path / "a")
    assert not is_inside(tmp_path / "a" / ".." / "b", tmp_path / "a")
    assert not is_inside(tmp_path / "a\0", tmp_path / "a")
    (tmp_path / "a" / "file").write_bytes(b"content")
    assert read_file(tmp_path / "a" / "near", "it", 7, tmp_path / "a") == b"content"
    with pytest.raises(UserError, match="it has 7 bytes; at most 6 are read"):
        read_file(tmp_path / "a" / "near", "it", 6)
