"""``python -m oodkernels``, which is ``oodk``."""

from __future__ import annotations

import sys

from oodk import main

if __name__ == "__main__":
    sys.exit(main())
