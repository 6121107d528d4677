from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from oodkernels.groups import Groups
from oodkernels.nn.mos import MOSHead, MOSLoss

GROUPS = Groups.from_labels(["b", "a", "b", "c", "a", "b", "c"])


def official_loss(logits, class_ids, class_to_group):
    """The loss of MOS's published trainer per sample: labels per group, cross entropy, summed."""
    class_to_group = [int(k) for k in class_to_group]
    total, start = torch.zeros(len(logits), dtype=logits.dtype), 0
    for k in range(max(class_to_group) + 1):
        members = [c for c, group in enumerate(class_to_group) if group == k]
        labels = [members.index(c) + 1 if c in members else 0 for c in class_ids.tolist()]
        end = start + 1 + len(members)
        total = total + cross_entropy(logits[:, start:end], torch.tensor(labels), reduction="none")
        start = end
    assert start == logits.shape[1]
    return total


def batch(groups=GROUPS, n=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(n, groups.width, generator=generator)
    targets = torch.randint(groups.num_classes, (2, n), generator=generator)
    return logits.to(dtype), *targets


# MOSLoss


@pytest.mark.parametrize("groups", [GROUPS, Groups.random(50, 6), Groups.from_sizes([1, 1, 9])])
def test_loss_is_the_official_loss(groups):
    logits, target, _ = batch(groups, dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = MOSLoss(groups)(ours, target)
    expected = official_loss(theirs, target, groups.class_to_group).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, torch.tensor(0.3), torch.tensor(0.3).double()])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mixup_is_the_official_mixup(lam, reduction):
    logits, a, b = batch()
    loss = MOSLoss(GROUPS, reduction)(logits, a, b, lam)
    each = [official_loss(logits, target, GROUPS.class_to_group) for target in (a, b)]
    expected = float(lam) * each[0] + (1 - float(lam)) * each[1]
    if reduction != "none":
        expected = getattr(expected, reduction)()
    torch.testing.assert_close(loss, expected)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("ignore_index", [-100, -1, 255])
def test_ignored_samples_count_for_nothing(ignore_index):
    logits, target, _ = batch()
    logits.requires_grad_()
    keep = torch.arange(len(target)) % 3 != 0
    target = target.where(keep, ignore_index)
    each = official_loss(logits[keep], target[keep], GROUPS.class_to_group)
    loss = MOSLoss(GROUPS, ignore_index=ignore_index)(logits, target)
    torch.testing.assert_close(loss, each.mean())
    loss.backward()
    assert not logits.grad[~keep].any()
    assert logits.grad[keep].any()
    none = MOSLoss(GROUPS, "none", ignore_index)(logits, target)
    torch.testing.assert_close(none[keep], each)
    assert not none[~keep].any()
    assert MOSLoss(GROUPS, ignore_index=ignore_index)(
        logits, torch.full_like(target, ignore_index)
    ).isnan()


def test_loss_takes_leading_dimensions():
    logits, target, _ = batch()
    flat = MOSLoss(GROUPS, "none")(logits, target)
    deep = MOSLoss(GROUPS, "none")(logits.reshape(2, 4, 4, -1), target.reshape(2, 4, 4))
    assert torch.equal(deep, flat.reshape(2, 4, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_half_logits_is_float32(dtype):
    logits, a, b = batch(dtype=dtype)
    loss = MOSLoss(GROUPS)(logits, a, b, 0.25)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, MOSLoss(GROUPS)(logits.float(), a, b, 0.25))


def test_loss_compiles_in_one_graph():
    logits, a, b = batch()
    loss = MOSLoss(GROUPS)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, a, b, 0.25), loss(logits, a, b, 0.25))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0, 7],), ValueError, "got 7 at index 1"),
        (([0, -1],), ValueError, "got -1 at index 1"),
        (([0.0, 1.0],), TypeError, "integer tensor, got torch.float32"),
        (([0, 1], [0, 1]), ValueError, "must be given together"),
        (([0, 1], None, 0.5), ValueError, "must be given together"),
        (([0, 1], [0, 7], 0.5), ValueError, "got 7 at index 1"),
        (([0, 1], [0, 1], 1.5), ValueError, r"lam must be in 0\.\.1, got 1\.5"),
        (([0, 1], [0, 1], float("nan")), ValueError, r"lam must be in 0\.\.1, got nan"),
        (([0, 1], [0, 1], torch.ones(2)), ValueError, r"lam must be a scalar, got shape \(2,\)"),
    ],
)
def test_loss_refuses(arguments, error, message):
    arguments = [torch.tensor(a) if isinstance(a, list) else a for a in arguments]
    with pytest.raises(error, match=message):
        MOSLoss(GROUPS)(torch.zeros(2, GROUPS.width), *arguments)


