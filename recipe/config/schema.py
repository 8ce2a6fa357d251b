"""The configuration: plain dataclasses with their bounds, the keys that identify a recipe, and their hashes.

Values are in `conf/`, each stated once. Types and bounds are here. Every `Config` (from Hydra, a recipe's JSON block or
`dataclasses.replace`) is checked in `Config.__post_init__`. Errors name the key. `_target_` is not used: a
configuration from somebody else is data and cannot run code.

Training *pins* the settings that define the recipe into the run and hashes them (`config_sha256`, and `recipe_id`
without the seed). `RUNTIME_KEYS` may differ from one command to the next.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from functools import cache, cached_property
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import Meta

from recipe.config.identity import (
    RUNTIME_KEYS,
    Pinned,
    flatten,
    to_dict,
    unflatten,
)
from recipe.errors import UserError

MAX_PIXELS = 178_956_970  # of an image: Pillow refuses more
# Names of files or folders: they are quoted before Hydra's grammar reads a command line.
PATHS = ("run_dir", "reference", "data.raw_dir", "data.directory", "model.weights", "evaluation.weights")
NAME = re.compile(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")

# Bounds, checked by msgspec. OmegaConf ignores them.
Natural = Annotated[int, Meta(ge=0)]
PositiveInt = Annotated[int, Meta(ge=1)]
Pixels = Annotated[int, Meta(ge=8)]
NonNegative = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Share = Annotated[float, Meta(gt=0, lt=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]
Name = Annotated[str, Meta(pattern=NAME.pattern, description="letters, digits, '.', '_' and '-'")]
Norm = Annotated[str, Meta(pattern=r"\A(batch|none)\Z", description="batch or none")]
File = Annotated[str, Meta(min_length=1, description="a path (is the variable set that stands for it?)")]
RGB = Meta(min_length=3, max_length=3, description="three numbers (R, G, B)")


class Source(str, Enum):
    imagenet = "imagenet"
    imagenette = "imagenette"
    folder = "folder"
    demo = "demo"


class Expectation(str, Enum):
    """The data set that the raw data must be. Checked before anything is written."""

    ilsvrc2012 = "ilsvrc2012"
    nothing = "nothing"


class Corrupt(str, Enum):
    """Treatment of images that are damaged, too large, or in a format that cannot be stored."""

    stop = "stop"
    skip = "skip"


class ImageOrder(str, Enum):
    random = "random"
    quasi_random = "quasi_random"  # shards are shuffled, then the images of a few shards at a time


class Decoder(str, Enum):
    """Library that decodes JPEG. Both give the same pixels."""

    nvimgcodec = "nvimgcodec"
    pillow = "pillow"


class Interpolation(str, Enum):
    bilinear = "bilinear"
    bicubic = "bicubic"


class AutoAugmentPolicy(str, Enum):
    none = "none"
    trivial_augment = "trivial_augment"
    rand_augment = "rand_augment"


class ScheduleKind(str, Enum):
    cosine = "cosine"
    linear = "linear"
    step = "step"


class LossKind(str, Enum):
    cross_entropy = "cross_entropy"
    binary_cross_entropy = "binary_cross_entropy"


class OptimizerKind(str, Enum):
    sgd = "sgd"
    sgdw = "sgdw"
    lamb = "lamb"


class EmaForm(str, Enum):
    """Start of the moving average of the weights."""

    warmup = "warmup"
    torchvision = "torchvision"


class Precision(str, Enum):
    """Arithmetic of the forward and backward pass. Weights are fp32."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Accelerator(str, Enum):
    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


class Backend(str, Enum):
    torch = "torch"
    onnx = "onnx"


class Variant(str, Enum):
    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


class TimedBackend(str, Enum):
    eager = "eager"
    compiled = "compiled"
    onnxruntime = "onnxruntime"


@dataclass
class DataDescription:
    """Declared facts of a data set. Empty ones are printed as *unknown*."""

    summary: str = ""  # one line
    origin: str = ""  # where the images come from
    licence: str = ""  # of the images
    access: str = ""  # how to get them
    labels: str = ""  # what a label is and where it comes from
    test_set: str = ""  # how the validation images came to be
    biases: str = ""  # known biases
    adding_samples: str = ""  # how to add images
    papers: list[str] = field(default_factory=list)  # author, title, arXiv number


@dataclass
class ModelDescription:
    """Declared facts of a model."""

    summary: str = ""  # one line
    papers: list[str] = field(default_factory=list)  # author, title, arXiv number


