"""A decoder-only transformer whose every layer sees position by its own scheme."""

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch.nn import functional as F

from lookfar.attention.scheme import Shared, build_scheme
from lookfar.batch import consecutive
from lookfar.config import ModelConfig
from lookfar.errors import UserError
from lookfar.methods.base import InputEncoding
from lookfar.model.attention import Attention, cast
from lookfar.model.block import Block, FeedForward
from lookfar.model.cache import Cache, LayerCache
from lookfar.sight import Sight

FEW = 16  # new tokens whose places in their documents are counted, in place of sorting all


class Decoder(nn.Module):
    """Tokens `[b t]` -> logits `[b t vocabulary]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocabulary is None:
            raise UserError("A decoder needs model.vocabulary; for bytes it is 256.")
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        shared: Shared = {}
        self.blocks = nn.ModuleList(_block(config, layer, shared) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        different = {None: 0, "own": config.slots, "one": 1}[config.slot_embeddings if config.slots else None]
        self.slot_embedding = nn.Embedding(different, config.width) if different else None
        self.head = None if config.tied else nn.Linear(config.width, config.vocabulary, bias=False)
        self.windows = [layer_window(config, layer) for layer in range(config.layers)]
        self.encoding = _input_encoding(self._blocks())
        _initialise(self)
        self.to(device=device_of(config.device), dtype=cast(config.dtype))

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        *,
        positions: Num[Tensor, "#b t"] | None = None,
        documents: Int[Tensor, "b t"] | None = None,
        sight: Sight | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b t vocabulary"]:
        """The logits of what follows each token.

        Args:
            tokens: of the batch.
            positions: their numbers; by default 0, 1, 2, … within each document.
            documents: the document of each token, -1 for padding; by default each line is one document.
            sight: who sees whom, in place of positions, documents and windows.
            cache: keys and values of earlier tokens; those of `tokens` are appended.
        """
        return self.logits(self.states(tokens, positions=positions, documents=documents, sight=sight, cache=cache))

    def states(
        self,
        tokens: Int[Tensor, "b t"],
        *,
        positions: Num[Tensor, "#b t"] | None = None,
        documents: Int[Tensor, "b t"] | None = None,
        sight: Sight | None = None,
        cache: Cache | None = None,
        last: int | None = None,
        step: int | None = None,
    ) -> Float[Tensor, "b q d"]:
        """The last hidden states, normalised: what `logits` reads. For other arguments see `forward`.

        Args:
            last: how many of the last tokens are asked for, by default all. What they do not need of the others is
                left out: in the last layer all but keys and values, and what no window lets them see. It goes with
                neither `sight` nor `cache`.
            step: each line is the one before it, moved on by so many tokens of one text. What the first layer makes of
                a token alone is then made once for all lines. It goes with `last`.
        """
        if last is not None and (sight is not None or cache is not None or not 1 <= last <= tokens.shape[1]):
            raise UserError(f"last={last} asks for the last of {tokens.shape[1]} tokens, without a sight or cache.")
        if step is not None and (last is None or step < 1):
            raise UserError(f"step={step} says how far each line is moved on, 1 or more, where the last are asked for.")
        if sight is not None:
            if positions is not None or documents is not None:
                raise UserError("A sight has its own positions and documents; give either it or them.")
            return self._through(self.embedding(tokens), dict.fromkeys(self.windows, sight), cache)
        positions, documents = self._numbered(tokens, positions, documents, cache)
        past, new = 0 if cache is None else cache.length, tokens.shape[1]
        sights = {
            window: Sight.causal(
                past + new,
                queries=new,
                positions=positions,
                documents=documents,
                window=window,
                device=tokens.device,
            )
            for window in dict.fromkeys(self.windows)
        }
        states = self._through(self.embedding(tokens), sights, cache, last, step)
        _note(cache, positions, documents)
        return states

    def slot_states(
        self,
        tokens: Int[Tensor, "b t"],
        *,
        slots: int | None = None,
        ends: Int[Tensor, "#b a"] | None = None,
        positions: Num[Tensor, "#b t"] | None = None,
        documents: Int[Tensor, "b t"] | None = None,
        ahead: bool = False,
        cache: Cache | None = None,
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b a s d"]]:
        """The states of the text, and of slots that predict several tokens at once: what `logits` reads.

        After every anchor stand s slots: slot n predicts the token n places after the text that it follows (n from 0).
        A slot sees that text and itself, so its answer depends neither on the other slots nor on how many there are.

        Args:
            tokens: of the text, or what is new in it where there is a cache; there may be none.
            slots: how many at each anchor; by default as many as the configuration has.
            ends: the anchors, `[b a]`: how many tokens of the text each follows; by default one, after all of them.
            positions, documents: of the text, as in `forward`.
            ahead: the text sees all of itself, as a prefix that is given whole.
            cache: keys and values of earlier tokens; those of `tokens` are appended, those of slots are not.
        """
        if self.slot_embedding is None or self.config.slots is None:
            raise UserError("This model has no slots; train it with model.slots=4.")
        slots = self.config.slots if slots is None else slots
        if not 1 <= slots <= self.config.slots:
            raise UserError(f"{slots} slots are not possible: the model has {self.config.slots}.")
        batch, new = tokens.shape
        past = 0 if cache is None else cache.length
        if ahead and past:
            raise UserError("What is in the cache has not seen the new text; with ahead=True give all of it at once.")
        positions, documents = self._numbered(tokens, positions, documents, cache)
        if ends is None:
            ends = _ends(documents, past + new, tokens.device)
        if ends.dim() != 2 or ends.shape[0] not in (1, batch) or not ends.shape[1]:
            raise UserError(f"`ends` must be [{batch} a], a number for each anchor; it is {list(ends.shape)}.")
        anchors = ends.shape[1]
        offsets = torch.arange(slots, device=tokens.device) * (self.config.slot_positions == "offset")
        sights = {
            window: Sight.slots(
                past + new,
                anchors * slots,
                queries=new + anchors * slots,
                ends=ends.repeat_interleave(slots, dim=1),
                offsets=offsets.repeat(anchors)[None],
                positions=positions,
                documents=documents,
                window=window,
                ahead=ahead,
                device=tokens.device,
            )
            for window in dict.fromkeys(self.windows)
        }
        embedded = self.slot_embedding.weight[:slots].expand(slots, -1)
        x = torch.cat([self.embedding(tokens), embedded.repeat(anchors, 1).expand(batch, -1, -1)], dim=1)
        states = self._through(x, sights, cache)
        _note(cache, positions, documents)
        return states[:, :new], states[:, new:].unflatten(1, (anchors, slots))

    def _through(
        self,
        x: Float[Tensor, "b t d"],
        sights: dict[int | None, Sight],
        cache: Cache | None,
        last: int | None = None,
        step: int | None = None,
    ) -> Float[Tensor, "b q d"]:
        """Embeddings through all layers, of which the last gives the states of the `last` tokens."""
        places = next(iter(sights.values())).query_positions
        if self.farthest is not None and (reach := int(places.max()) + 1) > self.farthest:
            raise UserError(
                f"{reach} tokens are more than the {self.farthest} positions of the learned table; "
                f"train with model.positions={reach} or ask for fewer."
            )
        if self.encoding is not None:
            x = self.encoding.encode(x, places)
        x = F.dropout(x, self.config.embedding_dropout, self.training and self.config.embedding_dropout > 0)
        asking = [sights[window] for window in self.windows]
        if last is not None and self.once:  # what encodes all keys anew takes whole sequences only
            asking = _asking(asking, last)
        for layer, (block, sight) in enumerate(zip(self._blocks(), asking, strict=True)):
            given = x if last is None else x[:, -sight.keys :]
            alike = step if layer == 0 and self.encoding is None and not self.training else None
            x = block(given, sight, None if cache is None else cache.layers[layer], alike)
        return self.norm(x if last is None else x[:, -last:])

    def logits(self, states: Float[Tensor, "*b d"]) -> Float[Tensor, "*b vocabulary"]:
        """Logits from states, soft-capped where the configuration says so."""
        logits = F.linear(states, self.embedding.weight) if self.head is None else self.head(states)
        cap = self.config.logit_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def cache(self, *, batch: int = 1, length: int = 256) -> Cache:
        """An empty cache with room for `length` tokens; it grows when they are more."""
        weight = self.embedding.weight
        layers = [LayerCache(block.attention.scheme.heads, batch, length, weight.device) for block in self._blocks()]
        return Cache(layers, batch)

    def recompute(self, wanted: bool) -> None:
        """Whether training keeps the inputs of layers only, and computes what is between again in the backward pass."""
        for block in self._blocks():
            block.recompute = wanted

    @property
    def once(self) -> bool:
        """Whether every key is encoded once, so that a cache can hold it."""
        return all(block.attention.scheme.once for block in self._blocks())

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.embedding.weight.dtype

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return self.embedding.num_embeddings

    @property
    def context(self) -> int:
        """The trained length."""
        return self.config.context

    @property
    def farthest(self) -> int | None:
        """How many positions the model can number; None: any number."""
        table = getattr(self.encoding, "positions", None)
        return table if isinstance(table, int) else None

    def _numbered(
        self,
        tokens: Int[Tensor, "b t"],
        positions: Num[Tensor, "#b t"] | None,
        documents: Int[Tensor, "b t"] | None,
        cache: Cache | None,
    ) -> tuple[Num[Tensor, "#b k"] | None, Int[Tensor, "b k"] | None]:
        """Positions and documents of all text, cached and new; None while all is consecutive in one document."""
        if cache is not None:
            batch, new = tokens.shape
            positions, documents = _continued(cache, batch, new, positions, documents)
        elif documents is not None and positions is None:
            positions = consecutive(documents)
        return positions, documents

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]


def _asking(sights: list[Sight], last: int) -> list[Sight]:
    """For each layer the last queries that layers above it need, against the keys that one of these can see."""
    needed = []
    for sight in reversed(sights):
        part = sight.rows(sight.queries - last, sight.queries)
        needed.append(part)
        last = part.keys
    return needed[::-1]


def device_of(name: str) -> torch.device:
    """The device of a configured name; `auto` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"There is no device {name!r} here ({str(error).splitlines()[0]}); try device='auto'."
        ) from error


