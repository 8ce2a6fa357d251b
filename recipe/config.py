"""Every knob of the pipeline, typed: types live here, values in `conf/`, each stated once.

Hydra composes `conf/`, `typed` turns the result into these plain dataclasses, and Hydra ends there. An unknown key,
a wrong type or an impossible combination stops before any work and names the key. There is no `_target_`
anywhere: a configuration from a stranger is data and cannot run code.

Two kinds of keys are told apart. What defines the recipe is *pinned* into the run by training and hashed
(`config_sha256`, and `recipe_id` without the seed); facts of the machine (`MACHINE_FACTS`) may change between
one command and the next without changing the recipe.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from enum import Enum
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipe.errors import UserError

MACHINE_FACTS = (
    "run_dir",
    "reference",
    "data.raw_dir",
    "data.directory",
    "data.processes",
    "model.weights",
    "evaluation.weights",
    "trainer.gpus",
    "trainer.accelerator",
    "trainer.max_images_per_process",
    "trainer.cpu_threads",
    "trainer.data_threads",
    "trainer.data_processes",
    "trainer.prefetch_batches",
    "trainer.cuda_graphs",
    "trainer.timeout_seconds",
    "trainer.save_every_steps",
    "trainer.max_restarts",
    "trainer.restart",
)
MAX_PIXELS = 178_956_970  # of an image: more than that Pillow refuses by itself
# Values that are names of files or folders: on a command line these are not read by Hydra's grammar first.
PATHS = ("run_dir", "reference", "data.raw_dir", "data.directory", "model.weights", "evaluation.weights")
NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")


class Source(str, Enum):
    """Where raw images come from."""

    imagenet = "imagenet"
    imagenette = "imagenette"
    folder = "folder"
    demo = "demo"


class Expectation(str, Enum):
    """What the raw data must be before anything is written."""

    ilsvrc2012 = "ilsvrc2012"
    nothing = "nothing"


class Corrupt(str, Enum):
    """What to do with an image that is damaged, too large, or of a kind that cannot be stored."""

    stop = "stop"
    skip = "skip"


class ImageOrder(str, Enum):
    """How an epoch goes through the training images."""

    random = "random"
    blocks = "blocks"


class Decoder(str, Enum):
    """The library that turns JPEG bytes into pixels: the same ones, by both."""

    nvimgcodec = "nvimgcodec"
    pillow = "pillow"


class Interpolation(str, Enum):
    """How pixels are resampled; always antialiased."""

    bilinear = "bilinear"
    bicubic = "bicubic"


class PolicyKind(str, Enum):
    """A random choice of image operations for every training image."""

    none = "none"
    trivial_augment = "trivial_augment"
    rand_augment = "rand_augment"


class ScheduleKind(str, Enum):
    """The shape of the learning rate after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    step = "step"


class LossKind(str, Enum):
    """What the logits are compared with."""

    cross_entropy = "cross_entropy"
    binary_cross_entropy = "binary_cross_entropy"


class OptimizerKind(str, Enum):
    """How a gradient becomes a step."""

    sgd = "sgd"
    sgd_decoupled = "sgd_decoupled"
    lamb = "lamb"


class AveragingForm(str, Enum):
    """How a moving average of the weights begins."""

    ramp = "ramp"
    torchvision = "torchvision"


class Precision(str, Enum):
    """The arithmetic of the forward and backward pass; weights are always fp32."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Accelerator(str, Enum):
    """The kind of device to train on."""

    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


class Backend(str, Enum):
    """What computes the logits of an evaluation."""

    torch = "torch"
    onnx = "onnx"


class Variant(str, Enum):
    """The arithmetic of an exported model."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


class TimedBackend(str, Enum):
    """What a latency is measured of."""

    eager = "eager"
    compiled = "compiled"
    onnxruntime = "onnxruntime"


@dataclass
class DataDescription:
    """What only people know about a data set; printed as *declared*, or *unknown* where it is empty."""

    summary: str = ""
    origin: str = ""
    licence: str = ""
    access: str = ""
    labels: str = ""
    test_set: str = ""
    biases: str = ""
    adding_samples: str = ""
    papers: list[str] = field(default_factory=list)


@dataclass
class ModelDescription:
    """What only people know about a model."""

    summary: str = ""
    papers: list[str] = field(default_factory=list)