def test_loss_refuses_settings():
    with pytest.raises(ValueError, match=r"reduction must be .*, got 'avg'"):
        MOSLoss(GROUPS, "avg")
    with pytest.raises(ValueError, match="ignore_index must be no class id, got 6"):
        MOSLoss(GROUPS, ignore_index=6)
    with pytest.raises(TypeError, match="groups must be Groups, got Tensor"):
        MOSLoss(GROUPS.offsets)


# MOSHead


def random_head(groups=GROUPS, **kwargs):
    head = MOSHead(6, groups, **kwargs)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    return head


def test_head_starts_at_zero():
    head = MOSHead(6, GROUPS, dtype=torch.float64)
    assert head.weight.shape == (10, 6)
    assert head.weight.dtype == torch.float64
    assert not head.weight.any()
    assert not head.bias.any()
    assert head(torch.randn(2, 3, 6).double()).shape == (2, 3, 10)
    assert MOSHead(6, GROUPS, bias=False).bias is None
    assert "3 groups" in repr(head)
    with pytest.raises(TypeError, match="groups must be Groups, got list"):
        MOSHead(6, [0, 3])


def test_predict_gives_class_ids():
    head = random_head()
    features = torch.randn(100, 6, generator=torch.Generator().manual_seed(2))
    prediction = head.predict(features)
    logits = head(features)
    p = [logits[:, a:b].softmax(1) for a, b in GROUPS.slices().tolist()]
    prob = torch.stack([q[:, 1:].max(1).values for q in p], 1)
    score = -torch.stack([q[:, 0] for q in p], 1).min(1).values
    torch.testing.assert_close(prediction.score, score)
    torch.testing.assert_close(prediction.prob, prob.max(1).values)
    assert torch.equal(prediction.group, prob.argmax(1))
    members = [[1, 4], [0, 2, 5], [3, 6]]
    by_name = {"a": members[0], "b": members[1], "c": members[2]}
    expected = [
        by_name[GROUPS.names[k]][int(p[k][i, 1:].argmax())]
        for i, k in enumerate(prediction.group.tolist())
    ]
    assert prediction.label.tolist() == expected
    assert not prediction.score.requires_grad


def test_head_and_loss_learn_interleaved_classes():
    generator = torch.Generator().manual_seed(3)
    centers = 4 * torch.randn(7, 6, generator=generator)
    target = torch.arange(7).repeat(20)
    features = centers[target] + torch.randn(140, 6, generator=generator)
    head, loss = MOSHead(6, GROUPS), MOSLoss(GROUPS)
    optimizer = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        loss(head(features), target).backward()
        optimizer.step()
    prediction = head.predict(features)
    assert (prediction.label == target).float().mean() > 0.95
    assert torch.equal(prediction.group, GROUPS.class_to_group[prediction.label])


def save_and_load(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_carries_the_groups(bias):
    head = random_head(bias=bias)
    state = save_and_load(head.state_dict())
    other = MOSHead(6, GROUPS, bias)
    assert not other.load_state_dict(state).missing_keys
    assert torch.equal(other.weight, head.weight)
    assert bytes(state["_extra_state"].tolist()).decode() == GROUPS.to_json()

    again = MOSHead.from_state_dict(state)
    assert again.groups == GROUPS
    assert (again.bias is None) == (not bias)
    assert torch.equal(again(torch.ones(6)), head(torch.ones(6)))


def test_state_dict_within_a_model():
    model = nn.Sequential(nn.Linear(4, 6), random_head().half())
    head = MOSHead.from_state_dict(save_and_load(model.state_dict()), "1.")
    assert head.weight.dtype == torch.float16
    assert torch.equal(head.weight, model[1].weight)
    with pytest.raises(
        ValueError, match=r"hold a MOSHead at prefix '0\.', got no '0._extra_state'"
    ):
        MOSHead.from_state_dict(model.state_dict(), "0.")


def test_state_dict_through_safetensors():
    safetensors = pytest.importorskip("safetensors.torch")
    head = random_head()
    state = safetensors.load(safetensors.save(head.state_dict()))
    assert MOSHead.from_state_dict(state).groups == GROUPS


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Groups.from_sizes([4, 3]), r"3 groups: b 3, a 2, c 2\), got .*2 groups: 0 4, 1 3\)"),
        (Groups.from_sizes([3, 2, 2]), r"class 1 in column 5 \(group 'a'\), got column 2 \(group"),
        (
            Groups(GROUPS.class_to_group, index_in_group=[0, 1, 1, 0, 0, 2, 1]),
            r"class 1 in column 5 \(group 'a'\), got column 6 \(group '1'\)",
        ),
    ],
)
def test_state_dict_of_another_taxonomy_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        MOSHead(6, GROUPS).load_state_dict(MOSHead(6, other).state_dict(), strict=False)


