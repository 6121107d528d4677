"""Writes the table of objectives in docs/tutorials/training.md from the registry."""

from __future__ import annotations

from pathlib import Path

from oodkernels.training import OBJECTIVES

PAGE = Path(__file__).parents[1] / "docs" / "tutorials" / "training.md"
BEGIN, END = "<!-- objectives -->\n", "<!-- end -->\n"


def table() -> str:
    """A row for each objective."""
    rows = [
        "| objective | what | needs | options | outliers a sample | scores |",
        "|---|---|---|---|---|---|",
    ]
    for spec in OBJECTIVES.values():
        cells = [
            f"`{spec.name}`",
            spec.summary.rstrip("."),
            ", ".join(sorted(spec.needs)),
            ", ".join(f"`{option}={value!r}`" for option, value in spec.options.items()),
            str(spec.per_sample) if "outliers" in spec.needs else "",
            ", ".join(spec.scores),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, ""])


def page(text: str) -> str:
    """The page with the table as the registry has it."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
