"""The registry of objectives, what they were made with, and what they refuse."""

from __future__ import annotations

import inspect
import math
import runpy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning_fabric")

from processes import ranks
from training_runs import CLASSES, blobs, loader, make_model, make_outliers, options, outlier_loader
from training_runs import config as two_epochs

from oodkernels import Groups
from oodkernels.detectors import DETECTORS
from oodkernels.nn import AbsentClassLoss, Discriminator, Generator, Head, MOSLoss
from oodkernels.training import (
    MINERS,
    OBJECTIVES,
    DOSMiner,
    MOSObjective,
    NTOMMiner,
    Objective,
    OutlierObjective,
    POEMMiner,
    SoftmaxObjective,
    SyntheticObjective,
    TrainConfig,
    Trainer,
    make_objective,
    register,
    tensor_loader,
)

config = partial(two_epochs, epochs=1)
GROUPS, OTHERS = Groups([0, 1, 1, 0]), Groups([0, 1, 0, 1])


# --- registry -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_registered_is_what_is_made(name: str) -> None:
    spec = OBJECTIVES[name]
    made = spec.make()
    assert made.name == spec.name == name
    assert made.options.keys() == spec.options.keys()
    assert (made.outliers is not None) == ("outliers" in spec.needs)
    assert made.absent == ("absent class" in spec.needs)
    assert spec.summary.endswith(".")
    assert spec.scores or name == "abnormality"
    assert set(spec.scores) <= set(DETECTORS)
    assert spec.per_sample == {"oe": 2, "energy": 2, "ntom": 2, "dos": 6}.get(name, 1)
    for option in spec.options:
        assert f"        {option}: " in (inspect.getdoc(spec.make) or "").replace(
            "\n    ", "\n        "
        )


def test_the_documentation_has_the_registry() -> None:
    root = Path(__file__).parents[2]
    if not (root / "docs").exists():
        pytest.skip("needs the source tree")
    namespace = runpy.run_path(str(root / "scripts" / "objectives_table.py"))
    text = namespace["PAGE"].read_text(encoding="utf-8")
    assert text == namespace["page"](text), "run scripts/objectives_table.py"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_train_toml_gives_the_run_back(name: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "softmax": {"mixup": 0.2},
        "mos": {"mixup": np.float32(0.5), "groups": GROUPS},
        "dos": {"beta": 0.5, "k": np.int64(8), "mode": "official"},
        "ntom": {"per_sample": 1, "q": np.float64(0.25)},
        "poem": {"memory": np.int64(2), "sigma": 3.0},
        "synthetic": {**options(name), "beta": 0.2},
    }.get(name, {})
    objective = OBJECTIVES[name].make(**given)
    trainer = Trainer(make_model(name), objective, config(steps=1, epochs=None), folder=tmp_path)
    x, y = blobs(32)
    x = x.view(-1, 1, 4, 4) if name in ("synthetic", "abnormality") else x
    train = tensor_loader(x, y, batch_size=16)
    trainer.fit(train, outlier_loader() if objective.outliers else None)
    read = TrainConfig.from_toml((tmp_path / "train.toml").read_text())
    assert read.objective == name
    again = Trainer(make_model(name), config=read)
    assert again.objective.options == objective.options
    assert again.config == read == trainer.config


def test_options_are_plain_and_objects_are_named() -> None:
    assert make_objective("dos", {"k": np.int64(5)}).options["k"] == 5
    assert make_objective("mos", {"groups": GROUPS}).options["groups"] == GROUPS.to_json()
    made = SyntheticObjective(Generator(4), Discriminator(4))
    assert made.options["generator"].startswith("<Generator(")
    with pytest.raises(ValueError, match="synthetic: generator must be a module, got '<Generator"):
        make_objective("synthetic", made.options)
    made = OutlierObjective(AbsentClassLoss(0.5), DOSMiner(8))
    assert made.name == "OutlierObjective"
    assert made.options["loss"] == "<AbsentClassLoss(beta=0.5, reduction='mean')>"
    assert made.options["miner"].startswith("<DOSMiner(k=8, n_init=5, ")
    with pytest.raises(ValueError, match=r"got 'OutlierObjective'; an objective of your own is"):
        make_objective(made.name, made.options)


