from __future__ import annotations

import csv
import json
import math
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import as_torchrun, python
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

pytest.importorskip("lightning_fabric")

from training_runs import (
    CASES,
    CLASSES,
    blobs,
    config,
    ddp,
    loader,
    make_model,
    make_outliers,
    options,
    outlier_loader,
)

from oodkernels import Groups, MOSHead
from oodkernels.nn import Discriminator, Generator
from oodkernels.training import (
    OBJECTIVES,
    AbnormalityObjective,
    DOSMiner,
    SoftmaxObjective,
    SyntheticObjective,
    TrainConfig,
    Trainer,
    load_checkpoint,
    load_weights,
    make_objective,
    tensor_loader,
)
from oodkernels.training._batches import Batches


def fit(
    model: nn.Module, how: TrainConfig, folder: Path | None = None, resume: bool = False
) -> Trainer:
    trainer = Trainer(model, config=how, folder=folder)
    outliers = None if trainer.objective.outliers is None else outlier_loader()
    trainer.fit(loader(), outliers, resume=resume)
    return trainer


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- every objective ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_reduces_its_loss(name: str) -> None:
    model = make_model(name)
    margins = {"m_in": -25.0, "m_out": -7.0} if name in ("energy", "poem") else {}
    how = config(objective=name, options=margins or options(name), epochs=6, log_every=99)
    trainer = Trainer(model, config=how)
    x, y = blobs(200)
    if name in ("synthetic", "abnormality"):
        x = x.view(-1, 1, 4, 4)
    outliers = None if trainer.objective.outliers is None else outlier_loader()
    result = trainer.fit(
        tensor_loader(x, y, batch_size=16, shuffle=True),
        outliers,
        tensor_loader(x, y, batch_size=64),
    )
    rows = result.history
    assert len(rows) == 6
    last = -1 if name != "abnormality" else 3  # then it has another loss
    assert rows[last]["loss"] < 0.9 * rows[0]["loss"]
    assert rows[-1]["val_accuracy"] > 0.8  # energy has other aims too
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    assert not model.training


def test_abnormality_learns_in_two_phases_and_can_score() -> None:
    x, y = blobs(200)
    x = x.view(-1, 1, 4, 4)
    how = config(objective="abnormality", schedule="constant", lr=0.05, epochs=12, log_every=999)
    model, states = make_model("abnormality"), []

    def keep(epoch: int) -> None:
        if epoch in (8, 12):
            states.append(weights(model))

    trainer = Trainer(model, config=how, on_epoch=keep)
    result = trainer.fit(tensor_loader(x, y, batch_size=16, shuffle=True))
    losses = [row["loss"] for row in result.history]
    assert losses[7] < 0.9 * losses[0]
    assert losses[11] < 0.9 * losses[8]
    assert torch.equal(*states)  # frozen in the second phase
    objective = trainer.objective
    assert isinstance(objective, AbnormalityObjective)
    noisy = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    clean, abnormal = objective.detector.score(x), objective.detector.score(noisy)
    assert (clean > abnormal).float().mean() > 0.8


def test_synthetic_trains_the_networks_it_is_given() -> None:
    x, y = blobs(64)
    networks = Generator(size=4, channels=1), Discriminator(size=4, channels=1)
    before = [p.clone() for network in networks for p in network.parameters()]
    model = make_model("softmax")
    objective = SyntheticObjective(*networks)
    Trainer(model, objective, config()).fit(tensor_loader(x.view(-1, 1, 4, 4), y, batch_size=16))
    after = [p for network in networks for p in network.parameters()]
    assert all(not torch.equal(p, q) for p, q in zip(after, before, strict=True))
    assert not any(p.requires_grad for p in after)


def test_plain_loop_gives_the_same_weights() -> None:
    x, y = blobs(64)
    ours, theirs = make_model("softmax"), make_model("softmax")
    result = Trainer(ours, config=config(epochs=3, log_every=1)).fit(
        tensor_loader(x, y, batch_size=16)
    )

    optimizer = torch.optim.SGD(
        theirs.parameters(), 0.02, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    losses = []
    for _ in range(3):
        for i in range(0, 64, 16):
            optimizer.zero_grad()
            loss = F.cross_entropy(theirs(x[i : i + 16]), y[i : i + 16])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-5, atol=1e-6)
    assert [row["loss"] for row in result.history] == pytest.approx(losses, rel=1e-5)


