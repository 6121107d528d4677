"""What ``oodk demo`` trains and compares."""

from oodkernels.demo.protocol import ID_SET, METHODS, NUM_CLASSES, DemoResult, Method, Settings, run

__all__ = ["ID_SET", "METHODS", "NUM_CLASSES", "DemoResult", "Method", "Settings", "run"]
