"""`lookfar explain`: where each method of a scheme acts, and which kernel computes it, and why not the others."""

from typing import Annotated, Literal

import typer

from lookfar.errors import UserError


def add(app: typer.Typer) -> None:
    """Put the verb into the command."""
    app.command("explain", epilog='Example:  lookfar explain "kerple + dape_v2 + stable_mask" --length 2048')(explain)


def explain(
    scheme: Annotated[str, typer.Argument(help='Such as "alibi + stable_mask".', metavar="SCHEME")],
    heads: Annotated[int, typer.Option(min=1)] = 8,
    head_width: Annotated[int, typer.Option(min=1)] = 64,
    length: Annotated[int, typer.Option(min=1, help="Tokens.")] = 512,
    queries: Annotated[int | None, typer.Option(min=1, help="How many of the last tokens ask: 1 in decoding.")] = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    dtype: Annotated[Literal["float32", "bfloat16", "float16", "float64"], typer.Option()] = "float32",
    window: Annotated[int | None, typer.Option(min=1, help="Tokens that a query sees.")] = None,
    slots: Annotated[int, typer.Option(min=0, help="Tokens to be predicted at once, after the text.")] = 0,
    inference: Annotated[bool, typer.Option("--inference", help="Without gradients.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …; it need not be here.")] = "auto",
) -> None:
    """Show how a scheme is computed."""
    import torch

    from lookfar.attention.scheme import build_scheme
    from lookfar.cli.tables import show
    from lookfar.kernels import Call
    from lookfar.kernels import explain as ask
    from lookfar.model.catalogue import KINDS
    from lookfar.model.decoder import device_of

    if queries is not None and queries > length:
        raise UserError(f"{queries} queries are more than the {length} tokens; ask for fewer.")
    built = build_scheme(scheme, heads=heads, head_width=head_width, context=length)
    counts = built.heads
    typer.echo(
        f"{built.expression}: {counts.score_heads} score heads, {counts.key_heads} key heads and {counts.value_heads} "
        f"value heads; queries of width {counts.head_width}, values of width {counts.value_width}.\n"
    )
    stages = [
        (words, ", ".join(type(each).__name__ for each in built.methods if isinstance(each, base)) or "-")
        for base, words in KINDS.items()
    ]
    show(("stage", "methods"), stages)
    asking = length if queries is None else queries
    call = Call(
        device="cuda" if device.startswith("cuda") else device_of(device).type,
        dtype=getattr(torch, dtype),
        queries=asking + slots,
        keys=length + slots,
        batch=batch,
        gradients=not inference,
        plain=not slots and (window is None or window >= length),
        consecutive=not slots,
        slots=slots > 0,
    )
    answers = ask(built, call)
    taken = next(name for name, refusal in answers if refusal is None)
    lines = [
        (name, "taken" if name == taken else "willing" if refusal is None else f"refuses: {refusal}")
        for name, refusal in answers
    ]
    purpose = "inference" if inference else "training"
    tokens = f"{length:,} tokens" if asking == length else f"the last {asking:,} of {length:,} tokens"
    show(("kernel", "answer"), lines, f"{purpose}, batch {batch}, {tokens}, {dtype}, {call.device}")
