"""Looks a run over at the door, before anything is built or written."""

import torch

from lookfar import plugins
from lookfar.attention.scheme import build_scheme, parse
from lookfar.config import Run
from lookfar.errors import UserError
from lookfar.evaluation import protocols
from lookfar.methods.base import InputEncoding, Method
from lookfar.model import numbering
from lookfar.model.decoder import device_of, layer_scheme, layer_window


def check(run: Run) -> None:
    """Raise a `UserError` for the first thing of a run that cannot work."""
    for protocol in run.evaluation.protocols:
        for length in run.lengths:
            protocols.find(protocol).windows(1, length)
    model = run.model
    for expression in (run.training.numbering, run.evaluation.numbering):
        numbering.find(expression, model.context)(1, 1, torch.Generator())
    limit = model.context if model.positions is None else model.positions
    for layer in range(model.layers):
        expression = layer_scheme(model, layer)
        layer_window(model, layer)
        for term in parse(expression):
            kind = plugins.find("methods", term.name)
            if issubclass(kind, Method) and kind.bounded and max(run.lengths) > limit:
                raise UserError(
                    f"{term.name!r} has no positions beyond {limit}, and evaluation.lengths reach {max(run.lengths)}; "
                    f"set model.positions={max(run.lengths)}, or evaluation.lengths up to {limit}."
                )
        if layer == 0 or not isinstance(model.scheme, str):
            build_scheme(
                expression,
                heads=model.heads,
                groups=model.groups,
                head_width=model.head_width,
                width=model.width,
                layer=layer,
            )
    expressions = {str(term) for layer in range(model.layers) for term in parse(layer_scheme(model, layer))}
    named = [each for each in sorted(expressions) if _encodes_inputs(each)]
    if len(named) > 1:
        raise UserError(f"Embeddings are encoded once: {named[0]!r} and {named[1]!r} cannot be in one pattern.")
    device_of(model.device)
    plugins.find("data", run.data.source)


def _encodes_inputs(expression: str) -> bool:
    return issubclass(plugins.find("methods", plugins.parse(expression)[0].name), InputEncoding)
