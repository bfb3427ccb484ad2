"""DAPE V2: lets a small convolution over keys and heads correct the scores from their content and bias."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lookfar.errors import UserError
from lookfar.methods.base import Count, ScoreMap, Site
from lookfar.sight import Rows, Sight


class DapeV2(ScoreMap):
    """Adds to the scores two 1×k convolutions along the keys that mix all heads, fed with scores and bias.

    Zheng et al., 2024, "DAPE V2: Process Attention Score as Feature Map", arXiv 2410.04798.

        scores + bias + conv(LeakyReLU(conv([scores; bias])))

    Convolutions run over the compact row: the keys that a query sees, in order, itself last. As published, the hidden
    map beyond the query leaks into the last row only, so a row depends on the length of the batch. `repair="hidden"`
    (default) zeroes the hidden map outside the row; `repair="paper"` appends ⌊k/2⌋ zero columns, which equals the
    published form on all rows but the last ⌊k/2⌋, and needs plain causal sight.
    """

    paper = "Zheng et al., 2024, arXiv 2410.04798"
    adds = "convolutions over the score maps of all heads"
    quirks = (
        "The published layer is not consistent: in a longer batch the last rows change, and its variants over nope "
        "and rope do not run. Over `differential` it mixes both maps, which no paper defines."
    )

    def __init__(
        self, site: Site, *, kernel: Count = 3, hidden: Count = 32, repair: Literal["hidden", "paper"] = "hidden"
    ) -> None:
        super().__init__(site)
        if kernel % 2 == 0:
            raise UserError(f"dape_v2 needs an odd kernel, not {kernel}; try kernel={kernel + 1}.")
        heads = site.heads.score_heads
        self.repair, self.reach = repair, kernel // 2
        self.first = nn.Conv2d(heads * (1 + site.biased), hidden, (1, kernel), padding=(0, kernel // 2))
        self.second = nn.Conv2d(hidden, heads, (1, kernel), padding=(0, kernel // 2))

    def rewrite(self, scores: Float[Tensor, "b h q k"], rows: Rows) -> Float[Tensor, "b h q k"]:
        compact = rows.compact()
        seen = compact.hide(rows.gather(rows.with_bias(scores)))
        if self.repair == "paper":
            seen = F.pad(seen, (0, self.reach))
        seen = seen.contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU
        hidden = F.leaky_relu(self.first(seen))
        if self.repair == "hidden":
            hidden = compact.hide(hidden)
        change = self.second(hidden)[..., : scores.shape[-1]]
        return scores + rows.scatter(change.to(scores.dtype))

    def refusal(self, sight: Sight) -> str | None:
        if self.repair == "paper" and not sight.plain:
            return "dape_v2(repair=paper) is exact for plain causal sight only; repair=hidden takes any."
        return None
