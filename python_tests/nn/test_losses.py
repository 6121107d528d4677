"""The losses against the authors' rules, restated sample by sample in Python floats."""

from __future__ import annotations

import copy
import io
import math
import sys
import types
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_ood_package
import torch
from torch import Tensor, nn

import oodkernels as oodk
from oodkernels import reference
from oodkernels.nn import JointGANLoss, joint_gan_loss, losses
from oodkernels.ops.outlier import outlier_loss

LOSSES = {  # name -> functional form, module, both with settings that are not the defaults
    "outlier exposure": (
        lambda z, t, **k: losses.outlier_exposure_loss(z, t, 0.7, **k),
        lambda **k: losses.OutlierExposureLoss(0.7, **k),
    ),
    "energy-bounded": (
        lambda z, t, **k: losses.energy_bounded_loss(z, t, 0.3, -3.0, -1.0, **k),
        lambda **k: losses.EnergyBoundedLoss(0.3, -3.0, -1.0, **k),
    ),
    "energy-bounded, T 2": (
        lambda z, t, **k: losses.energy_bounded_loss(z, t, 0.3, -3.0, -1.0, 2.0, **k),
        lambda **k: losses.EnergyBoundedLoss(0.3, -3.0, -1.0, 2.0, **k),
    ),
    "absent class": (
        lambda z, t, **k: losses.absent_class_loss(z, t, 0.4, **k),
        lambda **k: losses.AbsentClassLoss(0.4, **k),
    ),
    "joint GAN": (
        lambda z, t, **k: joint_gan_loss(z, t, 0.6, **k),
        lambda **k: JointGANLoss(0.6, **k),
    ),
}
SIZES = {"both": (5, 8), "ID": (6, 0), "OOD": (0, 7), "none": (0, 0)}

every = pytest.mark.parametrize("name", LOSSES)


sizes = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


def batch(n_id: int, n_ood: int, width: int = 11) -> tuple[Tensor, Tensor]:
    """Logits in float64 and targets, ID and OOD in no order."""
    random = torch.Generator().manual_seed(0)
    n = n_id + n_ood
    logits = torch.randn(n, width, generator=random, dtype=torch.float64) * 2
    target = torch.randint(width - 1, (n,), generator=random)
    target[torch.randperm(n, generator=random)[:n_ood]] = -1
    return logits, target


def lse(z: list[float], temperature: float = 1.0) -> float:
    return temperature * math.log(math.fsum(math.exp(x / temperature) for x in z))


def restated(name: str, z: list[float], t: int) -> float:
    """One sample's term."""
    n_classes = len(z)
    cross_entropy = lse(z) - z[t]
    uniform = -math.fsum(x - lse(z) for x in z) / n_classes
    if name == "outlier exposure":
        return cross_entropy if t >= 0 else 0.7 * uniform
    if name.startswith("energy-bounded"):
        energy = -lse(z, 2.0 if name.endswith("T 2") else 1.0)
        if t >= 0:
            return cross_entropy + 0.3 * max(0.0, energy + 3) ** 2
        return 0.3 * max(0.0, -1 - energy) ** 2
    if name == "absent class":  # of index -1
        return cross_entropy if t >= 0 else 0.4 * cross_entropy
    p = [math.exp(x - lse(z)) for x in z]
    divergence = math.fsum(math.log(1 / n_classes / q) / n_classes for q in p)
    return cross_entropy if t >= 0 else 0.6 * divergence


def mean(x: list[float]) -> float:
    return math.fsum(x) / len(x) if x else 0.0


