"""What each stage leaves behind: frozen, typed records <-> JSON.

A record holds numbers with their units in their names; formatting happens in the document's template only. Every
record carries its provenance and the hashes of what went in and came out, so that records form a chain
raw images -> shards -> weights -> predictions -> metrics, in which a stale link is visible.

Decoding validates: an unknown field, a missing one or a wrong type is refused (a record may come from a stranger).
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from recipe.errors import UserError

Setting = str | int | float | bool | None | list[Any] | dict[str, Any]  # any JSON value, read back from a live object


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The base of everything that is written to JSON."""


class TreeState(Record, frozen=True, kw_only=True):
    """The working tree: `clean`, `untracked` files only, `modified`, or why no commit names the code: `no git`,
    `git refused`, `not a repository of ours`."""

    state: str
    reason: str | None = None  # for which git refused, in its words
    untracked: list[str] = []  # at most 50
    untracked_files: int = 0
    patch_sha256: str | None = None  # of records/patches/<hash>.patch beside the record


class Hardware(Record, frozen=True, kw_only=True):
    """The machine of the first process; every node is taken to be alike."""

    processor: str
    cores: int
    memory_gib: float
    accelerator: str | None = None  # the device's own name, such as "NVIDIA H200"
    accelerators: int = 0  # in this run, over all nodes
    accelerator_memory_gib: float | None = None
    compute_capability: str | None = None


class Provenance(Record, frozen=True, kw_only=True):
    """Which code ran, by which command, when, for how long, on what."""

    command: str
    commit: str | None
    tree_at_start: TreeState
    tree_at_end: TreeState
    source_sha256: str  # over the content of the code that can change a result, at the start of the stage
    source_sha256_at_end: str
    started: str  # ISO 8601, UTC
    seconds: float
    hardware: Hardware
    versions: dict[str, str]
    environment: dict[str, str]


class Archive(Record, frozen=True, kw_only=True):
    """A raw file as it was found."""

    name: str
    bytes: int
    md5: str
    sha256: str
    is_published_md5: bool | None  # None: nobody published one


class Oddity(Record, frozen=True, kw_only=True):
    """An image that was not taken as it was."""

    split: str
    key: str
    what: str  # found
    done: str  # about it


class LeftOut(Record, frozen=True, kw_only=True):
    """Files and folders that were found among the raw images and are not used."""

    count: int
    examples: list[str]  # at most three, below the folder of the raw data


class SplitFacts(Record, frozen=True, kw_only=True):
    """One split of a processed data set."""

    images: int
    classes: int
    images_per_class_min: int
    images_per_class_max: int
    raw_sha256: str  # over sorted (key, label, sha256 of the original bytes): the same for tars and folders
    shards: int
    shard_bytes: int
    width_percentiles: list[int]  # pixels at 0, 5, 50, 95 and 100 %
    height_percentiles: list[int]
    grey_images: int


class LabelExample(Record, frozen=True, kw_only=True):
    """One worked example of the label convention."""

    key: str
    index: int
    class_id: str
    name: str


class PreprocessingRecord(Record, frozen=True, kw_only=True):
    """The Data chapter: what the raw images were and what was made of them."""

    format: str = "preprocessing/1"
    config_sha256: str  # of the settings that shape the data set
    provenance: Provenance
    inputs: dict[str, str]
    outputs: dict[str, str]
    description: dict[str, Setting]  # what people declared about the data set
    data_set: str
    layout: str  # how the raw files were found: official tars, class folders, Kaggle, ...
    raw_path: str  # relative to the checkout, or $RAW_DIR
    processed_path: str
    expectation: str
    is_ilsvrc2012: bool
    archives: list[Archive]
    splits: dict[str, SplitFacts]
    class_count: int
    class_list_sha256: str
    label_convention: str
    label_examples: list[LabelExample]
    validation_split: str  # how the validation set came to be
    shard_order: str
    stored_as: str
    odd_images: dict[str, int]  # kind -> count
    odd_examples: list[Oddity]  # at most 20; the manifest lists all
    rejected: list[Oddity]
    left_out: dict[str, LeftOut] = {}  # reason -> files and folders; without those that belong to an operating system
    lost_images: dict[str, LeftOut] = {}  # class (or split) -> those of them that are named like images
    decoded_with: str
    processes: int
    images_per_second: float
    continued_shards: int  # found complete from an interrupted run of the same settings


