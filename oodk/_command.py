"""Commands: in what order, what their help says of the library, and what becomes of errors."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from oodk._output import printable
from oodk._registries import REGISTRIES

_ORDER = (
    *("demo", "extract", "group", "train", "tune", "eval", "benchmark", "compare"),
    *("score", "threshold", "bundle"),
    "convert",
    "info",
)
_BUGS = (AssertionError, AttributeError, NameError)
_PLAIN = (ImportError, OSError, RuntimeError, TypeError, ValueError)
"""Errors whose message says what is wrong."""
_CURES = {
    "UnpicklingError": "it holds more than tensors: save a state dict, or arrays, anew",
    "SafetensorError": "write the file anew: it is cut off, or no safetensors file",
    "DecompressionBombError": "make the image smaller, or leave it out",
    "MemoryError": "less at once needs less memory: --memory, or a smaller --batch-size",
    "OutOfMemoryError": "a smaller --batch-size needs less memory",
    "UnicodeDecodeError": "save the text as UTF-8",
}
"""Type of an error -> what helps."""


class CommandError(Exception):
    """What a user is told in a line: an error, what was being done, and what helps."""


@contextmanager
def step(what: str, file: object) -> Iterator[None]:
    """Part of a command, for the line about what goes wrong in it.

    Args:
        what: "read", "train on", ...: what cannot be done then.
        file: What it is done to.
    """
    try:
        yield
    except (*_BUGS, CommandError, typer.Abort, typer.Exit, typer.BadParameter):
        raise
    except Exception as error:
        message, shown = reason(error), printable(str(file))
        if shown not in message:
            message = f"cannot {what} {shown}: {message}"
        raise CommandError(_with_cure(error, message)) from error


def reason(error: BaseException) -> str:
    """An error in a line."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{os.fspath(error.filename)}: " if error.filename else ""
        return printable(f"{where}{error.strerror}")
    text = " ".join(str(error).split())
    if isinstance(error, _PLAIN) and text:
        return printable(text)
    return printable(f"{type(error).__name__}{f': {text}' if text else ''}")


def _with_cure(error: BaseException, message: str) -> str:
    for kind in type(error).__mro__:
        if kind.__name__ in _CURES:
            return f"{message}: {_CURES[kind.__name__]}"
    if isinstance(error, (*_PLAIN, CommandError)):
        return message
    return f"{message}; OODK_TRACEBACK=1 shows where"


class Command(TyperCommand):
    """A command whose help takes in what the library registers, in place of ``{detectors}``."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        abouts: list[Any] = [self, *self.params]
        for about in abouts:
            about.help = _filled(getattr(about, "help", None))
        super().format_help(ctx, formatter)


def _filled(text: str | None) -> str | None:
    pattern = rf"\{{({'|'.join(REGISTRIES)})\}}"
    return text and re.sub(pattern, lambda found: REGISTRIES[found[1]].help(), text)


class Group(TyperGroup):
    """The commands; what goes wrong in one is said in a line, with exit code 1.

    With ``OODK_TRACEBACK=1`` in the environment errors come as Python gives them.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """Commands in the order of a run."""
        return sorted(self.commands, key=_ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except (*_BUGS, typer.Abort, typer.Exit, typer.BadParameter, BrokenPipeError):
            raise
        except KeyboardInterrupt as error:
            typer.echo(f"oodk: interrupted{f': {error}' if str(error) else ''}", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            own = isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("oodk")
            if own or type(error).__module__.startswith(("typer", "click")):
                raise
            if os.environ.get("OODK_TRACEBACK") == "1":
                cause = error.__cause__ if isinstance(error, CommandError) else None
                raise cause or error from None
            message = str(error) if isinstance(error, CommandError) else reason(error)
            typer.echo(f"oodk {ctx.invoked_subcommand}: {_with_cure(error, message)}", err=True)
            raise typer.Exit(1) from None


def _show_warning(message: Warning | str, *place: Any, **more: Any) -> None:
    typer.echo(f"oodk: warning: {printable(' '.join(str(message).split()))}", err=True)


def one_of(registry: str) -> Callable[[str], str]:
    """A parser of options that takes the names in a registry."""

    def parse(text: str) -> str:
        names = REGISTRIES[registry].names()
        if text not in names:
            raise typer.BadParameter(f"must be one of {', '.join(names)}, got {text!r}")
        return text

    return parse
