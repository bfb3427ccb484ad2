"""Measures a run and writes the rows into its folder."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lookfar import files
from lookfar.attention.scheme import spell
from lookfar.config import Run
from lookfar.data.base import Split
from lookfar.data.corpus import Corpus
from lookfar.data.tokenizers import Tokenizer
from lookfar.evaluation import protocols
from lookfar.evaluation.base import Progress, Row, Text
from lookfar.evaluation.perplexity import Perplexity
from lookfar.model.decoder import Decoder
from lookfar.training import folder as run_folder
from lookfar.training.precision import autocast


def measure(
    model: Callable[[], Decoder],
    text: Text,
    run: Run,
    folder: Path,
    *,
    update: int,
    lengths: Sequence[int],
    wanted: Sequence[str],
    progress: Progress,
    again: bool = False,
) -> list[Row]:
    """Perplexity at every length in every protocol of the model after an update.

    Rows that the folder has already are not measured again; the model is asked for only where some are missing.
    """
    known = [] if again else files.read_lines(folder / run_folder.ROWS)
    rows: list[Row] = []
    for expression in wanted:
        protocol = protocols.find(expression)
        if protocol.tokens is None and run.evaluation.tokens is not None:
            protocol = protocols.Protocol(protocol.name, run.evaluation.tokens, protocol.cut)
        for length in lengths:
            count = sum(window.scored for window in protocol.windows(len(text.tokens) - 1, length))
            spelled = None if run.evaluation.numbering == "consecutive" else run.evaluation.numbering
            same = {
                "scheme": about(run, folder)["scheme"],
                "numbering": spelled,
                "data": text.label,
                "protocol": protocol.name,
                "length": length,
                "count": count,
                "update": update,
            }
            found = [row for row in known if all(row.get(key) == value for key, value in same.items())]
            if not found:
                decoder = model()
                with autocast(run.training.precision, run.model.dtype, decoder.embedding.weight.device):
                    found = Perplexity(numbering=run.evaluation.numbering).measure(
                        decoder, text, length=length, protocol=protocol, progress=progress
                    )
                found = [{**about(run, folder), "update": update, **row} for row in found]
                run_folder.add_rows(folder, found)
            rows += found
    return rows


def about(run: Run, folder: Path) -> Row:
    """What every row of a run says of it."""
    schemes = (run.model.scheme,) if isinstance(run.model.scheme, str) else run.model.scheme
    scheme = " | ".join(spell(each) for each in schemes)
    return {"run": folder.name, "scheme": scheme, "seed": run.training.seed, "context": run.model.context}


def text_of(corpus: Corpus, split: Split) -> Text:
    """A split of the first text of a corpus as a stream to measure on."""
    return as_text(corpus.tokens(split), corpus.tokenizer, corpus.texts[0].label)


def as_text(tokens: Any, tokenizer: Tokenizer, label: str) -> Text:
    """Tokens as a stream to measure on."""
    unit = "byte" if tokenizer.vocabulary == 256 else "token"
    return Text(tokens, tokenizer.lengths, label, unit)
