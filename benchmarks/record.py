"""Condense a run of pytest-benchmark into one file of results: medians, rates, and the machine.

pytest benchmarks/test_mos.py --benchmark-only --benchmark-json=raw.json
python benchmarks/record.py raw.json benchmarks/results/mos-cpu.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def record(raw: dict[str, Any]) -> dict[str, Any]:
    machine, cpu = raw["machine_info"], raw["machine_info"].get("cpu", {})
    return {
        "date": raw["datetime"][:10],
        "machine": {
            "processor": cpu.get("brand_raw") or machine.get("processor"),
            "cores": machine.get("cores"),
            "python": machine["python_version"],
            "oodkernels": machine.get("oodkernels"),
        },
        "results": [
            {
                "name": bench["name"],
                "median_ms": round(1e3 * bench["stats"]["median"], 4),
                "min_ms": round(1e3 * bench["stats"]["min"], 4),
                "rounds": bench["stats"]["rounds"],
                **bench["extra_info"],
            }
            for bench in sorted(raw["benchmarks"], key=lambda b: b["fullname"])
        ],
    }


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    result = record(json.loads(source.read_text()))
    lines = ",\n".join("    " + json.dumps(row) for row in result.pop("results"))
    head = json.dumps(result, indent=2)[:-2]
    target.write_text(f'{head},\n  "results": [\n{lines}\n  ]\n}}\n')
    json.loads(target.read_text())


if __name__ == "__main__":
    main()
