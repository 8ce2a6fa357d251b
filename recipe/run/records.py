"""Records: the results of each stage as frozen, typed structs, stored as JSON.

Numbers have their units in their names and are formatted in the document's template only. The record of a stage has its
provenance and the hashes of its inputs and outputs. So records form a chain raw images -> shards -> weights ->
predictions -> metrics, and a stale record is visible.

Decoding validates, since records are untrusted: unknown fields, missing fields and wrong types are errors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from recipe.errors import UserError

PAIRS_MAX, MISTAKES_MAX, FLIPS_MAX = 10, 8, 20  # listed in a record, of confused classes, mistakes and flips
Setting = str | int | float | bool | None | list[Any] | dict[str, Any]  # any JSON value, read back from a live object


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class of all structs that are stored as JSON."""


class TreeState(Record, frozen=True, kw_only=True):
    """`clean`, `untracked` or `modified`. Without a commit: `no git`, `git refused` or `not a repository of ours`."""

    state: str
    reason: str | None = None  # the answer of git if it refused
    untracked: list[str] = []  # at most 50
    untracked_files: int = 0
    patch_sha256: str | None = None  # of records/patches/<hash>.patch


class Hardware(Record, frozen=True, kw_only=True):
    """The machine of rank 0. All nodes are assumed to be alike."""

    processor: str
    cores: int
    memory_gib: float
    accelerator: str | None = None  # name of the device, such as "NVIDIA H200"
    accelerators: int = 0  # used, over all nodes
    accelerator_memory_gib: float | None = None
    compute_capability: str | None = None


class Provenance(Record, frozen=True, kw_only=True):
    command: str
    commit: str | None
    tree_at_start: TreeState
    tree_at_end: TreeState
    source_sha256: str  # of all code that can change a result, when the stage started
    source_sha256_at_end: str
    started: str  # ISO 8601, UTC
    seconds: float
    hardware: Hardware
    versions: dict[str, str]
    environment: dict[str, str]


class Archive(Record, frozen=True, kw_only=True):
    name: str
    bytes: int
    md5: str
    sha256: str
    is_published_md5: bool | None  # None: no published MD5 is known


class UnusualImage(Record, frozen=True, kw_only=True):
    """An image that was converted or rejected."""

    split: str
    key: str
    what: str  # is unusual
    done: str  # "stored as ..." or "left out"


class LeftOut(Record, frozen=True, kw_only=True):
    """Files and folders among the raw images that are not used."""

    count: int
    examples: list[str]  # at most three, relative to the raw data


class SplitFacts(Record, frozen=True, kw_only=True):
    images: int
    classes: int
    images_per_class_min: int
    images_per_class_max: int
    images_per_class: list[int] = []  # of each class of the list, by its index; empty in older records
    raw_sha256: str  # of sorted (key, label, sha256 of the original bytes): equal for tars and folders
    shards: int
    shard_bytes: int
    width_percentiles: list[int]  # pixels at 0, 5, 50, 95 and 100 %
    height_percentiles: list[int]
    grey_images: int


class LabelExample(Record, frozen=True, kw_only=True):
    key: str
    index: int
    class_id: str
    name: str


class PreprocessingRecord(Record, frozen=True, kw_only=True):
    """The Data chapter."""

    format: str = "preprocessing/1"
    config_sha256: str  # of the settings that change the data set
    provenance: Provenance
    inputs: dict[str, str]
    outputs: dict[str, str]
    description: dict[str, Setting]  # as declared in the configuration
    data_set: str
    layout: str  # of the raw files: official tars, class folders, Kaggle, ...
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
    validation_split: str  # how the validation set was chosen
    shard_order: str
    stored_as: str
    unusual_images: dict[str, int]  # kind -> count
    unusual_examples: list[UnusualImage]  # at most 20. The manifest lists all
    rejected: list[UnusualImage]
    left_out: dict[str, LeftOut] = {}  # reason -> files and folders, without files of an operating system
    lost_images: dict[str, LeftOut] = {}  # class (or split) -> unused files named like images
    decoded_with: str
    processes: int
    images_per_second: float
    continued_shards: int  # kept from an interrupted run with the same settings


class ParameterGroup(Record, frozen=True, kw_only=True):
    name: str
    tensors: int
    parameters: int
    settings: dict[str, Setting]  # of optimizer.param_groups