def test_outliers_are_others_to_every_group() -> None:
    objective = make_objective("mos-outliers", {"weight": 0.5, "groups": GROUPS})
    model = nn.Linear(3, GROUPS.width)
    objective.prepare(model, lambda: torch.zeros(1, 3))
    x, y, outliers = torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 0, 1]), torch.randn(4, 3)
    loss, _ = objective.step(model, x, y, outliers, None)  # type: ignore[arg-type]
    inside = MOSLoss(GROUPS)(model(x), y)
    parts = [model(outliers)[:, a:b].log_softmax(1)[:, 0] for a, b in GROUPS.slices().tolist()]
    torch.testing.assert_close(loss, inside - 0.5 * sum(parts).mean())
    with pytest.raises(ValueError, match="MOSOutlierObjective: weight must be positive, got 0"):
        make_objective("mos-outliers", {"weight": 0})


def test_an_objective_of_ones_own() -> None:
    class Own(SoftmaxObjective):
        """One's own."""

        def __init__(self, depth: int = 3) -> None:
            super().__init__()

    assert (Own(2).name, Own(2).options) == ("Own", {"depth": 2})
    try:
        register("own", scores=["msp"])(Own)
        assert make_objective("own", {"depth": 4}).options == {"depth": 4}
        with pytest.raises(ValueError, match="register: name must be a new one, got 'own'"):
            register("own")
    finally:
        del OBJECTIVES["own"]


def test_an_objective_is_given_once() -> None:
    model = make_model("softmax")
    for objective, how, found in (
        (SoftmaxObjective(), config(options={"mixup": 0.1}), "got both, 'softmax'"),
        (SoftmaxObjective(), config(objective="oe"), "got both, 'softmax' and 'oe'"),
        ("softmax", config(objective="oe"), "got 'softmax' and, in the configuration, 'oe'"),
    ):
        with pytest.raises(ValueError, match=found):
            Trainer(model, objective, how)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"it has weight$"):
        make_objective("oe", {"wait": 1})


@pytest.mark.parametrize("name", MINERS)
def test_miners_know_what_they_were_made_with(name: str) -> None:
    miner = MINERS[name](seed=np.int64(3))  # type: ignore[arg-type]
    assert miner.name == name
    assert miner.options["seed"] == 3
    again = eval(repr(miner), {kind.__name__: kind for kind in MINERS.values()})
    assert again.options == miner.options
    state = miner.state_dict()
    MINERS[name](seed=4).load_state_dict(state)


def test_a_miner_goes_on_with_its_own_options_only() -> None:
    for ours, other, option in (
        (DOSMiner(k=8), DOSMiner(k=9), "k=9"),
        (NTOMMiner(0.1), NTOMMiner(0.2), "q=0.2"),
        (POEMMiner(mode="official"), POEMMiner(), "mode='default'"),
    ):
        with pytest.raises(ValueError, match=f"must be of a {type(other).__name__} with {option}"):
            other.load_state_dict(ours.state_dict())


# --- resuming another run -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (("dos", {}), ("absent-class", {}), "objective was 'dos', got 'absent-class'"),
        (
            ("dos", {}),
            ("dos", {"mode": "official"}),
            r"options\.mode was 'default', got 'official'",
        ),
        (("dos", {}), ("dos", {"k": 8}), r"options\.k was None, got 8"),
        (
            ("mos", {"groups": GROUPS}),
            ("mos", {"groups": Groups([0, 1, 0, 1])}),
            r"options\.groups",
        ),
        (("mos", {"mixup": 0.1}), ("mos", {"mixup": 0.3}), r"options\.mixup was 0\.1, got 0\.3"),
        (("mos", {}), ("mos", {"groups": OTHERS}), r"options\.groups was None"),
        (("poem", {}), ("poem", {"memory": 2}), r"options\.memory was 4, got 2"),
    ],
)
def test_a_run_does_not_go_on_as_another(
    first: tuple[str, Any], second: tuple[str, Any], message: str, tmp_path: Path
) -> None:
    def fit(name: str, given: dict[str, Any], epochs: int, resume: bool) -> None:
        model = make_model("dos" if name == "absent-class" else name)
        trainer = Trainer(
            model, make_objective(name, given), config(epochs=epochs), folder=tmp_path
        )
        trainer.fit(
            loader(), outlier_loader() if trainer.objective.outliers else None, resume=resume
        )

    fit(*first, 1, False)
    with pytest.raises(ValueError, match=f"where TrainConfig.{message}"):
        fit(*second, 2, True)
    fit(*first, 2, True)