def layer_scheme(config: ModelConfig, layer: int) -> str:
    """The scheme of a layer: a pattern cycles."""
    schemes = (config.scheme,) if isinstance(config.scheme, str) else config.scheme
    return schemes[layer % len(schemes)]


def layer_window(config: ModelConfig, layer: int) -> int | None:
    """The window of a layer: a pattern cycles."""
    windows = config.window if isinstance(config.window, tuple) else (config.window,)
    return windows[layer % len(windows)]


def hidden_width(config: ModelConfig) -> int:
    """The width of the feed-forward layer: 4 widths, or two thirds of that for a gated one, in steps of 16."""
    if config.hidden is not None:
        return config.hidden
    wanted = config.width * (8 / 3 if config.activation == "swiglu" else 4)
    return max(16, round(wanted / 16) * 16)


def _block(config: ModelConfig, layer: int, shared: Shared) -> Block:
    scheme = build_scheme(
        layer_scheme(config, layer),
        heads=config.heads,
        groups=config.groups,
        head_width=config.head_width,
        width=config.width,
        layer=layer,
        layers=config.layers,
        context=config.context,
        positions=config.positions,
        embedding_scale=_embedding_scale(config.width),
        soft_cap=config.attention_soft_cap,
        shared=shared,
    )
    attention = Attention(config.width, config.heads, scheme=scheme, qk_norm=config.qk_norm)
    feed_forward = FeedForward(config.width, hidden_width(config), config.activation)
    return Block(config.width, attention, feed_forward, config.dropout)


