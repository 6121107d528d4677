"""Modules of MOS (Huang & Li, CVPR 2021): a head with an "others" column per group, its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from oodkernels.groups import Groups
from oodkernels.ops.mos import mos_loss, mos_predict

if TYPE_CHECKING:
    from oodkernels.ops.mos import MOSPrediction

__all__ = ["MOSHead", "MOSLoss", "check_layout"]


class MOSHead(nn.Linear):
    """The linear layer of MOS: C + K logits, group by group, each group led by its "others".

    Weight and bias start at zero, as in the authors' training. The state dict carries the groups
    beside them, as the UTF-8 bytes of :meth:`Groups.to_json` under ``_extra_state``. Loading one
    whose groups lay out the columns differently is a ``ValueError``; names may differ.

    Shapes: features (..., in_features) to logits (..., groups.width), of the weight's dtype.

    Args:
        in_features: Width of the features.
        groups: The classes and their groups. The head keeps them on its own device.
        bias: Whether there is one.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        groups: Groups,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(groups, Groups):
            raise TypeError(f"MOSHead: groups must be Groups, got {type(groups).__name__}")
        super().__init__(in_features, groups.width, bias, device, dtype)
        self.groups = groups.to(self.weight.device)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any], prefix: str = "") -> MOSHead:
        """The head whose parameters and groups a state dict holds under ``prefix``.

        Raises:
            ValueError: The state dict holds no such head.
        """
        state = {
            key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)
        }
        for key in ("weight", "_extra_state"):
            if key not in state:
                raise ValueError(
                    f"MOSHead.from_state_dict: state_dict must hold a MOSHead at prefix "
                    f"{prefix!r}, got no {prefix + key!r}"
                )
        weight, groups = state["weight"], _decode(state["_extra_state"])
        head = cls(weight.shape[1], groups, "bias" in state, weight.device, weight.dtype)
        head.load_state_dict({key: state[key] for key in head.state_dict()})
        return head

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def predict(self, features: Tensor) -> MOSPrediction:
        """:func:`mos_predict` on the logits of ``features``, with class ids as labels.

        Args:
            features: Shape (..., in_features).

        Returns:
            Score, log_odds, label, group and prob, each of shape (...). The label is the user's
            class id, not a grouped index.
        """
        prediction = mos_predict(self(features), self.groups)
        return prediction._replace(label=self.groups.to_class(prediction.label))

    def get_extra_state(self) -> Tensor:
        """The groups, for the state dict: uint8, on the CPU."""
        # A tensor, because safetensors and averaged models hold no other values.
        return torch.frombuffer(bytearray(self.groups.to_json().encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Check that a state dict's groups are those of the head.

        Raises:
            ValueError: They are not.
        """
        where = "MOSHead: the state dict must have the groups of the head,"
        check_layout(where, self.groups, _decode(state))

    def extra_repr(self) -> str:
        """What ``repr`` shows of the head."""
        return f"{super().extra_repr()}, groups={self.groups}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MOSHead:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.groups = self.groups.to(self.weight.device)
        return self


class MOSLoss(nn.Module):
    """MOS's group softmax loss over class ids: the sum over groups of each group's cross entropy.

    The target of the group that holds the sample's class is that class, of every other group it
    is "others" (:func:`mos_loss`). With mixup, ``lam * loss(target) + (1 - lam) *
    loss(target_b)``, one ``lam`` a batch, as in the authors' training.

    Args:
        groups: The classes and their groups.
        reduction: "mean" over the samples that are not ignored, as
            :class:`torch.nn.CrossEntropyLoss` has it (with mixup each target has its own mean),
            "sum", or "none".
        ignore_index: Target of samples that are left out; no class id.
    """

    def __init__(
        self,
        groups: Groups,
        reduction: Literal["mean", "sum", "none"] = "mean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        if not isinstance(groups, Groups):
            raise TypeError(f"MOSLoss: groups must be Groups, got {type(groups).__name__}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(
                f"MOSLoss: reduction must be 'mean', 'sum' or 'none', got {reduction!r}"
            )
        if 0 <= ignore_index < groups.num_classes:
            raise ValueError(f"MOSLoss: ignore_index must be no class id, got {ignore_index}")
        self.groups = groups
        self.reduction = reduction
        self.ignore_index = ignore_index

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        target_b: Tensor | None = None,
        lam: float | Tensor | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            logits: Shape (..., groups.width), float64, float32, bfloat16 or float16.
            target: Class ids 0..C-1 or ``ignore_index``, integers, shape (...).
            target_b: With mixup, the class ids of the samples mixed in.
            lam: With mixup, the share of ``target``, in 0..1: a float or a 0-d tensor.

        Returns:
            Shape () or, with reduction "none", (...); float64 for float64 logits, else float32.

        Raises:
            ValueError: A target is out of range (see :meth:`Groups.to_grouped`), shapes disagree,
                ``lam`` is out of range or no scalar, or given without ``target_b`` or the reverse.
            TypeError: Targets are not integers.
        """
        loss = self._loss(logits, target)
        if target_b is None and lam is None:
            return loss
        if target_b is None or lam is None:
            raise ValueError("MOSLoss: target_b and lam must be given together, got one of them")
        if isinstance(lam, Tensor):
            if lam.dim() != 0:
                raise ValueError(f"MOSLoss: lam must be a scalar, got shape {tuple(lam.shape)}")
            lam = lam.to(loss.dtype)  # a 0-d float64 would promote a 0-d loss
        elif not 0 <= lam <= 1:
            raise ValueError(f"MOSLoss: lam must be in 0..1, got {lam}")
        return lam * loss + (1 - lam) * self._loss(logits, target_b)

    def extra_repr(self) -> str:
        """What ``repr`` shows of the loss."""
        return f"{self.groups}, reduction={self.reduction!r}, ignore_index={self.ignore_index}"

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return mos_loss(
            logits,
            self.groups.to_grouped(target, self.ignore_index),
            self.groups,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
        )


def check_layout(where: str, expected: Groups, found: Groups) -> None:
    """Refuse groups that lay out the columns otherwise than others; names may differ.

    Args:
        where: The beginning of the message.
        expected: Those of a head.
        found: Those to be used with it.

    Raises:
        ValueError: A class has another column.
    """
    mine, found = expected.to("cpu"), found.to("cpu")
    if (len(mine), mine.num_classes) != (len(found), found.num_classes):
        raise ValueError(f"{where} {mine}, got {found}")
    class_ids = torch.arange(mine.num_classes, device="cpu")
    columns, got = mine.to_column(class_ids), found.to_column(class_ids)
    if not torch.equal(columns, got):
        c = int((columns != got).nonzero()[0])
        raise ValueError(
            f"{where} with class {c} in column {columns[c]} (group "
            f"{mine.names[mine.class_to_group[c]]!r}), got column {got[c]} (group "
            f"{found.names[found.class_to_group[c]]!r})"
        )


def _decode(state: Tensor) -> Groups:
    if not isinstance(state, Tensor) or state.dtype != torch.uint8:
        raise ValueError("MOSHead: _extra_state must be the uint8 tensor that MOSHead saves")
    try:
        return Groups.from_json(bytes(state.cpu().tolist()).decode())
    except ValueError as error:
        raise ValueError(
            f"MOSHead: _extra_state must be the groups that MOSHead saves: {error}"
        ) from error
