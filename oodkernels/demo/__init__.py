"""The demo."""

from oodkernels.demo.protocol import ID_SET, METHODS, NUM_CLASSES, DemoResult, Method, Settings, run

__all__ = ["ID_SET", "METHODS", "NUM_CLASSES", "DemoResult", "Method", "Settings", "run"]
