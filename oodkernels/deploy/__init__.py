"""What goes into production: decisions with guarantees."""

from oodkernels.deploy.bundle import Bundle, Decision
from oodkernels.deploy.conformal import (
    LORD,
    SAFFRON,
    ConformalPValues,
    Discoveries,
    RiskControl,
    benjamini_hochberg,
    control_risk,
    least_cost_threshold,
    storey,
)

__all__ = [
    "LORD",
    "SAFFRON",
    "Bundle",
    "ConformalPValues",
    "Decision",
    "Discoveries",
    "RiskControl",
    "benjamini_hochberg",
    "control_risk",
    "least_cost_threshold",
    "storey",
]
