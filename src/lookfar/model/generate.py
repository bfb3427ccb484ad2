"""Writes on from prompts: greedy or sampled, batches of unequal length, token by token through the cache."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from lookfar.errors import UserError
from lookfar.model.cache import Cache
from lookfar.model.decoder import Decoder
from lookfar.model.packed import pack

FEW = 8  # tokens for which weights are not laid out anew
PADDING = -1  # the document of a token that no one sees


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits. Temperature 0 takes the likeliest."""

    temperature: float = 1.0
    top_k: int | None = None  # only the k likeliest
    top_p: float | None = None  # only the likeliest that together hold p of the probability (arXiv 1904.09751)
    min_p: float | None = None  # only those at least min_p as likely as the likeliest (arXiv 2407.01082)
    repetition_penalty: float = 1.0  # logits of tokens seen are divided by it, or multiplied if negative (1909.05858)
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "temperature": self.temperature >= 0,
            "top_k": self.top_k is None or self.top_k >= 1,
            "top_p": self.top_p is None or 0 < self.top_p <= 1,
            "min_p": self.min_p is None or 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
            "seed": 0 <= self.seed < 1 << 63,
        }
        for name, good in bounds.items():
            if not good:
                raise UserError(f"{name}={getattr(self, name)} is not possible.")

    def logits(self, logits: Float[Tensor, "b v"], seen: Int[Tensor, "b t"] | None = None) -> Float[Tensor, "b v"]:
        """The logits that are drawn from: -inf where a token is ruled out. `seen` tokens below 0 are ignored."""
        logits = logits.float()
        if self.repetition_penalty != 1 and seen is not None:
            among = torch.zeros(logits.shape[0], logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
            among.scatter_(1, torch.where(seen < 0, logits.shape[1], seen), True)
            penalty = self.repetition_penalty
            logits = torch.where(among[:, :-1], torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if self.temperature == 0:
            return logits
        logits = (logits - logits.amax(-1, keepdim=True)) / max(self.temperature, 1e-30)
        if self.top_k is not None and self.top_k < logits.shape[1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            ordered = ordered.masked_fill(before >= self.top_p, -torch.inf)  # the likeliest always stays
            logits = torch.empty_like(logits).scatter(1, order, ordered)
        if self.min_p is not None:
            chances = logits.softmax(-1)
            logits = logits.masked_fill(chances < self.min_p * chances.amax(-1, keepdim=True), -torch.inf)
        return logits

    def choose(
        self, logits: Float[Tensor, "b v"], seen: Int[Tensor, "b t"] | None, generators: list[torch.Generator]
    ) -> Int[Tensor, " b"]:
        """One token for each sequence, each drawn with a generator of its own."""
        logits = self.logits(logits, seen)
        if self.temperature == 0:
            return logits.argmax(-1)
        chances = logits.softmax(-1)
        drawn = [torch.multinomial(row, 1, generator=each) for row, each in zip(chances, generators, strict=True)]
        return torch.cat(drawn)


def stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    sampling: Sampling | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    seconds: float | None = None,
    block: int | None = None,
    positions: Callable[[Sequence[int]], Int64[np.ndarray, "t"]] | None = None,
) -> Iterator[list[int | None]]:
    """Yield one token for each prompt at a time, None for those that are done.

    Args:
        model: a trained decoder.
        prompts: tokens, of any lengths of at least 1.
        tokens: the most to write after each.
        sampling: how each is chosen; by default from the plain probabilities with seed 0.
        stop: told what has been written after a prompt, says whether it is done.
        seconds: the most time to spend.
        block: how many tokens to predict at once, by the slots of the model; each is then chosen without knowing the
            others of its block. None: one by one.
        positions: numbers the tokens of a text, from a prompt on; those that follow never change a number. None: 0, 1,
            2, … It goes without `block`.
    """
    if positions is not None and block is not None:
        raise UserError("Tokens that are predicted at once are numbered consecutively; leave block or positions out.")
    sampling = Sampling() if sampling is None else sampling
    farthest = model.farthest if positions is None else None  # a number that it has not is refused by the model
    given, documents = _padded(model, prompts, tokens, block, farthest)
    deadline = None if seconds is None else time.monotonic() + seconds
    device = given.device
    generators = [torch.Generator(device).manual_seed(sampling.seed + row) for row in range(len(prompts))]
    written: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    seen = None if documents is None else given.masked_fill(documents == PADDING, -1)
    seen = given if seen is None else seen
    room = given.shape[1] + tokens + (block or 0)
    cache = model.cache(batch=len(prompts), length=room) if model.once else None  # None: all is encoded at every step
    texts, count = [list(prompt) for prompt in prompts], 0
    while True:
        numbers = None if positions is None else _numbered(texts, positions, given)
        states = _ahead(model, given, documents, numbers, cache, block)
        if count == 0 and cache is not None and tokens > FEW:
            model = pack(model, len(prompts) * (block or 1))  # after the prompt, which is many rows
        accepted = []
        for state in states.unbind(1)[: tokens - count]:
            chosen = _chosen(model, state, sampling, seen, generators)
            accepted.append(chosen)
            step: list[int | None] = []
            for row, token in enumerate(chosen.tolist()):
                texts[row].append(token)
                step.append(None if done[row] else token)
                if not done[row]:
                    written[row].append(token)
                    done[row] = stop is not None and stop(written[row])
            count += 1
            yield step
            if all(done) or count == tokens or (deadline is not None and time.monotonic() > deadline):
                return
            if sampling.repetition_penalty != 1:
                seen = torch.cat([seen, chosen[:, None]], dim=1)
        given, documents = _following(given, documents, torch.stack(accepted, dim=1), whole=cache is None)


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    seconds: float | None = None,
    block: int | None = None,
    positions: Callable[[Sequence[int]], Int64[np.ndarray, "t"]] | None = None,
) -> list[list[int]]:
    """The tokens written after each prompt. For arguments see `stream`."""
    written: list[list[int]] = [[] for _ in prompts]
    for step in stream(
        model,
        prompts,
        tokens=tokens,
        sampling=sampling,
        stop=stop,
        seconds=seconds,
        block=block,
        positions=positions,
    ):
        for row, token in zip(written, step, strict=True):
            if token is not None:
                row.append(token)
    return written


@torch.inference_mode()  # of each step alone: the reader of a stream is in a mode of its own
def _chosen(
    model: Decoder,
    state: Float[Tensor, "b d"],
    sampling: Sampling,
    seen: Int[Tensor, "b t"],
    generators: list[torch.Generator],
) -> Int[Tensor, " b"]:
    return sampling.choose(model.logits(state), seen, generators)


@torch.inference_mode()
def _ahead(
    model: Decoder,
    tokens: Int[Tensor, "b t"],
    documents: Int[Tensor, "b t"] | None,
    positions: Int[Tensor, "b t"] | None,
    cache: Cache | None,
    block: int | None,
) -> Float[Tensor, "b s d"]:
    """The states of what follows the tokens, which are put into the cache: one, or those of a block of slots."""
    if block is None:
        return model.states(tokens, positions=positions, documents=documents, cache=cache)[:, -1:]
    return model.slot_states(tokens, slots=block, documents=documents, cache=cache)[1][:, 0]


def _following(
    given: Int[Tensor, "b t"], documents: Int[Tensor, "b t"] | None, new: Int[Tensor, "b s"], whole: bool
) -> tuple[Int[Tensor, "b u"], Int[Tensor, "b u"] | None]:
    """What the model is given next: the new tokens, or the whole text with them."""
    more = None if documents is None else torch.zeros_like(new)
    if not whole:
        return new, more
    numbers = None if documents is None or more is None else torch.cat([documents, more], dim=1)
    return torch.cat([given, new], dim=1), numbers


def _numbered(
    texts: Sequence[Sequence[int]], positions: Callable[[Sequence[int]], Int64[np.ndarray, "t"]], given: Tensor
) -> Int[Tensor, "b t"]:
    """The numbers of the tokens that the model is given, the last of each text; padding before them gets 0."""
    numbers = torch.zeros_like(given)
    for row, text in zip(numbers, texts, strict=True):
        last = torch.from_numpy(positions(text)[-given.shape[1] :])
        row[len(row) - len(last) :] = last
    return numbers


def _padded(
    model: Decoder, prompts: Sequence[Sequence[int]], tokens: int, block: int | None, farthest: int | None
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"] | None]:
    """Prompts with padding on the left, and what is padding; None where all are of one length."""
    lengths = [len(prompt) for prompt in prompts]
    vocabulary, longest = model.embedding.num_embeddings, max(lengths, default=0)
    if not lengths or min(lengths) == 0:
        raise UserError("A prompt is empty; give at least one token to write on from.")
    if tokens < 1:
        raise UserError(f"{tokens} tokens cannot be written; ask for at least 1.")
    if farthest is not None and tokens > (most := _most(model, farthest - longest, block)):
        together = f", {block} at once," if block else ""
        raise UserError(
            f"A prompt of {longest} tokens and {tokens} more{together} are beyond the {farthest} positions of the "
            f"learned table; ask for at most {most} tokens."
        )
    wrong = next((token for prompt in prompts for token in prompt if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise UserError(f"Token {wrong} is not in the vocabulary of {vocabulary}.")
    device = model.embedding.weight.device
    padded = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    if min(lengths) == longest:
        return padded, None
    place = torch.arange(longest, device=device)
    documents = torch.where(place < longest - torch.tensor(lengths, device=device)[:, None], PADDING, 0)
    return padded, documents


def _most(model: Decoder, free: int, block: int | None) -> int:
    """How many tokens can be written where a table has so many positions after the prompt.

    One by one, the last token is never read and needs none. Slots need theirs, the last block for all of its slots.
    """
    if not block:
        return max(0, free + 1)
    slots = block if model.config.slot_positions == "offset" else 1
    return max(0, (free - slots) // block + 1) * block
