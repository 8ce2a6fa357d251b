"""The class for users of a model: `Classifier.load(path)("puppy.jpg", top=5)`.

A checkpoint and an exported file are used alike. Both contain their transform and their class names, so nothing has to
be repeated and no list of names can be off by one. An exported file needs none of the code that builds networks.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from recipe.config.schema import MAX_PIXELS
from recipe.data.transforms import transform_of
from recipe.errors import NonFiniteError, UserError
from recipe.evaluation import Predict
from recipe.inference.onnx_file import OnnxModel, read_onnx
from recipe.inference.pictures import Picture, pixels_of
from recipe.run.files import display_path
from recipe.run.records import Guess, Interface

ONNX_SUFFIX, CHECKPOINT_SUFFIX = ".onnx", ".pt"


class Classifier:
    """Pictures in, the best classes with their names and probabilities out."""

    def __init__(
        self,
        predict: Predict,
        interface: Interface,
        where: str,
        apply_orientation: bool = True,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.predict = predict
        self.interface = interface
        self.where = where
        self.transform = transform_of(interface, where)
        self.apply_orientation = apply_orientation
        self.max_pixels = max_pixels

    @classmethod
    def load(
        cls,
        path: str | Path,
        apply_orientation: bool = True,
        device: str = "cpu",
        max_pixels: int = MAX_PIXELS,
    ) -> Classifier:
        """Load `model-fp32.onnx` or `step-00000222.pt`. Raises `UserError` for anything else, damaged or hostile.

        `apply_orientation` turns photographs upright by their EXIF, which training never did. `device` is for
        checkpoints. A picture of more than `max_pixels` is refused.
        """
        path = Path(path)
        where = display_path(path)
        if path.suffix == ONNX_SUFFIX:
            model = OnnxModel(read_onnx(path, where), where)
            return cls(model, model.metadata.interface, where, apply_orientation, max_pixels)
        if path.suffix == CHECKPOINT_SUFFIX:
            return cls(*_from_checkpoint(path, where, device), where, apply_orientation, max_pixels)
        raise UserError(f"{where} is neither an exported model (.onnx) nor a checkpoint (.pt)")

    def __call__(self, picture: Picture, top: int = 5) -> list[Guess]:
        """The best `top` classes of one picture, best first."""
        (logits,) = self._predicted(self.pixels(picture)[None]).double()
        if not logits.isfinite().all():
            raise NonFiniteError(f"{self.where} gives logits that are not finite")
        probabilities, indices = logits.softmax(dim=0).topk(min(top, len(logits)))
        return [
            Guess(
                index=index,
                class_id=self.interface.classes[index].id,
                name=self.interface.classes[index].name,
                probability=probability,
            )
            for index, probability in zip(indices.tolist(), probabilities.tolist(), strict=True)
        ]

    def _predicted(self, images: Tensor) -> Tensor:
        try:
            logits = self.predict(images)
        except RuntimeError as error:  # a crop that is too small for the network, say
            raise UserError(f"{self.where} cannot be run on images of its own crop: {error}") from error
        if logits.shape != (len(images), len(self.interface.classes)):
            raise UserError(
                f"{self.where} gives logits {list(logits.shape)}, but names {len(self.interface.classes)} classes"
            )
        return logits

    def pixels(self, picture: Picture) -> Tensor:
        """The input of the network: uint8 [3, crop, crop], as in evaluation."""
        pixels = pixels_of(picture, self.apply_orientation, self.max_pixels)
        try:
            return self.transform(pixels)
        except (MemoryError, RuntimeError) as error:  # of torch: RuntimeError, also where memory cannot be had
            where = display_path(picture) if isinstance(picture, str | Path) else "the picture"
            width, height = pixels.shape[-1], pixels.shape[-2]
            raise UserError(f"{where}, {width} x {height} pixels, cannot be resized: {error}") from error


def _from_checkpoint(path: Path, where: str, device: str) -> tuple[Predict, Interface]:
    from recipe.config.schema import Precision
    from recipe.data.transforms import Normalisation
    from recipe.evaluation import predictor
    from recipe.models.build import restored_model  # here: an exported file needs no code of networks
    from recipe.models.checkpoint import interface_of, load_checkpoint

    state = load_checkpoint(path)
    interface = interface_of(state, where)
    place = torch.device(device)
    normalisation = Normalisation(interface.mean, interface.std, place)
    model = restored_model(state, where).to(place)
    return predictor(model, normalisation, Precision.fp32, place, channels_last=False), interface