def test_groups_of_a_plain_head_are_compared(tmp_path: Path) -> None:
    def fit(groups: Groups, resume: bool) -> Trainer:
        head = Head(16, groups.width, groups)
        trainer = Trainer(head, MOSObjective(groups), config(), folder=tmp_path)
        trainer.fit(loader(), resume=resume)
        return trainer

    fit(GROUPS, False)
    with pytest.raises(ValueError, match=r"options\.groups was"):
        fit(Groups([0, 0, 1, 1]), True)


def test_groups_are_those_of_the_head() -> None:
    """Of equal width, but with other columns for the classes."""
    message = r"groups must be those of the model's head, with class 2 in column 5 .* got column 2"
    for model in (make_model("mos"), Head(16, 6, GROUPS)):
        with pytest.raises(ValueError, match=message):
            Trainer(model, MOSObjective(OTHERS), config()).fit(loader())
    trainer = Trainer(Head(16, 6, GROUPS), "mos", config())
    trainer.fit(loader())
    assert trainer.objective.fixed_groups == GROUPS


# --- labels and columns ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["absent-class", "dos", "ntom"])
def test_a_model_without_an_absent_column_is_refused(name: str) -> None:
    model = make_model("softmax")  # as many columns as classes
    with pytest.raises(
        ValueError,
        match=r"class ids in 0\.\.2, of the model's 4 columns, the last of which is the absent "
        r"class's: it needs one more than classes, got 3",
    ):
        Trainer(model, name, config()).fit(loader(), outlier_loader())


def test_a_head_that_says_otherwise_is_refused() -> None:
    """Its file would call the absent class a class, or a class absent."""
    with pytest.raises(ValueError, match=r"absent_column must be the last column .* got None"):
        Trainer(Head(16, CLASSES + 1), "dos", config()).fit(loader(), outlier_loader())
    with pytest.raises(ValueError, match=r"absent_column must be None for .* 'softmax', got 4"):
        Trainer(Head(16, CLASSES + 1, absent=True), "softmax", config()).fit(loader())


@pytest.mark.parametrize("name", ["softmax", "mos", "confidence", "oe"])
@pytest.mark.parametrize("which", ["training", "validation"])
@pytest.mark.parametrize("late", [False, True])
def test_labels_without_a_column_are_refused(name: str, which: str, late: bool) -> None:
    x, y = blobs(100)
    top = CLASSES
    bad = y.clone()
    bad[70 if late else 3] = top
    other = tensor_loader(x, bad, batch_size=16)
    good = tensor_loader(x, y, batch_size=16)
    trainer = Trainer(make_model(name), name, config())
    with pytest.raises(
        ValueError, match=rf"the {which} loader must give class ids in 0\.\.3, .* got {top}"
    ):
        trainer.fit(
            other if which == "training" else good,
            outlier_loader() if name == "oe" else None,
            other if which == "validation" else good,
        )
    bad[70 if late else 3] = -1
    with pytest.raises(ValueError, match="got -1"):
        trainer.fit(
            tensor_loader(x, bad, batch_size=16), outlier_loader() if name == "oe" else None
        )


# --- mining as the authors do ---------------------------------------------------------------------


