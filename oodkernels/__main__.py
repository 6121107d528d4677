"""``python -m oodkernels`` and the console script ``oodk``."""

from __future__ import annotations

import sys

# Extra by the import names of its packages.
_EXTRA = dict.fromkeys(("jinja2", "lightning_fabric", "matplotlib", "rich", "typer"), "cli")
_EXTRA |= {"skimage": "demo", "sklearn": "demo"}


def main() -> int:
    """Run the command line; one line instead of a traceback where an extra package is missing."""
    try:
        from oodkernels.cli import app

        app(prog_name="oodk")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        print(
            f"oodk: {missing} is not installed; to get all that oodk needs: "
            f'pip install "oodkernels[{_EXTRA[missing]}]"',
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
