"""Writes the table of detectors in docs/api/detectors.md from the registry."""

from __future__ import annotations

from pathlib import Path

from oodkernels.detectors import DETECTORS, FAMILIES

PAGE = Path(__file__).parents[1] / "docs" / "api" / "detectors.md"
BEGIN, END = "<!-- detectors -->\n", "<!-- end -->\n"


def table() -> str:
    """A row for each detector, by family and name."""
    specs = sorted((d.spec for d in DETECTORS.values()), key=lambda s: (s.family, s.name))
    rows = [
        "| name | class | family | reads | is fitted on | options | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for spec in specs:
        cells = [
            f"`{spec.name}`",
            f"`{spec.detector.__name__}`",
            spec.family,
            ", ".join(sorted(spec.needs)),
            ", ".join(sorted(spec.trained_on)),
            ", ".join(f"`{name}`" for name in spec.options),
            spec.paper,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    families = [f"- {name}: {reads}." for name, reads in FAMILIES.items()]
    return "\n".join([*rows, "", "Families share what they read:", "", *families, ""])


def page(text: str) -> str:
    """The page with the table as the registry has it."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