class ParameterGroup(Record, frozen=True, kw_only=True):
    """One group of the live optimizer."""

    name: str
    tensors: int
    parameters: int
    settings: dict[str, Setting]  # read back from optimizer.param_groups


class ModelFacts(Record, frozen=True, kw_only=True):
    """The network as built."""

    name: str
    class_name: str
    classes: int
    parameters: int
    architecture_sha256: str  # over module classes with their arguments, and tensor names, shapes and types
    modules: dict[str, int]  # class -> count
    batch_norm: dict[str, Setting]
    zero_initialised_norms: int
    alterations: dict[str, Setting] = {}  # blurred strides, stochastic depth, the bias of the head; empty: none
    initial_weights: str  # "random, seed 0" or the hash of the given ones
    initial_weights_sha256: str


class Schedule(Record, frozen=True, kw_only=True):
    """The learning rate, evaluated at steps."""

    steps: int
    steps_per_epoch: int
    warmup_steps: int
    points: list[tuple[int, float]]  # (step, learning rate)


class LoaderFacts(Record, frozen=True, kw_only=True):
    """How batches are made, read back from the live loader."""

    images_per_epoch: int
    unique_images_per_epoch: int  # fewer where an epoch holds several copies of an image
    images_left_out_per_epoch: int  # other ones in every epoch
    global_batch_size: int
    images_per_forward: int  # in one process
    images_per_batch_norm: int
    accumulation_steps: int
    decoder: str
    threads_per_process: int  # that decode, in all, for each process that trains
    first_indices: list[int]  # of epoch 0
    order_sha256: str  # over the order of the first two epochs
    order: str = "random"  # blocks: of shards, then of images within a few shards
    loading_processes: int = 0  # of each process that trains; 0: it decodes in threads of its own


class Epoch(Record, frozen=True, kw_only=True):
    """One epoch's cost, by the wall clock of the first process."""

    epoch: int  # counted from 1
    seconds: float
    images_per_second: float  # of training, over all processes
    data_wait_fraction: float
    validation_seconds: float
    held_up_fraction: float | None = None  # of the main thread, stalled by the GIL or for want of a core; beside a GPU


class Session(Record, frozen=True, kw_only=True):
    """One uninterrupted stretch of training."""

    started: str
    first_step: int
    processes: int
    is_exact: bool | None  # None: the first session; else whether the continuation can be bit-exact
    note: str
    source: str  # the first digits of the hash of the code
    images_per_batch_norm: int


class TrainingRecord(Record, frozen=True, kw_only=True):
    """The Training chapter: what was trained, how, and how it went."""

    format: str = "training/1"
    config_sha256: str
    recipe_id: str
    provenance: Provenance
    inputs: dict[str, str]
    outputs: dict[str, str]
    seed: int
    model: ModelFacts
    loss: dict[str, Setting]
    optimizer: str
    parameter_groups: list[ParameterGroup]
    schedule: Schedule
    augmentation: dict[str, Setting]
    augmentation_sha256: (
        str  # over the pixels that the live augmentation makes of fixed images, and over its draws for the device
    )
    averaging: dict[str, Setting]
    loader: LoaderFacts
    precision: dict[str, Setting]
    processes: int
    backend: str
    sessions: list[Session]
    epochs: list[Epoch]
    training_seconds: float  # all sessions, validation left out
    validation_seconds: float
    images_seen: int
    peak_accelerator_memory_gib: float | None
    skipped_steps: int  # by the gradient scaler of fp16
    validation_protocol: str
    final: dict[str, float]  # the last train and validation rows
    best_epoch: int
    selection: str
    circumstances: dict[str, Setting] = {}  # what must be equal for another run to give the same bits


class EnergyRecord(Record, frozen=True, kw_only=True):
    """What the accelerators used from the first step of a training to the end of its last validation."""

    format: str = "energy/1"
    inputs: dict[str, str]  # the weights that it was spent on
    joules: float  # of the whole devices, by their driver's counter
    seconds: float  # over which it was counted
    accelerators: int
    counter: str


