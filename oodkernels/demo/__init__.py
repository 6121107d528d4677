"""What ``oodk demo`` trains and compares."""

from oodkernels.demo.study import METHODS, Method, Settings, StudyResult, run

__all__ = ["METHODS", "Method", "Settings", "StudyResult", "run"]
