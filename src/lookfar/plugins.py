"""Finds things by name: a room is a package, a thing is the one public class of one of its files.

An expression such as `kerple + dape_v2(kernel=3)` names things together with their settings; the same grammar serves
schemes, protocols and everything else that is chosen by name.
"""

import ast
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from keyword import iskeyword
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lookfar.errors import UserError, nearest


@dataclass(frozen=True)
class Term:
    """One name of an expression, with its settings."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = ", ".join(f"{key}={_spell(value)}" for key, value in self.settings.items())
        return f"{self.name}({settings})" if settings else self.name


def parse(expression: str) -> list[Term]:
    """Read `a + b(setting=value)` as its terms. A bare word is a string; `true`, `false` and `none` are themselves."""
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{expression!r} is not an expression; write it as 'kerple + dape_v2(kernel=3)'.") from error
    return [_term(node, expression) for node in _summands(tree)]


def names(room: str) -> list[str]:
    """The names of all things in a room, sorted: `names("methods")` -> `["alibi", "dape_v2", …]`."""
    return sorted(name for name in _files(room) if _things(f"lookfar.{room}.{name}", room))


def find(room: str, name: str) -> type:
    """The class that a name stands for: `find("methods", "alibi")`; a dotted name is the user's own module."""
    if "." in name:
        return _find_foreign(room, name)
    if name not in _files(room) or not (things := _things(f"lookfar.{room}.{name}", room)):
        raise UserError(f"No {_noun(room)} is named {name!r}. {nearest(name, names(room))}")
    return things[0]


def build(room: str, term: Term, *arguments: Any) -> Any:
    """Build a thing from its term after checking its settings; `arguments` are passed first."""
    thing = find(room, term.name)
    return thing(*arguments, **check(thing, term))


def check(thing: Callable[..., Any], term: Term) -> dict[str, Any]:
    """The settings of a term, each checked against the keyword parameter of its name. Nothing is built."""
    known = settings(thing)
    checked = {}
    for key, value in term.settings.items():
        if key not in known:
            hint = nearest(key, list(known)) if known else "It has none."
            raise UserError(f"{term.name!r} has no setting {key!r}. {hint}")
        try:
            checked[key] = TypeAdapter(known[key]).validate_python(value, strict=isinstance(value, bool))
        except ValidationError as error:
            reasons = "; ".join(dict.fromkeys(detail["msg"] for detail in error.errors()))
            raise UserError(f"{term.name}({key}={_spell(value)}) is not possible: {reasons}.") from error
    return checked


def settings(thing: Callable[..., Any]) -> dict[str, Any]:
    """The settings of a thing: its keyword-only parameters and their types."""
    parameters = inspect.signature(thing).parameters.values()
    hints = typing.get_type_hints(thing.__init__ if isinstance(thing, type) else thing, include_extras=True)
    return {each.name: hints.get(each.name, Any) for each in parameters if each.kind is each.KEYWORD_ONLY}


def defaults(thing: Callable[..., Any]) -> dict[str, Any]:
    """The default of every setting of a thing."""
    parameters = inspect.signature(thing).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


@cache
def _files(room: str) -> tuple[str, ...]:
    package = importlib.import_module(f"lookfar.{room}")
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(name for name in found if name != "base" and not name.startswith("_"))


def _things(module_name: str, room: str) -> list[type]:
    """The public, concrete classes that a module defines and that descend from the room's base."""
    base, module = f"lookfar.{room}.base", importlib.import_module(module_name)
    return [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and not inspect.isabstract(value)
        and any(parent.__module__ == base for parent in value.__mro__)
    ]


def _find_foreign(room: str, name: str) -> type:
    try:
        things = _things(name, room)
    except (ImportError, TypeError, ValueError) as error:
        raise UserError(f"{name!r} cannot be imported ({error}); it must be a module on Python's path.") from error
    if len(things) != 1:
        raise UserError(f"{name!r} must define exactly one public {_noun(room)}; it defines {len(things)}.")
    return things[0]


def _noun(room: str) -> str:
    return {"data": "source of text", "evaluation": "measurement", "analysis": "analysis"}.get(
        room, room.removesuffix("s")
    )


def _summands(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_summands(node.left), *_summands(node.right)]
    return [node]


def _term(node: ast.expr, expression: str) -> Term:
    if isinstance(node, ast.Call) and not node.args and all(each.arg for each in node.keywords):
        settings = {str(each.arg): _value(each.value, expression) for each in node.keywords}
        if len(settings) == len(node.keywords):
            return Term(_dotted(node.func, expression), settings)
    elif isinstance(node, ast.Name | ast.Attribute):
        return Term(_dotted(node, expression))
    raise UserError(
        f"{ast.unparse(node)!r} in {expression!r} is not understood; write 'name' or 'name(setting=value)'."
    )


def _dotted(node: ast.expr, expression: str) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, expression)}.{node.attr}"
    raise UserError(f"{ast.unparse(node)!r} in {expression!r} is not a name.")


def _value(node: ast.expr, expression: str) -> Any:
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "none": None}.get(node.id, node.id)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise UserError(f"{ast.unparse(node)!r} in {expression!r} is not a value; write a number or a word.") from error


def _spell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return repr(int(value))  # 3 and 3.0 are one setting
    if isinstance(value, str) and value.isascii() and value.isidentifier() and not iskeyword(value):
        return repr(value) if value in ("true", "false", "none") else value
    return repr(value)