def test_mos_predicts_class_ids() -> None:
    groups = Groups([1, 0, 1, 0], index_in_group=[1, 0, 0, 1])
    model = nn.Sequential(make_model("softmax")[0], MOSHead(24, groups))
    trainer = Trainer(model, config=config(objective="mos", epochs=5))
    result = trainer.fit(loader(200), None, loader(200))
    assert result.history[-1]["val_accuracy"] > 0.9


@pytest.mark.parametrize("name", ["softmax", "mos"])
def test_mixup_mixes_inputs_and_losses(name: str) -> None:
    objective = make_objective(name, {"mixup": 0.5})
    model = make_model(name)
    objective.prepare(model, lambda: blobs(8)[0])
    x, y = blobs(8)
    torch.manual_seed(3)
    loss, _ = objective.step(model, x, y, None, None)  # type: ignore[arg-type]
    torch.manual_seed(3)
    share = torch.distributions.Beta(0.5, 0.5).sample()
    other = torch.randperm(8)
    logits = model(share * x + (1 - share) * x[other])
    assert isinstance(objective.loss, nn.Module)
    expected = share * objective.loss(logits, y) + (1 - share) * objective.loss(logits, y[other])
    torch.testing.assert_close(loss, expected)


def test_dos_selects_as_the_paper_and_runs_the_model_once_in_training_mode() -> None:
    x, y = blobs(8)
    candidates = make_outliers()[:48]
    calls = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = make_model("dos")

        def forward(self, x: Tensor) -> Tensor:
            calls.append((self.body.training, torch.is_grad_enabled(), x))
            out: Tensor = self.body(x)
            return out

    model = Spy()
    objective = OBJECTIVES["dos"].make(seed=4)
    loss, _ = objective.step(model, x, y, candidates, None)  # type: ignore[arg-type]
    mining, training = calls
    assert mining[:2] == (False, False)
    assert torch.equal(mining[2], candidates)
    assert training[:2] == (True, True)
    assert torch.equal(training[2][:8], x)

    body = model.body.eval()
    with torch.no_grad():
        features, logits = body[:-1](candidates), body(candidates)
    miner = DOSMiner(seed=4)
    rows = miner.select(features, logits, 8)
    assert torch.equal(training[2][8:], candidates[rows])
    hardest = -logits.softmax(1)[:, -1]
    assert miner.last is not None
    clusters = miner.last.labels
    assert clusters is not None
    for row in rows[: int(clusters.unique().numel())].tolist():
        assert hardest[row] == hardest[clusters == clusters[row]].max()

    z = body.train()(training[2])
    expected = F.cross_entropy(z[:8], y) + F.cross_entropy(z[8:], torch.full((8,), CLASSES))
    torch.testing.assert_close(loss, expected)