@every
@sizes
def test_is_the_rule(name: str, size: tuple[int, int]) -> None:
    function, module = LOSSES[name]
    logits, target = batch(*size)
    each = [restated(name, z, t) for z, t in zip(logits.tolist(), target.tolist(), strict=True)]
    of_id = [x for x, t in zip(each, target, strict=True) if t >= 0]
    of_ood = [x for x, t in zip(each, target, strict=True) if t < 0]
    expected: dict[str, Any] = {
        "none": each,
        "sum": math.fsum(each),
        "mean": mean(of_id) + mean(of_ood),
    }
    for reduction, value in expected.items():
        for loss in (
            function(logits, target, reduction=reduction),
            module(reduction=reduction)(logits, target),
        ):
            torch.testing.assert_close(loss, torch.tensor(value, dtype=torch.float64))
    torch.testing.assert_close(function(logits, target), module()(logits, target))


@every
@sizes
def test_gradient(name: str, size: tuple[int, int]) -> None:
    function, _ = LOSSES[name]
    logits, target = batch(*size)
    logits.requires_grad_()
    for reduction in ("none", "sum", "mean"):
        torch.autograd.gradcheck(lambda z, r=reduction: function(z, target, reduction=r), logits)
    (grad,) = torch.autograd.grad(function(logits, target), logits)
    assert grad.isfinite().all()
    # Each side's mean stands by itself: the other side's samples change nothing.
    for side in (target >= 0, target < 0):
        alone = logits[side].detach().requires_grad_()
        function(alone, target[side]).backward()
        torch.testing.assert_close(alone.grad, grad[side])


def test_gradient_of_outlier_exposure() -> None:
    logits, target = batch(5, 8)
    logits.requires_grad_()
    losses.OutlierExposureLoss(0.5)(logits, target).backward()
    p = logits.detach().softmax(-1)
    is_id = target >= 0
    onehot = nn.functional.one_hot(target[is_id], 11)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[is_id], (p[is_id] - onehot) / 5)
    torch.testing.assert_close(logits.grad[~is_id], 0.5 * (p[~is_id] - 1 / 11) / 8)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_accumulated_in_float32(name: str, dtype: torch.dtype) -> None:
    function, _ = LOSSES[name]
    logits, target = batch(40, 60, 700)
    logits = logits.to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    loss, expected = function(logits, target), function(exact, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    loss.backward()
    expected.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=max(eps, 2e-5), atol=1e-7)


@every
def test_leading_dimensions_and_strides(name: str) -> None:
    function, _ = LOSSES[name]
    logits, target = batch(10, 14)
    flat = function(logits, target, reduction="none")
    deep = function(logits.view(2, 3, 4, 11), target.view(2, 3, 4), reduction="none")
    assert torch.equal(deep, flat.view(2, 3, 4))
    transposed = logits.t().contiguous().t()
    assert torch.equal(function(transposed, target), function(logits, target))