class ProbeStep(Record, frozen=True, kw_only=True):
    """One optimizer step of the canary."""

    step: int  # of the recipe's own schedule
    epoch: int
    indices: list[int]  # of the images, in order, over all forward passes of the step
    learning_rate: float
    images_mean: float  # of the normalised, mixed images that go into the network
    images_std: float
    loss: float
    gradient_norm: float
    distances: dict[str, float]  # after the step, of each parameter group and of the moving average from their start


class EvaluationProbe(Record, frozen=True, kw_only=True):
    """What the evaluation makes of a few validation images, through the weights that count."""

    logits: list[float]  # of the first batch
    labels: list[int]  # of all images, as are the lists below
    losses: list[float]
    margins: list[float]  # best logit less the second best
    best_classes: int  # kept for each image
    correct: list[int]  # within 1, 2, ... 5
    loss: float
    accuracies: list[float]  # within 1 and 5
    class_counts: list[tuple[int, int, int]]  # of each class: images, right within 1 and 5


class Fingerprint(Record, frozen=True, kw_only=True):
    """What this recipe's code does with a few images that it draws itself, in fp32 on one CPU thread.

    A stranger computes the same numbers in a minute, without the data and without a GPU, and so learns whether this
    checkout still does what the recipe's did.
    """

    format: str = "fingerprint/2"
    source_sha256: str
    versions: dict[str, str]
    instructions: str  # of the processor, as torch uses them: they decide how pixels are rounded
    architecture_sha256: str
    parameters: int
    learning_rates: list[float]  # at 101 steps, evenly spread over the recipe's own schedule
    parameter_groups: list[ParameterGroup]
    augmentation_sha256: str
    evaluation_sha256: str
    order_sha256: str
    facts: dict[str, Setting]  # of loss, averaging, augmentation, normalisation and evaluation, read back
    steps: list[ProbeStep]
    training_counts: list[int]  # over all these steps: images, right within 1 and 5, steps that were skipped
    evaluation: EvaluationProbe


class SeedDynamics(Record, frozen=True, kw_only=True):
    """How one seed of a recipe went."""

    seed: int
    weights_sha256: str | None  # of what it ended with
    source_sha256: str | None
    images_per_batch_norm: int | None
    raw_sha256: dict[str, str]  # of each split's original images
    epochs: dict[str, list[int | float | None]]  # one column each: epoch, train_loss, train_top1, ...


class Dynamics(Record, frozen=True, kw_only=True):
    """How several seeds of one recipe went: what another run of it is judged by."""

    format: str = "dynamics/1"
    recipe_id: str
    config: dict[str, Any]  # pinned, without the seed
    steps_per_epoch: int
    seeds: list[SeedDynamics]


class ClassName(Record, frozen=True, kw_only=True):
    """One class; its label is its place in the list."""

    id: str
    name: str


class Interface(Record, frozen=True, kw_only=True):
    """What somebody needs who has nothing but the weights: how pixels are made, and what the outputs mean.

    It travels inside each checkpoint and each exported model.
    """

    classes: list[ClassName]  # output k is the logit of class k
    label_convention: str
    resize_pixels: int  # of the short side
    crop_pixels: int  # centre crop
    interpolation: str
    antialias: bool
    mean: list[float]  # RGB in [0, 1]
    std: list[float]


class Protocol(Record, frozen=True, kw_only=True):
    """How a metric was measured, read back from the live transform."""

    name: str
    backend: str  # torch, or onnxruntime with the provider that computed
    transform: dict[str, Setting]
    transform_sha256: str  # over the pixels that it makes of a fixed image
    decoder: str
    precision: str
    arithmetic: dict[str, Setting]  # torch's own switches
    batch_size: int
    checkpoint: str
    epochs_completed: int  # by these weights
    epochs: int  # of the whole training
    weights: str  # "as trained" or "moving average"


class ClassCounts(Record, frozen=True, kw_only=True):
    """One row of the per-class table."""

    index: int
    class_id: str
    name: str
    images: int
    correct_top1: int
    correct_top5: int