@dataclass
class ExperimentDescription:
    """What only people know about an experiment: its purpose, what it should reach and where that number is from."""

    summary: str = ""
    hardware: str = ""
    expected_time: str = ""
    expected_accuracy: str = ""
    expected_source: str = ""
    papers: list[str] = field(default_factory=list)
    action_items: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class DataConfig:
    """A data set: where its raw images are, what they must be, and how they are stored and normalised."""

    name: str  # the folder under data/ and the name in the document
    source: Source
    raw_dir: str | None  # the raw archives or folders
    directory: str  # the processed shards, index and manifest
    expect: Expectation
    corrupt: Corrupt = Corrupt.stop
    max_pixels: int = MAX_PIXELS  # of an image; larger ones are treated as `corrupt` says
    resize_short_side: int | None = None  # pixels; training images only (bilinear, JPEG); None keeps the original bytes
    quality: int = 90  # JPEG quality of resized training images
    validation_fraction: float = 0.1  # share held out by hash where a folder brings no validation set
    images_per_shard: int = 1000
    processes: int | None = None  # of preprocess.py; None: one per core (torchrun's share them); 0: no other
    train_images_per_class: int = 0  # of the demo, which is drawn
    validation_images_per_class: int = 0
    decoder: Decoder = Decoder.nvimgcodec
    order: ImageOrder = ImageOrder.random  # blocks: shards are shuffled, then the images of a few shards at a time
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])  # RGB in [0, 1]
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    description: DataDescription = field(default_factory=DataDescription)

    def __post_init__(self) -> None:
        require(NAME.match(self.name), "data.name", self.name, "letters, digits, '.', '_' and '-'")
        require(
            self.resize_short_side is None or self.resize_short_side >= 8,
            "data.resize_short_side",
            self.resize_short_side,
            "8 pixels or more, or null",
        )
        require(self.max_pixels >= 1, "data.max_pixels", self.max_pixels, "1 or more")
        require(1 <= self.quality <= 100, "data.quality", self.quality, "between 1 and 100")
        require(
            0 < self.validation_fraction < 1, "data.validation_fraction", self.validation_fraction, "between 0 and 1"
        )
        require(self.images_per_shard >= 1, "data.images_per_shard", self.images_per_shard, "1 or more")
        require(self.processes is None or self.processes >= 0, "data.processes", self.processes, "0 or more, or null")
        require(len(self.mean) == 3, "data.mean", self.mean, "three numbers (R, G, B)")
        require(len(self.std) == 3 and min(self.std) > 0, "data.std", self.std, "three positive numbers (R, G, B)")


@dataclass(kw_only=True)
class ModelConfig:
    """A network: any torchvision classifier by its name, or `small` (for images of CIFAR's size)."""

    name: str
    zero_init_last_norm: bool = False  # the last norm of every residual block starts at zero (arXiv 1706.02677)
    norm: str = "batch"  # of `small` only: batch or none
    blur_pool: bool = False  # blur what goes into a strided convolution of 16 or more channels (arXiv 1904.11486)
    stochastic_depth: float = 0.0  # share of images that skip the last residual block; linear from 0 at the first
    weights: str | None = None  # a file of weights to start from; its hash is pinned, not its path
    weights_sha256: str | None = None
    description: ModelDescription = field(default_factory=ModelDescription)

    def __post_init__(self) -> None:
        require(self.norm in ("batch", "none"), "model.norm", self.norm, "batch or none")
        require(
            0 <= self.stochastic_depth < 1, "model.stochastic_depth", self.stochastic_depth, "at least 0 and below 1"
        )


@dataclass(kw_only=True)
class AveragingConfig:
    """Exponential moving average of weights and buffers; a decay of 0 switches it off."""

    decay: float = 0.0  # per update; of the torchvision form before it is rescaled
    every_steps: int = 1
    form: AveragingForm = AveragingForm.ramp  # torchvision: as references/classification has it
    recalibrate_images: int = 0  # training images on which batch-norm statistics are estimated before each validation

    def __post_init__(self) -> None:
        require(0 <= self.decay < 1, "optimization.averaging.decay", self.decay, "at least 0 and below 1")
        require(self.every_steps >= 1, "optimization.averaging.every_steps", self.every_steps, "1 or more")
        require(
            self.recalibrate_images >= 0 and (self.decay > 0 or self.recalibrate_images == 0),
            "optimization.averaging.recalibrate_images",
            self.recalibrate_images,
            "0 or more, and 0 where optimization.averaging.decay=0",
        )


