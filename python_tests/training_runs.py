"""Models and data of the training tests; run as a program, the runs that need processes."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset

from oodkernels import Groups, MOSHead
from oodkernels.training import TrainConfig, Trainer, tensor_loader

CLASSES, WIDTH = 4, 16
CASES = (
    "softmax",
    "softmax-writing",
    "mos",
    "dos",
    "ntom",
    "poem",
    "confidence",
    "abnormality",
    "synthetic",
)


def blobs(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    noise = torch.rand(n, WIDTH, generator=generator)
    return 0.7 * noise + F.one_hot(labels, WIDTH), labels


def options(name: str) -> dict[str, float]:
    """Those without which an objective cannot take the blobs, which go beyond [0, 1]."""
    return {"mean": 0.25, "std": 0.3} if name == "synthetic" else {}


def make_outliers() -> Tensor:
    return 2 * torch.rand(400, WIDTH, generator=torch.Generator().manual_seed(5))


def config(**given: Any) -> TrainConfig:
    return TrainConfig(**({"epochs": 2, "lr": 0.02, "accelerator": "cpu"} | given))


def loader(n: int = 100, batch_size: int = 16) -> DataLoader[Any]:
    return tensor_loader(*blobs(n), batch_size=batch_size, shuffle=True)


def outlier_loader(batch_size: int = 32) -> DataLoader[Any]:
    return tensor_loader(make_outliers(), batch_size=batch_size, shuffle=True)


class ConfidenceHead(nn.Linear):
    """A last layer with a confidence branch beside it: (logits, confidence logit)."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__(in_features, num_classes)
        self.confidence = nn.Linear(in_features, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(features), self.confidence(features).squeeze(-1)


def make_model(name: str, dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        head: nn.Module = nn.Linear(24, CLASSES + (name in ("absent-class", "dos", "ntom")))
        if name.startswith("mos"):
            head = MOSHead(24, Groups([0, 1, 1, 0]))
        elif name == "confidence":
            head = ConfidenceHead(24, CLASSES)
        body = nn.Sequential(nn.Flatten(), nn.Linear(WIDTH, 24), nn.ReLU(), nn.Dropout(dropout))
        return nn.Sequential(body, head)


class Noisy(Dataset[Any]):
    """Blobs with noise of torch's global random numbers; kills the process at a read, if asked."""

    def __init__(self, images: bool) -> None:
        self.x, self.y = blobs(90)
        if images:
            self.x = self.x.view(-1, 1, 4, 4)
        self.reads, self.last = 0, -1

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        if self.reads == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.x[i] + 0.1 * torch.randn(self.x[i].shape), self.y[i]


def _trainer(name: str, folder: Path) -> Trainer:
    config = TrainConfig(
        objective=name,
        options=options(name),
        epochs=3,
        accumulate=2,
        ema=0.9,
        warmup=3,
        checkpoint_every=4,
        log_every=3,
        accelerator="cpu",
    )
    return Trainer(make_model(name, dropout=0.3), config=config, folder=folder)


def _fit(
    name: str, folder: Path, resume: bool, kill_at: int = -1, workers: int = 0
) -> dict[str, Any]:
    trainer = _trainer(name, folder)
    data = Noisy(images=name in ("abnormality", "synthetic"))
    data.last = kill_at
    trainer.fit(
        DataLoader(data, 8, shuffle=True, num_workers=workers),
        None
        if trainer.objective.outliers is None
        else tensor_loader(make_outliers(), batch_size=24, shuffle=True),
        tensor_loader(data.x, data.y, batch_size=32),
        resume=resume,
    )
    return torch.load(folder / "last.pt", weights_only=True)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def kill(folder: Path) -> None:
    # Processes are forked: without threads that is safe, and saves each the imports, those too that
    # the first optimizer makes.
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)])
    for case in CASES:
        name = case.split("-")[0]
        run = folder / case
        if (child := os.fork()) == 0:
            if case.endswith("writing"):
                calls, fsync = [], os.fsync

                def die(file: int, calls: list[int] = calls, fsync: Any = fsync) -> None:
                    calls.append(file)
                    if len(calls) == 5:
                        os.kill(os.getpid(), signal.SIGKILL)
                    fsync(file)

                os.fsync = die
                _fit(name, run, resume=False)
            # In the second epoch; POEM reads all data before each.
            _fit(name, run, resume=False, kill_at=145 + 180 * (name == "poem"))
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        left = any(path.name.endswith(".tmp") for path in run.iterdir())
        assert killed
        assert 0 < torch.load(run / "last.pt", weights_only=True)["step"] < 18
        assert left == case.endswith("writing")
        _compare(case, _fit(name, run, resume=True), run, folder)

    run = folder / "interrupt"
    if (child := os.fork()) == 0:
        os.setpgid(0, 0)
        try:
            _fit("softmax", run, resume=False, workers=1)
        except KeyboardInterrupt as error:
            os._exit(130 if "resume=True" in str(error) else 1)
        os._exit(0)
    while not (run / "last.pt").exists():
        time.sleep(0.01)
    os.killpg(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    _compare("interrupt", _fit("softmax", run, resume=True), run, folder)


def _compare(case: str, resumed: dict[str, Any], run: Path, folder: Path) -> None:
    name = "softmax" if case == "interrupt" else case.split("-")[0]
    straight = folder / f"{name}-straight"
    if not straight.exists():
        _fit(name, straight, resume=False)
    expected = torch.load(straight / "last.pt", weights_only=True)
    same = _same(resumed, expected)
    same &= (run / "log.csv").read_bytes() == (straight / "log.csv").read_bytes()
    same &= not any(path.name.startswith(".") for path in run.iterdir())
    print(case, "same" if same else "different", flush=True)


def ddp(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {}

    def fit(name: str, run: Path | None = None, epochs: int = 2, lr: float = 0.02) -> Trainer:
        config = TrainConfig(
            objective=name,
            options=options(name),
            epochs=epochs,
            lr=lr,
            schedule="constant",
            log_every=1,
            accelerator="cpu",
        )
        trainer = Trainer(make_model(name), config=config, folder=run)
        x, y = blobs(100)
        shaped = x.view(-1, 1, 4, 4) if name in ("abnormality", "synthetic") else x
        result = trainer.fit(
            tensor_loader(shaped, y, batch_size=8, shuffle=True),
            None
            if trainer.objective.outliers is None
            else tensor_loader(make_outliers(), batch_size=8, shuffle=True),
            tensor_loader(shaped, y, batch_size=9),
            resume=run is not None,
        )
        weights = [p.detach().flatten() for p in trainer.model.parameters()]
        found[name] = {"history": result.history, "weights": torch.cat(weights).tolist()}
        return trainer

    fit("ntom", folder / "run", epochs=1)
    fit("ntom", folder / "run", epochs=2)
    resumed = found["ntom"]
    for name in ("softmax", "oe", "ntom"):
        fit(name)
    found["resumed"] = resumed == found["ntom"]

    same = []
    for name in ("dos", "confidence", "abnormality", "synthetic"):
        trainer = fit(name, lr=0.1)
        learned = [*trainer.model.parameters(), *trainer.objective.parameters()]
        both: list[Any] = [None, None]
        torch.distributed.all_gather_object(both, [p.tolist() for p in learned])
        same.append(both[0] == both[1])
    found["same on processes"] = same
    if rank == 0:
        (folder / "ddp.json").write_text(json.dumps(found))


if __name__ == "__main__":
    {"kill": kill, "ddp": ddp}[sys.argv[1]](Path(sys.argv[2]))