@every
def test_compiles_in_one_graph(name: str) -> None:
    function, _ = LOSSES[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for size in ((5, 8), (13, 0)):
        logits, target = batch(*size)
        a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        for x, f in ((a, compiled), (b, function)):
            f(x, target).backward()
        torch.testing.assert_close(compiled(logits, target), function(logits, target))
        torch.testing.assert_close(a.grad, b.grad)


def test_autocast() -> None:
    logits, target = batch(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses.outlier_exposure_loss(logits.float(), target)
    assert torch.equal(loss, losses.outlier_exposure_loss(logits.float(), target))


@every
def test_refuses(name: str) -> None:
    function, module = LOSSES[name]
    logits, target = batch(5, 8)
    with pytest.raises(ValueError, match=r"reduction must be 'mean', 'sum' or 'none', got 'avg'"):
        function(logits, target, reduction="avg")
    with pytest.raises(ValueError, match=r"^\w+Loss: reduction must be"):
        module(reduction="avg")
    with pytest.raises(TypeError, match="logits must be float64"):
        function(logits.long(), target)
    with pytest.raises(TypeError, match="target must be int64"):
        function(logits, target.double())
    with pytest.raises(ValueError, match="target must have shape"):
        function(logits, target[:-1])
    for bad in (11, -2, -100):
        with pytest.raises(ValueError, match=rf"target must be in 0\.\.10 .* got {bad} in row 3"):
            function(logits, target.index_fill(0, torch.tensor(3), bad))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_absent_class_is_no_target(reduction: Any) -> None:
    """A model without a column for the absent class would never answer its last class."""
    logits, target = batch(5, 8)
    target[4] = 10
    message = (
        r"^absent_class_loss: target must be a class in 0\.\.9, or -1 for OOD, the last of 11 "
        r"logits being the absent class's, got 10 in row 4$"
    )
    for z in (logits, logits.clone().requires_grad_()):
        with pytest.raises(ValueError, match=message):
            losses.absent_class_loss(z, target, reduction=reduction)
    each = torch.func.vmap(lambda z, t: losses.absent_class_loss(z, t, reduction="none"))
    with pytest.raises(ValueError, match="target must be in"):  # the op's own
        each(logits, target)


def test_margins_follow_the_number_of_classes() -> None:
    """As for CIFAR-10 by the authors' script, and as far from logits that say nothing for any C."""
    for classes, m_in, m_out in ((10, -23.0, -5.0), (1307, -23 - 4.872905, -5 - 4.872905)):
        logits = 3 * torch.randn(20, classes, dtype=torch.float64)
        target = torch.arange(20) % 3 - 1
        found = losses.energy_bounded_loss(logits, target)
        torch.testing.assert_close(
            found, losses.energy_bounded_loss(logits, target, m_in=m_in, m_out=m_out)
        )
        nothing = torch.zeros(2, classes, dtype=torch.float64)
        each = losses.energy_bounded_loss(nothing, torch.tensor([0, -1]), 1.0, reduction="none")
        each = each - torch.tensor([math.log(classes), 0])
        torch.testing.assert_close(each, torch.tensor([20.6974149, 0.0]).double() ** 2)
        warm = losses.energy_bounded_loss(2 * nothing, torch.tensor([0, -1]), 1.0, temperature=2.0)
        assert float(warm) - math.log(classes) == pytest.approx(20.6974149**2)


def test_numpy_scalars_are_settings() -> None:
    logits, target = batch(5, 8)
    for kind in (np.float64, np.float32):
        loss = losses.EnergyBoundedLoss(kind(0.5), kind(-3), kind(-1), kind(2))
        expected = losses.EnergyBoundedLoss(0.5, -3, -1, 2)
        assert repr(loss) == repr(expected)
        assert torch.equal(loss(logits.float(), target), expected(logits.float(), target))
        assert losses.ConfidenceLoss(weight=kind(0.5)).weight.dtype == torch.float32


def test_settings_refused() -> None:
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="EnergyBoundedLoss: temperature must be positive"):
            losses.EnergyBoundedLoss(temperature=temperature)
    assert "weight=0.5, reduction='mean'" in repr(losses.OutlierExposureLoss())
    for kind, name in (
        (losses.OutlierExposureLoss, "weight"),
        (losses.EnergyBoundedLoss, "m_in"),
        (losses.AbsentClassLoss, "beta"),
        (losses.ConfidenceLoss, "weight"),
        (losses.ConfidenceLoss, "budget"),
        (JointGANLoss, "beta"),
    ):
        with pytest.raises(ValueError, match=f"^{kind.__name__}: {name} must not be NaN"):
            kind(**{name: math.nan})
        with pytest.raises(TypeError, match=f"^{kind.__name__}: {name} must be a number, got '1'"):
            kind(**{name: "1"})


def test_defaults_are_the_papers() -> None:
    logits, target = batch(5, 8)
    each, energy = oodk.outlier_cross_entropy(logits, target)
    is_ood = target < 0
    torch.testing.assert_close(
        losses.OutlierExposureLoss()(logits, target),
        each[~is_ood].mean() + 0.5 * each[is_ood].mean(),
    )
    moved = math.log(11 / 10)  # the authors' for CIFAR-10, of ten classes
    outside = (23 + moved - energy[~is_ood]).relu().square().mean()
    outside = outside + (energy[is_ood] - 5 - moved).relu().square().mean()
    torch.testing.assert_close(
        losses.EnergyBoundedLoss()(logits, target), each[~is_ood].mean() + 0.1 * outside
    )


def test_names() -> None:
    for name in losses.__all__:
        assert hasattr(losses, name)


# --- loss and gradient in one read of the logits --------------------------------------------------

sides = pytest.mark.parametrize("absent", [False, True], ids=["uniform", "absent"])


def outlier_rows(width: int, dtype: torch.dtype, rows: int = 37) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(width)
    logits = (torch.randn(rows, width, generator=random, dtype=torch.float64) * 4).to(dtype)
    target = torch.randint(-1, width, (rows,), generator=random)
    target[::3] = -1
    target[-1] = width - 1
    return logits, target


def plainly(logits: Tensor, target: Tensor, weight: float, absent: bool, mean: bool) -> Tensor:
    is_ood = target == -1
    if absent:
        is_ood = is_ood | (target == logits.shape[-1] - 1)
        target = torch.where(is_ood, logits.shape[-1] - 1, target)
    each = reference.outlier_cross_entropy(logits, target)[0]
    share = [m.sum() if mean and m.any() else 1 for m in (~is_ood, is_ood)]
    return each[~is_ood].sum() / share[0] + weight * each[is_ood].sum() / share[1]


@sides
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_read_is_the_reference(dtype: torch.dtype, absent: bool) -> None:
    for width in (1, 2, 7, 15, 16, 17, 33, 63, 64, 65, 200, 1008):
        for mean in (False, True):
            logits, target = outlier_rows(width, dtype)
            exact = logits.double().requires_grad_()
            expected = plainly(exact, target, 0.3, absent, mean)
            (expected_grad,) = torch.autograd.grad(expected, exact)
            for layout in (logits, logits.t().contiguous().t(), torch.cat([logits] * 2, 1)):
                x = layout[:, :width].detach().requires_grad_()
                loss = outlier_loss(x, target, 0.3, absent, mean)
                assert loss is not None
                assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                (grad,) = torch.autograd.grad(loss, x)
                assert grad.dtype == dtype
                small = 1e-12 if dtype == torch.float64 else 2e-6
                torch.testing.assert_close(loss.double(), expected.detach(), rtol=small, atol=small)
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(
                    grad.double(), expected_grad, rtol=max(eps, 5 * small), atol=small / 10
                )


@sides
@pytest.mark.parametrize("width", [5, 100])
def test_one_read_of_special_rows(width: int, absent: bool) -> None:
    logits, target = outlier_rows(width, torch.float32, 12)
    logits[0, 1], logits[1, 0], logits[2, -1] = math.nan, math.inf, math.inf
    logits[3], logits[4, 0], logits[6, 1], logits[7] = -math.inf, -math.inf, -math.inf, 1e30
    for row in range(len(logits)):
        x = logits[row].clone().requires_grad_()
        exact = logits[row].double().requires_grad_()
        found = outlier_loss(x, target[row], 0.3, absent, True)
        expected = plainly(exact, target[row], 0.3, absent, True)
        assert found is not None
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)
        found.backward()
        expected.backward()
        assert x.grad is not None
        torch.testing.assert_close(
            x.grad.double(), exact.grad, rtol=1e-5, atol=1e-6, equal_nan=True
        )