@dataclass
class ExperimentDescription:
    """Declared purpose of an experiment, its expected accuracy and the source of that number."""

    summary: str = ""  # one line
    hardware: str = ""  # that it was written for
    expected_time: str = ""  # of the training
    expected_accuracy: str = ""  # top-1 on the validation images
    expected_source: str = ""  # who measured or published that number
    papers: list[str] = field(default_factory=list)  # author, title, arXiv number
    action_items: list[str] = field(default_factory=list)  # what remains to be done


@dataclass(kw_only=True)
class DataConfig:
    """Raw images, expectations, storage and normalisation of a data set."""

    name: Name  # the folder under data/ and the name in the document
    source: Source
    raw_dir: File | None  # the raw archives or folders
    directory: File  # the processed shards, index and manifest
    expect: Expectation
    on_corrupt: Corrupt = Corrupt.stop  # for an image that is damaged, too large or of a format that cannot be stored
    max_pixels: PositiveInt = MAX_PIXELS  # most pixels of an image. `on_corrupt` applies to larger ones
    resize_short_side: Pixels | None = None  # of training images (bilinear, JPEG). None keeps the original bytes
    jpeg_quality: Annotated[int, Meta(ge=1, le=100)] = 90  # of resized training images
    validation_fraction: Share = 0.1  # share chosen by hash if a folder has no validation set
    images_per_shard: PositiveInt = 1000  # images in one tar file
    processes: Natural | None = None  # of preprocess.py. None: one per core (torchrun's share them). 0: no other
    train_images_per_class: Natural = 0  # of the demo, which is drawn
    validation_images_per_class: Natural = 0  # of the demo
    mean: Annotated[list[float], RGB] = field(default_factory=lambda: [0.485, 0.456, 0.406])  # RGB in [0, 1]
    std: Annotated[list[Positive], RGB] = field(default_factory=lambda: [0.229, 0.224, 0.225])  # RGB in [0, 1]
    description: DataDescription = field(default_factory=DataDescription)


@dataclass(kw_only=True)
class ModelConfig:
    """A network: any torchvision classifier by name, or `small` (for images of CIFAR's size)."""

    name: str
    zero_init_last_norm: bool = False  # the last norm of every residual block starts at zero (arXiv 1706.02677)
    norm: Norm = "batch"  # of `small` only. none: without normalisation
    blur_pool: bool = False  # blur what goes into a strided convolution of 16 or more channels (arXiv 1904.11486)
    stochastic_depth: BelowOne = 0.0  # share of images that skip the last residual block, linear from 0 at the first
    weights: File | None = None  # initial weights. Their hash is pinned, not the path
    weights_sha256: str | None = None  # of the initial weights, set by training
    description: ModelDescription = field(default_factory=ModelDescription)


@dataclass(kw_only=True)
class EmaConfig:
    """Exponential moving average of weights and buffers. A decay of 0 switches it off."""

    decay: BelowOne = 0.0  # per update. In the torchvision form before rescaling
    every_steps: PositiveInt = 1
    form: EmaForm = EmaForm.warmup  # torchvision: as references/classification has it
    precise_bn_images: Natural = 0  # training images for batch-norm statistics, estimated before each validation


@dataclass(kw_only=True)
class BceConfig:
    """Binary cross entropy, one binary problem per class (loss=binary_cross_entropy only)."""

    sum_classes: bool  # sum over classes and mean over images. false: the mean over both
    target_threshold: BelowOne | None  # classes with a larger share of a mixed image count as present
    init_head_bias: bool  # the last layer's bias starts at -log(classes)


@dataclass(kw_only=True)
class OptimizationConfig:
    """Loss, optimizer and schedule. Batch size and learning rate are global, for any number of GPUs."""

    epochs: PositiveInt
    batch_size: PositiveInt  # images per optimizer step, over all processes
    learning_rate: Positive  # at the end of the warm-up, for this batch size
    optimizer: OptimizerKind
    momentum: BelowOne  # of lamb: the first of its two betas
    nesterov: bool
    weight_decay: NonNegative  # of sgdw: the fraction by which a step at the full learning rate shrinks a weight
    decay_norms_and_biases: bool
    loss: LossKind
    label_smoothing: BelowOne
    bce: BceConfig
    schedule: ScheduleKind
    warmup_epochs: NonNegative  # linear from warmup_start_factor x learning_rate, per optimizer step
    warmup_start_factor: Fraction
    step_epochs: list[PositiveInt]  # of the step schedule: epochs after which the rate is multiplied by step_factor
    step_factor: float
    ema: EmaConfig


