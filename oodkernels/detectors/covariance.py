"""Detectors by class means and covariances of features."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from oodkernels._checks import check_class_ids, check_count, check_int
from oodkernels._optional import require
from oodkernels.detectors.base import OODDetector, register
from oodkernels.detectors.batch import Batch, Features, as_batch, check_kept, present
from oodkernels.detectors.gradients import check_step, input_step
from oodkernels.detectors.head import floats
from oodkernels.detectors.model import Model, positions_mean, run, to_model
from oodkernels.detectors.statistics import ClassStatistics
from oodkernels.detectors.whitening import Whitening, check_samples, check_shrinkage, whitening
from oodkernels.ops import nearest_centroid

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Mahalanobis"]

_STATE = ("counts", "means", "scatter", "shrinkage")


@register(
    "mahalanobis",
    "D",
    "Lee et al., NeurIPS 2018",
    at_fit=("layers", "axis", "classes"),
    at_score=("eps", "std"),
)
class Mahalanobis(OODDetector):
    """Half the squared Mahalanobis distance to the nearest class mean, negated.

    Lee, Lee, Lee & Shin, A Simple Unified Framework for Detecting Out-of-Distribution Samples and
    Adversarial Attacks, NeurIPS 2018, equation 2 and algorithm 1: with class means mu_c and one
    covariance S of the features about them (divided by N), the score of features h is
    M(h) = max_c -(h - mu_c)^T S^-1 (h - mu_c) / 2.

    Features are whitened once by the Cholesky factor of S, after which the nearest class is the
    nearest centroid (:func:`oodkernels.nearest_centroid`), at O(d^2 + C d) a sample and not
    O(C d^2). Means and covariance are fitted in float64 in one pass
    (:class:`oodkernels.ClassStatistics`); scores are computed in float32 unless the
    features are float64. The class predicted is the nearest, at the last of several layers.

    Scores of several layers are weighted by a logistic regression (:meth:`fit_weights`), and summed
    before that.

    Where S is singular, that is where a feature is constant within the classes or, but for 1e-10 of
    its variance, determined by the others, it is shrunk: (1 - a) S + a (tr S / d) I, with the a of
    Chen, Wiesel, Eldar & Hero, IEEE TSP 2010 (OAS), which a warning names. The authors take a
    pseudo-inverse, to which whatever lies in the null directions of the training data, where ID
    data never are, looks in-distribution.

    Args:
        layers: Names of the model's layers to read; outputs of more than two axes are averaged over
            the positions. Empty for the penultimate features.
        axis: Axis of the layers' features, or one by the layer's name, where outputs have more than
            two axes: 1 for (N, d, H, W), -1 for (N, T, d). None where the model's modules tell, as
            for :func:`extract`; of tensors by keyword nothing else does.
        shrinkage: a, in [0, 1]; None for 0, or as above where S is singular.
        eps: Size >= 0 of the input step x - eps sign(grad_x (-M)) / std, taken for each layer
            before it is scored. Needs x and a model.
        std: As for :class:`ODIN`.
        classes: Number C of classes, so that a class without samples is noticed even if it is the
            last; None for the largest label + 1.
        model: As for :class:`OODDetector`; differentiable in x if ``eps`` is not 0.

    Attributes:
        statistics: Layer (``"features"`` if there is one only) -> its
            :class:`~oodkernels.detectors.statistics.ClassStatistics`.
        shrinkages: Layer -> the a that was used.
        weights: (layers + 1,) float64, weights of the layers' scores and intercept, or None.

    Raises:
        ValueError: ``shrinkage``, ``eps``, ``std`` or ``classes`` is out of its range.
    """

    needs = frozenset({"features"})
    trained_on = frozenset({"features", "labels"})
    _carried = OODDetector._carried | {"_whitening", "shrinkages"}
    weights: Tensor | None

    def __init__(
        self,
        layers: Sequence[str] = (),
        *,
        axis: int | Mapping[str, int] | None = None,
        shrinkage: float | None = None,
        eps: float = 0.0,
        std: float | Sequence[float] | None = None,
        classes: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(model)
        if isinstance(layers, str):
            layers = (layers,)
        self.layers = tuple(layers)
        self.shrinkage = check_shrinkage("Mahalanobis", shrinkage)
        self.eps, self.std = check_step("Mahalanobis", eps, std)
        self.classes = None if classes is None else check_count("Mahalanobis", "classes", classes)
        self.axis: int | dict[str, int] | None
        if isinstance(axis, Mapping):
            self.axis = {
                name: check_int("Mahalanobis", f"axis[{name!r}]", a) for name, a in axis.items()
            }
        else:
            self.axis = None if axis is None else check_int("Mahalanobis", "axis", axis)
        if self.eps:
            self.needs = frozenset({"x"})
        self._reset()

    def layer_scores(self, x: Tensor | None = None, *, features: Features | None = None) -> Tensor:
        """The score of every layer, (N, layers): what the weights weigh. As :meth:`score`.

        Raises:
            ValueError: As :meth:`score`.
            TypeError: As :meth:`score`.
            NotFittedError: ``fit`` has not been called.
        """
        where = "Mahalanobis.layer_scores"
        batch = as_batch(where, x, features=features)
        with torch.no_grad():
            parts = [self._nearest(part)[0] for part in self._parts(where, batch)]
        return torch.cat(parts).to(batch.device)

    def fit_weights(
        self,
        x: Tensor | None = None,
        *,
        features: Features | None = None,
        labels: Tensor,
    ) -> Self:
        """Learn the weights of the layers from ID and OOD samples; needs scikit-learn.

        ID against OOD by ``LogisticRegressionCV``, as the authors do it, on the layers' scores,
        which are standardised first. :meth:`score` then gives the log-odds of ID.

        Args:
            x: As for :meth:`score`.
            features: As for :meth:`score`.
            labels: (N,) integers, -1 for OOD; any class ids for ID.

        Returns:
            The detector, without its threshold.

        Raises:
            ValueError: As :meth:`score`; or of ID or OOD there are fewer than 5 samples, one for
                each fold.
            TypeError: As :meth:`score`, or labels are not integers.
            NotFittedError: ``fit`` has not been called.
            ImportError: scikit-learn is missing.
        """
        where = "Mahalanobis.fit_weights"
        models = require("sklearn.linear_model", "detectors", where)
        scores = self.layer_scores(x, features=features).double().cpu()
        is_id = check_class_ids(where, labels, len(scores)).cpu() >= 0
        for kind, n in (("ID", int(is_id.sum())), ("OOD", int((~is_id).sum()))):
            if n < 5:
                raise ValueError(f"{where}: labels must have at least 5 {kind} samples, got {n}")
        mean, std = scores.mean(0), scores.std(0).clamp(min=torch.finfo(torch.float64).tiny)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of defaults that will change
            regression = models.LogisticRegressionCV().fit(
                ((scores - mean) / std).numpy(), is_id.numpy()
            )
        slope = torch.from_numpy(regression.coef_[0]) / std
        intercept = torch.from_numpy(regression.intercept_) - slope @ mean
        self.weights = torch.cat([slope, intercept])
        self.threshold = None  # it was of other scores
        return self

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Self:
        """Merge what the processes of a group were given by :meth:`partial_fit`.

        All of them call this, once, after their last batch; a process may have had none.

        Raises:
            ValueError: Processes have features of different width.
        """
        for name in self._names():
            self.statistics.setdefault(name, ClassStatistics(self.classes)).all_reduce(group)
        self._status, self.threshold = "pending", None
        return self

    def to(self, device: torch.device | str | int) -> Self:
        """Move what was fitted; the model is left where it is."""
        for name, statistics in self.statistics.items():
            statistics.to(device)
            if name in self._whitening:
                self._whitening[name] = self._whitening[name].to(device)
        return self

    # --- fitting ------------------------------------------------------------------------------

    def _reset(self) -> None:
        super()._reset()
        self.statistics: dict[str, ClassStatistics] = {}
        self.shrinkages: dict[str, float] = {}
        self.weights = None
        self._whitening: dict[str, Whitening] = {}

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        for name in self._names():
            about = f"{where}: layer {name!r}" if self.layers else where
            statistics = self.statistics.setdefault(name, ClassStatistics(self.classes))
            statistics.update(self._read(where, batch, name), present(labels), where=about)

    def _finish(self, where: str) -> None:
        for name, statistics in self.statistics.items():
            check_samples(where, statistics)
            self._whiten(where, name, self.shrinkage)
        self._set_shape()

    def _settle(self, where: str, changed: Collection[str]) -> None:
        self._whitening, self.shrinkages = dict(self._whitening), dict(self.shrinkages)
        super()._settle(where, changed)

    @torch.inference_mode(False)
    def _whiten(self, where: str, name: str, shrinkage: float | None) -> None:
        statistics = self.statistics[name]
        of = f"layer {name!r}" if self.layers else "the features"
        matrix, self.shrinkages[name] = whitening(
            where, statistics.covariance(), statistics, shrinkage, of, stacklevel=7
        )
        self._whitening[name] = Whitening(matrix, statistics.mean, statistics.means)

    def _set_shape(self) -> None:
        first = next(iter(self.statistics.values()))
        self.num_classes = first.num_classes
        self.width = None if self.layers else first.width

    # --- scoring ------------------------------------------------------------------------------

    def _axis(self, batch: Batch, name: str) -> int | None:
        """The axis of a layer's features: as said, else as the module tells."""
        said = self.axis.get(name) if isinstance(self.axis, dict) else self.axis
        return batch.axes.get(name) if said is None else said

    def _read(self, where: str, batch: Batch, name: str) -> Tensor:
        """Features (N, d) of a layer."""
        if not self.layers:
            return present(batch.features)
        axis = self._axis(batch, name)
        features = positions_mean(where, f"layer {name!r}", batch.layers[name], axis)
        statistics = self.statistics.get(name)
        if statistics and statistics.width not in (0, features.shape[1]):
            raise ValueError(
                f"{where}: features[{name!r}] must have width {statistics.width}, got "
                f"{features.shape[1]}"
            )
        return features

    def _names(self) -> tuple[str, ...]:
        return tuple(self.layers) or ("features",)

    def _check(self, where: str, batch: Batch) -> None:
        super()._check(where, batch)
        for name in self.layers:
            layer = batch.layers.get(name)
            if layer is not None and layer.dim() < 2:
                raise ValueError(
                    f"{where}: features[{name!r}] must be (N, d, ...), got {tuple(layer.shape)}"
                )

    def _score(self, batch: Batch) -> Tensor:
        scores = self._nearest(batch)[0]
        if self.weights is None:
            return scores.sum(1)
        weights = self.weights.to(scores.device)
        return (scores.double() @ weights[:-1] + weights[-1]).to(scores.dtype)

    def _label(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        return self._nearest(batch)[1], None

    def _nearest(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores of the layers (N, layers) and the nearest class of the last, (N,)."""
        return batch.once(self, lambda: self._compute(batch))

    def _compute(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.eps and self.model is None:
            raise ValueError(
                "Mahalanobis.score: eps > 0 needs a model: Mahalanobis(..., model=model)"
            )
        scores = []
        for name in self._names():
            own = self._stepped(name, present(batch.x)) if self.eps else batch
            features = self._read("Mahalanobis.score", own, name) if self.layers else None
            labels, distance = self._whitening[name].nearest(own, features)
            scores.append(distance / -2)
        return torch.stack(scores, 1), labels

    def _stepped(self, name: str, x: Tensor) -> Batch:
        """What the model makes of x moved towards its nearest class at a layer."""
        model = present(self.model)

        def outputs(x: Tensor) -> Batch:
            layers = (name,) if self.layers else ()
            return Batch.of(x, run(model, x, layers, features=not self.layers))

        def loss(x: Tensor) -> Tensor:
            features = floats(self._read("Mahalanobis.score", outputs(x), name))
            space = self._whitening[name].space(features)
            z = space.whitened(features)
            labels, _ = nearest_centroid(z.detach(), space.centroids)
            return (z - space.centroids[labels]).square().sum() / 2

        x = input_step("Mahalanobis.score", loss, to_model(model, x), self.eps, self.std)
        return outputs(x)

    # --- keeping ------------------------------------------------------------------------------

    def _state(self) -> dict[str, Tensor]:
        state = {}
        for name, statistics in self.statistics.items():
            amount = torch.tensor(self.shrinkages[name], dtype=torch.float64)
            for part, tensor in {**statistics.state_dict(), "shrinkage": amount}.items():
                state[f"{name}.{part}"] = tensor
        if self.weights is not None:
            state["weights"] = self.weights
        return state

    def _load_state(self, tensors: Mapping[str, Tensor]) -> None:
        names = self._names()
        wanted = {f"{name}.{part}" for name in names for part in _STATE}
        if tensors.keys() - {"weights"} != wanted:
            raise ValueError(f"tensors must be {sorted(wanted)}, got {sorted(tensors)}")
        for name in names:
            self.statistics[name] = ClassStatistics(self.classes)
            parts = {part: tensors[f"{name}.{part}"] for part in _STATE}
            self.statistics[name].load_state_dict(parts)
            amount = parts["shrinkage"]
            if amount.shape != () or not amount.is_floating_point() or not 0 <= amount <= 1:
                raise ValueError(f"{name}.shrinkage must be a number in [0, 1]")
            self._whiten("load", name, float(amount))
        self._set_shape()
        self.weights = tensors.get("weights")
        if self.weights is not None:
            check_kept("weights", self.weights)
        if self.weights is not None and self.weights.shape != (len(names) + 1,):
            raise ValueError(
                f"weights must have shape ({len(names) + 1},), got {tuple(self.weights.shape)}"
            )