class EvaluationRecord(Record, frozen=True, kw_only=True):
    """The Performance metrics section: integer counts over the whole validation set."""

    format: str = "evaluation/1"
    config_sha256: str
    provenance: Provenance
    inputs: dict[str, str]
    outputs: dict[str, str]
    protocol: Protocol
    images: int
    correct_top1: int
    correct_top5: int
    loss: float
    published: dict[str, float]  # what others measured of these weights, as they published it; mostly empty
    per_class: list[ClassCounts]
    runs: int = 1
    processes: int
    evaluation_seconds: float
    images_per_second: float


class Flip(Record, frozen=True, kw_only=True):
    """An image that the exported model puts into another class than the eager one."""

    key: str
    label: int
    eager_class: int
    exported_class: int
    eager_margin: float  # best logit less the second best, of the eager model


class VariantFacts(Record, frozen=True, kw_only=True):
    """One exported file, and how it compares with the eager model on every validation image."""

    variant: str
    file: str
    bytes: int
    sha256: str
    nodes: dict[str, int]  # operator -> count, as in the file
    conversion: dict[str, Setting]  # how it was made from the fp32 graph
    relative_logit_error: float  # largest difference of a logit / largest logit, over all images
    limit: str  # what the gate allowed
    correct_top1: int
    correct_top5: int
    flips: int
    flip_examples: list[Flip]  # those with the largest margin, at most 20; the predictions file holds all images
    images_per_second: float


class SerializationRecord(Record, frozen=True, kw_only=True):
    """The Serialization section: files that passed the gate, each compared with the eager model image by image."""

    format: str = "serialization/1"
    config_sha256: str
    settings: dict[str, Setting]
    provenance: Provenance
    inputs: dict[str, str]
    outputs: dict[str, str]
    checkpoint: str
    protocol: str
    provider: str  # of onnxruntime
    opset: int
    input_shape: list[str]
    images: int
    largest_logit: float  # of the eager model, absolute
    eager_correct_top1: int  # fp32 on the CPU, the reference of the gate
    eager_correct_top5: int
    eager_images_per_second: float
    evaluated_correct_top1: int  # as the evaluation record has it
    variants: list[VariantFacts]
    properties: list[str]  # names of the metadata inside each file


class Guess(Record, frozen=True, kw_only=True):
    """One of the best classes for one image."""

    index: int
    class_id: str
    name: str
    probability: float


class ClassifiedPicture(Record, frozen=True, kw_only=True):
    """What each file of a model says about one picture."""

    picture: str
    sha256: str  # of its file
    label: str | None  # the name of its class; None where the picture is not of the data set
    guesses: dict[str, list[Guess]]  # file of the model -> the best classes, best first


class InferenceRecord(Record, frozen=True, kw_only=True):
    """The Inference / Code section: what the example notebook saw."""

    format: str = "inference/1"
    config_sha256: str
    provenance: Provenance
    inputs: dict[str, str]
    outputs: dict[str, str]
    class_count: int
    label_convention: str
    pictures: list[ClassifiedPicture]  # the given ones first, then samples of the validation set


PREPROCESSING, MODEL, BOTH = "preprocessing", "model", "both"  # what a latency is of


class Latency(Record, frozen=True, kw_only=True):
    """One cell of the timing table; a percentile that too few repeats support is absent."""

    backend: str
    precision: str
    what: str  # preprocessing, model, or both
    batch_size: int
    repeats: int
    p50_milliseconds: float | None
    p90_milliseconds: float | None
    p99_milliseconds: float | None
    images_per_second: float  # at the median
    noise: float  # relative difference of the medians of two interleaved halves: the same thing, measured twice
    histogram_milliseconds: list[float]  # quantiles at 0, 2, ..., 100 %, for the figure


class Absent(Record, frozen=True, kw_only=True):
    """A backend that could not run, and why."""

    backend: str
    reason: str