class ModelFacts(Record, frozen=True, kw_only=True):
    """The network, read back from the module."""

    name: str
    class_name: str
    classes: int
    parameters: int
    architecture_sha256: str  # of module classes with their arguments, and tensor names, shapes and types
    modules: dict[str, int]  # class -> count
    batch_norm: dict[str, Setting]
    zero_initialised_norms: int
    alterations: dict[str, Setting] = {}  # blur pool, stochastic depth, bias of the head
    initial_weights: str  # "random, seed 0", or the hash of given weights
    initial_weights_sha256: str


class Schedule(Record, frozen=True, kw_only=True):
    steps: int
    steps_per_epoch: int
    warmup_steps: int
    points: list[tuple[int, float]]  # (step, learning rate)


class LoaderFacts(Record, frozen=True, kw_only=True):
    """The training loader, read back."""

    images_per_epoch: int
    unique_images_per_epoch: int  # fewer with repeated augmentation
    images_left_out_per_epoch: int  # in the incomplete last batch, different ones in every epoch
    global_batch_size: int
    images_per_forward: int  # in one process
    batch_norm_batch_size: int
    accumulation_steps: int
    decoder: str
    threads_per_process: int  # decoding threads of each training process, its workers included
    first_indices: list[int]  # of epoch 0
    order_sha256: str  # of the order of images in the first two epochs
    order: str = "random"  # or blocks: random shards, then random images within a few shards
    loading_processes: int = 0  # workers of each training process. 0: it decodes in threads


class Epoch(Record, frozen=True, kw_only=True):
    """Metrics and cost of one epoch. Seconds are by the wall clock of rank 0."""

    epoch: int  # counted from 1
    learning_rate: float  # of its last step
    train_loss: float  # these three: means over the augmented images of all its steps and processes
    train_top1: float  # fractions, as all accuracies
    train_top5: float
    validation_loss: float
    validation_top1: float
    validation_top5: float
    seconds: float  # of training
    images_per_second: float  # of training, over all processes
    data_wait_fraction: float
    validation_seconds: float
    stalled_fraction: float | None = None  # of the main thread with a GPU, by the GIL or a missing core


class Session(Record, frozen=True, kw_only=True):
    """One uninterrupted part of a training."""

    started: str
    first_step: int
    processes: int
    is_exact: bool | None  # the continuation can be bit-exact. None: the first session
    note: str
    source: str  # first digits of the hash of the code
    batch_norm_batch_size: int


class TrainingRecord(Record, frozen=True, kw_only=True):
    """The Training chapter."""

    format: str = "training/2"
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
    augmentation_sha256: str  # of augmented fixed images, and of the parameters of mixing and erasing
    averaging: dict[str, Setting]
    loader: LoaderFacts
    precision: dict[str, Setting]
    processes: int
    backend: str
    sessions: list[Session]
    epochs: list[Epoch]
    training_seconds: float  # of all sessions, without validation
    validation_seconds: float
    images_seen: int
    peak_accelerator_memory_gib: float | None
    skipped_steps: int  # by the gradient scaler of fp16
    validation_protocol: str
    best_epoch: int
    selection: str
    determinism_context: dict[str, Setting] = {}  # must be equal for bit-identical results


class EnergyRecord(Record, frozen=True, kw_only=True):
    """Energy of the accelerators from the first step of a training to the end of its last validation."""

    format: str = "energy/1"
    inputs: dict[str, str]  # the trained weights
    joules: float  # of all devices, by the driver's counter
    seconds: float  # of counting
    accelerators: int
    counter: str


class ProbeStep(Record, frozen=True, kw_only=True):
    """One optimizer step of the fingerprint."""

    step: int  # of the recipe's schedule
    epoch: int
    indices: list[int]  # of the images, in order, over all forward passes of the step
    learning_rate: float
    images_mean: float  # of the normalised, mixed inputs of the network
    images_std: float
    loss: float
    gradient_norm: float
    distances: dict[str, float]  # of each parameter group and of the moving average, from the start to after the step


class EvaluationProbe(Record, frozen=True, kw_only=True):
    """Evaluation of a few validation images after the last step."""

    logits: list[float]  # of the first batch
    labels: list[int]  # of all images, as the lists below
    losses: list[float]
    margins: list[float]  # best logit minus the second best
    best_classes: int  # stored for each image
    correct: list[int]  # within 1, 2, ... 5
    loss: float
    accuracies: list[float]  # within 1 and 5
    class_counts: list[tuple[int, int, int]]  # of each class: images, correct within 1 and 5