def test_pool_is_mined_once_an_epoch_and_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(make_model("ntom"), config=config(objective="ntom", epochs=3))
    objective, seen, pools = trainer.objective, [], []
    step, mine = objective.step, objective.mine  # type: ignore[attr-defined]

    def watch_step(model: Any, x: Tensor, y: Tensor, outliers: Tensor, context: Any) -> Any:
        seen.append((context.epoch, outliers))
        return step(model, x, y, outliers, context)

    def watch_mine(*args: Any) -> None:
        mine(*args)
        pools.append(objective.pool)
        assert torch.equal(args[0], torch.arange(len(make_outliers())))
        assert args[1] is None
        assert args[2].shape == (len(make_outliers()), CLASSES + 1)

    monkeypatch.setattr(objective, "step", watch_step)
    monkeypatch.setattr(objective, "mine", watch_mine)
    trainer.fit(loader(), outlier_loader(batch_size=16))
    assert [len(pool) for pool in pools] == [200, 200, 200]
    for epoch, pool in enumerate(pools):
        allowed = {tuple(row) for row in make_outliers()[pool].tolist()}
        rows = [tuple(row) for e, o in seen if e == epoch for row in o.tolist()]
        assert set(rows) <= allowed
        assert len(set(rows)) == len(rows) == 200  # each once


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "oe"])
def test_accumulation_equals_a_large_batch(name: str) -> None:
    results = {}
    for batch_size, accumulate in ((24, 1), (8, 3)):
        model = make_model(name).double()
        how = config(objective=name, accumulate=accumulate, precision="64-true", log_every=1)
        x, y = blobs(100 if name == "softmax" else 96)
        outliers = tensor_loader(make_outliers()[:96].double(), batch_size=batch_size)
        train = tensor_loader(x.double(), y, batch_size=batch_size, shuffle=True)
        trainer = Trainer(model, config=how)
        result = trainer.fit(train, outliers if name == "oe" else None)
        results[accumulate] = weights(model), [row["loss"] for row in result.history]
    (w1, one), (w3, three) = results[1], results[3]
    # 100 = 4 * 24 + 4: the last step of an epoch has one batch, of 4.
    assert len(one) == len(three) == (10 if name == "softmax" else 8)
    assert one == pytest.approx(three, rel=1e-6)  # Fabric gives losses in float32
    torch.testing.assert_close(w1, w3, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_schedule_with_warm_up(schedule: Any) -> None:
    how = config(
        epochs=None,
        steps=20,
        lr=0.1,
        schedule=schedule,
        warmup=4,
        milestones=[0.5, 0.9],
        log_every=1,
    )
    result = Trainer(make_model("softmax"), config=how).fit(loader())
    rates = [row["lr"] for row in result.history]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    after = {
        "cosine": [0.05 * (1 + math.cos(math.pi * s / 16)) for s in range(16)],
        "step": [0.1] * 6 + [0.01] * 8 + [0.001] * 2,
        "constant": [0.1] * 16,
    }[schedule]
    assert rates[4:] == pytest.approx(after)
    assert result.steps == 20
    assert [row["epoch"] for row in result.history] == [s // 7 for s in range(20)]


def test_gradient_is_clipped() -> None:
    model = make_model("softmax")
    before = weights(model)
    how = config(steps=1, epochs=None, clip_norm=1e-3, momentum=0, weight_decay=0, lr=1.0)
    result = Trainer(model, config=how).fit(loader())
    assert result.history[0]["grad_norm"] > 0.01
    assert (weights(model) - before).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_moving_average_is_validated_and_saved(tmp_path: Path) -> None:
    x, y = blobs(64)
    model, plain = make_model("softmax"), make_model("softmax")
    seen: list[Tensor] = []
    optimizer = torch.optim.SGD(plain.parameters(), 0.02)
    for _ in range(2):
        for i in range(0, 64, 16):
            optimizer.zero_grad()
            F.cross_entropy(plain(x[i : i + 16]), y[i : i + 16]).backward()
            optimizer.step()
            seen.append(weights(plain))
    average = seen[0]
    for w in seen[1:]:
        average = 0.8 * average + 0.2 * w

    how = config(ema=0.8, momentum=0, weight_decay=0, schedule="constant")
    trainer = Trainer(model, config=how, folder=tmp_path)
    result = trainer.fit(
        tensor_loader(x, y, batch_size=16), None, tensor_loader(x, y, batch_size=9)
    )
    assert trainer.ema is not None
    torch.testing.assert_close(weights(trainer.ema.module), average, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weights(model), average)
    loaded = make_model("softmax")
    load_weights(loaded, tmp_path / "last.pt")
    assert torch.equal(weights(loaded), weights(trainer.ema.module))
    with torch.no_grad():
        loss = F.cross_entropy(loaded(x), y).item()
    assert result.history[-1]["val_loss"] == pytest.approx(loss, rel=1e-5)
    load_weights(loaded, tmp_path / "last.pt", ema=False)
    assert torch.equal(weights(loaded), weights(model))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)]
)
def test_true_precisions_reach_validation_and_mining(precision: Any, dtype: torch.dtype) -> None:
    model = make_model("ntom")
    trainer = Trainer(model, "ntom", config(precision=precision))
    result = trainer.fit(loader(), outlier_loader(), loader())
    assert weights(model).dtype == dtype
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert math.isfinite(result.history[-1]["val_loss"])