def _input_encoding(blocks: list[Block]) -> InputEncoding | None:
    found = {id(each): each for block in blocks for each in block.attention.scheme.inputs}
    if len(found) > 1:
        names = " and ".join(type(each).__name__ for each in found.values())
        raise UserError(
            f"Embeddings are encoded once, before the first layer: {names} cannot be combined in a pattern."
        )
    return next(iter(found.values()), None)


def _embedding_scale(width: int) -> float:
    return width**-0.5


def _initialise(model: Decoder) -> None:
    """Weights of variance 1/inputs keep the scale; those that add to the stream are 1/√(2·layers) of that."""
    nn.init.normal_(model.embedding.weight, std=_embedding_scale(model.config.width))
    if model.slot_embedding is not None:
        nn.init.normal_(model.slot_embedding.weight, std=_embedding_scale(model.config.width))
    shrink = (2 * model.config.layers) ** -0.5
    for block in model._blocks():
        for linear, factor in (
            (block.attention.project, 1.0),
            (block.attention.output, shrink),
            (block.feed_forward.up, 1.0),
            (block.feed_forward.down, shrink),
        ):
            nn.init.normal_(linear.weight, std=factor * linear.in_features**-0.5)
    if model.head is not None:
        nn.init.normal_(model.head.weight, std=_embedding_scale(model.config.width))


