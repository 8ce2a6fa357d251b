"""Facts of several stages in one place: where they ran, what to be careful with, and all hashes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from recipe.document import commands
from recipe.document.formatting import Markdown, code, hardware, name_values, size, text, tree
from recipe.document.run_data import STALE, RunData, Section, source_changed
from recipe.run.records import InferenceRecord, Provenance, StageRecord, TimingRecord, record_sha256

VARIABLE = re.compile(r"\$([A-Z_]+)")
VARIABLES = {"REPOSITORY": "the address of this repository", "DOCUMENT": "the full path of the folder of this page"}
SECTION_NAMES = {  # of the document -> its title
    "optimization_methods": "Optimization methods",
    "performance_metrics": "Performance metrics",
    "inference_code": "Inference",
    "timing_information": "Timing information",
    "serialization": "Serialization",
}


class Caution(NamedTuple):
    """A limit of the result."""

    text: Markdown
    is_serious: bool = True


def warnings(facts: RunData, sections: Mapping[str, Section]) -> list[Caution]:
    found: list[Caution] = []
    if stale := [name for key, name in SECTION_NAMES.items() if sections[key].state == STALE]:
        found.append(Caution(Markdown(f"**Stale sections**: {', '.join(stale)}. Their inputs have changed since.")))
    ran = [(name, record.provenance) for name, record in stages(facts)]
    if changed := [name for name, provenance in ran if source_changed(provenance)]:
        found.append(Caution(Markdown(f"**source changed during the stage**: {', '.join(changed)}.")))
    if unclean := [name for name, provenance in ran if provenance.tree_at_start.state != "clean"]:
        found.append(Caution(Markdown(f"**The code was not a clean commit**: {', '.join(unclean)}.")))
    training, evaluation = facts.training, facts.evaluation
    if training is not None and any(session.is_exact is False for session in training.sessions):
        found.append(Caution(Markdown("Training was resumed, **not exactly**: see *Dynamics*.")))
    for allowed in facts.publication.allowed if facts.publication is not None else ():
        found.append(Caution(Markdown(f"Published although {text(allowed)}.")))
    if evaluation is not None and evaluation.runs == 1 and facts.seeds is None:
        found.append(Caution(Markdown("One run: the spread over seeds is unknown."), is_serious=False))
    if facts.preprocessing is not None and not facts.preprocessing.is_ilsvrc2012:
        what = "The data are not ILSVRC2012: accuracies are not comparable with those of ImageNet."
        found.append(Caution(Markdown(what), is_serious=False))
    return found


def stages(facts: RunData) -> list[tuple[Markdown, StageRecord]]:
    """(name, record) of each stage that ran. Latencies that the inference stage measured are part of it."""
    named = []
    for name, record in facts.stages():
        if isinstance(record, TimingRecord) and is_same_stage(record, facts.inference):
            continue
        title = f"timing, {record.machine}" if isinstance(record, TimingRecord) else name
        named.append((text(title.replace("evaluations/", "evaluation, ")), record))
    return named


def is_same_stage(timing: TimingRecord, inference: InferenceRecord | None) -> bool:
    """Whether one command on one machine and source wrote both records."""
    if inference is None:
        return False
    first, second = timing.provenance, inference.provenance
    same = ("command", "commit", "source_sha256", "source_sha256_at_end", "tree_at_start", "hardware", "environment")
    return all(getattr(first, name) == getattr(second, name) for name in same)


def environments(facts: RunData) -> list[tuple[str, Markdown, str]]:
    """(fact, value, stages): a fact that is equal in all stages stands once."""
    ran = [(name, record.provenance) for name, record in stages(facts)]
    rows = []
    for fact, values in (
        ("Code", [tree(provenance) for _, provenance in ran]),
        ("Hardware", [hardware(provenance.hardware) for _, provenance in ran]),
        ("Environment variables", [name_values(provenance.environment) for _, provenance in ran]),
    ):
        for value in dict.fromkeys(values):
            of = [name for (name, _), other in zip(ran, values, strict=True) if other == value]
            rows.append((fact, value, _named(of, len(ran))))
    return [*rows, ("Versions", _versions(ran), "all")] if ran else []


def environment_in_brief(facts: RunData) -> Markdown:
    """The hardware and the main versions of the training, else of the first stage."""
    ran = [record.provenance for _, record in stages(facts)]
    if not ran:
        return Markdown("")
    main = facts.training.provenance if facts.training is not None else ran[0]
    versions = [f"{name} {text(main.versions[name])}" for name in ("python", "torch") if name in main.versions]
    return Markdown("; ".join([hardware(main.hardware), *versions]))


def _named(of: Sequence[Markdown], all_stages: int) -> Markdown:
    return Markdown("all" if len(of) == all_stages else ", ".join(of))


def _versions(ran: Sequence[tuple[Markdown, Provenance]]) -> Markdown:
    """Every package with its version, and with the stages where they used different ones."""
    packages: dict[str, dict[str, list[Markdown]]] = {}
    for name, provenance in ran:
        for package, version in provenance.versions.items():
            packages.setdefault(package, {}).setdefault(version, []).append(name)
    shown = []
    for package, found in packages.items():
        # the metadata of a package lack the build that the package itself names, as in 2.15.0+cu132
        versions = {v: of for v, of in found.items() if not any(other.startswith(f"{v}+") for other in found)}
        for version, of in versions.items():
            where = f" ({', '.join(of)})" if len(versions) > 1 else ""
            shown.append(f"{text(package)} {text(version)}{where}")
    return Markdown(", ".join(shown))


def variables(facts: RunData) -> Markdown:
    """The variables of the commands, each with its replacement."""
    names = dict.fromkeys(VARIABLE.findall("\n".join(commands.again(facts))))
    return Markdown(", ".join(f"`${name}` by {VARIABLES.get(name, 'the full path of yours')}" for name in names))


def hashes(facts: RunData, rows_shown: int) -> list[tuple[Markdown, str]]:
    """(name, SHA-256) of all files and values with a hash. At most `rows_shown` outputs of preprocessing."""
    rows: list[tuple[Markdown, str]] = []
    if (training := facts.training) is not None:
        rows.append((Markdown("recipe_id: configuration without the seed"), training.recipe_id))
        rows.append((Markdown("config_sha256: configuration"), training.config_sha256))
    ran, sources = stages(facts), dict[str, list[Markdown]]()
    for name, record in ran:
        sources.setdefault(record.provenance.source_sha256, []).append(name)
    rows += [(Markdown(f"source of {_named(names, len(ran))}"), digest) for digest, names in sources.items()]
    if (data := facts.preprocessing) is not None:
        for archive in data.archives[:rows_shown]:
            what = f"raw archive {code(archive.name)}, {size(archive.bytes)}, MD5 {code(archive.md5)}"
            rows.append((Markdown(what), archive.sha256))
        rows += [(Markdown(f"raw images of {text(name)}"), split.raw_sha256) for name, split in data.splits.items()]
        rows.append((Markdown("class list"), data.class_list_sha256))
        rows += [(code(name), digest) for name, digest in list(data.outputs.items())[:rows_shown]]
    if training is not None:
        rows += [
            (Markdown("architecture"), training.model.architecture_sha256),
            (Markdown("initial weights"), training.model.initial_weights_sha256),
            (Markdown("order of the images of two epochs"), training.loader.order_sha256),
            (Markdown("pixels and draws of the augmentation"), training.augmentation_sha256),
        ]
        rows += [(Markdown(f"training, {code(name)}"), digest) for name, digest in training.outputs.items()]
    if facts.fingerprint is not None:
        rows.append((code("records/fingerprint.json"), record_sha256(facts.fingerprint)))
    for evaluation in (facts.evaluation, *facts.other_evaluations):
        if evaluation is not None:
            rows.append((Markdown(f"pixels of {code(evaluation.protocol.name)}"), evaluation.protocol.transform_sha256))
            rows += [(code(name), digest) for name, digest in evaluation.outputs.items()]
    if facts.serialization is not None:
        rows += [(code(entry.file), entry.sha256) for entry in facts.serialization.variants]
    if facts.inference is not None:
        rows += [(code(found.picture), found.sha256) for found in facts.inference.pictures if found.label is None]
        rows += [(code(name), digest) for name, digest in facts.inference.outputs.items()]
    return rows
