"""How well OOD is told apart, logged while a model of Lightning is trained."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from oodkernels._checks import check_count
from oodkernels.evaluation.evaluate import evaluate
from oodkernels.evaluation.scoring import Detectors, as_detectors
from oodkernels.groups import Groups

__all__ = ["OODCallback"]


def _base() -> Any:
    """The class of callbacks: of the package that is in use, else of one that is installed."""
    packages = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
    for known in (sys.modules.__contains__, lambda name: find_spec(name) is not None):
        for package, module in packages.items():
            if known(package):
                return import_module(module).Callback
    return object


_Callback: Any = _base()


class OODCallback(_Callback):  # type: ignore[misc]
    """Evaluates detectors at the end of validation epochs, and logs their figures.

    Keys are "ood/far/auroc" for the set "far", with several detectors "ood/far/energy/auroc", and
    "ood/average/...": what early stopping and checkpoints can monitor. The model is run in
    evaluation mode, as by :func:`oodkernels.evaluate`. The validation loop's sanity check is left
    out.

    Example:
        >>> callback = OODCallback(val_loader, {"far": far_loader}, ["energy"])
        >>> Trainer(callbacks=[callback, EarlyStopping("ood/far/auroc", mode="max")])

    Args:
        id_loader: ID samples that are not trained on, as for :func:`oodkernels.evaluate`.
        ood_loaders: OOD samples by name.
        detectors: As there, but none that has to be fitted.
        groups: Of a MOS head.
        every: Epochs from one evaluation to the next.
        prefix: What keys begin with.

    Raises:
        ValueError: A detector has to be fitted, or ``every`` is below 1.
        ModuleNotFoundError: Neither lightning nor pytorch-lightning is installed.
    """

    def __init__(
        self,
        id_loader: Any,
        ood_loaders: Mapping[str, Any],
        detectors: Detectors = ("msp", "max-logit", "energy"),
        *,
        groups: Groups | None = None,
        every: int = 1,
        prefix: str = "ood",
    ) -> None:
        if OODCallback.__base__ is object:
            raise ModuleNotFoundError(
                "OODCallback needs lightning, which is not installed: pip install lightning",
                name="lightning",
            )
        super().__init__()
        made = as_detectors(detectors, groups, None, "OODCallback")
        if wrong := [name for name, detector in made.items() if detector.trained_on]:
            raise ValueError(
                f"OODCallback: detectors must need no fit, got {', '.join(wrong)}: the model "
                "changes with each epoch"
            )
        self.id_loader, self.ood_loaders = id_loader, dict(ood_loaders)
        self.detectors, self.groups = detectors, groups
        self.every = check_count("OODCallback", "every", every)
        self.prefix = prefix

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Evaluate, and log to the module."""
        if trainer.sanity_checking or trainer.current_epoch % self.every:
            return
        found = evaluate(
            pl_module, self.id_loader, self.ood_loaders, self.detectors, groups=self.groups
        )
        pl_module.log_dict(found.flat(self.prefix))