def test_pool_and_training_data_are_those_of_the_samplers(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(make_model("poem"), "poem", config(epochs=1))
    seen: list[Any] = []
    monkeypatch.setattr(trainer.objective, "mine", lambda *args: seen.extend(args))
    trainer.objective.pool = torch.arange(4)  # type: ignore[assignment]
    ids = DataLoader(TensorDataset(*blobs(100)), 8, sampler=SubsetRandomSampler(range(5, 45)))
    pool = DataLoader(make_outliers(), 8, sampler=SubsetRandomSampler(range(100, 160)))
    trainer.fit(ids, pool)
    assert torch.equal(seen[0], torch.arange(100, 160))
    assert len(seen[1]) == 60
    body = make_model("poem")[0]
    with torch.no_grad():
        torch.testing.assert_close(seen[3], body(blobs(100)[0][5:45]))
    assert seen[4] == 40


@pytest.mark.parametrize("name", ["softmax", "dos", "synthetic"])
def test_bfloat16(name: str) -> None:
    how = config(
        objective=name, options=options(name), precision="bf16-mixed", epochs=5, weight_decay=0
    )
    model = make_model(name)
    dtypes = set()
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    layer.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    trainer = Trainer(model, config=how)
    x, y = blobs(100)
    before = [p.clone() for p in model.parameters()]
    if name == "synthetic":
        x = x.view(-1, 1, 4, 4)
    result = trainer.fit(
        tensor_loader(x, y, batch_size=16), outlier_loader() if name == "dos" else None
    )
    assert dtypes == {torch.bfloat16}
    assert result.history[-1]["loss"] < 0.95 * result.history[0]["loss"]
    after = model.parameters()
    assert all(not torch.equal(p, q) for p, q in zip(after, before, strict=True))


def test_best_and_last_checkpoints(tmp_path: Path) -> None:
    x, y = blobs(200)
    trainer = Trainer(make_model("softmax"), config=config(epochs=6, lr=1.0), folder=tmp_path)
    wrong = tensor_loader(x, y.roll(1), batch_size=50)  # gets worse as training goes on
    result = trainer.fit(loader(200), None, wrong)
    rows = [row for row in result.history if "val_accuracy" in row]
    best = max(rows, key=lambda row: row["val_accuracy"])
    assert result.best == best["val_accuracy"]
    assert result.best_path is not None
    assert load_checkpoint(result.best_path)["step"] == best["step"] < rows[-1]["step"]
    assert result.last_path == tmp_path / "last.pt"
    assert load_checkpoint(result.last_path)["step"] == result.steps
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best.pt", "last.pt", "log.csv", "train.toml"]
    with (tmp_path / "log.csv").open() as file:
        table = list(csv.DictReader(file))
    numbers = [{k: float(v) for k, v in line.items() if v} for line in table]
    assert numbers == result.history
    assert TrainConfig.from_toml((tmp_path / "train.toml").read_text()) == trainer.config


def test_global_random_numbers_are_left_alone() -> None:
    def state() -> tuple[Any, ...]:
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
        )

    before = state()
    fit(make_model("softmax"), config())
    assert state() == before


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_runs_end_as_uninterrupted_ones(tmp_path: Path) -> None:
    """SIGKILL between checkpoints and while one is written; SIGINT to a run with workers."""
    done = python("training_runs.py", "kill", str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [*CASES, "interrupt"]
    assert all(line.endswith("same") for line in lines), done.stdout


@pytest.mark.slow
def test_processes_share_the_work_of_one(tmp_path: Path) -> None:
    assert as_torchrun(2, lambda: ddp(tmp_path)) == [0, 0]
    found = json.loads((tmp_path / "ddp.json").read_text())
    for name in ("softmax", "oe", "ntom"):
        model = make_model(name)
        how = config(objective=name, accumulate=2, log_every=1, schedule="constant")
        trainer = Trainer(model, config=how)
        outliers = None if trainer.objective.outliers is None else outlier_loader(8)
        result = trainer.fit(loader(100, 8), outliers, loader(100, 9))
        for here, there in zip(result.history, found[name]["history"], strict=True):
            assert here == pytest.approx(there, rel=2e-4, abs=1e-5)
        there = torch.tensor(found[name]["weights"])
        torch.testing.assert_close(weights(model), there, rtol=1e-3, atol=1e-4)
    assert all(found["same on processes"])
    assert found["resumed"]
    for name in ("dos", "confidence", "synthetic"):
        losses = [row["loss"] for row in found[name]["history"]]
        assert sum(losses[7:]) < sum(losses[:7])
    assert len(found["abnormality"]["history"]) == 14


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    x, y = blobs(100)

    class Interrupting(Dataset[Any]):
        reads = 0

        def __len__(self) -> int:
            return 100

        def __getitem__(self, i: int) -> Any:
            Interrupting.reads += 1
            if Interrupting.reads == 150:
                signal.raise_signal(signal.SIGINT)
            return x[i], y[i]

    model = make_model("softmax")
    data = DataLoader(Interrupting(), 16, shuffle=True)
    trainer = Trainer(model, config=config(), folder=tmp_path)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"after step 11 of 14, saved .* resume=True"):
        trainer.fit(data)
    assert signal.getsignal(signal.SIGINT) is before
    trainer.fit(data, resume=True)
    straight = make_model("softmax")
    Trainer(straight, config=config()).fit(data)
    assert torch.equal(weights(model), weights(straight))