def _continued(
    cache: Cache,
    batch: int,
    new: int,
    positions: Num[Tensor, "#b t"] | None,
    documents: Int[Tensor, "b t"] | None,
) -> tuple[Num[Tensor, "b k"] | None, Int[Tensor, "b k"] | None]:
    """Positions and documents of all tokens, cached and new; None while all are consecutive in one document."""
    if batch != cache.batch:
        raise UserError(f"This cache holds {cache.batch} sequences; the call has {batch}.")
    past, device = cache.length, cache.layers[0].device
    if documents is not None or cache.documents is not None:
        zeros = torch.zeros(batch, past, dtype=torch.long, device=device)
        before = zeros if cache.documents is None else cache.documents
        after = torch.zeros(batch, new, dtype=torch.long, device=device) if documents is None else documents
        documents = torch.cat([before, after], dim=1)
    if positions is not None or cache.positions is not None or documents is not None:
        before, after = cache.positions, None if positions is None else positions.expand(batch, -1)
        if before is None or after is None:
            first = 0 if before is None else past
            default = _default(documents, first, past + new, batch, device)
            before = default[:, :past] if before is None else before
            after = default[:, default.shape[1] - new :] if after is None else after
        positions = torch.cat([before, after], dim=1)
    return positions, documents


def _note(cache: Cache | None, positions: Num[Tensor, "#b k"] | None, documents: Int[Tensor, "b k"] | None) -> None:
    """Keep the numbers of what the cache now holds; only here, so that a call that was refused leaves it as it was."""
    if cache is not None:
        cache.positions, cache.documents = positions, documents


def _ends(documents: Int[Tensor, "b k"] | None, tokens: int, device: torch.device) -> Int[Tensor, "#b 1"]:
    """After all of the text: after the last token of each line that is no padding."""
    if documents is None:
        return torch.full((1, 1), tokens, device=device)
    return ((documents >= 0) * torch.arange(1, tokens + 1, device=device)).amax(1, keepdim=True)


def _default(
    documents: Int[Tensor, "b k"] | None, first: int, last: int, batch: int, device: torch.device
) -> Int[Tensor, "b t"]:
    """Numbers of the tokens from `first` to `last`: 0, 1, 2, … within each document."""
    if documents is None:
        return torch.arange(first, last, device=device).expand(batch, -1)
    if last - first > FEW:
        return consecutive(documents)[:, first:]
    places = torch.arange(last, device=device)
    own = documents[:, first:, None] == documents[:, None, :]  # b t k
    earlier = places < places[first:, None]
    return (own & earlier).sum(-1).masked_fill(documents[:, first:] < 0, 0)