def test_state_dict_with_other_names_is_taken():
    head = MOSHead(6, Groups(GROUPS.class_to_group, ["x", "y", "z"]))
    head.load_state_dict(random_head().state_dict())
    assert head.groups.names == ("x", "y", "z")


def test_state_dict_of_a_plain_linear_layer():
    linear, head = nn.Linear(6, 10), MOSHead(6, GROUPS)
    with pytest.raises(RuntimeError, match="_extra_state"):
        head.load_state_dict(linear.state_dict())
    head.load_state_dict(linear.state_dict(), strict=False)
    assert torch.equal(head.weight, linear.weight)
    bad = {**linear.state_dict(), "_extra_state": torch.zeros(3)}
    with pytest.raises(ValueError, match="must be the uint8 tensor"):
        head.load_state_dict(bad)
    bad["_extra_state"] = torch.full((3,), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match="_extra_state must be the groups that MOSHead saves"):
        head.load_state_dict(bad)


def test_copies_and_moves():
    head = random_head()
    features = torch.randn(5, 6)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert other.groups == GROUPS
        assert torch.equal(other(features), head(features))
    meta = MOSHead(6, GROUPS, device="meta")
    assert meta.groups.device.type == "meta"
    assert meta.state_dict()["_extra_state"].device.type == "cpu"
    meta.to_empty(device="cpu").load_state_dict(head.state_dict())
    assert meta.groups.device.type == "cpu"
    assert torch.equal(meta.predict(features).label, head.predict(features).label)


def test_averaged_model():
    head = random_head()
    averaged = torch.optim.swa_utils.AveragedModel(head, use_buffers=True)
    averaged.update_parameters(head)
    averaged.update_parameters(MOSHead(6, GROUPS))
    torch.testing.assert_close(averaged.module.weight, head.weight / 2)
    assert MOSHead.from_state_dict(averaged.state_dict(), "module.").groups == GROUPS


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        head = nn.parallel.DistributedDataParallel(random_head())
        MOSLoss(GROUPS)(head(torch.randn(4, 6)), torch.arange(4)).backward()
        assert head.module.weight.grad.any()
        assert MOSHead.from_state_dict(head.state_dict(), "module.").groups == GROUPS
    finally:
        torch.distributed.destroy_process_group()


def test_head_compiles_and_exports():
    head = random_head()
    features = torch.randn(5, 6)
    expected = head.predict(features)
    compiled = torch.compile(head.predict, fullgraph=True, backend="eager")(features)
    for a, b in zip(expected, compiled, strict=True):
        assert torch.equal(a, b)
    exported = torch.export.export(head, (features,)).module()
    assert torch.equal(exported(features), head(features))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda():
    head = random_head().cuda()
    assert head.groups.device.type == "cuda"
    assert head.groups is GROUPS.to("cuda")
    features = torch.randn(5, 6)
    label = head.predict(features.cuda()).label
    assert label.is_cuda
    assert torch.equal(label.cpu(), random_head().predict(features).label)
    logits, a, b = batch()
    expected = MOSLoss(GROUPS)(logits, a, b, 0.3)
    lam = torch.tensor(0.3)
    torch.testing.assert_close(
        MOSLoss(GROUPS)(logits.cuda(), a.cuda(), b.cuda(), lam).cpu(), expected
    )
    assert save_and_load(head.state_dict())["_extra_state"].device.type == "cpu"