@dataclass(kw_only=True)
class OptimizationConfig:
    """How the weights move. Batch size and learning rate are global: adding GPUs edits nothing here."""

    epochs: int
    batch_size: int  # images per optimizer step, over all processes
    learning_rate: float  # at the end of the warm-up, for this batch size
    optimizer: OptimizerKind
    momentum: float  # of lamb: the first of its two betas
    nesterov: bool
    weight_decay: float  # of sgd_decoupled: the share of a weight that a step at the full learning rate takes
    decay_norms_and_biases: bool
    loss: LossKind
    label_smoothing: float
    binary_sum_classes: bool  # sum over classes and mean over images; false: the mean over both
    binary_target_threshold: float | None  # a class whose share of a mixed image is above it counts as present
    binary_head_bias: bool  # the last layer's bias starts at -log(classes)
    schedule: ScheduleKind
    warmup_epochs: float  # linear from warmup_start_factor x learning_rate, per optimizer step
    warmup_start_factor: float
    step_epochs: list[int]  # of the step schedule: epochs after which the rate is multiplied by step_factor
    step_factor: float
    averaging: AveragingConfig

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "optimization.epochs", self.epochs, "1 or more")
        require(self.batch_size >= 1, "optimization.batch_size", self.batch_size, "1 or more")
        require(self.learning_rate > 0, "optimization.learning_rate", self.learning_rate, "above 0")
        require(0 <= self.momentum < 1, "optimization.momentum", self.momentum, "at least 0 and below 1")
        require(self.weight_decay >= 0, "optimization.weight_decay", self.weight_decay, "0 or more")
        require(
            0 <= self.label_smoothing < 1,
            "optimization.label_smoothing",
            self.label_smoothing,
            "at least 0 and below 1",
        )
        require(
            0 <= self.warmup_epochs <= self.epochs,
            "optimization.warmup_epochs",
            self.warmup_epochs,
            f"between 0 and optimization.epochs={self.epochs}",
        )
        require(
            0 <= self.warmup_start_factor <= 1,
            "optimization.warmup_start_factor",
            self.warmup_start_factor,
            "between 0 and 1",
        )
        require(
            self.step_epochs == sorted(self.step_epochs) and min(self.step_epochs, default=1) >= 1,
            "optimization.step_epochs",
            self.step_epochs,
            "epochs in rising order, each 1 or more",
        )
        require(
            not self.nesterov or (self.momentum > 0 and self.optimizer is not OptimizerKind.lamb),
            "optimization.nesterov",
            self.nesterov,
            "false where optimization.optimizer=lamb or optimization.momentum=0",
        )
        self._check_binary()

    def _check_binary(self) -> None:
        """What only binary cross entropy looks at must not be set in vain."""
        threshold = self.binary_target_threshold
        require(
            threshold is None or 0 <= threshold < 1,
            "optimization.binary_target_threshold",
            threshold,
            "at least 0 and below 1, or null",
        )
        for name, neutral in (("sum_classes", False), ("target_threshold", None), ("head_bias", False)):
            value = getattr(self, f"binary_{name}")
            require(
                value is neutral or self.loss is LossKind.binary_cross_entropy,
                f"optimization.binary_{name}",
                value,
                f"{'null' if neutral is None else 'false'}, or optimization.loss=binary_cross_entropy",
            )


@dataclass(kw_only=True)
class PolicyConfig:
    """Automatic augmentation; all but the kind belongs to rand_augment."""

    kind: PolicyKind
    operations: int  # for each image
    strength: float  # share of each operation's range; torchvision's magnitude 9 of 30 is 0.3, timm's m6 of 10 is 0.6
    strength_std: float  # of a normal distribution around it, cut off at 0 and 1
    operation_probability: float  # that a chosen operation is applied at all

    def __post_init__(self) -> None:
        require(self.operations >= 1, "augmentation.policy.operations", self.operations, "1 or more")
        require(self.strength_std >= 0, "augmentation.policy.strength_std", self.strength_std, "0 or more")
        for name in ("strength", "operation_probability"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"augmentation.policy.{name}", value, "between 0 and 1")


