"""RoPE: turns queries and keys by angles that grow with position, so that scores know the distance."""

import math
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float, Num
from torch import Tensor

from lookfar.errors import UserError
from lookfar.methods.base import Count, Positive, QueryKeyEncoding, Site, wide
from lookfar.sight import Sight

Part = Annotated[float, Gt(0), Le(1)]
Scaling = Literal["none", "pi", "ntk", "dynamic", "yarn", "llama3"]


class _Last:
    """The angles that were asked for last. A copy of a model begins without."""

    def __init__(self, positions: Tensor | None = None, asked: Any = None, waves: Any = None) -> None:
        self._positions, self._asked, self._waves = positions, asked, waves

    def find(self, positions: Num[Tensor, "#b t"], asked: Any) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine, if these are the same positions in the same type."""
        known = self._positions
        if known is None or asked != self._asked or known.dtype != positions.dtype:
            return None
        return self._waves if torch.equal(known, positions) else None

    def __reduce__(self) -> tuple[type["_Last"], tuple[()]]:
        return _Last, ()


class Rope(QueryKeyEncoding):
    """Turns each pair of query and key features by position × frequency.

    Su et al., 2021, arXiv 2104.09864.

        (x, y) → (x cos θ - y sin θ, y cos θ + x sin θ),   θ = position · base^(-2n/width)

    `layout="halves"` pairs feature n with n + width/2 (GPT-NeoX, Llama in transformers); `layout="interleaved"` pairs
    neighbours (the paper, GPT-J). The two are the same up to a fixed permutation of features. `fraction` turns only the
    first features of each head (GPT-NeoX); `p` keeps the lowest frequencies still (p-RoPE, arXiv 2410.06205).

    A `scaling` stretches a trained model by `factor`, which changes no weight; factor 1 is plain RoPE:

    - `pi`: positions / factor (Chen et al., 2023, arXiv 2306.15595)
    - `ntk`: base · factor^(width/(width - 2)), the static form
    - `dynamic`: as ntk, with the factor that the current length n asks for, factor · n / original - (factor - 1), and
      plain up to `original`; every key then turns anew with each token, so it takes whole sequences of one document
      only and cannot be cached
    - `yarn`: high frequencies stay, low ones are divided by the factor, those between 32 and 1 turns of `original` are
      blended; queries and keys grow by 0.1 ln(factor) + 1 (Peng et al., 2023, arXiv 2309.00071)
    - `llama3`: as Llama 3.1, waves shorter than original/4 stay, those longer than `original` are divided by the factor

    `original` is the length that the model was trained at, by default the context.
    """

    paper = "Su et al., 2021, arXiv 2104.09864"
    adds = "a rotation of queries and keys"
    quirks = (
        "Two layouts exist and checkpoints do not say which; Llama in transformers has halves, GPT-J and the paper "
        "neighbours. A scaling that follows the current length cannot be cached. In half precision angles must be "
        "computed in float32, as here."
    )
    shared = True
    rotation = True

    def __init__(
        self,
        site: Site,
        *,
        base: Positive = 10000.0,
        layout: Literal["halves", "interleaved"] = "halves",
        fraction: Part = 1.0,
        p: Part = 1.0,
        scaling: Scaling = "none",
        factor: Annotated[float, Ge(1)] = 1.0,
        original: Count | None = None,
    ) -> None:
        super().__init__(site)
        self.layout = layout
        self.width = round(site.heads.head_width * fraction)  # of the features that turn
        if self.width % 2 or not self.width:
            part = "" if fraction == 1 else f" times fraction ({fraction}), {self.width} features,"
            raise UserError(f"rope turns pairs of features: head_width ({site.heads.head_width}){part} must be even.")
        if factor > 1 and scaling == "none":
            raise UserError(f"rope(factor={factor}) needs a scaling: pi, ntk, dynamic, yarn or llama3.")
        if scaling == "ntk" and self.width > 2:
            base *= factor ** (self.width / (self.width - 2))
        half = self.width // 2
        frequencies = base ** (-torch.arange(half, dtype=torch.float64, device="cpu") / half)
        frequencies[max(1, round(p * half)) :] = 0
        length = site.context if original is None else original
        if scaling == "pi":
            frequencies = frequencies / factor
        elif scaling == "yarn":
            frequencies = _yarn(frequencies, base, factor, length)
        elif scaling == "llama3":
            frequencies = _llama3(frequencies, factor, length)
        self.frequencies = frequencies.tolist()  # not a buffer: no cast may touch them, nor a model without data
        self.once = scaling != "dynamic"
        self.factor, self.original = factor, length  # of the dynamic form
        self.last = _Last()
        self.growth = 0.1 * math.log(factor) + 1 if scaling == "yarn" else 1.0

    def queries(self, queries: Float[Tensor, "b h t e"], positions: Num[Tensor, "#b t"]) -> Float[Tensor, "b h t e"]:
        return self._turn(queries, positions)

    def keys(self, keys: Float[Tensor, "b g t e"], positions: Num[Tensor, "#b t"]) -> Float[Tensor, "b g t e"]:
        return self._turn(keys, positions)

    def _turn(self, x: Float[Tensor, "b c t e"], positions: Num[Tensor, "#b t"]) -> Float[Tensor, "b c t e"]:
        cos, sin = self._waves(positions, x)
        turned = x if self.width == x.shape[-1] else x[..., : self.width]
        if self.layout == "halves":
            partners = torch.cat(turned.chunk(2, dim=-1)[::-1], dim=-1)
        else:
            partners = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        turned = turned * cos + partners * sin
        return turned if turned.shape == x.shape else torch.cat([turned, x[..., self.width :]], dim=-1)

    def _waves(
        self, positions: Num[Tensor, "#b t"], x: Float[Tensor, "b c t e"]
    ) -> tuple[Float[Tensor, "#b 1 t f"], Float[Tensor, "#b 1 t f"]]:
        """For each feature the factor of itself and that of its partner: cos θ, and - sin θ or sin θ.

        Queries, keys and all layers ask for the same, so the last are kept.
        """
        asked = x.dtype, x.device, torch.is_inference_mode_enabled()
        keeps = x.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere a comparison has to wait
        keeps = keeps and type(x) is type(positions) is Tensor and not positions.requires_grad
        if keeps and (waves := self.last.find(positions, asked)) is not None:
            return waves
        places = wide(positions, x)[:, None, :, None]  # b 1 t 1
        frequencies = torch.tensor(self.frequencies, device=x.device, dtype=places.dtype)
        angles = places * (frequencies if self.once else self._stretched(frequencies, places))
        cos, sin = (self.growth * angles.cos()).to(x.dtype), (self.growth * angles.sin()).to(x.dtype)
        if self.layout == "halves":
            waves = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        else:
            waves = cos.repeat_interleave(2, dim=-1), torch.stack([-sin, sin], dim=-1).flatten(-2)
        if keeps:
            self.last = _Last(positions.clone(), asked, waves)
        return waves

    def refusal(self, sight: Sight) -> str | None:
        if self.once:
            return None
        documents = sight.key_documents
        several = documents is not None and bool(
            ((documents != documents.amax(1, keepdim=True)) & (documents >= 0)).any()
        )
        if sight.queries != sight.keys or sight.text is not None or several:
            return "rope(scaling=dynamic) turns all keys by the length of the sequence; it takes whole sequences only."
        return None

    def _stretched(
        self, frequencies: Float[Tensor, " f"], places: Float[Tensor, "#b 1 t 1"]
    ) -> Float[Tensor, "#b 1 1 f"]:
        """The frequencies of the dynamic form: the base grows with the length of each line."""
        tokens = places.amax(dim=2, keepdim=True) + 1
        stretch = (self.factor * tokens / self.original - (self.factor - 1)).clamp(min=1)
        feature = torch.arange(len(frequencies)).to(frequencies) / max(1, len(frequencies) - 1)
        return frequencies * stretch**-feature


def _yarn(frequencies: Float[Tensor, " f"], base: float, factor: float, original: int) -> Float[Tensor, " f"]:
    """Blend by how often a wave turns within the original length: 32 times or more stays, once or less is stretched."""
    half = len(frequencies)

    def feature(turns: float) -> float:
        return half * math.log(original / (2 * math.pi * turns)) / math.log(base)

    low, high = max(0, math.floor(feature(32.0))), min(2 * half - 1, math.ceil(feature(1.0)))
    ramp = ((torch.arange(half, dtype=torch.float64, device=frequencies.device) - low) / max(high - low, 1e-3)).clamp(
        0, 1
    )
    return frequencies * (1 - ramp) + frequencies / factor * ramp


def _llama3(frequencies: Float[Tensor, " f"], factor: float, original: int) -> Float[Tensor, " f"]:
    """Blend by how many waves fit into the original length: 4 or more stay, 1 or less are stretched."""
    waves = original * frequencies / (2 * math.pi)
    ramp = ((waves - 1) / (4 - 1)).clamp(0, 1)
    return frequencies * ramp + frequencies / factor * (1 - ramp)