class Watched:
    """What an objective was asked to mine from, and what it trained on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, objective: Any) -> None:
        self.mined: list[Any] = []
        self.rows: list[list[Tensor]] = []
        mine, step = objective.mine, objective.step

        def watch_mine(*args: Any) -> None:
            mine(*args)
            self.mined.append((args, objective.pool))
            self.rows.append([])

        def watch_step(model: Any, x: Any, y: Any, o: Tensor, context: Any) -> Any:
            self.rows[-1].append(o)
            return step(model, x, y, o, context)

        monkeypatch.setattr(objective, "mine", watch_mine)
        monkeypatch.setattr(objective, "step", watch_step)


@pytest.mark.parametrize(("name", "share"), [("ntom", 2), ("poem", 1)])
@pytest.mark.parametrize("batch_size", [8, 50])
def test_every_selected_outlier_is_read_once_an_epoch(
    name: str, share: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the batch in which the pool is read."""
    trainer = Trainer(make_model(name), name, config(epochs=2, accumulate=2))
    watched = Watched(monkeypatch, trainer.objective)
    trainer.fit(loader(120, 16), outlier_loader(batch_size))
    assert len(watched.mined) == 2
    for (_, pool), parts in zip(watched.mined, watched.rows, strict=True):
        assert len(pool) == share * 120
        assert len(parts) == 8
        assert {len(part) for part in parts} <= {share * 15}
        expected = make_outliers()[pool]
        assert torch.equal(*(t[t[:, 0].argsort()] for t in (torch.cat(parts), expected)))


def test_poem_counts_training_data_with_what_it_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the authors' train_blr: the prior first, then all of min(epoch, memory) selections, of
    samples that may not be among the candidates, and the training data as many times."""
    how = config(epochs=5, options={"candidates": 150, "memory": 3}, objective="poem")
    model = make_model("poem")
    trainer = Trainer(model, config=how)
    objective: Any = trainer.objective
    posteriors: list[tuple[Tensor, Tensor]] = []
    select = objective.miner.select

    def watch(*args: Any) -> Tensor:
        gram, moment = objective.miner._gram.clone(), objective.miner._moment.clone()
        body = model[0].eval()
        with torch.no_grad():
            features = body(blobs(100)[0]).double(), body(make_outliers()).double()
        posteriors.append((gram, moment))
        selected: Tensor = select(*args)
        if past:
            z, o = features
            rows = o[torch.cat(past[-3:])]
            times = min(len(past), 3)
            torch.testing.assert_close(gram, times * z.T @ z + rows.T @ rows, rtol=1e-4, atol=1e-4)
            expected = 3 * (times * z.sum(0) - rows.sum(0))
            torch.testing.assert_close(moment, expected, rtol=1e-4, atol=1e-3)
        else:
            assert not gram.any()
        return selected

    past: list[Tensor] = []
    monkeypatch.setattr(objective.miner, "select", watch)
    watched = Watched(monkeypatch, objective)
    mine = objective.mine

    def keep(*args: Any) -> None:
        mine(*args)
        past.append(objective.pool)

    monkeypatch.setattr(objective, "mine", keep)
    trainer.fit(loader(), outlier_loader())
    assert len(posteriors) == 5
    candidates = [args[0] for args, _ in watched.mined]
    assert not torch.isin(past[0], candidates[1]).all()  # remembered all the same
    with pytest.raises(ValueError, match="POEMObjective: memory must be positive, got 0"):
        make_objective("poem", {"memory": 0})


@pytest.mark.parametrize(("name", "n"), [("ntom", 400), ("poem", 200)])
def test_a_pool_too_small_to_choose_from_is_said(name: str, n: int) -> None:
    trainer = Trainer(make_model(name), name, config(epochs=2))
    x, y = blobs(200)
    pool = make_outliers()[:150]
    with pytest.warns(UserWarning, match="no more than the .* nothing is mined") as found:
        trainer.fit(tensor_loader(x, y, batch_size=50), tensor_loader(pool, batch_size=50))
    mined = [str(w.message) for w in found if "mined" in str(w.message)]
    assert len(mined) == 1
    assert f"150 candidates are no more than the {n}" in mined[0]


@pytest.mark.parametrize("together", [True, False])
def test_processes_select_together(together: bool, tmp_path: Path) -> None:
    """What one process with all candidates would: a share each, of uneven numbers of candidates."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
    candidates = torch.randn(70, 6)
    alone = make_objective("dos", {"seed": 3})
    assert isinstance(alone, OutlierObjective)
    expected = alone.mined(model, candidates, 12)

    def work(rank: int, world: int) -> Tensor:
        objective = make_objective("dos", {"seed": 3, "together": together})
        assert isinstance(objective, OutlierObjective)
        mine = candidates[:40] if rank == 0 else candidates[40:]
        return objective.mined(model, mine, 7 - 2 * rank)  # 12 in all

    first, second = ranks(tmp_path, 2, work)
    if together:
        assert torch.equal(first, expected[0::2])
        assert torch.equal(second, expected[1::2])
    else:
        assert torch.equal(first, alone_again(model, candidates[:40], 7))
        assert torch.equal(second, alone_again(model, candidates[40:], 5))


