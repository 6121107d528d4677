"""What is read from a model: by the call that asked, on the axis that holds features."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oodkernels.detectors import (
    KNN,
    ODIN,
    AbnormalityModule,
    Energy,
    FeatureModel,
    Mahalanobis,
    OODDetector,
    extract,
)

SECONDS = 60


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What calls return that run in threads of their own; raises what one of them raises."""
    found: list[Any] = [None] * len(calls)
    failed: list[BaseException] = []

    def take(i: int) -> None:
        try:
            found[i] = calls[i]()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=take, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    if failed:
        raise failed[0]
    return found


class Net(nn.Module):
    """Calls ``inside(x)`` between its layers."""

    def __init__(self, inside: Callable[[Tensor], Any] = lambda x: None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm = nn.BatchNorm1d(6)
        self.norm.running_mean = torch.randn(6, generator=generator)
        self.hidden = nn.Linear(6, 4)
        self.fc = nn.Linear(4, 3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        self.inside(x)
        hidden = self.hidden(self.norm(x)).relu()
        self.inside(x)
        logits = self.fc(hidden)
        self.inside(x)
        return logits


def inputs(n: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


# --- threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [None, "hidden"])
def test_a_call_reads_what_it_computed_itself(features: str | None) -> None:
    meet = threading.Barrier(2, timeout=SECONDS)
    net = Net().eval()
    xs = [inputs(seed=1), inputs(seed=2)]
    alone = [extract(net, x, ["hidden"], features) for x in xs]
    net.inside = lambda x: meet.wait()  # so that each layer runs for both before the next
    found = together(*(lambda x=x: extract(net, x, ["hidden"], features) for x in xs))
    for mine, expected in zip(found, alone, strict=True):
        assert torch.equal(mine.logits, expected.logits)
        assert torch.equal(mine.features, expected.features)
        assert torch.equal(mine.layers["hidden"], expected.layers["hidden"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_threads_share_a_detector_of_features() -> None:
    meet = threading.Barrier(2, timeout=SECONDS)
    net, y = Net().eval(), torch.arange(60) % 3
    detector = Mahalanobis(shrinkage=0.1, model=net).fit([(inputs(60), y)])
    xs = [inputs(seed=1), inputs(seed=2)]
    expected = [detector.score(x) for x in xs]
    net.inside = lambda x: meet.wait()
    found = together(*(lambda x=x: detector.score(x) for x in xs))
    for mine, alone in zip(found, expected, strict=True):
        assert torch.equal(mine, alone)


class Overlap:
    """Two calls: the second begins within the first, and runs its layers after the first's end."""

    def __init__(self) -> None:
        self.first_is_in, self.second_is_in, self.first_is_done = (
            threading.Event() for _ in range(3)
        )

    def inside(self, first: bool) -> None:
        """To be called in the forward pass before any layer."""
        mine, other = (
            (self.first_is_in, self.second_is_in)
            if first
            else (self.second_is_in, self.first_is_done)
        )
        mine.set()
        assert other.wait(SECONDS)

    def run(self, first: Callable[[], Any], second: Callable[[], Any]) -> list[Any]:
        """What they return."""

        def begin() -> Any:
            try:
                return first()
            finally:
                self.first_is_done.set()

        def follow() -> Any:
            assert self.first_is_in.wait(SECONDS)
            return second()

        return together(begin, follow)


def test_a_model_in_training_mode_is_switched_for_all_calls() -> None:
    net, x, overlap = Net(), inputs(), Overlap()
    y = inputs(seed=1)
    expected = [torch.logsumexp(Net().eval()(z), 1) for z in (x, y)]
    met: set[bool] = set()

    def inside(given: Tensor) -> None:
        first = torch.equal(given, x)
        if first not in met:
            met.add(first)
            overlap.inside(first)

    net.inside = inside
    detector = Energy(model=net)
    before = net.norm.running_mean.clone()
    found = overlap.run(lambda: detector.score(x), lambda: detector.score(y))
    for score, alone in zip(found, expected, strict=True):
        torch.testing.assert_close(score, alone)
    assert torch.equal(net.norm.running_mean, before)
    assert int(net.norm.num_batches_tracked) == 0
    assert all(module.training for module in net.modules())


def test_models_that_share_layers_are_switched_together() -> None:
    shared, x, overlap = nn.BatchNorm1d(6), inputs(), Overlap()

    class Waits(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.first = first

        def forward(self, x: Tensor) -> Tensor:
            overlap.inside(self.first)
            return x

    first, second = (nn.Sequential(Waits(i == 0), shared) for i in range(2))
    for score in overlap.run(
        lambda: Energy(model=first).score(x), lambda: Energy(model=second).score(x)
    ):
        torch.testing.assert_close(score, torch.logsumexp(x / (1 + shared.eps) ** 0.5, 1))
    assert int(shared.num_batches_tracked) == 0
    assert shared.training


def test_another_thread_cannot_train_a_model_that_is_switched() -> None:
    net, x, met = Net(), inputs(), []

    def inside(x: Tensor) -> None:
        if met:
            return
        met.append(True)
        with pytest.raises(RuntimeError, match="Net is in evaluation mode while another thread"):
            together(lambda: net(x))

    net.inside = inside
    Energy(model=net).score(x)
    assert met
    net(x)  # afterwards it may
    assert int(net.norm.num_batches_tracked) == 1


def test_detectors_of_logits_hook_nothing() -> None:
    net, x = Net().eval(), inputs()
    expected = torch.logsumexp(net(x), 1)
    hooked = []

    def inside(x: Tensor) -> None:
        hooked.append(any(m._forward_hooks or m._forward_pre_hooks for m in modules))

    modules = list(net.modules())
    net.inside = inside
    torch.testing.assert_close(Energy(model=net).score(x), expected)
    ODIN(eps=0.1, model=net).score(x)
    assert hooked == [False] * 9


@pytest.mark.parametrize("scripted", [False, True])
def test_a_module_within_may_be_in_training_mode_alone(scripted: bool) -> None:
    net = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    expected = torch.logsumexp(net(inputs()), 1)
    net[0].train()
    model = torch.jit.script(net) if scripted else net
    torch.testing.assert_close(Energy(model=model).score(inputs()), expected)
    assert [m.training for m in model.children()] == [True, False]
    assert not model.training


def test_phase_1_of_the_abnormality_module_trains_a_feature_model() -> None:
    net = Net()
    detector = AbnormalityModule(model=FeatureModel(net))
    detector.build(inputs())
    detector.reconstruction_loss(inputs(), torch.arange(8) % 3)
    assert int(net.norm.num_batches_tracked) == 1


def test_a_pending_fit_is_finished_once() -> None:
    meet, finished = threading.Barrier(2, timeout=SECONDS), []

    class Slow(KNN):
        def _finish(self, where: str) -> None:
            finished.append(where)
            threading.Event().wait(0.05)
            super()._finish(where)

    detector = Slow(1, "torch").partial_fit(features=inputs(40))

    def score() -> Tensor:
        meet.wait()
        return detector.score(features=inputs(40))

    for found in together(score, score):
        assert found.abs().max() < 1e-6
    assert finished == ["Slow.score"]
    assert len(detector.bank) == 40


def test_an_index_is_searched_when_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    faiss = pytest.importorskip("faiss")
    adding, other_is_done = threading.Event(), threading.Event()
    detector = KNN(1, "faiss").fit(features=inputs(40))

    class Slow:
        def __init__(self, width: int) -> None:
            self.index = index(width)

        def add(self, rows: Any) -> None:
            if not adding.is_set():
                adding.set()
                other_is_done.wait(SECONDS)
            self.index.add(rows)

        def search(self, rows: Any, k: int) -> Any:
            return self.index.search(rows, k)

    index = faiss.IndexFlatL2
    monkeypatch.setattr(faiss, "IndexFlatL2", Slow)

    def other() -> Tensor:
        assert adding.wait(SECONDS)
        try:
            return detector.score(features=inputs(40))
        finally:
            other_is_done.set()

    for found in together(lambda: detector.score(features=inputs(40)), other):
        assert found.abs().max() < 1e-6


# --- the axis of the features ---------------------------------------------------------------------


class Tokens(nn.Module):
    """(N, T, 6) -> (N, 3): a linear layer on every token, then their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.act = nn.GELU()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.act(self.norm(self.embed(x)))
        return self.head(tokens).flatten(1, -2).mean(1)


@pytest.mark.parametrize("shape", [(4, 7, 6), (4, 7, 2, 6)], ids=["tokens", "channels last"])
def test_the_input_of_a_linear_layer_has_its_features_last(shape: tuple[int, ...]) -> None:
    net, x = Tokens().eval(), torch.randn(shape)
    outputs = extract(net, x, ["norm", "act"])
    tokens = outputs.layers["act"].flatten(1, -2)
    torch.testing.assert_close(outputs.features, tokens.mean(1))
    torch.testing.assert_close(net.head(outputs.features), outputs.logits)
    assert outputs.axes == {"norm": -1}
    normed = outputs.layers["norm"].flatten(1, -2).mean(1)
    torch.testing.assert_close(extract(net, x, features="norm").features, normed)


def test_tokens_are_told_apart_by_their_features() -> None:
    """Averaged over the features, which layer normalisation centres, all rows look alike."""
    x = torch.randn(60, 7, 6, generator=torch.Generator().manual_seed(0))
    net = Tokens().eval()
    net.act = nn.Identity()
    detector = KNN(3, "torch", model=net).fit([(x + torch.arange(6), torch.zeros(60).long())])
    inside, outside = x[:30] + torch.arange(6), x[30:] - torch.arange(6)
    assert detector.score(inside).min() > detector.score(outside).max()


MAPS: dict[str, tuple[nn.Module, int | None]] = {
    "conv": (nn.Conv2d(2, 2, 1), 1),
    "norm": (nn.BatchNorm2d(2), 1),
    "group norm": (nn.GroupNorm(1, 2), 1),
    "pool": (nn.AvgPool2d(1), 1),
    "layer norm": (nn.LayerNorm(2), -1),
    "layer norm of several": (nn.LayerNorm([2, 2, 2]), None),
    "linear": (nn.Linear(2, 2), -1),
    "block": (nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout()), 1),
    "activation": (nn.ReLU(), None),
    "identity": (nn.Identity(), None),
    "flattened": (nn.Sequential(nn.Conv2d(2, 2, 1), nn.Flatten(2)), None),
    "of one's own": (type("Own", (nn.Conv2d,), {"forward": lambda self, x: x})(2, 2, 1), None),
}


@pytest.mark.parametrize("name", MAPS)
def test_which_layers_tell_their_axis(name: str) -> None:
    layer, axis = MAPS[name]
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(8, 3)).eval()
    x = torch.randn(5, 2, 2, 2)
    made = layer(x)
    for said in (1, -1):
        features = extract(net, x, features="0", axis=said).features
        torch.testing.assert_close(features, made.movedim(said, 1).flatten(2).mean(2))
    assert extract(net, x, ["0"]).axes == ({} if axis is None else {"0": axis})
    if axis is None:
        with pytest.raises(ValueError, match=r"extract: layer '0' gives \(5, .*: say axis=1 if"):
            FeatureModel(net, "0")(x)
        assert FeatureModel(net, "0", axis=1)(x).features.shape == (5, 2)
    else:
        found = FeatureModel(net, "0")(x).features
        torch.testing.assert_close(found, extract(net, x, features="0", axis=axis).features)


def test_layers_of_mahalanobis_have_their_axis_said_or_known(tmp_path: Any) -> None:
    pytest.importorskip("safetensors")
    net = Tokens().eval()
    x, y = torch.randn(90, 7, 6) + torch.arange(90)[:, None, None] % 3, torch.arange(90) % 3
    known = Mahalanobis(["norm"], shrinkage=0.1, model=net).fit([(x, y)])
    tokens = extract(net, x, ["norm", "act"]).layers
    mean = Mahalanobis(shrinkage=0.1).fit(features=tokens["norm"].mean(1), labels=y)
    torch.testing.assert_close(known.score(x), mean.score(features=tokens["norm"].mean(1)))
    refused = r"layer 'act' gives \(90, 7, 5\), of which nothing tells the axis"
    with pytest.raises(ValueError, match=rf"Mahalanobis.fit: {refused}"):
        Mahalanobis(["norm", "act"], shrinkage=0.1, model=net).fit([(x, y)])
    with pytest.raises(ValueError, match=rf"Mahalanobis.fit: {refused}"):
        Mahalanobis(["act"], shrinkage=0.1).fit(features=tokens, labels=y)
    for axis in (-1, 2, {"act": -1}):
        said = Mahalanobis(["act"], axis=axis, shrinkage=0.1, model=net).fit([(x, y)])
        mean = Mahalanobis(shrinkage=0.1).fit(features=tokens["act"].mean(1), labels=y)
        torch.testing.assert_close(said.score(x), mean.score(features=tokens["act"].mean(1)))
        said.save(tmp_path / "file")
        again = OODDetector.load(tmp_path / "file", net)
        assert torch.equal(again.score(features={"act": tokens["act"]}), said.score(x))
    with pytest.raises(ValueError, match=r"axis must be one but the first of \(90, 7, 5\), got 3"):
        Mahalanobis(["act"], axis=3).fit(features=tokens, labels=y)


class Switching(nn.Module):
    """Gives its input, and notes which of its layers are in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Sequential(nn.ReLU()), nn.Identity()])
        self.fc = nn.Linear(3, 3)
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(any(module.training for module in self.modules()))
        return self.fc(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train(),
        lambda model: model.parts[0][0].train(),
        lambda model: model.parts.insert(0, nn.Dropout()),
        lambda model: model.parts[1].add_module("within", nn.Dropout()),
        lambda model: setattr(model, "fc", nn.Linear(3, 3)),
        lambda model: model.parts.__delitem__(0),
        lambda model: model.parts.__setitem__(1, nn.Sequential(nn.Dropout())),
    ],
    ids=["train", "part", "insert", "leaf", "replace", "delete", "set"],
)
def test_what_a_model_becomes_after_the_first_score_is_seen(
    change: Callable[[Switching], Any],
) -> None:
    model = Switching().eval()
    energy, knn = Energy(model=model), KNN(1, "torch", model=model).fit(features=torch.eye(3))
    x = torch.randn(4, 3)
    for _ in range(2):
        energy.score(x)
        knn.score(x)
    change(model)
    training = [module.training for module in model.modules()]
    torch.testing.assert_close(energy.score(x), Energy().score(logits=model.fc(x)))
    torch.testing.assert_close(knn.score(x), knn.score(features=x))
    assert not any(model.seen)
    assert [module.training for module in model.modules()] == training


def test_a_model_that_moves_takes_its_inputs_along() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(3, 2)).eval()
    energy = Energy(model=model)
    energy.score(torch.randn(2, 3))
    seen = []
    model[1] = nn.Linear(3, 2, device="meta").eval()
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].device.type))
    with pytest.raises(NotImplementedError, match="meta"):  # back to where the inputs were
        energy.score(torch.randn(2, 3))
    assert seen == ["meta"]
