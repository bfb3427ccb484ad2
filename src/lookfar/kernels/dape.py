"""DAPE V1 and V2 in Triton: strips of scores instead of the square, forward and backward."""

import importlib.util
import os

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lookfar.attention.scheme import Scheme
from lookfar.kernels.base import Call, Kernel
from lookfar.kernels.dape_strips import Attend, Net, Plan, Strip, Tiles
from lookfar.methods.dape_v1 import DapeV1
from lookfar.methods.dape_v2 import DapeV2
from lookfar.sight import Sight

PAIRS = 1 << 23  # of query and key, over the batch, that a strip holds
ROWS = 16  # queries of a strip, at least
TYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_HEADS, MOST_HIDDEN, MOST_TAPS, WIDEST = 32, 64, 7, 256
MOST_LINES = (1 << 16) - 1  # of a batch, which is an axis of a grid
MOST_WEIGHTS = 1 << 13  # of one matrix over the unfolded row; the gradient holds four


class Dape(Kernel):
    """Computes the scores of a strip of queries, sends them through the net and the softmax, and goes on to the next.

    Memory is proportional to the length. Backward, a strip is computed again; the same call gives the same gradients.
    """

    def __init__(self, *, pairs: int = PAIRS, tiles: Tiles | None = None) -> None:
        self.pairs, self.tiles = pairs, Tiles() if tiles is None else tiles

    def refusal(self, scheme: Scheme, call: Call) -> str | None:
        net = scheme.maps[0] if scheme.maps else None
        if not (type(net) is DapeV1 or type(net) is DapeV2):  # an heir has its own `rewrite`
            return "it is made for dape_v1 and dape_v2 alone"
        return _refused_net(net, scheme) or _refused_call(call)

    def attend(
        self,
        queries: Float[Tensor, "b h q e"],
        keys: Float[Tensor, "b g k e"],
        values: Float[Tensor, "b g2 k v"],
        sight: Sight,
        scheme: Scheme,
    ) -> Float[Tensor, "b h q v"]:
        net = scheme.maps[0]
        assert isinstance(net, DapeV1 | DapeV2)
        keys, values = scheme.heads.keys_for_scores(keys), scheme.heads.values_for_scores(values)
        with torch.autocast(queries.device.type, enabled=False):
            high = max(0, sight.first_query - sight.first_key + sight.queries - 1)  # the longest distance
            table, sink = None, scheme.sink(sight.query_positions)
            if scheme.biases:
                lowest = 1 - sight.keys if sight.ahead else 0
                table = scheme.table(torch.arange(high, lowest - 1, -1, device=queries.device)).float()
            if sink is not None:
                sink = sink.float().expand(queries.shape[:3])
            plan = Plan(
                tiles=self.tiles,
                strips=self._strips(sight, queries.shape[0]),
                net=_net(net, scheme),
                offset=sight.first_query - sight.first_key,
                high=high,
                scale=scheme.scale,
            )
            rows = [each.expand(len(queries), -1).int().contiguous() for each in sight.spans()]
            return Attend.apply(queries, keys, values, table, sink, *_weights(net, plan.net), *rows, plan)

    def _strips(self, sight: Sight, batch: int) -> list[Strip]:
        """Queries in turn, with the keys that one of them can see by order and window."""
        reach = sight.keys if sight.window is None else sight.window * (1 + sight.ahead)
        rows = 1 << (sight.queries - 1).bit_length()
        while rows > ROWS and batch * rows * min(sight.keys, reach + rows) > self.pairs:
            rows //= 2
        found = []
        for start in range(0, sight.queries, rows):
            stop = min(start + rows, sight.queries)
            part = sight.rows(start, stop)
            first = part.first_key - sight.first_key
            found.append(Strip(start, stop, first, first + part.keys))
        return found


def _refused_net(net: DapeV1 | DapeV2, scheme: Scheme) -> str | None:
    sizes = _net(net, scheme)
    if isinstance(net, DapeV2) and net.repair == "paper":
        return "it zeroes the hidden map outside the row, which repair=paper does not"
    if scheme.soft_cap is not None:
        return "the scores are soft-capped"
    if not scheme.by_distance:
        return f"{scheme.expression} adds a bias that does not depend on the distance alone"
    if sizes.heads > MOST_HEADS:
        return f"{sizes.heads} score heads are more than {MOST_HEADS}"
    if sizes.hidden > MOST_HIDDEN:
        return f"{sizes.hidden} hidden channels are more than {MOST_HIDDEN}"
    if sizes.taps > MOST_TAPS:
        return f"a kernel of {sizes.taps} is wider than {MOST_TAPS}"
    if sizes.columns * sizes.hidden_padded > MOST_WEIGHTS:
        return f"{sizes.heads} heads, {sizes.hidden} hidden channels and {sizes.taps} taps do not fit in shared memory"
    if scheme.heads.value_width > WIDEST:
        return f"values {scheme.heads.value_width} wide are more than {WIDEST}"
    return None


def _refused_call(call: Call) -> str | None:
    if call.slots:
        return "a slot is not in the text"
    if call.scattered:
        return "the keys that a query sees need not be neighbours"
    if not call.steady:
        return "a distance is not always the number of places between two tokens"
    if call.batch > MOST_LINES:
        return f"a batch of {call.batch:,} is more than the {MOST_LINES:,} that a GPU starts at once"
    if call.dtype not in TYPES:
        return f"it computes in float32, and the input is {call.dtype}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if call.device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton has no programs for the device {call.device}"
    return None


def _net(net: DapeV1 | DapeV2, scheme: Scheme) -> Net:
    return Net(
        heads=scheme.heads.score_heads,
        hidden=net.first.weight.shape[0],
        taps=2 * net.reach + 1 if isinstance(net, DapeV2) else 1,
        biased=bool(scheme.biases),
        keeps=bool(scheme.biases) and net.keeps_bias,
    )


def _weights(net: DapeV1 | DapeV2, sizes: Net) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Both layers as matrices over the unfolded row, `[(tap, head), hidden]`, in float32 and filled up with zeros.

    First layer: one for the scores, one for the bias if there is any, and `[hidden]`. Second: one, and `[head]`.
    """
    first, second = (layer.weight.float().reshape(*layer.weight.shape[:2], -1) for layer in (net.first, net.second))
    halves = [sizes.unfolded(each.movedim(2, 0).mT) for each in first.split(sizes.heads, dim=1)]  # hidden h tap
    return (
        halves[0],
        halves[1] if sizes.biased else None,
        F.pad(_bias(net.first), (0, sizes.hidden_padded - sizes.hidden)),
        sizes.unfolded(second.movedim(2, 0)),  # h hidden tap
        F.pad(_bias(net.second), (0, sizes.heads_padded - sizes.heads)),
    )


def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias.float()