def test_gradient_of_a_scaled_loss_and_of_a_kept_graph() -> None:
    logits, target = outlier_rows(100, torch.float32)
    logits.requires_grad_()
    loss = losses.outlier_exposure_loss(logits, target)
    loss.backward(retain_graph=True)
    assert logits.grad is not None
    once = logits.grad.clone()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(logits.grad, 3 * once)
    logits.grad = None
    (losses.outlier_exposure_loss(logits, target) * 4 / 2).backward()
    torch.testing.assert_close(logits.grad, 2 * once)
    hidden = logits.detach().requires_grad_()  # no leaf, and used twice
    (losses.outlier_exposure_loss(hidden * 1, target) + hidden.sum()).backward()
    torch.testing.assert_close(hidden.grad, once + 1)
    grad = torch.autograd.grad(
        losses.outlier_exposure_loss(hidden, target), hidden, create_graph=True
    )[0]
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["outlier exposure", "absent class"])
def test_small_gradients_of_float16_survive_a_scaled_loss(name: str) -> None:
    """1 / rows of a small probability underflows in float16; scaled, it does not."""
    function, _ = LOSSES[name]
    logits = torch.zeros(1000, 400, dtype=torch.float16)
    logits[:, 0] = 8
    target = torch.zeros(1000, dtype=torch.int64)
    logits.requires_grad_()
    (function(logits, target) * 2**16).backward()
    assert logits.grad is not None
    p = logits.detach()[0].double().softmax(-1)[1]
    torch.testing.assert_close(logits.grad[0, 1].double(), p / 1000 * 2**16, rtol=2**-10, atol=0)
    assert p / 1000 < torch.finfo(torch.float16).smallest_normal / 100


