"""Checkpoints: plain values, damage, other data; modes, the best, what a failed step leaves."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("lightning_fabric")

from training_runs import CLASSES, blobs, config, loader, make_model, make_outliers, options

from oodkernels.training import (
    OBJECTIVES,
    SoftmaxObjective,
    TrainConfig,
    Trainer,
    load_checkpoint,
    load_weights,
    tensor_loader,
)
from oodkernels.training._plain import plain
from oodkernels.training.checkpoint import save_checkpoint


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, CLASSES)
    )


# --- plain values ---------------------------------------------------------------------------------


class Colour(str, Enum):
    red = "red"


def test_plain_values() -> None:
    given = {
        "a": np.float32(0.5),
        "b": [np.int64(3), (np.True_, None)],
        "c": {np.int64(1): Colour.red},
        "d": np.arange(3),
        "e": Path("x"),
        "f": torch.float32,
    }
    found = plain(given, "it")
    assert found["a"] == 0.5
    assert type(found["a"]) is float
    assert found["b"] == [3, (True, None)]
    assert [type(v) for v in (found["b"][0], found["b"][1][0])] == [int, bool]
    assert found["c"] == {1: "red"}
    assert type(found["c"][1]) is str
    assert torch.equal(found["d"], torch.arange(3))
    assert (found["e"], found["f"]) == ("x", torch.float32)
    with pytest.raises(TypeError, match=r"^it\.x\[1\] must be a number, .* got set$"):
        plain({"x": [1, {2}]}, "it")


def test_numpy_numbers_come_back_from_every_file(tmp_path: Path) -> None:
    """In the configuration, the options, the optimiser, and the figures of the log."""

    class Counting(SoftmaxObjective):
        """Cross entropy that counts in NumPy."""

        def figures(self) -> dict[str, float]:
            return {"count": np.int64(3), "share": np.float32(0.5)}

    how = config(
        lr=np.float64(0.02), epochs=np.int64(2), momentum=np.float32(0.5), nesterov=np.True_
    )
    assert [type(v) for v in (how.lr, how.epochs, how.momentum, how.nesterov)] == [
        float,
        int,
        float,
        bool,
    ]
    assert TrainConfig.from_toml(how.to_toml()) == how

    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=np.float64(0.02), momentum=np.float32(0.9))  # type: ignore[arg-type]

    model = make_model("softmax")
    objective = Counting(label_smoothing=np.float32(0.25))
    trainer = Trainer(model, objective, how, folder=tmp_path, optimizer=make)
    trainer.fit(loader(), val_loader=loader())
    load_weights(make_model("softmax"), tmp_path / "best.pt")
    assert load_checkpoint(tmp_path / "last.pt")["optimizer"]["param_groups"][0]["momentum"] == (
        pytest.approx(0.9)
    )
    size: Any = np.int64(16)
    assert trainer.fit(loader(batch_size=size), val_loader=loader(), resume=True).steps == 14
    options = {"k": np.int64(4), "beta": np.float32(0.5)}
    dos = Trainer(
        make_model("dos"), config=config(objective="dos", options=options), folder=tmp_path / "dos"
    )
    dos.fit(loader(), tensor_loader(make_outliers(), batch_size=40))
    read = TrainConfig.from_toml((tmp_path / "dos" / "train.toml").read_text())
    assert read == dos.config


def test_what_cannot_be_read_back_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^TrainConfig: options\.k must be a number, .* got set"):
        config(options={"k": {1}})
    with pytest.raises(TypeError, match=r"^TrainConfig: options\.k must hold no None"):
        config(options={"k": [None]})
    with pytest.raises(ValueError, match=r"epochs must be an integer, got 2\.5"):
        config(epochs=2.5)

    class Keeping(SoftmaxObjective):
        """Keeps a set in its state."""

        def get_extra_state(self) -> Any:
            return {"seen": {1, 2}}

        def set_extra_state(self, state: Any) -> None:
            pass

    model = make_model("softmax")
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(model, Keeping(), config(), folder=tmp_path)
    with pytest.raises(
        TypeError, match=r"^Trainer\.fit: checkpoint\.objective_state\._extra_state\.seen must be"
    ):
        trainer.fit(loader())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- damage ---------------------------------------------------------------------------------------


def test_a_flipped_bit_is_seen(tmp_path: Path) -> None:
    """Wherever it is: in a weight, a momentum, a random state, a number, the digests."""
    path = tmp_path / "last.pt"
    trainer = Trainer(make_model("softmax"), config=config(ema=0.9), folder=tmp_path)
    trainer.fit(loader())
    whole = bytearray(path.read_bytes())
    good = load_checkpoint(path)
    rng, loaded, messages = np.random.default_rng(0), 0, []
    for at in rng.integers(len(whole), size=150).tolist():
        broken = bytearray(whole)
        broken[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        try:
            found = load_checkpoint(path)
        except ValueError as error:
            messages.append(str(error))
            continue
        loaded += 1  # in padding and file names: what is read is what was saved
        assert str(found) == str(good)
        for name, value in good["model"].items():
            assert torch.equal(found["model"][name], value)
    assert len(messages) == 150 - loaded > 75
    assert all(message.startswith(f"load_checkpoint: {path} must be") for message in messages)
    path.write_bytes(whole)
    start = whole.index(good["model"]["1.weight"].numpy().tobytes())
    whole[start + 5] ^= 4
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"as it was saved, got another model\.1\.weight"):
        load_checkpoint(path)


def test_a_changed_number_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save_checkpoint({"model": {"w": torch.ones(2)}, "best": np.float32(0.5)}, path)
    content = torch.load(path, weights_only=True)
    assert type(content["best"]) is float
    content["best"] = 0.25
    torch.save(content, path)
    with pytest.raises(ValueError, match="got another value: the file was damaged or changed"):
        load_checkpoint(path)


# --- other data -----------------------------------------------------------------------------------


def same(name: str) -> DataLoader[Any]:
    x, y = blobs(96)
    pool = make_outliers()[:192]
    return {
        "training": lambda: tensor_loader(x, y, batch_size=16, shuffle=True),
        "outlier": lambda: tensor_loader(pool, batch_size=32, shuffle=True),
        "validation": lambda: tensor_loader(x, y, batch_size=24),
    }[name]()


def other(name: str, change: str) -> DataLoader[Any]:
    """As many batches as before, of other samples."""
    x, y = blobs(96)
    pool = make_outliers()[:192]
    if change == "order":
        if name == "training":
            return tensor_loader(x, y, batch_size=16)
        if name == "outlier":
            return tensor_loader(pool, batch_size=16, shuffle=True)
        return tensor_loader(x, y, batch_size=23)
    if name == "outlier":
        return tensor_loader(pool + 1e-3, batch_size=32, shuffle=True)
    return tensor_loader(
        x + 1e-3, y, batch_size=16 if name == "training" else 24, shuffle=name == "training"
    )


@pytest.mark.parametrize("objective", ["oe", "ntom"])
@pytest.mark.parametrize("name", ["training", "outlier", "validation"])
@pytest.mark.parametrize("change", ["order", "data"])
def test_a_run_does_not_go_on_with_other_data(
    objective: str, name: str, change: str, tmp_path: Path
) -> None:
    names = ("training", "outlier", "validation")

    def fit(epochs: int, resume: bool, changed: str | None = None) -> None:
        loaders = [other(n, change) if n == changed else same(n) for n in names]
        trainer = Trainer(make_model(objective), objective, config(epochs=epochs), folder=tmp_path)
        trainer.fit(*loaders, resume=resume)

    fit(1, False)
    with pytest.raises(
        ValueError,
        match=f"the {name} loader must give the {'batches' if change == 'order' else 'data'} that",
    ):
        fit(2, True, name)
    fit(2, True)


# --- modes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["training", "evaluating"])
def test_frozen_parts_stay_as_they_are(root: str) -> None:
    """A backbone in evaluation mode, its parameters frozen: its BatchNorm drifted."""
    backbone = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    backbone.eval().requires_grad_(False)
    head = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, CLASSES))
    model = nn.Sequential(backbone, head)
    model.train(root == "training")
    backbone.eval()
    modes: list[list[bool]] = []
    backbone.register_forward_hook(
        lambda module, args, output: modes.append(
            [m.training for part in (backbone, head) for m in part.modules()]
        )
    )
    before = copy.deepcopy(backbone.state_dict())
    trained = head[0].running_mean.clone()
    Trainer(model, config=config(ema=0.9)).fit(loader(), val_loader=loader())
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert not torch.equal(head[0].running_mean, trained)
    assert [False] * 4 + [True] * 4 in modes  # in steps
    assert modes[-1] in ([False] * 8, [False] * 4 + [True] * 4)
    assert not any(module.training for module in model.modules())


def test_training_goes_on_in_each_part_s_mode_after_validation() -> None:
    model = normed()
    model[1].eval()
    seen = []
    model[4].register_forward_pre_hook(
        lambda module, args: seen.append([m.training for m in model])
    )
    Trainer(model, config=config()).fit(loader(), val_loader=loader(batch_size=100))
    steps = [True, False, True, True, True]
    assert seen == [*[steps] * 7, [False] * 5] * 2


def test_a_failure_gives_the_modes_back() -> None:
    model = normed()
    model[1].eval()
    x, y = blobs(64)
    x[37] = math.nan
    with pytest.raises(FloatingPointError):
        Trainer(model, config=config()).fit(tensor_loader(x, y, batch_size=8))
    assert [m.training for m in model] == [True, False, True, True, True]


# --- best -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("monitor", ["val_loss", "val_accuracy"])
@pytest.mark.parametrize("nan_epochs", [(0,), (1,), (0, 1, 2)])
def test_nan_is_never_best(
    monitor: Any, nan_epochs: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs: list[int] = []
    trainer = Trainer(
        make_model("softmax"),
        config=config(epochs=3, monitor=monitor),
        folder=tmp_path,
        on_epoch=epochs.append,
    )
    validate = trainer.objective.validate

    def broken(*args: Any) -> tuple[Tensor, Tensor]:
        loss, labels = validate(*args)
        if len(epochs) in nan_epochs:
            loss = loss * math.nan
        return loss, labels

    monkeypatch.setattr(trainer.objective, "validate", broken)
    result = trainer.fit(loader(), val_loader=loader(batch_size=100))
    values = [row[monitor] for row in result.history if monitor in row]
    usual = [v for v in values if not math.isnan(v)]
    expected = None if not usual else min(usual) if monitor == "val_loss" else max(usual)
    assert result.best == expected
    assert (result.best_path is None) == (expected is None) == (not (tmp_path / "best.pt").exists())


# --- a step that fails ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_after_a_nan_loss_all_is_as_before_the_step(name: str, tmp_path: Path) -> None:
    """BatchNorm's statistics, the confidence's price, generator and miner included."""
    body, head = make_model(name)
    model = nn.Sequential(body, nn.BatchNorm1d(24), head)
    x, y = blobs(64)
    x[37] = math.nan
    x = x.view(-1, 1, 4, 4) if name in ("synthetic", "abnormality") else x
    how = config(objective=name, options=options(name), checkpoint_every=1)
    trainer = Trainer(model, config=how, folder=tmp_path)
    out = make_outliers()
    kept: list[Callable[[], Any]] = []
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 4 .*37") as error:
        trainer.fit(
            tensor_loader(x, y, batch_size=8),
            None if trainer.objective.outliers is None else tensor_loader(out, batch_size=16),
        )
    assert "\n" not in str(error.value)
    assert not kept
    last = load_checkpoint(tmp_path / "last.pt")
    assert last["step"] == 4
    for now, then in (
        (model.state_dict(), last["model"]),
        (trainer.objective.state_dict(), last["objective_state"]),
    ):
        assert str(plain(now, "")) == str(then)
        for key, value in then.items():
            if isinstance(value, Tensor):
                assert torch.equal(now[key], value), key
    assert all(p.grad is None or not p.grad.isnan().any() for p in model.parameters())


# --- one sample, one writer -----------------------------------------------------------------------


class Counted(Dataset[Any]):
    def __init__(self, n: int) -> None:
        self.x, self.y = blobs(n)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i], self.y[i]


def test_a_batch_of_one_is_refused_before_training_where_the_model_cannot(tmp_path: Path) -> None:
    model, steps = normed(), []
    model[0].register_forward_hook(lambda module, args, output: steps.append(len(output)))
    statistics = copy.deepcopy(model[1].state_dict())
    for train in (loader(97, 32), DataLoader(Counted(97), 32, shuffle=True)):
        with pytest.raises(ValueError, match="more than one sample for the model's BatchNorm"):
            Trainer(model, config=config(), folder=tmp_path / "a").fit(train)
    assert set(steps) == {1}
    assert all(torch.equal(v, statistics[k]) for k, v in model[1].state_dict().items())
    Trainer(model, config=config()).fit(DataLoader(Counted(97), 32, drop_last=True))
    Trainer(make_model("softmax"), config=config()).fit(loader(97, 32))  # has no BatchNorm
    out = tensor_loader(make_outliers(), batch_size=8)
    Trainer(normed(), "oe", config()).fit(loader(97, 32), out)  # never alone
    spatial = nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, CLASSES)
    )
    Trainer(spatial, config=config()).fit(loader(97, 32))  # sixteen pixels are enough


def test_a_folder_is_one_run_s_and_only_its_own_files_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".notes.tmp").write_text("mine")
    (tmp_path / ".last.pt.123.tmp").write_text("another program's")
    found: list[BaseException] = []

    def second(epoch: int) -> None:
        def fit() -> None:
            try:
                Trainer(make_model("softmax"), config=config(), folder=tmp_path).fit(
                    loader(), resume=True
                )
            except RuntimeError as error:
                found.append(error)

        thread = threading.Thread(target=fit)
        thread.start()
        thread.join()

    trainer = Trainer(make_model("softmax"), config=config(), folder=tmp_path, on_epoch=second)
    trainer.fit(loader())
    assert len(found) == 2
    assert f"Trainer.fit: {tmp_path} is being written by process" in str(found[0])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".last.pt.123.tmp", ".notes.tmp", "last.pt", "log.csv", "train.toml"]
    trainer.fit(loader(), resume=True)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_weights_of_wrapped_models_load(prefix: str, tmp_path: Path) -> None:
    trainer = Trainer(make_model("softmax"), config=config(ema=0.5), folder=tmp_path)
    trainer.fit(loader())
    state = load_checkpoint(tmp_path / "last.pt")
    wrapped = {prefix + name: value for name, value in state["model"].items()}
    averaged = {
        ("module." + prefix + name.removeprefix("module.") if name != "n_averaged" else name): value
        for name, value in state["ema"].items()
    }
    save_checkpoint({**state, "model": wrapped, "ema": averaged}, tmp_path / "w.pt")
    for ema in (False, True):
        plainly, found = make_model("softmax"), make_model("softmax")
        load_weights(plainly, tmp_path / "last.pt", ema=ema)
        load_weights(found, tmp_path / "w.pt", ema=ema)
        assert torch.equal(found[1].weight, plainly[1].weight)