class Fingerprint(Record, frozen=True, kw_only=True):
    """A short training of this recipe on a few drawn images, in fp32 on one CPU thread.

    Another checkout computes the numbers in a minute, without the data and without a GPU. Equal numbers mean that it
    trains as the recipe's code did.
    """

    format: str = "fingerprint/2"
    source_sha256: str
    versions: dict[str, str]
    instructions: str  # of the processor, as torch uses them. They decide the rounding
    architecture_sha256: str
    parameters: int
    learning_rates: list[float]  # at 101 steps, evenly spaced over the recipe's schedule
    parameter_groups: list[ParameterGroup]
    augmentation_sha256: str
    evaluation_sha256: str
    order_sha256: str
    facts: dict[str, Setting]  # of loss, averaging, augmentation, normalisation and evaluation, read back
    steps: list[ProbeStep]
    training_counts: list[int]  # over all steps: images, correct within 1 and 5, skipped steps
    evaluation: EvaluationProbe


class ClassName(Record, frozen=True, kw_only=True):
    id: str
    name: str


class Interface(Record, frozen=True, kw_only=True):
    """Preprocessing and classes of a model. Stored in each checkpoint and exported file."""

    classes: list[ClassName]  # output k is the logit of class k
    label_convention: str
    resize_pixels: int  # of the short side
    crop_pixels: int  # centre crop
    interpolation: str
    antialias: bool
    mean: list[float]  # RGB in [0, 1]
    std: list[float]


class Protocol(Record, frozen=True, kw_only=True):
    """The protocol of a metric, read back from the transform."""

    name: str
    backend: str  # torch, or onnxruntime with its provider
    transform: dict[str, Setting]
    transform_sha256: str  # of its pixels for a fixed image
    decoder: str
    precision: str
    arithmetic: dict[str, Setting]  # torch's own switches
    batch_size: int
    checkpoint: str
    epochs_completed: int  # of these weights
    epochs: int  # of the training
    weights: str  # "as trained" or "moving average"


class ClassCounts(Record, frozen=True, kw_only=True):
    index: int
    class_id: str
    name: str
    images: int
    correct_top1: int
    correct_top5: int


class ConfusedPair(Record, frozen=True, kw_only=True):
    """Images of one class that were taken for another."""

    label: str  # name of the class
    predicted: str
    images: int


class Mistake(Record, frozen=True, kw_only=True):
    """A misclassified image."""

    key: str
    label: str  # name of the class
    predicted: str
    margin: float  # best logit minus the second best


class EvaluationRecord(Record, frozen=True, kw_only=True):
    """The Performance metrics section: integer counts over all validation images."""

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
    published: dict[str, float]  # metrics that others published of these weights
    per_class: list[ClassCounts]
    confused_pairs: list[ConfusedPair] = []  # at most `PAIRS_MAX`, the most frequent first
    mistakes: list[Mistake] = []  # at most `MISTAKES_MAX`, the largest margins first
    runs: int = 1
    processes: int
    evaluation_seconds: float
    images_per_second: float


class Flip(Record, frozen=True, kw_only=True):
    """An image whose best class differs between the exported and the PyTorch model."""

    key: str
    label: int
    eager_class: int
    exported_class: int
    eager_margin: float  # best logit minus the second best, of the PyTorch model


class VariantFacts(Record, frozen=True, kw_only=True):
    """One exported file, compared with the PyTorch model on every validation image."""

    variant: str
    file: str
    bytes: int
    sha256: str
    nodes: dict[str, int]  # operator -> count
    conversion: dict[str, Setting]  # from the fp32 graph
    relative_logit_error: float  # largest difference of a logit / largest logit, over all images
    limit: str  # of the comparison
    correct_top1: int
    correct_top5: int
    flips: int
    flip_examples: list[Flip]  # at most 20, the largest margins first. All images are in the predictions file
    images_per_second: float


class SerializationRecord(Record, frozen=True, kw_only=True):
    """The Serialization section: the exported files that passed the comparison."""

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
    largest_logit: float  # of the PyTorch model, absolute
    eager_correct_top1: int  # of the PyTorch model in fp32 on the CPU, the reference
    eager_correct_top5: int
    eager_images_per_second: float
    evaluated_correct_top1: int  # of the evaluation record
    variants: list[VariantFacts]
    properties: list[str]  # names of the metadata in each file


