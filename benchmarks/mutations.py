"""Which changes of the code does `drift` find? Every constant, comparison and sign of the arithmetic, one at a time.

    python benchmarks/mutations.py                       # all, some hours of one core; goes on where it stopped
    python benchmarks/mutations.py --only optim.py       # one file

A mutant is one module of `recipe` with one number, comparison or sign changed in memory. It computes the fingerprints
of a few recipes that use every feature between them, and counts as found where `drift` would name a difference (or
where the code no longer runs). Survivors are looked at by a person: `EQUIVALENT` says why one changes nothing that a
recipe could show; the rest is missed. Only the recipes that run a mutant's line are asked, by the lines that the clean
code ran. Results: benchmarks/results/mutations.md.
"""

from __future__ import annotations

import argparse
import ast
import base64
import copy
import importlib.abc
import importlib.machinery
import json
import os
import select
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TARGETS = [
    "recipe/models/build.py",
    "recipe/models/layers.py",
    "recipe/evaluation.py",
    "recipe/data/transforms.py",
    *(f"recipe/training/{name}.py" for name in ("optim", "step", "ema")),
    *(f"recipe/data/augment/{name}.py" for name in ("crop", "auto_augment", "mixup")),
]
SMALL = ["experiment=smoke", "optimization.epochs=5", "augmentation.crop_pixels=24"]
RECIPES = {
    "plain": SMALL,
    "policies, mixing, erasing, torchvision's average": [
        *SMALL,
        *("augmentation.auto_augment.policy=trivial_augment", "augmentation.random_erasing.probability=0.5"),
        *("augmentation.mixup.mixup_alpha=0.2", "augmentation.mixup.cutmix_alpha=1.0"),
        *("optimization.ema.decay=0.9", "optimization.ema.form=torchvision"),
        *("optimization.ema.every_steps=2", "optimization.schedule=step", "optimization.step_epochs=[2,4,5]"),
        *("optimization.nesterov=true", "evaluation.flip=true", "optimization.decay_norms_and_biases=true"),
        "model.blur_pool=true",
    ],
    "binary loss, repeats, growing images, average with recalibration": [
        *SMALL,
        *("augmentation.auto_augment.policy=rand_augment", "augmentation.auto_augment.magnitude_std=0.6"),
        *(
            "augmentation.auto_augment.probability=0.7",
            "augmentation.repeated_augmentation=2",
            "optimization.optimizer=lamb",
        ),
        *("augmentation.mixup.mixup_alpha=0.3", "augmentation.mixup.probability=0.8"),
        *("optimization.loss=binary_cross_entropy", "optimization.bce.sum_classes=true"),
        *("optimization.bce.target_threshold=0.2", "optimization.bce.init_head_bias=true"),
        *("optimization.schedule=linear", "optimization.ema.decay=0.9"),
        *("optimization.ema.precise_bn_images=16", "augmentation.progressive_resizing.first_pixels=16"),
        *("augmentation.progressive_resizing.start_epoch=1", "augmentation.progressive_resizing.end_epoch=4"),
        *("augmentation.progressive_resizing.multiple=4", "augmentation.interpolation=bicubic"),
    ],
    "resnet18 with blurred strides and stochastic depth, decoupled decay, Pillow": [
        *SMALL,
        *("model.name=resnet18", "model.blur_pool=true", "model.stochastic_depth=0.2"),
        *("model.zero_init_last_norm=true", "optimization.optimizer=sgdw", "loader.decoder=pillow"),
        *("augmentation.mixup.cutmix_alpha=0.7", "optimization.loss=binary_cross_entropy"),
    ],
}
STEPS_PER_EPOCH, CLASSES = 150, 12  # of the schedule: more steps than are recorded
SECONDS_PER_MUTANT = 240.0
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
SIGNS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}


@dataclass(frozen=True)
class Mutant:
    """One change: `place` counts the changeable nodes of the file, in the order of `ast.walk`."""

    file: str
    place: int
    line: int
    statement: int  # the line in which its statement begins
    text: str
    change: str

    @property
    def key(self) -> str:
        """The same while the file stays as it is."""
        return f"{self.file}:{self.line}:{self.place} {self.change}"


# ---- making mutants ---------------------------------------------------------------------------------


