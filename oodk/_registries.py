"""What the library has by name, for the choices and the help of commands; imported when asked."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


class Registry(NamedTuple):
    """Names that the library registers.

    Attributes:
        module: Where.
        attribute: Of it: a mapping by name, or a sequence of names.
        describe: The names in a command's help.
    """

    module: str
    attribute: str
    describe: Callable[[Any], str] = lambda found: _listed(list(found))

    def found(self) -> Any:
        """The mapping or sequence."""
        return getattr(import_module(self.module), self.attribute)

    def names(self) -> list[str]:
        """Names in their order."""
        return list(self.found())

    def help(self) -> str:
        """Text for a command's help."""
        return self.describe(self.found())


def _options(found: Any) -> str:
    """The objectives as a list, with what they need and can be set to."""
    lines = []
    for spec in found.values():
        needs = f" Needs {', '.join(sorted(spec.needs))}." if spec.needs else ""
        options = [f"`{k}={v}`" for k, v in spec.options.items() if k not in spec.needs]
        lines.append(f"* `{spec.name}`: {spec.summary}{needs} {', '.join(options)}".rstrip())
    return "\n\n".join(lines)


REGISTRIES = {
    "benchmarks": Registry("oodkernels.evaluation.benchmarks", "BENCHMARKS"),
    "conventions": Registry("oodkernels.metrics.ood", "CONVENTIONS"),
    "demo_methods": Registry("oodkernels.demo.methods", "METHODS"),
    "detectors": Registry("oodkernels.detectors", "DETECTORS"),
    "extract_formats": Registry("oodkernels.data", "EXTRACT_FORMATS"),
    "formats": Registry("oodkernels.data", "FORMATS"),
    "kinds": Registry("oodkernels.data", "ROLES"),
    "objective_options": Registry("oodkernels.training", "OBJECTIVES", _options),
    "objectives": Registry("oodkernels.training", "OBJECTIVES"),
}
