"""``python -m oodkernels`` and the console script ``oodk``."""

from __future__ import annotations

import sys

# Import names of the packages of the extra "demo".
_EXTRA = ("jinja2", "lightning_fabric", "matplotlib", "rich", "skimage", "sklearn", "typer")


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
            'pip install "oodkernels[cli]"',
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
