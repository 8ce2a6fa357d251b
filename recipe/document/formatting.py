"""Filters of the templates: numbers as text, and text from outside as harmless markdown.

A template prints `Markdown`, made by a filter of this module, as it is, and escapes all other text. A number without a
filter is an error, so that one quantity cannot be printed in two ways.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

from recipe.run.records import Guess, Hardware, Latency, Provenance, Setting, TreeState

NOTHING = "–"
ESCAPED = re.compile(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
LINE_START = re.compile(r"^(\d{1,9})([.)])(?=\s|$)|^(#{1,6}|\+|-+|=+)(?=\s|$)")
PLAIN_CODE = re.compile(r"[^`|<>&\\]+")


class Markdown(str):
    """Text that is printed without escaping."""

    __slots__ = ()


def finalize(value: object) -> Markdown:
    """The printed value of an expression: markdown as it is, text escaped, counts with separators."""
    if isinstance(value, Markdown):
        return value
    if isinstance(value, str):
        return text(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return Markdown(f"{value:,}")
    raise TypeError(f"{value} reached the page without a filter")  # printing an undefined name raises by itself


def on_one_line(value: str) -> str:
    """Without line breaks, control characters and lone surrogates. Direction overrides would reorder a page."""
    encodable = value.encode("utf-8", "replace").decode()
    kept = (" " if unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp") else letter for letter in encodable)
    return " ".join("".join(kept).split())


def text(value: str) -> Markdown:
    """Text from outside, escaped: it cannot open HTML, a table cell, a link, code, mathematics or a list."""
    escaped = on_one_line(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    escaped = ESCAPED.sub(lambda found: f"\\{found[0]}", escaped)
    return Markdown(LINE_START.sub(lambda found: f"{found[1]}\\{found[2]}" if found[1] else f"\\{found[3]}", escaped))


def code(value: str) -> Markdown:
    """A name, hash or command in a line, in backticks or, where these are not safe, in an escaped HTML element."""
    line = on_one_line(value)
    if PLAIN_CODE.fullmatch(line):
        return Markdown(f"`{line}`")
    return Markdown(f"<code>{text(line)}</code>" if line else "")


def fenced(lines: str | list[str], language: str = "") -> Markdown:
    """A code block with a fence longer than any inside it. Each given line stays one line."""
    body = "\n".join(on_one_line(line) for line in ([lines] if isinstance(lines, str) else lines))
    ticks = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", body))])
    return Markdown(f"{ticks}{language}\n{body}\n{ticks}")


def percent(fraction: float | None) -> Markdown:
    """A fraction as a percentage with two decimals. The only format of an accuracy."""
    return number(None if fraction is None else 100 * fraction, 2, " %")


def accuracy(correct: int, images: int) -> Markdown:
    return Markdown(f"{percent(correct / images if images else None)} ({correct:,} of {images:,})")


def number(value: float | None, decimals: int = 0, unit: str = "") -> Markdown:
    """A number with thousands separators. A dash for None."""
    if value is None:
        return Markdown(NOTHING)
    return Markdown(f"{value:,.{decimals}f}{unit}" if math.isfinite(value) else "not finite")


def images_per_second_text(images_per_second: float | None) -> Markdown:
    return number(images_per_second, 0 if images_per_second is not None and images_per_second >= 100 else 1)


def significant(value: float | None, digits: int = 4) -> Markdown:
    """A quantity that spans orders of magnitude, such as a learning rate."""
    return Markdown(NOTHING if value is None else f"{value:.{digits}g}")


def duration(seconds: float | None) -> Markdown:
    if seconds is None or not math.isfinite(seconds):
        return Markdown(NOTHING)
    if seconds < 59.95:
        return Markdown(f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s")
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return Markdown(f"{minutes} min {rest:02d} s")
    hours, minutes = divmod(round(seconds / 60), 60)
    return Markdown(f"{hours} h {minutes:02d} min")


def size(value_bytes: int) -> Markdown:
    """Bytes in the largest binary unit that gives at least one."""
    amount, units = float(value_bytes), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return Markdown(f"{amount:,.0f} bytes" if units[0] == "bytes" else f"{amount:,.1f} {units[0]}")


def setting(value: Setting) -> Markdown:
    """A setting: yes or no, lists with commas, numbers at full precision."""
    if value is None or value == []:
        return Markdown("none")
    if isinstance(value, bool):
        return Markdown("yes" if value else "no")
    if isinstance(value, list):
        return Markdown(", ".join(setting(entry) for entry in value))
    if isinstance(value, dict):
        return Markdown(", ".join(f"{text(key)} {_grouped(entry)}" for key, entry in value.items()))
    return text(value) if isinstance(value, str) else Markdown(f"{value:.12g}")


def _grouped(value: Setting) -> str:
    """A list or a mapping within a mapping, in parentheses."""
    return f"({setting(value)})" if isinstance(value, list | dict) and value else setting(value)


def name_values(values: dict[str, str]) -> Markdown:
    return Markdown(", ".join(f"{text(name)} {text(value)}" for name, value in values.items()) or "none")


def pixel_percentiles(pixels: list[int]) -> Markdown:
    """Percentiles of sizes in pixels, from the smallest to the largest."""
    return Markdown(" / ".join(f"{value:,}" for value in pixels) or NOTHING)


def hardware(machine: Hardware) -> Markdown:
    """One line about a machine."""
    parts = [f"{text(machine.processor)}, {machine.cores:,} cores, {machine.memory_gib:,.1f} GiB of memory"]
    if machine.accelerator:
        memory = f" of {machine.accelerator_memory_gib:,.1f} GiB" if machine.accelerator_memory_gib else ""
        capability = f", compute capability {text(machine.compute_capability)}" if machine.compute_capability else ""
        parts.insert(0, f"{machine.accelerators:,} × {text(machine.accelerator)}{memory}{capability}")
    return Markdown("; ".join(parts))


def tree(provenance: Provenance) -> Markdown:
    state = provenance.tree_at_start
    commit = code(provenance.commit or "unknown")
    if state.state == "clean":
        return Markdown(f"clean at commit {commit}")
    if state.state == "untracked":
        return Markdown(f"commit {commit} with untracked files: {untracked(state)}")
    if state.state == "modified":
        extra = f"; untracked files: {untracked(state)}" if state.untracked else ""
        return Markdown(
            f"**MODIFIED** after commit {commit}: patch {code(patch_path(state))}, "
            f"SHA-256 {code(state.patch_sha256 or 'unknown')}{extra}"
        )
    return Markdown(f"{text(without_commit(state))}: the code is identified by its content only")


def without_commit(state: TreeState) -> str:
    return f"{state.state}, because {state.reason}" if state.reason else state.state


def untracked(state: TreeState, most: int = 5) -> Markdown:
    """The first untracked files by name, the others by number."""
    names = ", ".join(code(name) for name in state.untracked[:most])
    rest = max(state.untracked_files, len(state.untracked)) - most
    return Markdown(f"{names} and {rest:,} more" if rest > 0 else names)


def patch_path(state: TreeState) -> str:
    """The path of the patch, relative to the document."""
    return f"records/patches/{(state.patch_sha256 or 'unknown')[:16]}.patch"


def latency(cell: Latency | None) -> Markdown:
    """p50 / p90 / p99 of a cell, in milliseconds."""
    if cell is None:
        return Markdown(NOTHING)
    return Markdown(
        " / ".join(number(value, 2) for value in (cell.p50_milliseconds, cell.p90_milliseconds, cell.p99_milliseconds))
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Markdown:
    """A table of cells that are markdown already, left-aligned."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return Markdown("\n".join([lines[0], "|" + ":--|" * len(head), *lines[1:]]))


def guesses(classes: list[Guess]) -> Markdown:
    return Markdown(", ".join(f"{text(guess.name)} {percent(guess.probability)}" for guess in classes))


FILTERS = {
    "latency": latency,
    "guesses": guesses,
    "markdown": Markdown,
    "code": code,
    "fenced": fenced,
    "percent": percent,
    "number": number,
    "rate": images_per_second_text,
    "significant": significant,
    "duration": duration,
    "size": size,
    "setting": setting,
    "pixel_percentiles": pixel_percentiles,
    "hardware": hardware,
    "tree": tree,
}
