"""What goes into production: decisions with guarantees."""

from oodkernels.deploy.bundle import Bundle, Decision
from oodkernels.deploy.conformal import (
    LORD,
    SAFFRON,
    ConformalPValues,
    Discoveries,
    RiskControl,
    Steps,
    benjamini_hochberg,
    control_risk,
    least_cost_threshold,
    storey,
)
from oodkernels.deploy.monitor import Alarm, Monitor

__all__ = [
    "LORD",
    "SAFFRON",
    "Alarm",
    "Bundle",
    "ConformalPValues",
    "Decision",
    "Discoveries",
    "Monitor",
    "RiskControl",
    "Steps",
    "benjamini_hochberg",
    "control_risk",
    "least_cost_threshold",
    "storey",
]