@dataclass(kw_only=True)
class ErasingConfig:
    """Random erasing: a rectangle of the normalised image becomes zero, which is the data set's mean colour."""

    probability: float
    scale_min: float  # share of the image's area
    scale_max: float
    ratio_min: float  # height / width
    ratio_max: float

    def __post_init__(self) -> None:
        require(0 <= self.probability <= 1, "augmentation.erasing.probability", self.probability, "between 0 and 1")
        require(
            0 < self.scale_min <= self.scale_max <= 1,
            "augmentation.erasing.scale_min",
            self.scale_min,
            f"above 0 and at most augmentation.erasing.scale_max={self.scale_max}, which is at most 1",
        )
        require(
            0 < self.ratio_min <= self.ratio_max,
            "augmentation.erasing.ratio_min",
            self.ratio_min,
            f"above 0 and at most augmentation.erasing.ratio_max={self.ratio_max}",
        )


@dataclass(kw_only=True)
class MixingConfig:
    """Mixup and cutmix; an alpha of 0 switches either off. Images are paired inside groups of the global batch."""

    mixup_alpha: float
    cutmix_alpha: float
    cutmix_share: float  # of the groups that are mixed, where both are on
    probability: float  # that a group is mixed at all
    group_images: int  # share one draw; must divide the images of one forward pass

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            require(getattr(self, name) >= 0, f"augmentation.mixing.{name}", getattr(self, name), "0 or more")
        for name in ("cutmix_share", "probability"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"augmentation.mixing.{name}", value, "between 0 and 1")
        require(self.group_images >= 2, "augmentation.mixing.group_images", self.group_images, "2 or more")


@dataclass(kw_only=True)
class ProgressiveConfig:
    """Training images grow from `first_pixels` to `augmentation.crop_pixels`; null: they have one size."""

    first_pixels: int | None
    start_epoch: float  # epochs completed when growing begins
    end_epoch: float  # and ends
    multiple: int  # sizes are rounded to multiples of this

    def __post_init__(self) -> None:
        require(
            self.first_pixels is None or self.first_pixels >= 8,
            "augmentation.progressive.first_pixels",
            self.first_pixels,
            "8 or more, or null",
        )
        require(
            0 <= self.start_epoch <= self.end_epoch,
            "augmentation.progressive.start_epoch",
            self.start_epoch,
            f"at least 0 and at most augmentation.progressive.end_epoch={self.end_epoch}",
        )
        require(self.multiple >= 1, "augmentation.progressive.multiple", self.multiple, "1 or more")


@dataclass(kw_only=True)
class AugmentationConfig:
    """What happens to a training image; each draw is a function of (seed, epoch, image)."""

    crop_pixels: int  # side of the square that the network sees
    scale_min: float  # share of the image's area that a crop covers
    scale_max: float
    ratio_min: float  # width / height of a crop before it is resized
    ratio_max: float
    flip_probability: float
    interpolation: Interpolation
    policy: PolicyConfig
    erasing: ErasingConfig
    mixing: MixingConfig
    progressive: ProgressiveConfig
    repeats: int  # differently augmented copies of an image in one global batch

    def __post_init__(self) -> None:
        require(self.crop_pixels >= 8, "augmentation.crop_pixels", self.crop_pixels, "8 or more")
        require(self.repeats >= 1, "augmentation.repeats", self.repeats, "1 or more")
        require(
            0 < self.scale_min <= self.scale_max <= 1,
            "augmentation.scale_min",
            self.scale_min,
            f"above 0 and at most augmentation.scale_max={self.scale_max}, which is at most 1",
        )
        require(
            0 < self.ratio_min <= self.ratio_max,
            "augmentation.ratio_min",
            self.ratio_min,
            f"above 0 and at most augmentation.ratio_max={self.ratio_max}",
        )
        require(
            0 <= self.flip_probability <= 1, "augmentation.flip_probability", self.flip_probability, "between 0 and 1"
        )