@dataclass(kw_only=True)
class AutoAugmentConfig:
    """Automatic augmentation. All settings but the policy are of rand_augment."""

    policy: AutoAugmentPolicy
    num_ops: PositiveInt  # for each image
    magnitude: Fraction  # share of an operation's range: torchvision's 9 of 30 is 0.3, timm's m6 of 10 is 0.6
    magnitude_std: NonNegative  # of a normal distribution around it, cut off at 0 and 1
    probability: Fraction  # that a chosen operation is applied at all


@dataclass(kw_only=True)
class RandomErasingConfig:
    """Random erasing: a rectangle of the normalised image is set to zero, the data set's mean colour."""

    probability: Fraction
    scale_min: Positive  # share of the image's area
    scale_max: Fraction
    ratio_min: Positive  # height / width
    ratio_max: float


@dataclass(kw_only=True)
class MixupConfig:
    """Mixup and cutmix. An alpha of 0 switches either off. Images are paired inside groups of the global batch."""

    mixup_alpha: NonNegative
    cutmix_alpha: NonNegative
    switch_probability: Fraction  # of cutmix for a mixed group, if both are on
    probability: Fraction  # that a group is mixed at all
    group_size: Annotated[int, Meta(ge=2)]  # images with equal parameters. Must divide the images of one forward pass


@dataclass(kw_only=True)
class ProgressiveResizingConfig:
    """Growth of training images from `first_pixels` to `augmentation.crop_pixels`. Null: one size."""

    first_pixels: Pixels | None
    start_epoch: NonNegative  # completed epochs at the start of growth
    end_epoch: float  # and at its end
    multiple: PositiveInt  # sizes are rounded to multiples of this


@dataclass(kw_only=True)
class AugmentationConfig:
    """Augmentation of training images. Each draw is a function of (seed, epoch, image)."""

    crop_pixels: Pixels  # side of the square that the network sees
    scale_min: Positive  # share of the image's area that a crop covers
    scale_max: Fraction
    ratio_min: Positive  # width / height of a crop before it is resized
    ratio_max: float
    flip_probability: Fraction
    interpolation: Interpolation
    auto_augment: AutoAugmentConfig
    random_erasing: RandomErasingConfig
    mixup: MixupConfig
    progressive_resizing: ProgressiveResizingConfig
    repeated_augmentation: PositiveInt  # differently augmented copies of an image in one global batch


@dataclass(kw_only=True)
class LoaderConfig:
    """Reading of images for training and evaluation."""

    decoder: Decoder
    order: ImageOrder
    workers: Natural | None  # decoding processes of each training process. 0: threads. None: by device
    threads: PositiveInt | None  # decoding threads of each training process. None: cores / processes
    prefetch_batches: PositiveInt


@dataclass(kw_only=True)
class TrainerConfig:
    """Processes, arithmetic and cadences."""

    gpus: PositiveInt | None  # processes on this node. None: torchrun's, else all visible GPUs, else one
    accelerator: Accelerator
    precision: Precision
    channels_last: bool
    compile: bool
    cuda_graphs: bool  # replay the kernels of the compiled network as one graph
    deterministic: bool
    max_micro_batch_size: PositiveInt  # images of one forward pass. Gradient accumulation follows from it
    torch_threads: PositiveInt | None  # of torch in each process. None: cores / processes
    log_every_steps: PositiveInt
    keep_checkpoints: PositiveInt
    save_every_steps: PositiveInt | None  # also within epochs. None: after each epoch and when the run is stopped
    timeout_seconds: PositiveInt  # of a collective operation
    max_restarts: Natural  # of all processes from the newest checkpoint, after one died (not for torchrun)
    start_over: bool  # rename an old run and start over


@dataclass(kw_only=True)
class EvaluationConfig:
    """Protocol of the metric. All but the batch size is part of the metric's name."""

    resize_pixels: Pixels  # of the short side, before the centre crop
    crop_pixels: Pixels
    interpolation: Interpolation
    flip: bool  # average the logits of an image and of its mirror image
    batch_size: PositiveInt  # images per forward pass. It can change the last digits of logits
    checkpoint: str  # last, best, or the name of a file in the run's checkpoints/
    backend: Backend  # onnx: an exported model of the run
    variant: Variant  # of the onnx backend
    weights: File | None  # in place of a run's: a name of torchvision (IMAGENET1K_V2) or a file