class TimingRecord(Record, frozen=True, kw_only=True):
    """The Timing information of one machine."""

    format: str = "timing/1"
    config_sha256: str
    settings: dict[str, Setting]
    provenance: Provenance
    inputs: dict[str, str]
    machine: str  # names the file: a rerun on this machine replaces these rows only
    threads: int
    image: str  # what preprocessing was measured on
    image_sha256: str
    image_pixels: list[int]  # width, height
    crop_pixels: int
    arithmetic: dict[str, Setting]  # torch's own switches
    clock: dict[str, Setting]  # driver, clocks and power of the accelerator as they were
    noise_floor: float  # median of the cells' noise
    reference: str  # the backend that is what torchvision's users write
    cells: list[Latency]
    absent: list[Absent]


class JudgedClaim(Record, frozen=True, kw_only=True):
    """One claim of a recipe beside what a second run of it gave."""

    claim: str
    level: str  # see recipe/review/reproduce/judge.py
    claimed: Setting
    found: Setting
    why: str


class ReproductionRecord(Record, frozen=True, kw_only=True):
    """A recipe that was run again from its document alone, and each of its claims judged."""

    format: str = "reproduction/1"
    document_sha256: str  # of the file that was read: names what was reproduced
    name: str
    recipe_id: str
    config_sha256: str
    provenance: Provenance
    machine: dict[str, Setting]  # processes, threads and the like, as they were chosen for this machine
    checkout: list[str]  # how this checkout differs from the recipe's, in words
    circumstances: list[str]  # and the circumstances of training
    stages: list[str]  # that were run
    claims: list[JudgedClaim]
    verdict: str


class JournalEntry(Record, frozen=True, kw_only=True):
    """One stage of one run, as the journal of experiments has it."""

    time: str  # started
    run: str  # numbered where several places have the same recorded path
    stage: str
    outcome: str  # ended, stopped, or that no end was written
    step: int | None = None  # at which it was stopped
    top1_accuracy: float | None = None
    config_sha256: str | None = None
    parent: str | None = None  # the run before it whose configuration differs
    changed: list[str] = []  # from the parent's configuration, at most 20
    changes: int = 0


class JournalRecord(Record, frozen=True, kw_only=True):
    """The Journal section: all runs of this name, from runs/journal.jsonl as it stood when the document was written."""

    format: str = "journal/1"
    name: str
    run_dir: str | None = None  # of this run, as the document's commands name it; None in older records
    entries: list[JournalEntry]  # the newest 200
    earlier_entries: int  # that are left out here
    unreadable_lines: int


class SeedRun(Record, frozen=True, kw_only=True):
    """One of several runs of a recipe."""

    seed: int
    weights_sha256: str
    source_sha256: str
    correct_top1: int
    correct_top5: int
    epochs: dict[str, list[float | None]]  # one list for each column of the dynamics


class SeedsRecord(Record, frozen=True, kw_only=True):
    """Runs with one recipe_id, which differ in their seed only: how far honest runs lie apart."""

    format: str = "seeds/1"
    recipe_id: str
    protocol: str
    images: int
    runs: list[SeedRun]  # by seed


class PublicationRecord(Record, frozen=True, kw_only=True):
    """What a published recipe says that its run does not."""

    format: str = "publication/1"
    run_dir: str  # as commands name it
    artefacts: str | None  # the address of weights and exported files
    allowed: list[str]  # what would have been refused, and was allowed
    metric_rows: int  # of the run
    metric_rows_kept: int


AnyRecord = TypeVar("AnyRecord", bound=Record)


def to_json(record: Record) -> bytes:
    """The record as indented JSON with a final newline; equal records give equal bytes.

    Raises `UserError` for a record that could not be read again: JSON has no number that is not finite, for one.
    """
    content = msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"
    from_json(content, type(record), f"the {type(record).__name__} that would be written")
    return content


def from_json(content: bytes, kind: type[AnyRecord], where: str) -> AnyRecord:
    """Decode and validate; raises `UserError` that names the file and the field."""
    try:
        record = msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not a {kind.__name__}: {error}") from error
    formats = {entry.name: entry.default for entry in msgspec.structs.fields(kind)}
    found = getattr(record, "format", None)
    if found != formats.get("format"):
        raise UserError(f"{where} has format {found!r}; this code reads {formats['format']!r}")
    return record