class Guess(Record, frozen=True, kw_only=True):
    index: int
    class_id: str
    name: str
    probability: float


class ClassifiedPicture(Record, frozen=True, kw_only=True):
    """One picture, classified by each file of the model."""

    picture: str
    sha256: str  # of its file
    label: str | None  # name of its class. None: not a picture of the data set
    guesses: dict[str, list[Guess]]  # file of the model -> the best classes, best first


class InferenceRecord(Record, frozen=True, kw_only=True):
    """The Inference / Code section, written by the example notebook."""

    format: str = "inference/1"
    config_sha256: str
    provenance: Provenance
    inputs: dict[str, str]
    outputs: dict[str, str]
    class_count: int
    label_convention: str
    pictures: list[ClassifiedPicture]  # given ones first, then samples of the validation set


PREPROCESSING, MODEL, BOTH = "preprocessing", "model", "both"  # parts whose latency is measured


class Latency(Record, frozen=True, kw_only=True):
    """One cell of the timing table. Percentiles with too few repeats beyond them are None."""

    backend: str
    precision: str
    what: str  # preprocessing, model, or both
    batch_size: int
    repeats: int
    p50_milliseconds: float | None
    p90_milliseconds: float | None
    p99_milliseconds: float | None
    images_per_second: float  # at the median
    noise: float  # relative difference of the medians of two interleaved halves
    histogram_milliseconds: list[float]  # quantiles at 0, 2, ..., 100 %, for the figure


class Absent(Record, frozen=True, kw_only=True):
    """A backend that could not run."""

    backend: str
    reason: str


class TimingRecord(Record, frozen=True, kw_only=True):
    """The Timing information section of one machine."""

    format: str = "timing/1"
    config_sha256: str
    settings: dict[str, Setting]
    provenance: Provenance
    inputs: dict[str, str]
    machine: str  # name of the file. A rerun on this machine replaces it
    threads: int
    image: str  # that preprocessing was measured on
    image_sha256: str
    image_pixels: list[int]  # width, height
    crop_pixels: int
    arithmetic: dict[str, Setting]  # torch's own switches
    clock: dict[str, Setting]  # driver, clocks and power of the accelerator
    noise_floor: float  # median of the cells' noise
    reference: str  # the backend that others are compared with: plain torchvision code
    cells: list[Latency]
    absent: list[Absent]


class JudgedClaim(Record, frozen=True, kw_only=True):
    """One claim of a recipe, compared with a second run of it."""

    claim: str
    level: str  # see recipe/review/reproduce/judge.py
    claimed: Setting
    found: Setting
    why: str


class ReproductionRecord(Record, frozen=True, kw_only=True):
    """A second run of a recipe from its document, and the comparison of its claims."""

    format: str = "reproduction/1"
    document_sha256: str  # of the file that was read
    name: str
    recipe_id: str
    config_sha256: str
    provenance: Provenance
    machine: dict[str, Setting]  # processes, threads and similar settings of this machine
    checkout: list[str]  # differences between this checkout and the recipe's, in words
    determinism_context: list[str]  # differences between the circumstances of the two trainings
    stages: list[str]  # that were run
    claims: list[JudgedClaim]
    verdict: str


class JournalEntry(Record, frozen=True, kw_only=True):
    """One stage of one run in runs/journal.jsonl."""

    time: str  # of its start
    run: str  # recorded path, numbered if several folders have the same one
    stage: str
    outcome: str  # ended, stopped, or no end was written
    step: int | None = None  # of the stop
    top1_accuracy: float | None = None
    config_sha256: str | None = None
    parent: str | None = None  # newest run before it with another configuration
    changed: list[str] = []  # settings that differ from the parent's, at most 20
    changes: int = 0


class JournalRecord(Record, frozen=True, kw_only=True):
    """The Journal section: all runs of this name in runs/journal.jsonl when the document was written."""

    format: str = "journal/1"
    name: str
    run_dir: str | None = None  # of this run in the document's commands. None in older records
    entries: list[JournalEntry]  # the newest 200
    earlier_entries: int  # not in `entries`
    unreadable_lines: int


