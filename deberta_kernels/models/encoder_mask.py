"""The mask of one forward on its way from a patched encoder to its attention modules."""

from __future__ import annotations

import builtins
from typing import Any

from torch import Tensor

from deberta_kernels.models.packing import Packing
from deberta_kernels.models.position_tables import content_key
from deberta_kernels.types import Masks

__all__ = ["EncoderMask"]


class EncoderMask:
    """One forward's mask, as a patched encoder hands it to its attention modules in place of a (B, 1, N, N) tensor.

    Not a dataclass on purpose: wrappers that rebuild dataclasses and containers (FSDP, accelerate) leave it whole.

    Args:
        source: the mask the encoder was given: (B, N), (B, N, N) or (B, 1 or H, N, N); not 0 = keep.
        masks: what it means, parsed once for all layers.
        packing: how the states that come with it are packed, (1, rows, C) in place of (B, N, C); None = not at all.

    Attributes:
        closed: nothing but known code, which nobody watches, runs in the layer that is given it now.
    """

    closed = False

    def __init__(self, source: Tensor, masks: Masks, packing: Packing | None = None) -> None:
        self.source = source
        self.masks = masks
        self.packing = packing
        self._read: tuple[Tensor, tuple[Any, ...] | None] | None = None

    def packed(self, packing: Packing | None) -> EncoderMask:
        """Return this mask for states that are packed in another way, or not at all."""
        return type(self)(self.source, self.masks, packing)

    def bool(self) -> Tensor:
        """Refuse to be a tensor, as which Hugging Face's attention takes it once it is no longer patched."""
        raise RuntimeError(
            "the mask of a patched encoder reached attention that is not patched any more; a checkpointed forward must "
            "be differentiated before unpatch(): call patch(model), run the forward again, and then its backward."
        )

    def begin_layer(self, closed: builtins.bool) -> None:
        """Take note of what runs in the next layer; other code than the known may change what was read."""
        self.closed = closed
        if not closed:
            self._read = None

    def dense(self) -> Tensor:
        """Return the (B, 1 or H, N, N) mask that Hugging Face's encoder builds, in the dtype of the source."""
        if self.source.dim() == 2:
            return self.source[:, None, None, :] * self.source[:, None, :, None]
        return self.source.unsqueeze(1) if self.source.dim() == 3 else self.source

    def to(self, device: Any, **unused: Any) -> EncoderMask:
        """Return this mask on another device, as hooks of models spread over devices ask for."""
        parts = (self.masks.key, self.masks.query, self.masks.pair)
        masks = Masks(*(None if mask is None else mask.to(device) for mask in parts))
        packing = None if self.packing is None else self.packing.to(device)
        return type(self)(self.source.to(device), masks, packing)

    def rel_key(self, rel_embeddings: Tensor) -> tuple[Any, ...] | None:
        """Return `content_key(rel_embeddings)`, read once for closed layers in a row that get the same tensor."""
        if not self.closed:
            return content_key(rel_embeddings)
        if self._read is None or self._read[0] is not rel_embeddings:
            self._read = (rel_embeddings, content_key(rel_embeddings))
        return self._read[1]
