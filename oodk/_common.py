"""What the commands share: options, configuration files, groups."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from oodk._command import reason, step
from oodk._output import printable

if TYPE_CHECKING:
    from oodkernels import Groups

# --- options ----------------------------------------------------------------------------------


def _toml() -> Any:
    return import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


def parse_toml(text: str) -> Any:
    """A value as TOML has it: number, true, list; anything else is a string."""
    try:
        return _toml().loads(f"value = {text}")["value"]
    except ValueError:
        return text


def _flag(parameter: Any) -> str:
    """The long name of an option without its dashes, as configuration files have it."""
    names = [name.lstrip("-") for name in parameter.opts if name.startswith("--")]
    return names[0] if names else str(parameter.name)


def _read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Take the file's values for the defaults of the command's options."""
    if path is None:
        return None
    try:
        content = _toml().loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path}: {reason(error)}") from None
    own = content.get(str(ctx.info_name))
    if isinstance(own, dict):
        content = own
    known = {_flag(p): p for p in ctx.command.params if p.name != "config"}
    defaults = {}
    for key, value in content.items():
        flag = key.replace("_", "-")
        if flag not in known:
            raise typer.BadParameter(
                f"{path}: {key!r} is no option of oodk {ctx.info_name}; there are "
                f"{', '.join(sorted(known))}"
            )
        if isinstance(value, dict):
            value = [f"{name}={item}" for name, item in value.items()]
        elif isinstance(value, list) != bool(getattr(known[flag], "multiple", False)):
            wanted = "a list" if not isinstance(value, list) else "one value"
            raise typer.BadParameter(f"{path}: {key!r} must be {wanted}")
        defaults[str(known[flag].name)] = value
    ctx.default_map = defaults
    return path


ConfigOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        is_eager=True,
        callback=_read_config,
        help="TOML file with values for any of these options, such as the config.toml of an "
        "earlier run. What the command line says counts more.",
    ),
]
JsonOption: TypeAlias = Annotated[
    bool, typer.Option("--json", help="JSON on standard output, for programs.")
]
QuietOption: TypeAlias = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress; only the result.")
]
GroupsOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="Groups of a MOS head: a file of `oodk group`, a CSV with a column `group`, or an "
        "image list or .npy of the official code.",
    ),
]


def write_config(ctx: typer.Context, folder: Path) -> Path:
    """Write ``config.toml`` with the value of every option, so that the run can be repeated."""
    import oodkernels
    from oodkernels._files import write_text
    from oodkernels._optional import require

    options = {
        _flag(parameter): _plain(value)
        for parameter in ctx.command.params
        if (value := ctx.params.get(str(parameter.name))) is not None and parameter.name != "config"
    }
    written = require("tomli_w", "cli", "config.toml").dumps(options)
    path = folder / "config.toml"
    write_text(path, f"# oodk {ctx.info_name}, oodkernels {oodkernels.__version__}\n{written}")
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    value = os.fspath(value) if isinstance(value, Path) else getattr(value, "value", value)
    return printable(value) if isinstance(value, str) else value


def pairs(
    option: str, values: Sequence[str], name_of: Callable[[Path], str] | None = None
) -> dict[str, str]:
    """NAME=VALUE options as a dict.

    Args:
        option: Its name, for messages.
        values: As given.
        name_of: Of a path, for values without a name; None where all must have one.
    """
    found: dict[str, str] = {}
    for text in values:
        name, is_pair, value = text.partition("=")
        if not is_pair and name_of is not None:
            name, value = name_of(Path(text)), text
        elif not is_pair:
            raise typer.BadParameter(f"must be NAME=VALUE, got {text!r}", param_hint=f"'{option}'")
        if not name or not value or name in found:
            what = f"{name!r} twice" if name in found else repr(text)
            raise typer.BadParameter(
                f"must be NAME=VALUE, each name once, got {what}", param_hint=f"'{option}'"
            )
        found[name] = value
    return found


def require_writable(folder: Path, option: str = "--out") -> None:
    """Make a folder; a usage error where that, or writing to it, is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise typer.BadParameter(
            f"cannot write to {folder}: {error.strerror or error}", param_hint=f"'{option}'"
        ) from None


def require_writable_file(path: Path | None, option: str = "--out") -> None:
    """:func:`require_writable` for the folder of a file."""
    if path is not None:
        require_writable(path.parent, option)


# --- files ------------------------------------------------------------------------------------


def read_groups(path: Path, class_names: Sequence[str] | None = None) -> Groups:
    """Groups from any of their files.

    Args:
        path: .json, .csv, an image list of MOS's code (.txt), or its .npy.
        class_names: Names of the classes of a .npy, in the order of the columns.

    Raises:
        ValueError: It is none of them, or a .npy for 1,000 classes in an order that is not known.
    """
    from oodkernels import Groups

    readers: dict[str, Callable[[Path], Groups]] = {
        ".json": Groups.load,
        ".csv": Groups.from_table,
        ".txt": Groups.from_image_list,
        ".npy": partial(_read_official, class_names=class_names),
    }
    if path.suffix not in readers:
        raise ValueError(f"{path} must end in {', '.join(readers)}")
    with step("read", path):
        return readers[path.suffix](path)


def _read_official(path: Path, class_names: Sequence[str] | None) -> Groups:
    from oodkernels import Groups
    from oodkernels.data.samples import open_arrays

    (array,) = open_arrays(path).values()
    content = array.read()
    flat = content.ndim == 1
    count = content.sum() if flat else content[-1:].max() - len(content) if content.ndim == 2 else 0
    if class_names is None and int(count) == 1000:
        raise ValueError(
            f"{path}: its 1000 classes are in the order of the head's columns, which is not that "
            "of ImageNet's class ids. Convert the authors' list instead: oodk convert groups "
            "imagenet2012_group_softmax_val_list.txt groups.json; or name the classes in the "
            f"order of the columns: oodk convert groups {path} groups.json --class-names FILE"
        )
    make = Groups.from_sizes if flat else Groups.from_slices
    return make(content, class_names=class_names)
