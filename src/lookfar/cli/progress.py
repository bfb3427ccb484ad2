"""Shows what happens while it happens: a live line on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SPARSE = 10.0  # seconds between lines where there is no terminal


@contextmanager
def watching(title: str = "") -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that is told events and shows them on stderr."""
    show = _Live(title) if sys.stderr.isatty() else _Lines(title)
    try:
        yield show.tell
    finally:
        show.close()


@contextmanager
def in_lines(title: str = "") -> Iterator[Callable[[dict[str, Any]], None]]:
    """As `watching`, for several things that happen at once: never a live line."""
    show = _Lines(title)
    try:
        yield show.tell
    finally:
        show.close()


class _Lines:
    """A line at the start, then one every few seconds."""

    def __init__(self, title: str) -> None:
        self.title, self.last, self.clock = title, time.monotonic(), _Clock()

    def tell(self, event: dict[str, Any]) -> None:
        text, ends = self.clock.describe(event)
        now = time.monotonic()
        if text and (event["event"] == "start" or ends or now - self.last > SPARSE):
            self.last = now
            print(f"{self.title}{text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to put away."""


class _Live:
    """One line that is written over."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.title, self.clock, self.console = title, _Clock(), Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}")
        self.progress = Progress(*columns, console=self.console, transient=True, refresh_per_second=8)
        self.task = self.progress.add_task(title or "lookfar", total=1.0, text="")
        self.progress.start()

    def tell(self, event: dict[str, Any]) -> None:
        text, ends = self.clock.describe(event)
        if event["event"] != "note":
            self.progress.update(self.task, completed=_part(event), text=text)
        if ends or (event["event"] == "start" and event["update"]):
            self.console.print(f"{self.title}{text}", highlight=False, markup=False)

    def close(self) -> None:
        self.progress.stop()


class _Clock:
    """Puts events into words; speed and time left are those of this session, not of what a resumed run did before."""

    def __init__(self) -> None:
        self.first: dict[str, Any] | None = None

    def describe(self, event: dict[str, Any]) -> tuple[str, bool]:
        """The words, and whether they end a stage."""
        kind = event["event"]
        if kind == "start":
            self.first = None
            done = f"resuming at update {event['update']}" if event["update"] else "training"
            if event["update"] == event["updates"]:
                done = "already trained"
            return f"{done}: {event['parameters']:,} parameters, {event['updates']:,} updates", False
        if kind == "update":
            return self._update(event), event["update"] == event["updates"]
        if kind in ("data", "evaluation"):
            part = "" if event["part"] is None else f" {event['part']:4.0%}"
            return f"{event['what']}{part}", False
        return str(event.get("text", "")), True

    def _update(self, event: dict[str, Any]) -> str:
        place = f"update {event['update']:,}/{event['updates']:,}  loss {event['loss']:.3f}"
        if self.first is None:
            self.first = event
            return place
        seconds = event["seconds"] - self.first["seconds"]
        updates = event["update"] - self.first["update"]
        unit = "tokens" if "tokens" in event else "problems"
        speed = (event[unit] - self.first[unit]) / max(seconds, 1e-9)
        left = (event["updates"] - event["update"]) * seconds / updates
        return f"{place}  {speed:,.0f} {unit}/s  {_spell(left)} left"


def _part(event: dict[str, Any]) -> float:
    if event["event"] == "update":
        return event["update"] / event["updates"]
    return event.get("part") or 0.0


def _spell(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
