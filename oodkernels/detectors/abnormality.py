"""The abnormality module: a decoder and a small network that learns what normal looks like."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from oodkernels._checks import accumulate_type, check_class_ids, check_flag, check_int
from oodkernels.detectors.base import OODDetector, register
from oodkernels.detectors.batch import Batch, Features, Inputs, check_kept, present
from oodkernels.detectors.model import Model, Outputs, extract, to_model

if TYPE_CHECKING:
    from typing_extensions import Self

Noise: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
"""Images (N, ...) and a generator on the CPU -> as many abnormal images."""

__all__ = ["AbnormalityModule", "distort"]


@register(
    "abnormality",
    "F",
    "Hendrycks & Gimpel, ICLR 2017",
    at_fit=("layer", "epochs", "freeze", "decoder", "noise", "seed"),
)
class AbnormalityModule(OODDetector):
    """Logit of the normality that a small network sees in an input, its reconstruction and logits.

    Hendrycks & Gimpel, A Baseline for Detecting Misclassified and Out-of-Distribution Examples in
    Neural Networks, ICLR 2017, section 4, trained as in the authors' code:

    1. A decoder of a hidden layer reconstructs x, and the model is trained on with it: loss
       0.9 cross entropy + 0.1 mean squared error, on ID samples.
    2. Both are frozen. A risk network of (logits, squared reconstruction errors, hidden layer)
       learns, by binary cross entropy, to tell clean ID samples (a third) from distorted ones.

    The score is the risk network's logit; its sigmoid is the normality of the paper, which rounds
    to 1 from a logit of 17. :meth:`fit` does both phases, with Adam at 0.001, in the first phase at
    0.0001 for the last third of the epochs. It trains the model unless ``freeze``; save that
    yourself, :meth:`save` holds the decoder and the risk network.

    Args:
        layer: Name of the layer whose output is decoded; None for the penultimate features.
        epochs: Passes over the data in each phase.
        freeze: Leave the model as it is: in the first phase the decoder alone is trained.
        decoder: Hidden layer as the model gives it (N, ...) -> the shape of x. By default linear
            layers over 128, 256 and 256 GELUs.
        noise: What makes ID images abnormal; :func:`distort` by default, for images (N, C, H, W).
        seed: Of the initial weights, the noise, and the model's dropout while training.
        model: An ``nn.Module`` or :class:`FeatureModel`, that gives logits.

    Attributes:
        decoder: The decoder; None before :meth:`fit` unless it was given.
        risk: The risk network, (N, logits + pixels + hidden) -> (N, 1); None before.

    Raises:
        ValueError: ``epochs`` is not two numbers of at least 1.
    """

    needs = frozenset({"x"})
    trained_on = frozenset({"x", "labels"})

    def __init__(
        self,
        layer: str | None = None,
        *,
        epochs: Sequence[int] = (30, 15),
        freeze: bool = False,
        decoder: nn.Module | None = None,
        noise: Noise | None = None,
        seed: int = 0,
        model: Model | None = None,
    ) -> None:
        super().__init__(model)
        self.epochs = tuple(check_int("AbnormalityModule", "epochs", n) for n in epochs)
        if len(self.epochs) != 2 or min(self.epochs) < 1:
            raise ValueError(
                f"AbnormalityModule: epochs must be two numbers of at least 1, got {epochs}"
            )
        self.layer = layer
        self.freeze = check_flag("AbnormalityModule", "freeze", freeze)
        self.noise = distort if noise is None else noise
        self.seed = check_int("AbnormalityModule", "seed", seed)
        self._given_decoder = decoder is not None
        self.decoder = decoder
        self.risk: nn.Module | None = None
        self._shape = torch.Size()
        self._kept: dict[str, Tensor] = {}  # from a file, for a decoder still to be given

    # --- fitting ------------------------------------------------------------------------------

    def fit(
        self,
        data: Iterable[Any] | Inputs | None = None,
        y: Inputs | None = None,
        *,
        logits: Inputs | None = None,
        features: Features | None = None,
        labels: Inputs | None = None,
        void: int | None = None,
    ) -> Self:
        """Both phases, forgetting what was learnt before; torch's random state is left as it was.

        Args:
            data: Batches (x, labels), such as a shuffling ``DataLoader`` or a list, to be gone
                through once an epoch; or with ``y`` all samples, (N, ...).
            y: (N,) labels of ``data``.
            logits: Not read.
            features: Not read.
            labels: Not read.
            void: Not for this detector: label samples to be left out -1.

        Returns:
            The detector.

        Raises:
            ValueError: ``void`` is given, the model is no ``nn.Module`` or has no such layer, there
                are no ID samples, labels do not match x or the logits, or decoder or noise give
                another shape than x.
            TypeError: Data can be gone through only once, or x is not floating-point.
        """
        where = "AbnormalityModule.fit"
        if void is not None:
            raise ValueError(f"{where}: void must be None, got {void}: label the samples -1")
        if not isinstance(self.model, nn.Module):
            raise ValueError(f"{where}: model must be an nn.Module, got {self.model!r:.80}")
        if y is not None:
            data = self._all_at_once(where, data, y)[0]
        if data is None or isinstance(data, Iterator):
            raise TypeError(
                f"{where}: data must be batches (x, labels) that can be gone through again, got "
                f"{type(data).__name__}"
            )
        self._reset()
        parameters = list(self.model.parameters())
        devices = [p.device for p in parameters[:1] if p.is_cuda]
        modes = [(module, module.training) for module in self.model.modules()]
        with torch.random.fork_rng(devices), torch.enable_grad():
            torch.manual_seed(self.seed)
            generator = torch.Generator().manual_seed(self.seed)
            x, _ = next(self._id_batches(where, data))
            self.build(x)
            decoder, risk = present(self.decoder), present(self.risk)
            try:
                self.model.train(not self.freeze)
                decoder.train()
                trained = list(decoder.parameters()) + ([] if self.freeze else parameters)
                optimizer = torch.optim.Adam(trained, lr=1e-3)
                for epoch in range(self.epochs[0]):
                    if epoch == -(-2 * self.epochs[0] // 3):
                        optimizer.param_groups[0]["lr"] = 1e-4
                    for x, y in self._id_batches(where, data):
                        _step(optimizer, self.reconstruction_loss(x, y))
                decoder.eval()
                risk.train()
                optimizer = torch.optim.Adam(risk.parameters(), lr=1e-3)
                for _ in range(self.epochs[1]):
                    for x, _ in self._id_batches(where, data):
                        order = torch.randperm(len(x), generator=generator).to(x.device)
                        _step(optimizer, self.risk_loss(x[order], generator))
                risk.eval()
            finally:
                for module, mode in modes:
                    module.training = mode
        self.finish()
        return self

    def finish(self) -> None:
        """Take decoder and risk network as trained, by :meth:`fit` or by the losses below."""
        self._status = "fitted"

    def build(self, x: Tensor) -> None:
        """Make the decoder, unless it was given, and the risk network, for inputs like ``x``.

        Raises:
            ValueError: The model has no layer of that name, or the decoder gives another shape.
        """
        with torch.no_grad():
            outputs = self._outputs(x[:2])
            hidden = self._hidden(outputs)
            if not self._given_decoder:
                self.decoder = _decoder(hidden[0].numel(), x.shape[1:]).to(hidden)
            decoder = present(self.decoder).to(hidden.device)
            found, expected = decoder(hidden).shape, x[:2].shape
        if found != expected:
            raise ValueError(
                f"AbnormalityModule.fit: decoder must give the shape of x, {tuple(expected)}, got "
                f"{tuple(found)}"
            )
        self._shape = x.shape[1:]
        columns = self.num_classes = outputs.logits.shape[1]
        self.risk = _risk(columns + x[0].numel() + hidden[0].numel()).to(hidden)

    def reconstruction_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """The loss of phase 1 on a batch, for the model in the mode it is in, and the decoder.

        Args:
            x: (N, ...) ID inputs.
            labels: (N,) class ids.

        Returns:
            0.9 cross entropy + 0.1 mean squared error of the reconstruction, a scalar.
        """
        x = to_model(present(self.model), x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            outputs = self._outputs(x, evaluate=False)
        rebuilt = present(self.decoder)(self._hidden(outputs))
        error = F.mse_loss(rebuilt, x.to(rebuilt))
        return 0.9 * F.cross_entropy(outputs.logits, labels.to(x.device)) + 0.1 * error

    def risk_loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of phase 2 on a batch, for the risk network alone.

        Args:
            x: (N, ...) ID inputs in random order: the first third stays clean, the rest is
                distorted.
            generator: Of the noise; on the CPU.

        Returns:
            Mean binary cross entropy, a scalar.

        Raises:
            ValueError: The noise gives another shape.
        """
        clean = -(-len(x) // 3)
        abnormal = self.noise(x[clean:], generator)
        if abnormal.shape != x[clean:].shape:
            raise ValueError(
                f"AbnormalityModule.fit: noise must give the shape it gets, "
                f"{tuple(x[clean:].shape)}, got {tuple(abnormal.shape)}"
            )
        evidence, _ = self._evidence(torch.cat([x[:clean], abnormal]))
        logit = present(self.risk)(evidence)[:, 0]
        target = (torch.arange(len(x), device=logit.device) < clean).to(logit)
        return F.binary_cross_entropy_with_logits(logit, target)

    def _id_batches(
        self, where: str, data: Iterable[Sequence[Tensor]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels of each batch, without OOD samples."""
        empty = True
        for batch, labels in self._training_batches(where, data):
            x = present(batch.x)
            if not x.is_floating_point():
                raise TypeError(f"{where}: x must be floating-point, got {x.dtype}")
            labels = check_class_ids(where, labels, len(x)).to(x.device)
            if self.num_classes is not None and (labels >= self.num_classes).any():
                raise ValueError(
                    f"{where}: labels must be below {self.num_classes}, the number of logits, got "
                    f"{int(labels.max())}"
                )
            is_id = labels >= 0
            if is_id.any():
                empty = False
                yield x[is_id], labels[is_id]
        if empty:
            raise ValueError(f"{where}: data must give ID samples, got none")

    # --- scoring ------------------------------------------------------------------------------

    def _outputs(self, x: Tensor, evaluate: bool = True) -> Outputs:
        model = present(self.model)
        assert isinstance(model, nn.Module)
        layers = () if self.layer is None else (self.layer,)
        return extract(model, to_model(model, x), layers, evaluate=evaluate)

    def _hidden(self, outputs: Outputs) -> Tensor:
        hidden = outputs.features if self.layer is None else outputs.layers[self.layer]
        if hidden is None:
            raise ValueError(
                "AbnormalityModule: model must have an nn.Linear that reads features, or layer= "
                "must name a layer"
            )
        return hidden.to(accumulate_type(hidden.dtype))

    @torch.no_grad()
    def _evidence(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, squared reconstruction errors and hidden layer side by side; logits alone."""
        outputs = self._outputs(x)
        hidden = self._hidden(outputs)
        error = (present(self.decoder)(hidden) - to_model(present(self.model), x)).square()
        parts = (outputs.logits, error, hidden)
        return torch.cat([t.flatten(1).to(hidden) for t in parts], 1), outputs.logits

    def _check(self, where: str, batch: Batch) -> None:
        if not isinstance(self.model, nn.Module):
            raise ValueError(
                f"{where}: model must be an nn.Module: AbnormalityModule(..., model=model)"
            )
        if self._status != "fitted":
            return
        if self.decoder is None:
            raise ValueError(
                f"{where}: decoder must be given: AbnormalityModule.load(path, model, decoder=...)"
            )
        shape = present(batch.x).shape[1:]
        if shape != self._shape:
            raise ValueError(
                f"{where}: x must be (N, {', '.join(map(str, self._shape))}), got "
                f"{tuple(present(batch.x).shape)}"
            )

    def _score(self, batch: Batch) -> Tensor:
        return self._judged(batch)[0]

    def _label(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        return self._judged(batch)[1], None

    def _judged(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.once(self, lambda: self._compute(present(batch.x)))

    def _compute(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normality and predicted class."""
        self.to(to_model(present(self.model), x).device)
        evidence, logits = self._evidence(x)
        return present(self.risk)(evidence)[:, 0], logits.argmax(1)

    # --- keeping ------------------------------------------------------------------------------

    def to(self, device: torch.device | str | int) -> Self:
        """Move decoder and risk network; the model is left where it is."""
        for network in (self.decoder, self.risk):
            if network is not None:
                network.to(device)
        return self

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Model | None = None,
        *,
        num_classes: int | None = None,
        width: int | None = None,
        decoder: nn.Module | None = None,
        noise: Noise | None = None,
    ) -> Self:
        """Load, like :meth:`OODDetector.load`.

        Args:
            path: As there.
            model: As there.
            num_classes: As there.
            width: As there.
            decoder: Like the one that the detector was given, if it was; takes on its parameters.
            noise: For another :meth:`fit`; by default :func:`distort`.

        Raises:
            ValueError: As there, or ``decoder`` is not like the one in the file.
            ImportError: As there.
            OSError: As there.
        """
        detector = super().load(path, model, num_classes=num_classes, width=width)
        if noise is not None:
            detector.noise = noise
        if decoder is not None:
            detector.decoder = _loaded(f"{cls.__name__}.load", decoder, detector._kept).eval()
            detector._given_decoder = True
        return detector

    def _reset(self) -> None:
        super()._reset()
        self.risk = None
        if not self._given_decoder:
            self.decoder = None

    def _arguments(self) -> dict[str, Any]:
        modules = ("decoder", "noise")
        return {name: v for name, v in super()._arguments().items() if name not in modules}

    def _settings(self) -> dict[str, Any]:
        return {
            **self._arguments(),
            "shape": self._shape,
            "given_decoder": self._given_decoder,
        }

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any], model: Model | None) -> Self:
        arguments = dict(settings)
        shape, given = arguments.pop("shape"), arguments.pop("given_decoder")
        detector = cls(**arguments, model=model)
        detector._shape, detector._given_decoder = torch.Size(shape), given
        return detector

    def _state(self) -> dict[str, Tensor]:
        networks = {"decoder": present(self.decoder), "risk": present(self.risk)}
        return {
            f"{name}.{key}": tensor
            for name, network in networks.items()
            for key, tensor in network.state_dict().items()
        }

    def _load_state(self, tensors: Mapping[str, Tensor]) -> None:
        def part(name: str) -> dict[str, Tensor]:
            start = name + "."
            return {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}

        for name, tensor in tensors.items():
            check_kept(name, tensor)
        risk, self._kept = part("risk"), part("decoder")
        weight = risk["0.weight"]
        if not self._given_decoder:
            hidden = self._kept["1.weight"].shape[1]
            inputs = (self.num_classes or 0) + math.prod(self._shape) + hidden
            if weight.shape[1] != inputs:
                raise ValueError(f"risk must read {inputs} numbers, got {weight.shape[1]}")
        self.risk = _loaded("risk", _risk(weight.shape[1]).to(weight), risk).eval()
        if not self._given_decoder:
            decoder = _decoder(self._kept["1.weight"].shape[1], self._shape).to(weight)
            self.decoder = _loaded("decoder", decoder, self._kept).eval()


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Abnormal images: half of them noisy, a quarter blurred, a quarter turned.

    The strengths are those of the authors, who have 28 x 28 images in [0, 1], in units of the
    images' own size and range of values: Gaussian noise of standard deviation 0.9 to 1.2 times the
    range, a Gaussian blur of 0.16 to 0.18 times the side (they blur over the images of a batch,
    too), and rotation by a quarter turn to either side, stretched to the shape if not square.

    Args:
        images: (N, C, H, W), floating-point.
        generator: On the CPU.

    Returns:
        (N, C, H, W).

    Raises:
        ValueError: Another shape.
    """
    if images.dim() != 4:
        raise ValueError(f"distort: images must be (N, C, H, W), got {tuple(images.shape)}")
    n = len(images)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    noisy, blurred, turned = images.tensor_split([(n + 1) // 2, n - n // 4])
    if len(noisy):
        span = images.amax() - images.amin()
        noise = torch.randn(noisy.shape, generator=generator).to(images)
        noisy = noisy + uniform(0.9, 1.2) * span * noise
    share = 5 / 28 * uniform(0.9, 1.0)
    height, width = images.shape[2:]
    blurred = _blur(height, share).to(images) @ blurred @ _blur(width, share).to(images).T
    left = torch.rand(len(turned), generator=generator).to(images.device) < 0.5
    quarter, other = (
        F.interpolate(turned.rot90(k, (2, 3)), (height, width), mode="bilinear")
        if height != width and len(turned)
        else turned.rot90(k, (2, 3)).reshape(turned.shape)
        for k in (1, 3)
    )
    return torch.cat([noisy, blurred, torch.where(left[:, None, None, None], quarter, other)])


def _blur(size: int, share: float) -> Tensor:
    """(size, size) matrix of a Gaussian filter; beyond the border lies the border's value."""
    radius = math.ceil(4 * share * size)
    offset = torch.arange(-radius, radius + 1)
    weight = (offset / (share * size)).square().div(-2).softmax(0)
    at = (torch.arange(size)[:, None] + offset).clamp(0, size - 1)
    return torch.zeros(size, size).scatter_add_(1, at, weight.expand(size, -1))


def _decoder(width: int, shape: Sequence[int]) -> nn.Module:
    pixels = math.prod(shape)
    layers = _mlp(width, 128, 256, 256, pixels)
    return nn.Sequential(nn.Flatten(), *layers, nn.Unflatten(1, tuple(shape)))


def _risk(width: int) -> nn.Module:
    return nn.Sequential(*_mlp(width, 512, 128, 1))


def _mlp(*widths: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.GELU("tanh")]
    return layers[:-1]


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _loaded(what: str, network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{what}: {error}") from None
    return network