def test_resume_refuses_what_is_not_the_run(tmp_path: Path) -> None:
    fit(make_model("softmax"), config(), tmp_path)
    with pytest.raises(ValueError, match="holds a run: go on with it by resume=True"):
        fit(make_model("softmax"), config(), tmp_path)
    with pytest.raises(ValueError, match=r"where TrainConfig.lr was 0.02, got 0.5"):
        fit(make_model("softmax"), config(lr=0.5), tmp_path, resume=True)
    with pytest.raises(ValueError, match="of another model"):
        fit(make_model("dos"), config(), tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"batches an epoch was 7, got 13"):
        Trainer(make_model("softmax"), config=config(), folder=tmp_path).fit(
            loader(200), resume=True
        )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "last.pt").touch()
    with pytest.raises(ValueError, match="other holds a run: go on with it by"):
        Trainer(make_model("softmax"), config=config(), folder=tmp_path / "other").fit(
            loader(), resume=tmp_path / "last.pt"
        )
    with pytest.raises(ValueError, match="resume=True must have a folder"):
        fit(make_model("softmax"), config(), None, resume=True)
    fit(make_model("softmax"), config(), tmp_path / "new", resume=True)


def test_more_epochs_than_before(tmp_path: Path) -> None:
    model, straight = make_model("softmax"), make_model("softmax")
    how = config(schedule="constant", epochs=1)
    fit(model, how, tmp_path)
    (tmp_path / "new").mkdir()
    Trainer(model, config=replace(how, epochs=2), folder=tmp_path / "new").fit(
        loader(), resume=tmp_path / "last.pt"
    )
    trainer = Trainer(model, config=replace(how, epochs=3), folder=tmp_path / "new")
    trainer.fit(loader(), resume=True)
    fit(straight, replace(how, epochs=3))
    assert torch.equal(weights(model), weights(straight))
    again = trainer.fit(loader(), resume=True)  # nothing left to do
    assert again.steps == 21


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch evil",)