@dataclass(kw_only=True)
class TrainerConfig:
    """How to run, never what to learn: processes, arithmetic, threads, cadences."""

    gpus: int | None  # processes on this node; None: torchrun's number, else every visible GPU, else one CPU process
    accelerator: Accelerator
    precision: Precision
    channels_last: bool
    compile: bool
    cuda_graphs: bool  # of the compiled network: replay its kernels, the same ones, as one graph
    deterministic: bool
    max_images_per_process: int  # caps one forward pass; gradient accumulation is derived from it
    cpu_threads: int | None  # of torch in each process; None: the cores divided by the processes
    data_threads: int | None  # that decode and augment for each process; None: the cores divided by the processes
    data_processes: int | None  # that hold these threads; 0: the training process itself; None: by device
    prefetch_batches: int
    log_every_steps: int
    keep_checkpoints: int
    save_every_steps: int | None  # also inside an epoch; None: after each epoch, and when the run is stopped
    timeout_seconds: int  # of a collective operation
    max_restarts: int  # of all processes, from the newest checkpoint, when one of them dies; of our own launch
    restart: bool  # move an old run aside and begin anew

    def __post_init__(self) -> None:
        for name in ("gpus", "cpu_threads", "data_threads", "save_every_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"trainer.{name}", value, "1 or more, or null")
        for name in (
            "max_images_per_process",
            "prefetch_batches",
            "log_every_steps",
            "keep_checkpoints",
            "timeout_seconds",
        ):
            require(getattr(self, name) >= 1, f"trainer.{name}", getattr(self, name), "1 or more")
        require(self.max_restarts >= 0, "trainer.max_restarts", self.max_restarts, "0 or more")
        processes = self.data_processes
        require(processes is None or processes >= 0, "trainer.data_processes", processes, "0 or more, or null")
        require(
            self.compile or not self.cuda_graphs,
            "trainer.cuda_graphs",
            self.cuda_graphs,
            "false, or trainer.compile=true",
        )


@dataclass(kw_only=True)
class EvaluationConfig:
    """The protocol of the metric; all but the batch size is part of the metric's name."""

    resize_pixels: int  # of the short side, before the centre crop
    crop_pixels: int
    interpolation: Interpolation
    flip: bool  # average the logits of an image and of its mirror image
    batch_size: int  # images per forward pass; another shape can change the last digits of logits
    checkpoint: str  # last, best, or the name of a file in the run's checkpoints/
    backend: Backend  # onnx: an exported model of the run
    variant: Variant  # of the onnx backend
    weights: str | None  # instead of a run's: a name of torchvision (IMAGENET1K_V2) or a file

    def __post_init__(self) -> None:
        require(self.crop_pixels >= 8, "evaluation.crop_pixels", self.crop_pixels, "8 or more")
        require(
            self.resize_pixels >= self.crop_pixels,
            "evaluation.resize_pixels",
            self.resize_pixels,
            f"at least evaluation.crop_pixels={self.crop_pixels}",
        )
        require(self.batch_size >= 1, "evaluation.batch_size", self.batch_size, "1 or more")
        require(
            self.weights is None or self.backend is Backend.torch,
            "evaluation.weights",
            self.weights,
            "null where evaluation.backend=onnx, which evaluates an exported model of a run",
        )
        require(
            not self.flip or self.backend is Backend.torch,
            "evaluation.flip",
            self.flip,
            "false where evaluation.backend=onnx: an exported model sees one view",
        )


@dataclass(kw_only=True)
class SerializationConfig:
    """Which files are exported, and how far each may be from the eager model before it gets its name."""

    variants: list[Variant]
    fp32_tolerance: float  # largest difference of a logit / largest logit, over all validation images
    fp16_accuracy_drop_max: float  # of top-1, as a fraction
    int8_accuracy_drop_max: float
    int8_calibration_images: int  # training images, never validation ones
    int8_reduce_range: bool  # 7 bits for weights: no saturation on processors without VNNI
    batch_size: int  # images per forward pass of the comparison

    def __post_init__(self) -> None:
        require(
            Variant.fp32 in self.variants and len(set(self.variants)) == len(self.variants),
            "serialization.variants",
            [variant.value for variant in self.variants],
            "a list without repetition that holds fp32, from which the others are made",
        )
        for name in ("fp32_tolerance", "fp16_accuracy_drop_max", "int8_accuracy_drop_max"):
            require(
                0 <= getattr(self, name) < 1, f"serialization.{name}", getattr(self, name), "at least 0 and below 1"
            )
        for name in ("int8_calibration_images", "batch_size"):
            require(getattr(self, name) >= 1, f"serialization.{name}", getattr(self, name), "1 or more")


@dataclass(kw_only=True)
class TimingConfig:
    """What the latency table measures, and for how long."""

    seconds_per_cell: float
    batch_sizes: list[int]
    compiled_batch_sizes: list[int]  # each one is compiled anew, which takes up to a minute
    backends: list[TimedBackend]

    def __post_init__(self) -> None:
        require(self.seconds_per_cell > 0, "timing.seconds_per_cell", self.seconds_per_cell, "above 0")
        for name in ("batch_sizes", "compiled_batch_sizes"):
            sizes = getattr(self, name)
            require(
                all(size >= 1 for size in sizes) and len(set(sizes)) == len(sizes),
                f"timing.{name}",
                sizes,
                "different numbers, each 1 or more",
            )


@dataclass(kw_only=True)
class Config:
    """One recipe: everything that the scripts do follows from it."""

    name: str  # of the experiment: the file in conf/experiment/ and the folder under runs/
    run_dir: str
    reference: str | None  # a recipe to be judged by after each validation, as `python -m recipe watch` does
    seed: int
    description: ExperimentDescription
    data: DataConfig
    model: ModelConfig
    optimization: OptimizationConfig
    augmentation: AugmentationConfig
    trainer: TrainerConfig
    evaluation: EvaluationConfig
    serialization: SerializationConfig
    timing: TimingConfig

    def __post_init__(self) -> None:
        require(NAME.match(self.name), "name", self.name, "letters, digits, '.', '_' and '-'")
        require(0 <= self.seed < 2**32, "seed", self.seed, "between 0 and 2**32 - 1")
        require(
            not self.optimization.binary_head_bias or self.model.weights is None,
            "optimization.binary_head_bias",
            self.optimization.binary_head_bias,
            "false where model.weights gives the bias",
        )


def known_keys(schema: type = Config, prefix: str = "") -> list[str]:
    """Every key of the schema, dotted."""
    keys: list[str] = []
    for name, kind in get_type_hints(schema).items():
        keys += (
            known_keys(kind, f"{prefix}{name}.")
            if isinstance(kind, type) and is_dataclass(kind)
            else [f"{prefix}{name}"]
        )
    return keys


def require(condition: object, key: str, value: object, allowed: str) -> None:
    """Stop with the key, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise UserError(f"{key}={value} cannot be: it must be {allowed}")


def typed(composed: DictConfig) -> Config:
    """The composed configuration as plain dataclasses, checked; raises `UserError` that names the key."""
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise UserError(" ".join(str(error).split())) from error
    assert isinstance(config, Config)
    values = leaves(untyped(config))
    for key, value in values.items():
        require(not isinstance(value, float) or math.isfinite(value), key, value, "a finite number")
    for key in MACHINE_FACTS:
        require(values[key] != "", key, "", "not empty: is the variable set that stands for it?")
    unknown = leaves(OmegaConf.to_container(composed)).keys() - values.keys()  # type: ignore[arg-type]
    require(not unknown, "the key", ", ".join(sorted(unknown)), "one that `python train.py --cfg job` prints")
    return config


def untyped(config: Any) -> Any:
    """Dataclasses and enums as plain dictionaries, lists, strings and numbers (what JSON and YAML can hold)."""
    if is_dataclass(config) and not isinstance(config, type):
        return {key: untyped(value) for key, value in asdict(config).items()}
    if isinstance(config, Enum):
        return config.value
    if isinstance(config, Mapping):
        return {str(key): untyped(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [untyped(value) for value in config]
    return config


def pinned(config: Config) -> dict[str, Any]:
    """What defines the recipe: the configuration without facts of the machine."""
    values: dict[str, Any] = untyped(config)
    for key in MACHINE_FACTS:
        *groups, leaf = key.split(".")
        section = values
        for group in groups:
            section = section[group]
        del section[leaf]
    return values


def canonical_json(value: Any) -> bytes:
    """One spelling for one value: sorted keys, no spaces, ASCII. What is hashed is always this."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def sha256_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of a plain value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def config_sha256(pinned_values: Mapping[str, Any]) -> str:
    """Identifies a pinned configuration, the seed included."""
    return sha256_of(pinned_values)


def recipe_id(pinned_values: Mapping[str, Any]) -> str:
    """Identifies a recipe: runs that share it differ in their seed only."""
    return sha256_of({key: value for key, value in pinned_values.items() if key != "seed"})


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries flattened: {"data": {"name": "demo"}} -> {"data.name": "demo"}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(leaves(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Each key whose value differs, as `key: before -> after`, in the order of the keys."""
    old, new = leaves(before), leaves(after)
    absent = "(absent)"
    return [
        f"{key}: {old.get(key, absent)} -> {new.get(key, absent)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, absent) != new.get(key, absent)
    ]


ConfigStore.instance().store(name="schema", node=Config)
