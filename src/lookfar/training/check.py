"""Looks a run over at the door, before anything is built or written."""

import torch
from jaxtyping import Num
from torch import Tensor

from lookfar import plugins
from lookfar.attention.scheme import Scheme, build_scheme, parse
from lookfar.config import Run
from lookfar.data.mixture import ingredients
from lookfar.errors import UserError
from lookfar.evaluation import protocols
from lookfar.methods.base import InputEncoding, Method
from lookfar.model import numbering
from lookfar.model.decoder import device_of, layer_scheme, layer_window
from lookfar.sight import Sight
from lookfar.tasks import numbering as of_digits
from lookfar.tasks.numbering import DigitPositions
from lookfar.training import objectives, problems, schedules, tracking


def check(run: Run) -> None:
    """Raise a `UserError` for the first thing of a run that cannot work."""
    if run.task.name is None:
        for protocol in run.evaluation.protocols:
            for length in run.lengths:
                protocols.find(protocol).windows(1, length)
    else:
        problems.check(run)
    schedules.check(run.training)
    tracking.check(run.training.tracking)
    model = run.model
    names = {term.name for layer in range(model.layers) for term in parse(layer_scheme(model, layer))}
    kinds = {name: plugins.find("methods", name) for name in names}
    numbers = _numbers(run, any(issubclass(kind, Method) and kind.bounded for kind in kinds.values()))
    objectives.find(run.training.objective, model)
    limit = model.context if model.positions is None else model.positions
    for layer in range(model.layers):
        expression = layer_scheme(model, layer)
        layer_window(model, layer)
        for term in parse(expression):
            if issubclass(kinds[term.name], Method):
                _takes(kinds[term.name], term.name, numbers, limit)
        if layer == 0 or not isinstance(model.scheme, str):
            scheme = build_scheme(
                expression,
                heads=model.heads,
                groups=model.groups,
                head_width=model.head_width,
                width=model.width,
                layer=layer,
            )
            _can_be_trained(run, scheme)
    expressions = {str(term) for layer in range(model.layers) for term in parse(layer_scheme(model, layer))}
    named = [each for each in sorted(expressions) if _encodes_inputs(each)]
    if len(named) > 1:
        raise UserError(f"Embeddings are encoded once: {named[0]!r} and {named[1]!r} cannot be in one pattern.")
    device_of(model.device)
    if run.task.name is None:
        ingredients(run.data)


def _numbers(run: Run, bounded: bool) -> dict[str, Num[Tensor, "1 t"]]:
    """How the longest line of each part is numbered, by what decides it; `bounded`: a method has a largest number."""
    parts = {
        "model.context": (run.training.numbering, run.model.context),
        "evaluation.lengths": (run.evaluation.numbering, _most_tokens(run, bounded)),
    }
    digits = _digits(run)
    if digits is not None:
        found = problems.lengths(run, digits.problems)
        reached = {"training.numbering": digits.largest, "evaluation.lengths": digits.reach(found)}
        return {part: torch.tensor([[0, largest]]) for part, largest in reached.items()}
    found = {}
    for part, (expression, tokens) in parts.items():
        positions = numbering.find(expression, run.model.context)(1, tokens, torch.Generator().manual_seed(0))
        positions = torch.arange(tokens)[None] if positions is None else positions
        if part == "model.context" and run.model.slots is not None:
            beyond = run.model.slots if run.model.slot_positions == "offset" else 1
            positions = torch.cat([positions, positions.amax() + 1 + torch.arange(beyond)[None]], dim=1)
        found[part] = positions
    return found


def _digits(run: Run) -> DigitPositions | None:
    """The numbers of a task's digits, where the run numbers them."""
    named = [each for each in (run.training.numbering, run.evaluation.numbering) if of_digits.names_digits(each)]
    if not named:
        return None
    if run.task.name is None:
        raise UserError(f"{named[0]!r} numbers the digits of a task; name one, such as task.name='addition'.")
    return problems.digits(run)


def _most_tokens(run: Run, bounded: bool) -> int:
    """How many tokens are read at once when the run is measured; at least 1 where nothing is bounded."""
    if run.task.name is None:
        return max(run.lengths)
    if not bounded:
        return 1  # all problems would have to be made to tell
    found = problems.problems_of(run.task)
    return max(1, problems.most_tokens(found, problems.lengths(run, found)) - 1)  # the last is no input


def _can_be_trained(run: Run, scheme: Scheme) -> None:
    """Raise where a method refuses what training will show it."""
    sights = [Sight.slots(2, 1)] if run.model.slots is not None else []
    if run.data.documents == "isolated":
        two = torch.tensor([[0, 0, 1, 1]])
        sights.append(Sight.causal(4, positions=torch.tensor([[0, 1, 0, 1]]), documents=two))
    for sight in sights:
        if reason := scheme.refusal(sight):
            raise UserError(reason)


def _takes(kind: type[Method], name: str, numbers: dict[str, Num[Tensor, "1 t"]], limit: int) -> None:
    """Raise where a method has no position for some number."""
    for part, positions in numbers.items():
        reach = int(positions.max()) + 1
        if kind.bounded and reach > limit:
            raise UserError(
                f"{name!r} has no positions beyond {limit}, and {part} reach {reach}; "
                f"set model.positions={reach}, or {part} up to {limit}."
            )
        if not kind.fractional and positions.is_floating_point():
            raise UserError(
                f"{name!r} takes whole positions, and tokens of {part} are numbered in fractions; "
                f"number them consecutively."
            )


def _encodes_inputs(expression: str) -> bool:
    return issubclass(plugins.find("methods", plugins.parse(expression)[0].name), InputEncoding)
