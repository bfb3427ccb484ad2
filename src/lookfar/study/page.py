"""Puts figures on one page that works offline, and on paper; knows nothing of what they show."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from lookfar import files
from lookfar.errors import UserError


def compose(title: str, looks: Mapping[str, Any], head: str, sections: Sequence[str]) -> str:
    """The page: its head, the legend of all series, and the sections under it."""
    keys = "".join(_key(name, look) for name, look in looks.items())
    parts = {"title": escape(title), "head": head, "keys": keys, "sections": "\n".join(sections)}
    return Template(resource("page.html")).substitute(parts, bundle=_bundle())


def figure(panels: Sequence[Mapping[str, Any]], caption: str, name: str, kinds: Sequence[str] = ("svg", "pdf")) -> str:
    """Specified panels above their caption, with links to the same on paper."""
    plain = [json.dumps(panel, ensure_ascii=False, separators=(",", ":"), allow_nan=False) for panel in panels]
    safe = [text.replace("<", "\\u003c") for text in plain]  # no name ends the script
    places = "".join(f'<div class="chart"><script type="application/json">{text}</script></div>\n' for text in safe)
    links = " ".join(f'<a href="figures/{name}.{kind}">{kind.upper()}</a>' for kind in kinds)
    return f'<figure><div class="panels">{places}</div><figcaption>{caption} {links}</figcaption></figure>'


def definitions(facts: Iterable[tuple[str, str]]) -> str:
    """Terms and what is said of them."""
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in facts)
    return f'<dl class="facts">{items}</dl>'


def swatch(look: Any) -> str:
    """The line and the point of a series, small."""
    dash = " ".join(map(str, look.dash)) if look.dash[-1] else "none"
    return (
        f'<svg class="swatch" viewBox="-14 -6 28 12" aria-hidden="true">'
        f'<path d="M-14,0H14" stroke="{look.colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        f'<path d="{look.shape}" transform="scale(4)" fill="{look.colour}"/></svg>'
    )


def resource(name: str) -> str:
    """A file that belongs to the pages."""
    return resources.files("lookfar.study").joinpath(name).read_text(encoding="utf-8")


def vega_lite() -> str:
    """The version of Vega-Lite that altair writes, as vl_convert names it."""
    import altair

    return ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


def publish(path: Path, content: bytes) -> None:
    """Write a file of the page, whole or not at all; a place that cannot be written is a `UserError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another place for the page.") from error


def _key(name: str, look: Any) -> str:
    shown = f"{swatch(look)}{escape(name)}"
    return f'<button type="button" data-series="{escape(name)}" aria-pressed="true">{shown}</button>'


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    import vl_convert

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=vega_lite())
    return script.replace("</script", "<\\/script")