class SeedRun(Record, frozen=True, kw_only=True):
    seed: int
    weights_sha256: str | None  # at the end of training
    source_sha256: str | None
    batch_norm_batch_size: int | None
    raw_sha256: dict[str, str]  # split -> hash of its original images
    epochs: dict[str, list[int | float | None]]  # one column each: epoch, train_loss, train_top1, ...


class SeedCounts(Record, frozen=True, kw_only=True):
    """Evaluation of several runs by one protocol. Lists have one number for each run."""

    protocol: str
    images: int
    correct_top1: list[int]
    correct_top5: list[int]


class SeedsRecord(Record, frozen=True, kw_only=True):
    """Runs of one recipe that differ in their seed only: the spread in the document, the reference of `watch`."""

    format: str = "seeds/2"
    recipe_id: str
    config: dict[str, Any]  # pinned, without the seed
    steps_per_epoch: int
    runs: list[SeedRun]
    evaluation: SeedCounts | None = None


class PublicationRecord(Record, frozen=True, kw_only=True):
    """The settings of `publish`."""

    format: str = "publication/1"
    run_dir: str  # in commands
    artefacts: str | None  # address of weights and exported files
    allowed: list[str]  # problems that a flag allowed
    metric_rows: int  # of the run
    metric_rows_kept: int


StageRecord = (
    PreprocessingRecord | TrainingRecord | EvaluationRecord | SerializationRecord | InferenceRecord | TimingRecord
)
STAGES = {  # name of a stage's record -> the script or module that writes it, in the order of the pipeline
    "preprocessing": "preprocess.py",
    "training": "train.py",
    "evaluation": "evaluate.py",
    "serialization": "serialize.py",
    "inference": "recipe.stages.infer",
}


@dataclass(frozen=True, kw_only=True)
class Records:
    """All records of a run, each in `records/<name>.json`. None if it was not written yet."""

    preprocessing: PreprocessingRecord | None = None
    training: TrainingRecord | None = None
    energy: EnergyRecord | None = None
    fingerprint: Fingerprint | None = None
    evaluation: EvaluationRecord | None = None
    other_evaluations: Sequence[EvaluationRecord] = ()  # evaluations/<protocol>.json: exported and published weights
    serialization: SerializationRecord | None = None
    inference: InferenceRecord | None = None
    timing: Sequence[TimingRecord] = ()  # timing/<machine>.json
    journal: JournalRecord | None = None
    seeds: SeedsRecord | None = None
    reproduction: ReproductionRecord | None = None
    publication: PublicationRecord | None = None

    def stages(self) -> Iterator[tuple[str, StageRecord]]:
        """(file below records/ without its suffix, record) of each stage that ran, in the order of the pipeline."""
        for name in STAGES:
            if (record := getattr(self, name)) is not None:
                yield name, record
        yield from ((f"evaluations/{record.protocol.name}", record) for record in self.other_evaluations)
        yield from ((f"timing/{record.machine}", record) for record in self.timing)


def _types(are_lists: bool) -> dict[str, type[Record]]:
    hints = get_type_hints(Records).items()
    return {name: get_args(hint)[0] for name, hint in hints if (get_origin(hint) is Sequence) == are_lists}


RECORDS = _types(are_lists=False)  # name -> type
RECORD_LISTS = _types(are_lists=True)  # name -> type of each record of a folder


def now() -> str:
    """UTC, to the second, ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


AnyRecord = TypeVar("AnyRecord", bound=Record)


def to_json(record: Record) -> bytes:
    """Indented JSON with a final newline. Equal records give equal bytes.

    Raises `UserError` for a record that cannot be decoded again, such as one with NaN.
    """
    content = msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"
    from_json(content, type(record), f"the {type(record).__name__} that would be written")
    return content


def record_sha256(record: Record) -> str:
    """SHA-256 of the record's file."""
    return hashlib.sha256(to_json(record)).hexdigest()


def from_json(content: bytes, kind: type[AnyRecord], where: str) -> AnyRecord:
    """Decode and validate. Raises `UserError` with `where` and the field."""
    try:
        record = msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not a {kind.__name__}: {error}") from error
    formats = {entry.name: entry.default for entry in msgspec.structs.fields(kind)}
    found = getattr(record, "format", None)
    if found != formats.get("format"):
        raise UserError(f"{where} has format {found!r}; this code reads {formats['format']!r}")
    return record