def changeable(tree: ast.Module) -> list[tuple[ast.AST, str]]:
    """Each node that can be changed, with the change in words; what Python itself does not compute is left alone."""
    skipped = {id(inner) for node in ast.walk(tree) for part in annotations(node) for inner in ast.walk(part)}
    found = []
    for node in ast.walk(tree):
        if id(node) not in skipped and (change := change_of(node)) is not None:
            found.append((node, change))
    return found


def annotations(node: ast.AST) -> Iterator[ast.AST]:
    """Types are not computed with."""
    for name in ("annotation", "returns"):
        if (part := getattr(node, name, None)) is not None:
            yield part


def change_of(node: ast.AST) -> str | None:
    """What is done to a node, in words; None where it stays."""
    match node:
        case ast.Constant(value=bool()):
            return None
        case ast.Constant(value=int() | float()):
            return f"{node.value!r} -> {changed_number(node.value)!r}"
        case ast.Compare(ops=[operator]) if type(operator) in COMPARISONS:
            return f"{type(operator).__name__} -> {COMPARISONS[type(operator)].__name__}"
        case ast.BinOp(op=operator) | ast.AugAssign(op=operator) if type(operator) in SIGNS:
            return f"{type(operator).__name__} -> {SIGNS[type(operator)].__name__}"
        case ast.UnaryOp(op=ast.USub()):
            return "minus dropped"
    return None


def changed_number(value: float) -> float:
    """The next whole number, or half as much again."""
    if isinstance(value, int):
        return value + 1
    return value * 1.5 if value else 0.5


def change(node: Any) -> None:
    """Do it, in place."""
    if isinstance(node, ast.Constant):
        node.value = changed_number(node.value)
    elif isinstance(node, ast.Compare):
        node.ops = [COMPARISONS[type(node.ops[0])]()]
    elif isinstance(node, ast.BinOp | ast.AugAssign):
        node.op = SIGNS[type(node.op)]()
    else:
        node.op = ast.UAdd()


def mutants(file: str) -> list[Mutant]:
    """All of a file."""
    source = (ROOT / file).read_text()
    lines, tree = source.splitlines(), ast.parse(source)
    begins: dict[int, int] = {}
    for statement in (node for node in ast.walk(tree) if isinstance(node, ast.stmt)):  # inner ones come later
        begins |= {id(node): statement.lineno for node in ast.walk(statement)}
    return [
        Mutant(file, place, node.lineno, begins[id(node)], lines[node.lineno - 1].strip(), words)  # type: ignore[attr-defined]
        for place, (node, words) in enumerate(changeable(tree))
    ]


def mutated(mutant: Mutant) -> ast.Module:
    """The module with its one change."""
    tree = copy.deepcopy(ast.parse((ROOT / mutant.file).read_text()))
    change(changeable(tree)[mutant.place][0])
    return ast.fix_missing_locations(tree)