@pytest.mark.parametrize("what", ["code", "text", "empty", "other", "version"])
def test_checkpoints_run_no_code(what: str, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    if what == "code":
        torch.save(_Evil(), path)
    elif what == "version":
        torch.save({"format": "oodkernels.training", "version": 99}, path)
    elif what == "other":
        torch.save({"model": 1}, path)
    else:
        path.write_text("no checkpoint" * (what == "text"))
    with pytest.raises(ValueError, match=r"load_checkpoint: .*last.pt must be"):
        load_checkpoint(path)
    assert not Path("evil").exists()


# --- what goes wrong ------------------------------------------------------------------------------


class _Broken(Dataset[Any]):
    def __init__(self, n: int = 100, labelled: bool = True) -> None:
        self.x, self.y = blobs(n)
        self.labelled = labelled

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        if i == 17:
            raise OSError("truncated image")
        return (self.x[i], self.y[i]) if self.labelled else self.x[i]


class _BrokenBatches(_Broken):
    def __getitems__(self, rows: list[int]) -> list[Any]:
        return [self[i] for i in rows]


@pytest.mark.parametrize(
    ("which", "workers"),
    [("training", 0), ("training", 1), ("outlier", 0), ("validation", 0), ("__getitems__", 0)],
)
def test_unreadable_sample_is_named(which: str, workers: int) -> None:
    trainer = Trainer(make_model("oe"), config=config(objective="oe", epochs=4))
    kind = _BrokenBatches if which == "__getitems__" else _Broken
    broken = DataLoader(kind(), 16, num_workers=workers)
    which = "training" if which == "__getitems__" else which
    with pytest.raises(
        RuntimeError, match=f"sample 17 of the {which} data could not be read: OSError: truncated"
    ):
        trainer.fit(
            broken if which == "training" else loader(),
            broken if which == "outlier" else outlier_loader(),
            broken if which == "validation" else loader(),
        )


def test_nan_loss_names_step_and_samples_and_spares_the_weights(tmp_path: Path) -> None:
    x, y = blobs(64)
    x[37] = math.nan
    model = make_model("softmax")
    how = config(checkpoint_every=1)
    trainer = Trainer(model, config=how, folder=tmp_path)
    with pytest.raises(
        FloatingPointError, match=r"loss is nan at step 4 \(epoch 0\), training samples 32, .*37"
    ):
        trainer.fit(tensor_loader(x, y, batch_size=8))
    checkpoint = load_checkpoint(tmp_path / "last.pt")
    assert checkpoint["step"] == 4
    assert weights(model).isfinite().all()
    assert all(torch.equal(v, checkpoint["model"][k]) for k, v in model.state_dict().items())


def test_infinite_gradient_is_an_error() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :CLASSES] + self.scale.sqrt()

    model = Root()
    with pytest.raises(FloatingPointError, match=r"norm of the gradient is .* at step 0"):
        fit(model, config())
    assert model.scale == 0


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """Files may not grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("limit", "what"), [(4000, "last.pt"), (150, "log")])
def test_full_disk(limit: int, what: str, tmp_path: Path, full_disk: Callable[[int], None]) -> None:
    model, straight = make_model("softmax"), make_model("softmax")

    def fill(epoch: int) -> None:
        if epoch == 1:
            full_disk(limit)

    trainer = Trainer(model, config=config(log_every=2), folder=tmp_path, on_epoch=fill)
    try:
        with pytest.raises(OSError, match=f"{what} could not be written at step (9|8|14): ") as e:
            trainer.fit(loader())
    finally:
        full_disk(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert "last.pt" in str(e.value)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "log.csv", "train.toml"]
    Trainer(model, config=config(log_every=2), folder=tmp_path).fit(loader(), resume=True)
    result = Trainer(straight, config=config(log_every=2), folder=tmp_path / "b").fit(loader())
    assert torch.equal(weights(model), weights(straight))
    assert (tmp_path / "log.csv").read_text() == (tmp_path / "b" / "log.csv").read_text()
    assert result.steps == 14


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="folder could not be written"):
        fit(make_model("softmax"), config(), tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("train", "error", "match"),
    [
        ([1, 2], TypeError, "training loader must be a torch DataLoader, got list"),
        (tensor_loader(blobs(9)[0], batch_size=4), TypeError, "labels .* got NoneType for them"),
        (
            tensor_loader(blobs(9)[0], blobs(9)[1].float(), batch_size=4),
            TypeError,
            r"training loader must give .* integer labels \(N,\), got torch.float32 \(4,\)",
        ),
        (DataLoader([{"x": 1.0}] * 4, 2), TypeError, "must give tensors x or .* got dict"),
        (
            DataLoader(TensorDataset(*blobs(3)), 4, drop_last=True),
            ValueError,
            "training loader must have a batch, got none",
        ),
    ],
)
def test_unfit_loaders(train: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Trainer(make_model("softmax"), config=config()).fit(train)


def test_unfit_models_and_objectives() -> None:
    with pytest.raises(TypeError, match=r"Trainer: model must be an nn.Module, got function"):
        Trainer(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="OutlierExposureObjective must have an outlier_loader"):
        Trainer(make_model("oe"), config=config(objective="oe")).fit(loader())
    with pytest.raises(ValueError, match="SoftmaxObjective takes no outliers"):
        Trainer(make_model("softmax"), config=config()).fit(loader(), outlier_loader())
    with pytest.raises(ValueError, match="one MOSHead, got 0"):
        fit(make_model("softmax"), config(objective="mos"))
    with pytest.raises(ValueError, match=r"must give \(logits, confidence\), got logits alone"):
        fit(make_model("softmax"), config(objective="confidence"))
    with pytest.raises(
        ValueError, match=r"generator and discriminator must be given .* \(16, 16\)"
    ):
        fit(make_model("softmax"), config(objective="synthetic"))
    other = SyntheticObjective(Generator(size=4), Discriminator(size=4))
    with pytest.raises(ValueError, match=r"generator must give \(16, 16\), .* got \(16, 3, 4, 4"):
        Trainer(make_model("softmax"), other, config()).fit(loader())
    with pytest.raises(ValueError, match=r"name must be one of softmax, mos, .* got 'soft'"):
        fit(make_model("softmax"), config(objective="soft"))
    with pytest.raises(ValueError, match=r"make_objective: oe: .*unexpected keyword"):
        make_objective("oe", {"wait": 1})
    with pytest.raises(ValueError, match="must have a parameter to train"):
        fit(make_model("softmax").requires_grad_(False), config())
    with pytest.raises(ValueError, match="tensors must fill a batch of 64, got 3"):
        tensor_loader(torch.zeros(3), batch_size=64, drop_last=True)


def test_missing_lightning_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'oodkernels\[train\]'"):
        Trainer(make_model("softmax"))


# --- configuration --------------------------------------------------------------------------------


def test_config_comes_back_from_toml() -> None:
    how = TrainConfig(
        objective="dos",
        options={"beta": 0.5, "k": 32, "mode": "official"},
        steps=1000,
        milestones=[0.3, 0.6],
        schedule="step",
        ema=0.999,
        seed=7,
    )
    assert TrainConfig.from_toml(how.to_toml()) == how
    assert TrainConfig.from_dict(json.loads(json.dumps(how.to_dict()))) == how
    assert TrainConfig().epochs == 20
    with pytest.raises(ValueError, match="unknown learning_rate"):
        TrainConfig.from_toml("learning_rate = 0.1")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"epochs": 1, "steps": 2}, "epochs or steps must be given, got both"),
        ({"lr": 0}, "lr must be positive and finite, got 0"),
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adam, adamw, got 'lion'"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"gamma": math.nan}, "gamma must be finite and at least 0, got nan"),
        ({"momentum": math.inf}, "momentum must be finite and at least 0, got inf"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"precision": "16-mixed"}, "precision must be one of 32-true"),
        ({"milestones": [1.5]}, r"milestones must be in \(0, 1\), got \[1.5\]"),
    ],
)
def test_config_refuses(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=f"TrainConfig: {match}"):
        TrainConfig(**options)


# --- loading --------------------------------------------------------------------------------------


class _Noisy(Dataset[Any]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> Any:
        return torch.tensor([i, torch.rand(()), np.random.rand(), random.random()])  # noqa: NPY002


def _samplers() -> list[DataLoader[Any]]:
    data = _Noisy()
    generator = torch.Generator().manual_seed(9)
    return [
        DataLoader(data, 6, shuffle=True),
        DataLoader(data, 6, shuffle=True, generator=generator),
        DataLoader(data, 6, sampler=WeightedRandomSampler([0.1] * 20, 20, generator=generator)),
        DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 6, True)),
        DataLoader(data, None, sampler=RandomSampler(data, generator=generator)),
    ]


@pytest.mark.parametrize("which", range(5))
def test_batches_depend_on_their_number_alone(which: int) -> None:
    source = _samplers()[which]
    batches = Batches(source, "training", seed=1)
    n = batches.per_epoch
    assert n == len(source)
    every = [batch.data for batch in batches.read(range(3 * n))]
    assert not torch.equal(every[0], every[n])
    torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    again = Batches(_samplers()[which], "training", seed=1)
    some = [batch.data for batch in again.read(range(n + 1, 3 * n))]
    assert all(torch.equal(a, b) for a, b in zip(every[n + 1 :], some, strict=True))
    other = next(Batches(_samplers()[which], "training", seed=2).read(range(1)))
    assert not torch.equal(other.data, every[0])


def test_workers_change_nothing_but_speed() -> None:
    plain = Batches(DataLoader(_Noisy(), 6, shuffle=True), "training", 1)
    spread = Batches(DataLoader(_Noisy(), 6, shuffle=True, num_workers=2), "training", 1)
    pairs = list(zip(plain.read(range(5)), spread.read(range(5)), strict=True))
    assert len(pairs) == 5
    for a, b in pairs:
        assert torch.equal(a.data, b.data)
        assert a.samples == b.samples == a.data[:, 0].tolist()


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        x, y = blobs(100)
        return zip(x, y, strict=True)


def test_iterable_data(tmp_path: Path) -> None:
    stream: DataLoader[Any] = DataLoader(_Stream(), 16)
    with pytest.raises(ValueError, match=r"TrainConfig.steps must be given"):
        Trainer(make_model("softmax"), config=config()).fit(stream)
    model, straight = make_model("softmax"), make_model("softmax")
    how = config(epochs=None, steps=9, schedule="constant")
    Trainer(straight, config=how).fit(stream)
    Trainer(model, config=replace(how, steps=4), folder=tmp_path).fit(stream)
    Trainer(model, config=how, folder=tmp_path).fit(stream, resume=True)
    assert torch.equal(weights(model), weights(straight))


def test_pool_needs_indices() -> None:
    trainer = Trainer(make_model("ntom"), "ntom", config())
    with pytest.raises(ValueError, match=r"data sets must have indices .* IterableDataset"):
        trainer.fit(loader(), DataLoader(_Stream(), 16))


def test_tensorboard(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensorboard must have a folder"):
        Trainer(make_model("softmax"), tensorboard=True)
    pytest.importorskip("tensorboard")
    trainer = Trainer(make_model("softmax"), config=config(), folder=tmp_path, tensorboard=True)
    trainer.fit(loader())
    assert list(tmp_path.glob("tensorboard/events.*"))


def test_objective_given_is_the_one_recorded() -> None:
    assert Trainer(make_model("oe"), "oe").config.objective == "oe"
    trainer = Trainer(make_model("oe"), make_objective("oe", {"weight": 2.0}))
    assert trainer.config.objective == "oe"
    assert trainer.config.options == {"weight": 2.0}
    trainer = Trainer(make_model("softmax"), SoftmaxObjective(mixup=1))
    assert trainer.config.objective == "softmax"
    assert trainer.config.options == {"mixup": 1, "label_smoothing": 0.0}


def test_progress_and_loggers(capsys: pytest.CaptureFixture[str]) -> None:
    rows = []

    class Logger:
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            rows.append((step, metrics["loss"]))

        def finalize(self, status: str) -> None:
            rows.append((0, 0.0))

    trainer = Trainer(
        make_model("softmax"),
        config=config(),
        progress=True,
        loggers=[Logger()],  # type: ignore[list-item]
    )
    result = trainer.fit(loader())
    assert rows == [*((row["step"], row["loss"]) for row in result.history), (0, 0.0)]
    assert "14/14" in capsys.readouterr().err