def alone_again(model: nn.Module, candidates: Tensor, n: int) -> Tensor:
    objective = make_objective("dos", {"seed": 3})
    assert isinstance(objective, OutlierObjective)
    return objective.mined(model, candidates, n)


def test_a_window_that_does_not_fit_is_said() -> None:
    logits = torch.randn(100, 4)
    with pytest.warns(UserWarning, match=r"window of 95 from quantile 0\.125 .* starts at 0\.05"):
        NTOMMiner().select(None, logits, 95)


def test_ragged_candidates_are_left_out_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(make_model("dos"), "dos", config(epochs=3))
    sizes = []
    step = trainer.objective.step

    def watch(model: Any, x: Any, y: Any, o: Tensor, context: Any) -> Any:
        sizes.append(len(o))
        return step(model, x, y, o, context)

    monkeypatch.setattr(trainer.objective, "step", watch)
    with pytest.warns(UserWarning, match="last batch has 16 of 96 candidates and is left out"):
        trainer.fit(loader(), outlier_loader(96))
    assert set(sizes) == {96}


# --- synthetic outliers ---------------------------------------------------------------------------


def test_synthetic_outliers_are_normalised_as_the_data() -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    images = torch.rand(40, 3, 8, 8)
    x = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    train = tensor_loader(x, torch.arange(40) % 4, batch_size=8)
    with pytest.raises(
        ValueError, match=r"images in \[0, 1\], or mean and std be those of their normalisation"
    ):
        Trainer(model, "synthetic", config()).fit(train)
    trainer = Trainer(model, "synthetic", config(options={"mean": mean, "std": std}))
    trainer.fit(train)
    objective: Any = trainer.objective
    low, high = ((v - torch.tensor(mean)) / torch.tensor(std) for v in (0.0, 1.0))
    made = objective._sample(20).detach().amin((0, 2, 3)), objective._sample(20).amax((0, 2, 3))
    assert (made[0] >= low - 1e-5).all()
    assert (made[1] <= high + 1e-5).all()
    assert float(made[0].min()) < 0


# --- what teaches nothing -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "mos", "oe", "energy", "absent-class"])
def test_a_loss_that_stays_at_that_of_guessing_is_said(name: str) -> None:
    """Features of norm 1 / 1000: the default learning rate is far too small for them."""
    x, y = blobs(400)
    head = Head(
        16,
        6 if name == "mos" else CLASSES + (name == "absent-class"),
        GROUPS if name == "mos" else None,
        absent=name == "absent-class",
    )
    objective = MOSObjective(GROUPS) if name == "mos" else make_objective(name)
    train = tensor_loader(x / 1000, y, batch_size=16, shuffle=True)
    out = tensor_loader(make_outliers() / 1000, batch_size=16)
    trainer = Trainer(head, objective, config(epochs=1, lr=1e-3))
    chance = {
        "softmax": math.log(4),
        "mos": 2 * math.log(3),
        "oe": 1.5 * math.log(4),
        "energy": math.log(4) + 0.1 * (23 - math.log(10)) ** 2,
        "absent-class": 2 * math.log(5),
    }[name]
    with pytest.warns(
        UserWarning, match="after an epoch the loss is .* of guessing among 4 classes"
    ):
        trainer.fit(train, out if objective.outliers else None)
    assert objective.chance() == pytest.approx(chance, rel=1e-5)


def test_a_loss_that_falls_is_not(recwarn: pytest.WarningsRecorder) -> None:
    head = Head(16, CLASSES)
    head.standardize(blobs(400)[0] / 1000)
    x, y = blobs(400)
    Trainer(head, config=config(lr=0.05)).fit(tensor_loader(x / 1000, y, batch_size=16))
    assert not [w for w in recwarn if "guessing" in str(w.message)]


def test_base_class() -> None:
    assert Objective().options == {}
    with pytest.raises(NotImplementedError):
        Objective().step(None, None, None, None, None)  # type: ignore[arg-type]
    assert replace(config(), objective="mos").objective == "mos"