class Replaced(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a tree instead of from its file."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = mutant.file.removesuffix(".py").replace("/", ".")
        self.path = ROOT / mutant.file
        self.code = compile(mutated(mutant), str(self.path), "exec")

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        specification = importlib.machinery.ModuleSpec(name, self, origin=str(self.path))
        specification.has_location = True
        return specification

    def exec_module(self, module: Any) -> None:
        exec(self.code, module.__dict__)


# ---- judging them -----------------------------------------------------------------------------------


Lines = dict[str, list[int]]  # file -> lines that ran


@dataclass(frozen=True)
class Clean:
    """What the code gives as it is."""

    fingerprints: dict[str, str]  # recipe -> JSON
    lines: dict[str, Lines]  # recipe -> what it ran
    pictures: dict[str, str]  # what the demo draws, base64: drawing them again would be half of the work

    def recipes_for(self, mutant: Mutant) -> list[str]:
        """Those that run its line."""
        places = {mutant.line, mutant.statement}
        return [name for name, lines in self.lines.items() if places & set(lines.get(mutant.file, []))]


def fingerprint(name: str) -> bytes:
    """Of one recipe, by the code as it is imported now."""
    from recipe.config.compose import config_from_overrides
    from recipe.run.records import to_json
    from recipe.training.fingerprint import take_fingerprint

    return to_json(take_fingerprint(config_from_overrides(RECIPES[name]), STEPS_PER_EPOCH, CLASSES))


def with_pictures(pictures: dict[str, str]) -> dict[str, str]:
    """Let the demo take these instead of drawing; with none, keep what it draws."""
    from recipe.preprocessing import demo

    draw = demo.jpeg

    def jpeg(*place: int) -> bytes:
        key = json.dumps(place)
        if key not in pictures:
            pictures[key] = base64.b64encode(draw(*place)).decode()
        return base64.b64decode(pictures[key])

    demo.jpeg = jpeg
    return pictures


def verdict(mutant: Mutant | None, clean: Clean) -> str:
    """What the first recipe that shows it shows; empty where none does."""
    if mutant is not None:
        sys.meta_path.insert(0, Replaced(mutant))
    try:
        with_pictures(clean.pictures)
        for name in RECIPES if mutant is None else clean.recipes_for(mutant):
            content = fingerprint(name)
            from recipe.review.verify.trace import compare_traces
            from recipe.run.records import Fingerprint, from_json

            stored = from_json(clean.fingerprints[name].encode(), Fingerprint, name)
            if found := compare_traces(stored, from_json(content, Fingerprint, name)):
                return f"{name}: {found[0].what}"
    except Exception as error:  # code that no longer runs is found
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def observed(name: str) -> str:
    """One recipe's fingerprint, the lines that it ran, and what was drawn, as JSON."""
    ran: dict[str, set[int]] = {file: set() for file in TARGETS}
    names = {str(ROOT / file): file for file in TARGETS}

    def trace(frame: Any, event: str, argument: Any) -> Any:
        file = names.get(frame.f_code.co_filename)
        if file is None:
            return None
        ran[file].add(frame.f_lineno)
        return trace

    threading.settrace(trace)
    sys.settrace(trace)
    pictures = with_pictures({})
    content = fingerprint(name).decode()
    sys.settrace(None)
    return json.dumps([content, {file: sorted(lines) for file, lines in ran.items()}, pictures])


def in_child(work: Any, seconds: float) -> str | None:
    """What `work` returns, computed in a fork that has imported libraries but nothing of `recipe`; None: no answer."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.write(writer, work().encode())
        os._exit(0)
    os.close(writer)
    answer = b""
    is_done = bool(select.select([reader], [], [], seconds)[0])
    while is_done and (piece := os.read(reader, 65536)):
        answer += piece
    os.close(reader)
    if not is_done:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return answer.decode() if is_done and status == 0 else None


def load_libraries() -> None:
    """Once, so that a child starts in a moment; torch must not have computed anything in parallel before a fork."""
    import hydra
    import msgspec
    import numpy
    import scipy.io
    import timm.optim.lamb
    import torch
    import torchvision.transforms.v2

    torch.set_num_threads(1)
    assert all((hydra, msgspec, numpy, scipy.io, timm, torchvision))


def clean_code() -> Clean:
    """By the code as it is; a second computation must agree with it to the last bit."""
    clean = Clean({}, {}, {})
    for name in RECIPES:
        answer = in_child(lambda name=name: observed(name), 900.0)
        assert answer is not None, f"the code as it is does not run: {name}"
        clean.fingerprints[name], clean.lines[name], pictures = json.loads(answer)
        clean.pictures.update(pictures)
    again = in_child(lambda: verdict(None, clean), 900.0)
    assert again == "", f"findings on the clean tree: {again}"
    return clean


ONE_PIXEL = "a shorter way to the same values, for convolutions of one pixel"
ALL_ALIKE = "which one is looked at does not matter: all are the same there"
FAST_PATH = "decides by which of two ways the same pixels come about"
SQUARE = "the images of a batch are square"
NEVER_EQUAL = "a number that is drawn is never the very threshold"
NO_MAGNITUDE = "the operation has no magnitude"
DEFAULTS = {  # of fields that the builders fill from the configuration, whatever stands here
    "crop.py": ("start_epoch: float", "end_epoch: float", "multiple: int", "repeats: int = 1", "copy: int = 0"),
    "auto_augment.py": ("num_ops: int", "magnitude: float", "magnitude_std: float", "probability: float"),
    "mixup.py": (
        *("seed: int", "probability: float", "scale: tuple", "ratio: tuple", "mixup_alpha: float"),
        *("cutmix_alpha: float", "switch_probability: float", "group_size: int"),
    ),
}
# (file, a part of the line, a part of the change, why the change cannot show in any recipe)
EQUIVALENT: list[tuple[str, str, str, str]] = [
    ("layers.py", "self.kernel_size == (1, 1)", "", ONE_PIXEL),
    ("layers.py", "convolution.bias is not None", "", "the parameters are replaced in the line after the call"),
    ("layers.py", "len(ends) < 2", "", "every residual network has three blocks or more; it is a message"),
    ("layers.py", "blurred[0].blur[0, 0].tolist()", "", ALL_ALIKE),
    ("layers.py", "torch.all(head.bias == head.bias[0])", "0 -> 1", ALL_ALIKE),
    ("layers.py", "float(head.bias[0].detach())", "0 -> 1", ALL_ALIKE),
    ("evaluation.py", "margins = values", "0 -> 1", "the margin of a network of one class is zero in any column"),
    ("evaluation.py", "margins = values", "Gt -> GtE", "a network of one class makes one column, and has no second"),
    ("evaluation.py", "margins = values", "1 -> 2", "decides only for networks of two classes"),
    ("evaluation.py", "top1, top5 =", "5 -> 6", "no more than five classes of an image are kept"),
    (
        "optim.py",
        "wanted = wanted > self.target_threshold",
        "Gt -> GtE",
        "no mixed target is the threshold itself",
    ),
    ("optim.py", "if moved and kept != 1", "", "whether weights are multiplied by one or not"),
    *(
        (file, text, "", "a default that no recipe uses: the configuration's value is passed")
        for file, texts in DEFAULTS.items()
        for text in texts
    ),
    ("crop.py", "flip = rng.random() < self.flip_probability", "Lt -> LtE", NEVER_EQUAL),
    ("crop.py", "crop, size = self.random_crop(", "", SQUARE),
    ("crop.py", "self.policy.draw(rng, size[0])", "0 -> 1", SQUARE),
    ("crop.py", "return sizes[0] if len(begins) <= 1", "0 -> 1", ALL_ALIKE),
    ("auto_augment.py", '"identity": Range(', "", NO_MAGNITUDE),
    ("auto_augment.py", '"autocontrast": Range(', "", NO_MAGNITUDE),
    ("auto_augment.py", '"equalize": Range(', "", NO_MAGNITUDE),
    ("auto_augment.py", "FILL = ", "0.0 -> 0.5", "pixels are whole numbers: half a level is none"),
    ("auto_augment.py", "rng.random() < 0.5", "Lt -> LtE", NEVER_EQUAL),
    ("auto_augment.py", "if rng.random() < self.probability", "Lt -> LtE", NEVER_EQUAL),
    ("mixup.py", ".random() >= self.probability", "GtE -> Gt", NEVER_EQUAL),
    ("mixup.py", "generator.random() < self.switch_probability", "Lt -> LtE", NEVER_EQUAL),
    ("mixup.py", "parameters.weight >= 0.5", "GtE -> Gt", NEVER_EQUAL),
    ("mixup.py", "rows = torch.arange(images.shape[2]", "2 -> 3", SQUARE),
    ("optim.py", "return [step for step in sides if step >= 0]", "", "no rate falls before the first epoch ends"),
    ("optim.py", "max(1, ", "1 -> 2", "every schedule has more steps than that"),
    ("optim.py", "if step < self.warmup_steps", "", "at the end of the warm-up both formulas give the peak"),
    ("transforms.py", "if image.stride(0) != 1", "", FAST_PATH),
    ("transforms.py", "KERNELS[interpolation](image[None]", "", FAST_PATH),
    ("transforms.py", "if height <= width else", "", "for a square picture both are the same size"),
    ("transforms.py", "for source, size in (((97, 131)", "", "pictures by which a fast path is tried out"),
]


def reason(row: dict[str, Any]) -> str:
    """Why a survivor is equivalent; empty where it was missed."""
    for file, text, change, why in EQUIVALENT:
        if row["file"].endswith(file) and text in row["text"] and change in row["change"]:
            return why
    return ""


def page(rows: list[dict[str, Any]]) -> str:
    """The results as markdown."""
    found = [row for row in rows if row["found"]]
    unreached = [row for row in rows if not row["found"] and not row["recipes"]]
    survived = [row for row in rows if not row["found"] and row["recipes"]]
    equivalent = [row for row in survived if reason(row)]
    missed = [row for row in survived if not reason(row)]
    share = 100 * len(found) / max(1, len(found) + len(missed))
    lines = [
        "# Which changes of the code does drift find?",
        "",
        "Made by `python benchmarks/mutations.py`. Every number (the next whole one, half as much again), comparison",
        "(the edge, the opposite) and sign (+ and -, * and /, a minus) of the files below was changed, one at a time.",
        "",
        f"{len(rows)} changes: {len(found)} found, {len(equivalent)} equivalent, {len(missed)} missed,",
        f"{len(unreached)} in lines that none of the {len(RECIPES)} recipes runs.",
        f"**{share:.1f} % of those that are run and not equivalent are found.**",
        "0 findings on the clean tree.",
        "",
        "| File | Changes | Found | Equivalent | Missed | Not run |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for file in TARGETS:
        counts = [sum(row["file"] == file for row in part) for part in (rows, found, equivalent, missed, unreached)]
        lines.append(f"| `{file}` | {' | '.join(map(str, counts))} |")
    lines += ["", "The recipes:", ""] + [f"- {name}: `{' '.join(words)}`" for name, words in RECIPES.items()]
    for title, part in (("Equivalent", equivalent), ("Missed", missed)):
        lines += ["", f"## {title}", "", "| Place | Line | Change | Why |", "|:--|:--|:--|:--|"]
        for row in part:
            text = row["text"].replace("|", "\\|")
            lines.append(f"| `{row['file']}:{row['line']}` | `{text[:90]}` | {row['change']} | {reason(row)} |")
    lines += ["", "## Not run by these recipes", "", "Messages, given weights, several processes, and the like."]
    places = sorted({(row["file"], row["line"], row["text"][:70]) for row in unreached})
    lines += ["", *(f"- `{file}:{line}` `{text}`" for file, line, text in places), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="files whose name ends so")
    parser.add_argument("--output", type=Path, default=RESULTS / "mutations.jsonl")
    parser.add_argument("--page", nargs="+", type=Path, help="write the page from these results, and run nothing")
    parser.add_argument("--share", default="0/1", help="k/n: every n-th mutant from k, to use several cores")
    arguments = parser.parse_args()
    if arguments.page:
        now = {mutant.key: mutant.text for file in TARGETS for mutant in mutants(file)}
        rows = [json.loads(line) for path in arguments.page for line in lines_of(path)]
        of_now = {row["key"]: row for row in rows if now.get(row["key"]) == row["text"]}  # other code has changed since
        rows = [of_now[key] for key in now if key in of_now]  # each once, in the order of the code
        print(f"{len(rows)} of {len(now)} changes of the code as it is now were tried")
        (RESULTS / "mutations.md").write_text(page(rows))
        return
    sys.path.insert(0, str(ROOT))
    load_libraries()
    clean = clean_code()
    print(f"0 findings on the clean tree, {len(RECIPES)} recipes", flush=True)
    tried = [json.loads(line) for line in lines_of(arguments.output)]
    done = {(row["key"], row["text"]) for row in tried}
    every = [mutant for file in TARGETS if file.endswith(arguments.only or "") for mutant in mutants(file)]
    first, step = (int(part) for part in arguments.share.split("/"))
    waiting = [mutant for mutant in every[first::step] if (mutant.key, mutant.text) not in done]
    clock = time.perf_counter()
    for number, mutant in enumerate(waiting, start=1):
        found = in_child(lambda mutant=mutant: verdict(mutant, clean), SECONDS_PER_MUTANT)
        row = {**vars(mutant), "key": mutant.key, "found": "no answer" if found is None else found}
        row["recipes"] = len(clean.recipes_for(mutant))
        with arguments.output.open("a") as handle:
            handle.write(json.dumps(row) + "\n")
        rate = (time.perf_counter() - clock) / number
        mark = "found " if row["found"] else "MISSED"
        left = (len(waiting) - number) * rate / 60
        print(f"{mark} {mutant.key} | {mutant.text} | {row['found'][:60]} ({left:.0f} min left)", flush=True)
    print(Counter("found" if json.loads(line)["found"] else "survived" for line in lines_of(arguments.output)))


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