@dataclass(kw_only=True)
class SerializationConfig:
    """Exported variants, and the tolerance of each to the eager model."""

    variants: list[Variant]
    fp32_tolerance: BelowOne  # largest difference of a logit / largest logit, over all validation images
    fp16_accuracy_drop_max: BelowOne  # of top-1, as a fraction
    int8_accuracy_drop_max: BelowOne
    int8_calibration_images: PositiveInt  # training images, never validation ones
    int8_reduce_range: bool  # 7 bits for weights: no saturation on processors without VNNI
    batch_size: PositiveInt  # images per forward pass of the comparison


@dataclass(kw_only=True)
class TimingConfig:
    """Cells of the latency table."""

    seconds_per_cell: Positive
    batch_sizes: list[PositiveInt]
    compiled_batch_sizes: list[PositiveInt]  # each one is compiled, for up to a minute
    backends: list[TimedBackend]


@dataclass(kw_only=True)
class Config:
    """One recipe, from plain values (`Config(**values)`) or dataclasses.

    Raises `UserError` with the first invalid key, its value and the allowed values. Change it with
    `dataclasses.replace`, which checks all values again.
    """

    name: Name  # of the experiment: the file in conf/experiment/ and the folder under runs/
    run_dir: File
    reference: File | None  # a recipe to compare with after each validation, as `python -m recipe watch` does
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)]
    description: ExperimentDescription
    data: DataConfig
    model: ModelConfig
    optimization: OptimizationConfig
    augmentation: AugmentationConfig
    loader: LoaderConfig
    trainer: TrainerConfig
    evaluation: EvaluationConfig
    serialization: SerializationConfig
    timing: TimingConfig

    def __post_init__(self) -> None:
        converted = _converted(to_dict(self))
        for name in converted.__struct_fields__:
            setattr(self, name, getattr(converted, name))
        values = flatten(to_dict(self))
        for key, value in values.items():
            numbers = value if isinstance(value, list) else [value]
            if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
                raise invalid(key, value, "finite")
        for key, is_allowed, allowed in _cross_checks(self):
            if not is_allowed:
                raise invalid(key, values[key], allowed)

    @cached_property
    def pinned(self) -> Pinned:
        """The settings without those of the machine."""
        values = flatten(to_dict(self))
        return Pinned(unflatten({key: value for key, value in values.items() if key not in RUNTIME_KEYS}))


def _cross_checks(config: Config) -> Iterator[tuple[str, bool, str]]:
    """(key, True if its value is allowed, allowed values) for settings that depend on one another."""
    optimization, ema, augmentation = config.optimization, config.optimization.ema, config.augmentation
    evaluation, serialization, timing = config.evaluation, config.serialization, config.timing
    epochs, steps = optimization.epochs, optimization.step_epochs
    yield "optimization.warmup_epochs", optimization.warmup_epochs <= epochs, f"at most optimization.epochs={epochs}"
    yield "optimization.step_epochs", steps == sorted(steps), "epochs in rising order"
    has_momentum = optimization.momentum > 0 and optimization.optimizer is not OptimizerKind.lamb
    allowed = "false where optimization.optimizer=lamb or optimization.momentum=0"
    yield "optimization.nesterov", has_momentum or not optimization.nesterov, allowed
    is_binary = optimization.loss is LossKind.binary_cross_entropy
    for name, off in (("sum_classes", False), ("target_threshold", None), ("init_head_bias", False)):
        is_off = getattr(optimization.bce, name) is off
        allowed = f"{'null' if off is None else 'false'}, or optimization.loss=binary_cross_entropy"
        yield f"optimization.bce.{name}", is_binary or is_off, allowed
    has_bias = optimization.bce.init_head_bias and config.model.weights is not None
    yield "optimization.bce.init_head_bias", not has_bias, "false where model.weights gives the bias"
    is_averaged = ema.decay > 0 or ema.precise_bn_images == 0
    allowed = "0 where optimization.ema.decay=0"
    yield "optimization.ema.precise_bn_images", is_averaged, allowed
    erasing, resizing = augmentation.random_erasing, augmentation.progressive_resizing
    for group, values, low, high in (
        ("augmentation", augmentation, "scale_min", "scale_max"),
        ("augmentation", augmentation, "ratio_min", "ratio_max"),
        ("augmentation.random_erasing", erasing, "scale_min", "scale_max"),
        ("augmentation.random_erasing", erasing, "ratio_min", "ratio_max"),
        ("augmentation.progressive_resizing", resizing, "start_epoch", "end_epoch"),
    ):
        most = getattr(values, high)
        yield f"{group}.{low}", getattr(values, low) <= most, f"at most {group}.{high}={most}"
    trainer = config.trainer
    yield "trainer.cuda_graphs", trainer.compile or not trainer.cuda_graphs, "false, or trainer.compile=true"
    crop = evaluation.crop_pixels
    yield "evaluation.resize_pixels", evaluation.resize_pixels >= crop, f"at least evaluation.crop_pixels={crop}"
    is_torch = evaluation.backend is Backend.torch
    allowed = "null where evaluation.backend=onnx, which evaluates an exported model of a run"
    yield "evaluation.weights", is_torch or evaluation.weights is None, allowed
    allowed = "false where evaluation.backend=onnx: an exported model sees one view"
    yield "evaluation.flip", is_torch or not evaluation.flip, allowed
    is_base = Variant.fp32 in serialization.variants
    yield "serialization.variants", is_base, "a list with fp32, from which the others are made"
    for key, entries in (
        ("serialization.variants", list(serialization.variants)),
        ("timing.batch_sizes", timing.batch_sizes),
        ("timing.compiled_batch_sizes", timing.compiled_batch_sizes),
    ):
        yield key, len(set(entries)) == len(entries), "a list without repetition"


