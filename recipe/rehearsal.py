"""A forward pass without numbers: what a network cannot take is said before any work.

Tensors of torch's meta device have shapes alone, so a pass costs milliseconds and no memory.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call

from recipe.errors import UserError


def rehearse(model: nn.Module, name: str, images: int, pixels: int, remedy: str) -> None:
    """Pass the shape [images, 3, pixels, pixels] through `model` in the mode that it is in; changes nothing.

    Raises `UserError` with torch's reason and the remedy where it cannot pass: a batch norm in training mode needs two
    values per channel, and a layer with a stride needs something left to stride over.
    """
    shapes = {key: torch.empty_like(value, device="meta") for key, value in model.state_dict(keep_vars=True).items()}
    shapes |= {key: torch.empty_like(value, device="meta") for key, value in model.named_buffers()}
    example = torch.empty(images, 3, pixels, pixels, device="meta")
    try:
        with torch.no_grad():
            functional_call(model, shapes, (example,))
    except (ValueError, RuntimeError, AssertionError) as error:
        count = "1 image" if images == 1 else f"{images} images"
        doing = "train on" if model.training else "evaluate"
        raise UserError(
            f"{name} cannot {doing} {count} of {pixels} x {pixels} pixels in a forward pass "
            f"({' '.join(str(error).split())[:200]}); {remedy}"
        ) from error