def test_one_read_is_the_same_on_any_number_of_threads() -> None:
    logits, target = outlier_rows(700, torch.float32, 300)
    found = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        found.append(torch.ops.oodk._outlier_loss(logits, target, 0.3, False, True))
    for loss, grad in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(grad, found[0][1])


def test_one_read_as_an_op() -> None:
    logits, target = outlier_rows(20, torch.float32)
    op = torch.ops.oodk._outlier_loss.default
    torch.library.opcheck(op, (logits, target, 0.3, False, True))
    torch.library.opcheck(op, (logits[:, ::2], target.clamp(max=9), 0.3, True, False))


# --- pytorch-ood ----------------------------------------------------------------------------------


@pytest.fixture
def pytorch_ood(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One of its losses by module and name: the packages as a whole want torchvision and more."""
    package = types.ModuleType("pytorch_ood.loss")
    package.__path__ = [str(Path(pytorch_ood_package.root().__path__[0], "loss"))]
    monkeypatch.setitem(sys.modules, "pytorch_ood.loss", package)
    return lambda module, name: getattr(import_module(f"pytorch_ood.loss.{module}"), name)


@pytest.mark.parametrize("size", [(5, 8), (6, 0)])
def test_energy_bounded_is_pytorch_oods(pytorch_ood: Any, size: tuple[int, int]) -> None:
    theirs = pytorch_ood("energy", "EnergyRegularizedLoss")
    logits, target = batch(*size)
    for reduction in ("none", "sum", "mean"):
        torch.testing.assert_close(
            losses.EnergyBoundedLoss(0.3, -3, -1, reduction=reduction)(logits, target),
            theirs(0.3, -3, -1, reduction)(logits, target),
        )


def test_pytorch_ood_weakens_outlier_exposure(pytorch_ood: Any) -> None:
    theirs = pytorch_ood("oe", "OutlierExposureLoss")
    logits, target = batch(5, 8)
    logits, is_ood = logits.float(), target < 0
    each = losses.outlier_exposure_loss(logits, target, 0.5, "none")
    torch.testing.assert_close(each, theirs(0.5, "none")(logits, target))
    torch.testing.assert_close(each.sum(), theirs(0.5, "sum")(logits, target))
    # Hendrycks et al. average ID over ID and OOD over OOD; pytorch-ood both over all samples.
    ours = losses.outlier_exposure_loss(logits, target)
    torch.testing.assert_close(ours, each[~is_ood].mean() + each[is_ood].mean())
    torch.testing.assert_close(theirs()(logits, target), each.sum() / 13)
    assert ours > 1.5 * theirs()(logits, target)
    # More OOD samples of the same kind must not change the balance; theirs does.
    more, labels = torch.cat([logits, logits[is_ood]]), torch.cat([target, target[is_ood]])
    torch.testing.assert_close(losses.outlier_exposure_loss(more, labels), ours)
    assert not torch.isclose(theirs()(more, labels), theirs()(logits, target), rtol=1e-2)


# --- confidence branch ----------------------------------------------------------------------------


def confidence_batch(n_id: int = 9, n_ood: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, target = batch(n_id, n_ood)
    random = torch.Generator().manual_seed(1)
    k = torch.randn(len(target), generator=random, dtype=torch.float64) * 2
    return logits, k, target, torch.arange(len(target)) % 2 == 0


def authors_terms(z: list[float], k: float, t: int, hint: bool) -> tuple[float, float]:
    """The published training loop: probabilities mixed with the one-hot label, logs last."""
    c = 1 / (1 + math.exp(-k))
    p = math.exp(z[t] - lse(z))
    used = c if hint else 1.0
    return -math.log(used * p + (1 - used)), -math.log(c)


@pytest.mark.parametrize("size", [(9, 4), (5, 0), (0, 6)])
def test_confidence_is_the_authors(size: tuple[int, int]) -> None:
    logits, k, target, hints = confidence_batch(*size)
    rows = zip(logits.tolist(), k.tolist(), target.tolist(), hints.tolist(), strict=True)
    terms = [authors_terms(*row) if row[2] >= 0 else (0.0, 0.0) for row in rows]
    each = [nll + 0.2 * cost for nll, cost in terms]
    for column in (k, k[:, None]):
        for reduction, value in (
            ("none", each),
            ("sum", math.fsum(each)),
            ("mean", math.fsum(each) / max(size[0], 1)),
        ):
            found = losses.confidence_loss(logits, column, target, 0.2, hints, reduction)
            torch.testing.assert_close(found, torch.tensor(value, dtype=torch.float64))
    torch.autograd.gradcheck(
        lambda z, c: losses.confidence_loss(z, c, target, 0.2, hints),
        (logits.requires_grad_(), k.requires_grad_()),
    )


def test_confidence_does_not_saturate() -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    k = torch.tensor([100.0, -100.0], requires_grad=True)
    target, hints = torch.tensor([1, 0]), torch.tensor([True, True])
    loss = losses.confidence_loss(logits, k, target, 0.1, hints, "none")
    torch.testing.assert_close(loss.detach(), torch.tensor([100.0, 0.1 * 100.0]))
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert k.grad is not None
    torch.testing.assert_close(k.grad, torch.tensor([1.0, -0.1]))


def test_hints_go_to_a_random_half() -> None:
    n = 4000
    logits, target = torch.zeros(n, 2), torch.zeros(n, dtype=torch.int64)
    k = torch.zeros(n)
    torch.manual_seed(0)
    nll = losses.confidence_loss(logits, k, target, 0.0, None, "none")
    hinted = torch.isclose(nll, torch.tensor(-math.log(0.75)))
    assert (hinted | torch.isclose(nll, torch.tensor(math.log(2)))).all()
    assert abs(float(hinted.float().mean()) - 0.5) < 0.04
    torch.manual_seed(0)
    assert torch.equal(losses.confidence_loss(logits, k, target, 0.0, None, "none"), nll)


def test_budget_adapts_the_weight() -> None:
    loss = losses.ConfidenceLoss(budget=0.3, weight=0.1)
    logits, target = torch.zeros(4, 3), torch.tensor([0, 1, 2, -1])
    hints = torch.zeros(4, dtype=torch.bool)
    weight, sure, unsure = 0.1, torch.full((4,), 5.0), torch.full((4,), -5.0)
    for k, factor in ((sure, 1 / 1.01), (sure, 1 / 1.01), (unsure, 1 / 0.99)):
        k = k.clone().requires_grad_()
        found = loss(logits, k, target, hints)
        expected = losses.confidence_loss(logits, k, target, weight, hints)
        torch.testing.assert_close(found, expected)  # the weight before the update
        found.backward()
        weight *= factor
        torch.testing.assert_close(loss.weight, torch.tensor(weight))
    loss.eval()
    loss(logits, sure, target, hints)
    loss.train()
    loss(logits, sure, torch.full_like(target, -1), hints)  # no ID samples
    torch.testing.assert_close(loss.weight, torch.tensor(weight))

    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    again = losses.ConfidenceLoss()
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again.weight, loss.weight)
    assert torch.equal(copy.deepcopy(loss).weight, loss.weight)


def test_confidence_compiles_with_its_budget() -> None:
    logits, k, target, hints = confidence_batch()
    eager, compiled = losses.ConfidenceLoss(), losses.ConfidenceLoss()
    torch._dynamo.reset()
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        a, b = k.clone().requires_grad_(), k.clone().requires_grad_()
        eager(logits, a, target, hints).backward()
        step(logits, b, target, hints).backward()
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(eager.weight, compiled.weight)
    assert eager.weight != 0.1


def test_confidence_of_half_precision() -> None:
    logits, k, target, hints = confidence_batch()
    z, c = logits.bfloat16(), k.bfloat16()
    loss = losses.ConfidenceLoss()(z, c, target, hints)
    assert loss.dtype == torch.float32
    expected = losses.ConfidenceLoss()(z.double(), c.double(), target, hints)
    torch.testing.assert_close(loss, expected.float())


@pytest.mark.filterwarnings("ignore:Discarding samples")
@pytest.mark.parametrize("size", [(9, 4), (0, 5)])
def test_confidence_with_hints_to_all_is_pytorch_oods(
    pytorch_ood: Any, size: tuple[int, int]
) -> None:
    logits, k, target, _ = confidence_batch(*size)
    ours = losses.confidence_loss(logits, k, target, 0.2, torch.ones_like(target).bool())
    theirs = pytorch_ood("conf", "ConfidenceLoss")(alpha=0.2)
    torch.testing.assert_close(ours, theirs(logits, k.sigmoid()[:, None], target))


def test_confidence_refuses() -> None:
    logits, k, target, hints = confidence_batch()
    with pytest.raises(ValueError, match=r"confidence_logits must have shape .* got \(12,\)"):
        losses.confidence_loss(logits, k[1:], target)
    with pytest.raises(ValueError, match="confidence_logits must have shape"):
        losses.confidence_loss(logits, k[:, None, None], target)
    with pytest.raises(TypeError, match="confidence_logits must be float64"):
        losses.confidence_loss(logits, k.long(), target)
    with pytest.raises(TypeError, match=r"hints must be bool, got torch\.float64"):
        losses.confidence_loss(logits, k, target, hints=k)
    with pytest.raises(ValueError, match="hints must have the shape of target"):
        losses.confidence_loss(logits, k, target, hints=hints[1:])
    with pytest.raises(ValueError, match="ConfidenceLoss: reduction must be"):
        losses.ConfidenceLoss(reduction="avg")


# --- what they are for ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "joint GAN"])
def test_training_separates_outliers(name: str) -> None:
    """Three classes, outliers between them: trained with them, the score tells them apart."""
    function, _ = LOSSES[name]
    random = torch.Generator().manual_seed(0)
    n_classes = 4 if name == "absent class" else 3
    centers = torch.tensor([[3.0, 0.0], [-2.0, 3.0], [-2.0, -3.0]])

    def draw(n: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(3, (n,), generator=random)
        x = centers[y] + 0.5 * torch.randn(n, 2, generator=random)
        ood = 0.5 * torch.randn(n, 2, generator=random)
        return torch.cat([x, ood]), torch.cat([y, torch.full((n,), -1)])

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, n_classes))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        x, t = draw(64)
        optimizer.zero_grad()
        function(model(x), t).backward()
        optimizer.step()
    x, t = draw(500)
    logits = model(x).detach()
    score = {
        "outlier exposure": logits.softmax(-1).amax(-1),
        "absent class": -logits.softmax(-1)[:, -1],
    }.get(name, logits.logsumexp(-1))
    result = oodk.roc_metrics(score[t >= 0], score[t < 0])
    assert result.auroc > 0.97
    assert (logits[t >= 0, :3].argmax(-1) == t[t >= 0]).float().mean() > 0.95