@cache
def _fields() -> type[msgspec.Struct]:
    """The fields of `Config` as a struct that msgspec converts without `Config.__post_init__`."""
    return msgspec.defstruct("Fields", list(get_type_hints(Config, include_extras=True).items()))


@cache
def _bounds() -> msgspec.inspect.Type:
    return msgspec.inspect.type_info(_fields())


def _converted(values: Any) -> msgspec.Struct:
    """Convert plain values to their types. Raises `UserError` for the first value out of bounds."""
    try:
        return msgspec.convert(values, _fields())
    except msgspec.ValidationError as error:
        reason, _, place = str(error).removesuffix("`").rpartition(" - at `$.")
        bounds: Any = _bounds()
        for name, index in re.findall(r"(\w+)|\[(\d+)\]", place):
            bounds = getattr(bounds, "type", bounds)  # with its description
            if index:
                values, bounds = values[int(index)], bounds.item_type
            else:
                values, bounds = values[name], {field.name: field.type for field in bounds.fields}[name]
        wrong_type = re.fullmatch(r"Expected `(.*)`, got `(.*)`", reason)
        allowed = f"{wrong_type[1].replace(' | ', ' or ')}, not {wrong_type[2]}" if wrong_type else _words(bounds)
        raise invalid(place, values, allowed) from error


def _words(bounds: msgspec.inspect.Type) -> str:
    """The allowed values of a type, in words for a message."""
    if isinstance(bounds, msgspec.inspect.Metadata):
        return str((bounds.extra_json_schema or {})["description"])
    if isinstance(bounds, msgspec.inspect.UnionType):
        return f"{_words(bounds.types[0])}, or null"
    if isinstance(bounds, msgspec.inspect.EnumType):
        return f"one of {', '.join(member.value for member in bounds.cls)}"
    assert isinstance(bounds, msgspec.inspect.IntType | msgspec.inspect.FloatType)
    if bounds.ge is not None and bounds.le is not None:
        return f"between {bounds.ge} and {bounds.le}"
    if bounds.ge is not None:
        return f"{bounds.ge} or more" if bounds.lt is None else f"at least {bounds.ge} and below {bounds.lt}"
    return f"above {bounds.gt}" + ("" if bounds.lt is None else f" and below {bounds.lt}")


def invalid(key: str, value: object, allowed: str) -> UserError:
    return UserError(f"{key}={value} is invalid: must be {allowed}")


@cache
def schema_keys(schema: type = Config, prefix: str = "") -> tuple[str, ...]:
    """Every key of the schema, dotted."""
    keys: list[str] = []
    for name, kind in get_type_hints(schema).items():
        keys += (
            schema_keys(kind, f"{prefix}{name}.")
            if isinstance(kind, type) and is_dataclass(kind)
            else [f"{prefix}{name}"]
        )
    return tuple(keys)


def config_from_pinned(values: Mapping[str, Any]) -> Config:
    """Convert a pinned configuration to a `Config`, with the neutral values of `RUNTIME_KEYS`.

    Raises `UserError` for unknown and missing keys, and for values out of bounds.
    """
    settings, keys = flatten(values), [key for key in schema_keys() if key not in RUNTIME_KEYS]
    others = [key for key in settings if key not in keys]
    faults = [
        *(f"{key} is a fact of the machine" if key in RUNTIME_KEYS else f"{key} is unknown" for key in others),
        *(f"{key} is missing" for key in keys if key not in settings),
    ]
    if faults:
        raise UserError("; ".join(faults))
    return Config(**unflatten(settings | RUNTIME_KEYS))
