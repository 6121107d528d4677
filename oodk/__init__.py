"""The command line, ``oodk``: beside the library and not in it, because that imports torch.

The commands import it when they run, so that ``oodk --help`` does without.
"""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line; one line instead of a traceback where its packages are missing."""
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files, whatever a notebook has set
    try:
        from oodk.app import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("rich", "typer"):
            raise
        print(
            f"oodk: the command line needs {missing}, which is not installed: "
            "pip install 'oodkernels[cli]'",
            file=sys.stderr,
        )
        return 1
    app(prog_name="oodk")
    return 0
