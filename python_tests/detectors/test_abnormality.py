"""The abnormality module: both phases, what they train and leave alone, any shape, files."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import batches, digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from oodkernels import ood_metrics
from oodkernels.detectors import AbnormalityModule, FeatureModel, NotFittedError, OODDetector
from oodkernels.detectors.abnormality import distort


def classifier(shape: tuple[int, ...] = (2, 6, 5), classes: int = 3) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(shape[0], 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(4 * shape[1] * shape[2], 16),
            nn.Tanh(),
            nn.Linear(16, classes),
        )


def data(shape: tuple[int, ...] = (2, 6, 5), n: int = 96) -> list[tuple[Tensor, Tensor]]:
    """Stripes, of which there are three kinds."""
    y = torch.arange(n) % 3
    x = torch.zeros(n, *shape)
    for c in range(3):
        x[y == c, :, c::3] = 1
    x += 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return batches(x, y, 32)


def state(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


# --- the phases -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [None, "0"])
def test_losses_are_the_authors(layer: str | None) -> None:
    torch.manual_seed(0)
    model = classifier().double().eval()
    detector = AbnormalityModule(layer, model=model)
    x, y = data()[0]
    x = x.double()
    detector.build(x)
    z = model(x)
    hidden = model[:6](x) if layer is None else model[:1](x)
    rebuilt = detector.decoder(hidden)
    assert rebuilt.shape == x.shape
    probability = z.softmax(1)[torch.arange(32), y]
    expected = 0.9 * -probability.log().mean() + 0.1 * (x - rebuilt).square().mean()
    torch.testing.assert_close(detector.reconstruction_loss(x, y), expected)

    seen = []
    detector.noise = lambda images, generator: seen.append(images) or images + 9
    loss = detector.risk_loss(x, torch.Generator())
    mixed = torch.cat([x[:11], x[11:] + 9])
    assert torch.equal(seen[0], x[11:])
    z, hidden = model(mixed), (model[:6] if layer is None else model[:1])(mixed)
    error = (mixed - detector.decoder(hidden)).square()
    evidence = torch.cat([z, error.flatten(1), hidden.flatten(1)], 1)
    normality = detector.risk(evidence).sigmoid()[:, 0]
    normality[11:] = 1 - normality[11:]
    torch.testing.assert_close(loss, -normality.log().mean())
    loss.backward()
    assert all(p.grad is not None for p in detector.risk.parameters())
    assert all(p.grad is None for m in (model, detector.decoder) for p in m.parameters())


@pytest.mark.parametrize("freeze", [False, True])
def test_what_is_trained(freeze: bool) -> None:
    model = classifier()
    model[1].eval()
    before, draws = state(model), torch.get_rng_state()
    phases: dict[str, list[tuple[bool, dict[str, Tensor]]]] = {"noise": []}

    def noise(images: Tensor, generator: torch.Generator) -> Tensor:
        both = {**state(model), **{f"d.{k}": t for k, t in state(detector.decoder).items()}}
        phases["noise"].append((model[0].training, both))
        return distort(images, generator)

    detector = AbnormalityModule(epochs=(2, 3), freeze=freeze, noise=noise, model=model)
    assert detector.fit(data()) is detector
    first, last = phases["noise"][0][1], phases["noise"][-1][1]
    assert all(torch.equal(first[name], last[name]) for name in first)  # frozen in phase 2
    changed = [
        name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])
    ]
    assert bool(changed) != freeze
    assert len(phases["noise"]) == 3 * 3
    assert [m.training for m in (model[0], model[1], model[3])] == [True, False, True]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(draws, torch.get_rng_state())
    x = data()[0][0]
    score = detector.score(x)
    assert (score.shape, score.dtype, score.requires_grad) == ((32,), torch.float32, False)
    torch.testing.assert_close(detector.score(x[5:7]), score[5:7])


def test_same_seed_same_scores() -> None:
    x = data()[0][0]
    scores = []
    for seed in (1, 1, 2):
        detector = AbnormalityModule(epochs=(2, 2), seed=seed, model=classifier())
        scores.append(detector.fit(data()).score(x))
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 9)])
def test_any_shape_is_told_from_noise(shape: tuple[int, ...]) -> None:
    model = classifier(shape)
    detector = AbnormalityModule(epochs=(20, 60), model=model).fit(data(shape))
    x, y = data(shape)[0]
    assert (model.eval()(x).argmax(1) == y).double().mean() > 0.9
    normality = detector.score(x).sigmoid()
    noisy = detector.score(x + torch.randn(x.shape)).sigmoid()
    assert normality.mean() > 0.8
    assert noisy.mean() < 0.2


def test_decoder_of_ones_own(tmp_path) -> None:
    pytest.importorskip("safetensors")

    def decoder(kernel: int = 1) -> nn.Module:
        return nn.Sequential(nn.Dropout2d(), nn.Conv2d(4, 2, kernel))

    model = classifier()
    detector = AbnormalityModule(
        "0", epochs=(2, 2), decoder=decoder(), model=FeatureModel(model)
    ).fit(data())
    x = data()[0][0]
    detector.save(tmp_path / "file")
    loaded = AbnormalityModule.load(tmp_path / "file", model, decoder=decoder())
    assert torch.equal(loaded.score(x), detector.score(x))
    with pytest.raises(ValueError, match=r"decoder must be given: AbnormalityModule\.load"):
        OODDetector.load(tmp_path / "file", model).score(x)
    with pytest.raises(ValueError, match=r"AbnormalityModule\.load: (?s:.)*size mismatch"):
        AbnormalityModule.load(tmp_path / "file", model, decoder=decoder(3))


# --- distortions ----------------------------------------------------------------------------------


def test_distortions_are_the_authors() -> None:
    from skimage.filters import gaussian

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 2, 28, 28, generator=generator)
    z = distort(x, generator)
    noise = z[:20] - x[:20]
    assert 0.9 < noise.std() < 1.2
    assert abs(noise.mean()) < 0.02
    low, high = (
        torch.stack([torch.from_numpy(gaussian(i.numpy(), 5 * c)) for i in x[20:30].flatten(0, 1)])
        for c in (0.9, 1.0)
    )
    blurred = z[20:30].flatten(0, 1)
    between = torch.minimum(low, high) - 2e-3 < blurred
    assert (between & (blurred < torch.maximum(low, high) + 2e-3)).double().mean() > 0.99
    turns = [(torch.rot90(x[30:], k, (2, 3)) == z[30:]).all((1, 2, 3)) for k in (1, 3)]
    assert (turns[0] ^ turns[1]).all()
    assert 0 < turns[0].sum() < 10


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5])
def test_distortions_of_few_images_of_any_scale(n: int) -> None:
    x = torch.rand(n, 3, 4, 7) * 1000 - 500
    z = distort(x, torch.Generator().manual_seed(0))
    assert z.shape == x.shape
    assert not n or (z - x).abs().amax((1, 2, 3)).min() > 1


# --- files and errors -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_file_gives_the_detector_back(dtype: torch.dtype, tmp_path) -> None:
    pytest.importorskip("safetensors")
    model = classifier().to(dtype)
    it = [(x.to(dtype), y) for x, y in data()]
    detector = AbnormalityModule("5", epochs=(1, 2), freeze=True, seed=3, model=model).fit(it)
    x = it[0][0]
    assert detector.score(x).dtype == (dtype if dtype != torch.bfloat16 else torch.float32)
    detector.calibrate(detector.score(x))
    detector.save(tmp_path / "file")
    loaded = OODDetector.load(tmp_path / "file", model, num_classes=3)
    assert torch.equal(loaded.predict(x).is_ood, detector.predict(x).is_ood)
    assert torch.equal(loaded.score(x), detector.score(x))
    assert repr(loaded) == "AbnormalityModule(layer='5', epochs=(1, 2), freeze=True, seed=3)"
    assert torch.equal(loaded.fit(it).score(x), detector.fit(it).score(x))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: AbnormalityModule(epochs=(3,)), ValueError, "epochs must be two numbers"),
        (lambda m: AbnormalityModule(epochs=(3, 0)), ValueError, "epochs must be two numbers"),
        (lambda m: AbnormalityModule().fit(data()), ValueError, "model must be an nn.Module"),
        (
            lambda m: AbnormalityModule(model=m).score(data()[0][0]),
            NotFittedError,
            "fit must come first",
        ),
        (
            lambda m: AbnormalityModule(model=m).fit(iter(data())),
            TypeError,
            "that can be gone through again",
        ),
        (lambda m: AbnormalityModule(model=m).fit(), TypeError, "got NoneType"),
        (lambda m: AbnormalityModule(model=m).fit([]), ValueError, "must give ID samples"),
        (
            lambda m: AbnormalityModule(model=m).fit([(x, -torch.ones_like(y)) for x, y in data()]),
            ValueError,
            "must give ID samples, got none",
        ),
        (
            lambda m: AbnormalityModule(model=m).fit([(x.int(), y) for x, y in data()]),
            TypeError,
            "x must be floating-point, got torch.int32",
        ),
        (
            lambda m: AbnormalityModule(model=m).fit([(x, y + 1) for x, y in data()]),
            ValueError,
            "labels must be below 3, the number of logits, got 3",
        ),
        (
            lambda m: AbnormalityModule("7", model=m).fit(data()),
            ValueError,
            "no layer '7'",
        ),
        (
            lambda m: AbnormalityModule(decoder=nn.Linear(16, 7), model=m).fit(data()),
            ValueError,
            r"decoder must give the shape of x, \(2, 2, 6, 5\), got \(2, 7\)",
        ),
        (
            lambda m: AbnormalityModule(noise=lambda x, g: x[:1], model=m).fit(data()),
            ValueError,
            "noise must give the shape it gets",
        ),
        (
            lambda m: (
                AbnormalityModule(epochs=(1, 1), model=m).fit(data()).score(torch.rand(4, 2, 5, 6))
            ),
            ValueError,
            r"x must be \(N, 2, 6, 5\), got \(4, 2, 5, 6\)",
        ),
        (
            lambda m: distort(torch.rand(4, 6), torch.Generator()),
            ValueError,
            r"distort: images must be \(N, C, H, W\), got \(4, 6\)",
        ),
    ],
)
def test_refuses(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(classifier())


# --- real images ----------------------------------------------------------------------------------


def test_beats_chance_on_images() -> None:
    it = digits()
    model = copy.deepcopy(it.model)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(it.images), generator=generator)
    train = batches(it.images[order], it.labels[order], 64)
    detector = AbnormalityModule(epochs=(8, 8), model=model).fit(train)
    id_scores = detector.score(it.test_images)
    for name, images in it.ood.items():
        assert ood_metrics(id_scores, {"": detector.score(images)})[""].auroc > 0.9, name
    detector.calibrate(id_scores)
    found = detector.predict(it.test_images)
    accuracy = (found.label == it.test_labels).double().mean()
    assert accuracy > 0.9
    assert F.cross_entropy(model(it.test_images), it.test_labels) < 1
