"""What decoding keeps: the encoded keys and the values of every layer, and how the tokens were numbered."""

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from lookfar.methods.base import Heads


class LayerCache:
    """Encoded keys and values of one layer, in buffers that double when they are full.

    Their type is that of the first keys: under autocast it is narrower than the parameters'.
    """

    def __init__(self, heads: Heads, batch: int, length: int, device: torch.device) -> None:
        self.length, self.device = 0, device
        self._keys = torch.empty(batch, heads.key_heads, length, heads.head_width, device="meta")
        self._values = torch.empty(batch, heads.value_heads, length, heads.value_width, device="meta")

    def append(
        self, keys: Float[Tensor, "b g t e"], values: Float[Tensor, "b g2 t v"]
    ) -> tuple[Float[Tensor, "b g k e"], Float[Tensor, "b g2 k v"]]:
        """Store new keys and values; return all that are stored."""
        start, self.length = self.length, self.length + keys.shape[2]
        return self._write(keys, values, start)

    def show(
        self, keys: Float[Tensor, "b g t e"], values: Float[Tensor, "b g2 t v"]
    ) -> tuple[Float[Tensor, "b g k e"], Float[Tensor, "b g2 k v"]]:
        """All that are stored, and these after them, which are not kept."""
        return self._write(keys, values, self.length)

    def _write(self, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        stop = start + keys.shape[2]
        if not (_may_write(keys, self._keys) and _may_write(values, self._values)):
            return self._beside(keys, values, start)
        if start == 0:
            self._keys = torch.empty_like(self._keys, dtype=keys.dtype, device=keys.device)
            self._values = torch.empty_like(self._values, dtype=values.dtype, device=values.device)
        if stop > self._keys.shape[2]:
            size = 1 << (stop - 1).bit_length()
            self._keys, self._values = _grown(self._keys, size), _grown(self._values, size)
        self._keys[:, :, start:stop] = keys
        self._values[:, :, start:stop] = values
        return self._keys[:, :, :stop].to(keys.dtype), self._values[:, :, :stop].to(values.dtype)

    def _beside(self, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """As `_write`, into new buffers: the old ones are needed as they are."""
        if start:
            keys = torch.cat([self._keys[:, :, :start].to(keys.dtype), keys], dim=2)
            values = torch.cat([self._values[:, :, :start].to(values.dtype), values], dim=2)
        if self.length > start:  # stored, not only shown
            self._keys, self._values = keys, values
        return keys, values


class Cache:
    """The caches of all layers, and the positions and documents of the tokens in them."""

    def __init__(self, layers: list[LayerCache], batch: int) -> None:
        self.layers, self.batch = layers, batch
        self.positions: Num[Tensor, "b k"] | None = None
        self.documents: Int[Tensor, "b k"] | None = None

    @property
    def length(self) -> int:
        """How many tokens are stored."""
        return self.layers[0].length


def _grown(buffer: Tensor, size: int) -> Tensor:
    grown = buffer.new_empty(*buffer.shape[:2], size, buffer.shape[3])
    grown[:, :, : buffer.shape[2]] = buffer
    return grown


def _may_write(new: Tensor, stored: Tensor) -> bool:
    """Whether a buffer can be written where it lies: neither a backward pass nor inference mode holds it."""
    graph = stored.requires_grad or (new.requires_grad and torch.is_grad_enabled())
    return not graph and (torch.is_inference_mode_enabled() or not stored.is_inference())
