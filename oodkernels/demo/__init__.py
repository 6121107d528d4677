"""What ``oodk demo`` trains and compares."""

from oodkernels.demo.methods import METHODS, Method, Settings
from oodkernels.demo.study import StudyResult, run

__all__ = ["METHODS", "Method", "Settings", "StudyResult", "run"]
