"""Every test that an op of op_db.py must pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from op_db import FLOATS, OPS, Op, Sample
from torch import Tensor
from torch._subclasses import FakeTensorMode

import oodkernels  # noqa: F401  (registers the ops)

ops = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
differentiable = pytest.mark.parametrize(
    "op", [op for op in OPS if op.differentiable], ids=lambda op: op.name
)
mapped = pytest.mark.parametrize("op", [op for op in OPS if op.mapped], ids=lambda op: op.name)
floats = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _where_there_is_a_kernel(request: pytest.FixtureRequest) -> None:
    values = getattr(request.node, "callspec", None) and request.node.callspec.params
    if not values:
        return
    if values.get("device") == "cuda" or "cuda" in request.node.name:
        name = f"oodk::{values['op'].name}"
        keys = ("CUDA", "CompositeImplicitAutograd", "CompositeExplicitAutograd")
        if not any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys):
            pytest.skip(f"{name} has no CUDA kernel yet")


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def is_score(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def doubled(sample: Sample) -> Sample:
    args = tuple(a.double() if is_score(a) else a for a in sample.args)
    return Sample(args, sample.kwargs, sample.name)


def check(op: Op, dtype: torch.dtype, sample: Sample, actual: Any) -> None:
    exact = sample if op.as_is else doubled(sample)
    expected = op.reference(*exact.args, **exact.kwargs)
    for i, (a, e) in enumerate(zip(outputs(actual), outputs(expected), strict=True)):
        assert a.shape == e.shape, sample.name
        if a.is_floating_point():
            wide = dtype == torch.float64 or i in op.float64
            expected_type = torch.float64 if wide else torch.float32
            assert a.dtype == (dtype if i in op.like_input else expected_type)
            rtol, atol = op.tolerance(i, dtype)
            torch.testing.assert_close(
                a.double(),
                e.double(),
                rtol=rtol,
                atol=atol,
                equal_nan=True,
                msg=lambda m, i=i: f"{sample.name}, output {i}: {m}",
            )
        elif op.compare is None:
            assert torch.equal(a, e), sample.name
    if op.compare is not None:
        op.compare(sample, actual, expected)


def same(a: Any, b: Any) -> None:
    for x, y in zip(outputs(a), outputs(b), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


SCHEMAS = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("oodk::")]


def test_every_op_has_a_row() -> None:
    registered = {schema.name for schema in SCHEMAS}
    missing = registered - {f"oodk::{op.name}" for op in OPS}
    assert registered
    assert not missing, f"op_db.py has no row for {sorted(missing)}"


def test_no_schema_takes_words_for_errors() -> None:
    words = {
        f"{schema.name}({argument.name})"
        for schema in SCHEMAS
        for argument in schema.arguments
        if "str" in str(argument.type)
    }
    assert words == {"oodk::dos_select(mode)", "oodk::shape_features_(shape)"}  # settings


@ops
@floats
def test_reference(op: Op, dtype: torch.dtype, device: str) -> None:
    for sample in op.samples(device, dtype):
        check(op, dtype, sample, op.call(*sample.args, **sample.kwargs))


def rows_of(op: Op, sample: Sample, rows: list[int]) -> tuple[Any, ...]:
    return tuple(a[rows] if i in op.rowwise else a for i, a in enumerate(sample.args))


def strided(x: Tensor) -> list[Tensor]:
    """The values of x, laid out as slices of larger tensors, transposed and expanded."""
    layouts = []
    if x.dim() >= 1:
        padded = torch.full((*x.shape[:-1], x.shape[-1] + 3), 99, dtype=x.dtype, device=x.device)
        padded[..., 1:-2] = x
        layouts.append(padded[..., 1:-2])
        wide = torch.full((*x.shape, 2), 99, dtype=x.dtype, device=x.device)
        wide[..., 0] = x
        layouts.append(wide[..., 0])
    if x.dim() >= 2:
        layouts.append(x.transpose(0, -1).contiguous().transpose(0, -1))
    for layout in layouts:
        assert torch.equal(layout, x) or x.isnan().any()
    return layouts


@ops
def test_strides(op: Op, device: str) -> None:
    for sample in op.samples(device, torch.float32):
        expected = op.call(*sample.args, **sample.kwargs)
        for i in {op.varied, *op.rowwise}:
            for layout in strided(sample.args[i]):
                args = (*sample.args[:i], layout, *sample.args[i + 1 :])
                same(op.call(*args, **sample.kwargs), expected)
        # One row, again and again, in the memory of one.
        if op.rowwise and sample.args[0].dim() == 2 and len(sample.args[0]):
            once = rows_of(op, sample, [0])
            again = tuple(
                a.expand(5, *a.shape[1:]) if i in op.rowwise else a for i, a in enumerate(once)
            )
            expected = op.call(*rows_of(op, sample, [0] * 5), **sample.kwargs)
            same(op.call(*again, **sample.kwargs), expected)


@ops
def test_opcheck(op: Op, device: str) -> None:
    finite = [s for s in op.samples(device, torch.float32) if "special" not in s.name]
    ways = ("test_schema", "test_autograd_registration", "test_faketensor")
    traced = set()  # of what a trace depends on; sizes are symbols in it
    for sample in finite[::3]:
        args = sample.args
        if op.differentiable:
            args = (args[0].clone().requires_grad_(), *args[1:])
        kind = tuple(a.dim() if isinstance(a, Tensor) else repr(a) for a in args)
        more = () if kind in traced else ("test_aot_dispatch_dynamic",)
        traced.add(kind)
        torch.library.opcheck(op.overload, args, sample.kwargs, test_utils=(*ways, *more))


def gradient(fn: Any, sample: Sample) -> Tensor:
    """Gradient of the first argument under a fixed random weighting of the outputs."""
    x = sample.args[0].detach().clone().requires_grad_()
    out = outputs(fn(x, *sample.args[1:], **sample.kwargs))
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in out]
    return torch.autograd.grad(out, x, weights)[0]


@differentiable
@floats
def test_gradient_against_reference(op: Op, dtype: torch.dtype, device: str) -> None:
    rtol, atol = {
        torch.float64: (1e-11, 1e-12),
        torch.float32: (1e-5, 1e-6),
        torch.bfloat16: (2**-8, 1e-6),
        torch.float16: (2**-11, 1e-6),
    }[dtype]
    for sample in op.samples(device, dtype):
        if "special" in sample.name:
            continue
        grad = gradient(op.call, sample)
        assert grad.dtype == dtype
        expected = gradient(op.reference, doubled(sample))
        torch.testing.assert_close(
            grad.double(),
            expected,
            rtol=rtol,
            atol=atol,
            msg=lambda m, s=sample: f"{s.name}: {m}",
        )


@differentiable
def test_gradient_of_special_rows(op: Op, device: str) -> None:
    for sample in op.samples(device, torch.float32):
        if "special" in sample.name:
            grad = gradient(op.call, sample)
            expected = gradient(op.reference, doubled(sample)).float()
            torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@differentiable
def test_gradcheck(op: Op, device: str) -> None:
    for sample in op.samples(device, torch.float64):
        x = sample.args[0]
        if x.numel() > 3000 or "special" in sample.name:
            continue
        x = x.detach().clone().requires_grad_()
        torch.autograd.gradcheck(
            lambda z, s=sample: op.call(z, *s.args[1:], **s.kwargs), (x,), fast_mode=True
        )


@differentiable
def test_double_backward_is_refused(op: Op, device: str) -> None:
    sample = next(op.samples(device, torch.float64))
    x = sample.args[0].clone().requires_grad_()
    out = outputs(op.call(x, *sample.args[1:], **sample.kwargs))
    (grad,) = torch.autograd.grad(sum(o.sum() for o in out), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), x)


class OfAHead(torch.nn.Module):
    """An op on what a layer with parameters puts out, as in a network that is being trained."""

    def __init__(self, op: Op, sample: Sample) -> None:
        super().__init__()
        self.call, self.kwargs = op.call, sample.kwargs
        self.scale = torch.nn.Parameter(torch.ones((), device=sample.args[0].device))

    def forward(self, *args: Any) -> Any:
        return self.call(*(a * self.scale if is_score(a) else a for a in args), **self.kwargs)


@ops
def test_outputs_of_a_head(op: Op, device: str) -> None:
    """Eager, compiled and exported: the same outputs, and the same gradients or none."""
    sample = next(op.samples(device, torch.float32))
    head = OfAHead(op, sample)
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(head, sample.args).module()
    expected = outputs(head(*sample.args))
    for way in (head, compiled, exported):
        found = outputs(way(*sample.args))
        same(tuple(o.detach() for o in found), tuple(o.detach() for o in expected))
        for out in found:
            assert out.requires_grad == (op.differentiable and out.is_floating_point())
        if op.differentiable:
            (scale,) = way.parameters()
            grads = [
                torch.autograd.grad(sum(o.sum() for o in outs), parameter, retain_graph=True)
                for outs, parameter in ((found, scale), (expected, head.scale))
            ]
            torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-4)


@mapped
def test_gradient_by_torch_func(op: Op, device: str) -> None:
    """``torch.func.grad``, its vmap over rows, and compiled: the gradient of eager mode."""
    samples = op.samples(device, torch.float32)
    sample = next(s for s in samples if s.args[0].dim() == (3 if op.problem else 2))
    position = next(i for i, a in enumerate(sample.args) if is_score(a))

    def total(*args: Any) -> Tensor:
        found = outputs(op.call(*args, **sample.kwargs))
        return sum((o.sum() for o in found if o.is_floating_point()), (2 * args[position]).sum())

    args = [a.clone().requires_grad_() if i == position else a for i, a in enumerate(sample.args)]
    (expected,) = torch.autograd.grad(total(*args), args[position])
    assert op.differentiable or (expected == 2).all()
    grad = torch.func.grad(total, argnums=position)
    in_dims = tuple(0 if i in op.mapped else None for i in range(len(sample.args)))
    each = torch.func.vmap(grad, in_dims=in_dims)
    torch._dynamo.reset()
    ways = [grad, each, torch.compile(each, backend="aot_eager")]
    if op.differentiable:
        ways.append(torch.compile(grad, fullgraph=True, backend="aot_eager"))
    for way in ways:
        torch.testing.assert_close(way(*sample.args), expected, rtol=1e-6, atol=1e-6)


def as_numpy(x: Any) -> Any:
    kinds = {bool: np.bool_, int: np.int64, float: np.float64}
    return kinds[type(x)](x) if type(x) in kinds else x


@ops
def test_numpy_scalars(op: Op) -> None:
    for sample in list(op.samples("cpu", torch.float32))[:6]:
        args = tuple(map(as_numpy, sample.args))
        kwargs = {name: as_numpy(value) for name, value in sample.kwargs.items()}
        same(op.call(*args, **kwargs), op.call(*sample.args, **sample.kwargs))


@differentiable
def test_compile(op: Op, device: str) -> None:
    """With gradients, of fixed sizes; the others are compiled of any size, and behind a head."""
    torch._dynamo.reset()
    compiled = torch.compile(op.call, fullgraph=True, dynamic=False)
    for sample in list(op.samples(device, torch.float32))[:2]:
        expected = op.call(*sample.args, **sample.kwargs)
        same(compiled(*sample.args, **sample.kwargs), expected)
        same(gradient(compiled, sample), gradient(op.call, sample))


@ops
def test_compile_dynamic(op: Op, device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(op.call, fullgraph=True, dynamic=True)
    for sample in list(op.samples(device, torch.float32))[:4]:
        same(compiled(*sample.args, **sample.kwargs), op.call(*sample.args, **sample.kwargs))


@mapped
def test_vmap(op: Op, device: str) -> None:
    samples = op.samples(device, torch.float32)
    sample = next(s for s in samples if s.args[0].dim() == (3 if op.problem else 2))
    n = min(5, len(sample.args[0]))
    args = [a[:n] if i in op.mapped else a for i, a in enumerate(sample.args)]
    in_dims = [0 if i in op.mapped else None for i in range(len(args))]
    each = [
        outputs(op.call(*(a[r] if d == 0 else a for a, d in zip(args, in_dims, strict=True))))
        for r in range(n)
    ]
    expected = tuple(map(torch.stack, zip(*each, strict=True)))
    same(outputs(torch.func.vmap(op.call, tuple(in_dims))(*args)), expected)
    first = args[0].movedim(0, 1).contiguous()
    same(outputs(torch.func.vmap(op.call, (1, *in_dims[1:]))(first, *args[1:])), expected)
    if "mos" in op.name:
        all_mapped = [0 if isinstance(a, Tensor) else None for a in args]
        many = [
            torch.stack([a] * n) if d == 0 and e is None else a
            for a, d, e in zip(args, all_mapped, in_dims, strict=True)
        ]
        with pytest.raises(ValueError, match="vmap over groups"):
            torch.func.vmap(op.call, tuple(all_mapped))(*many)


@ops
def test_refused(op: Op, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OODK_VALIDATE", "1")
    for case in op.refused(device):
        with pytest.raises(case.error, match=f"^{op.says or op.name}: .*{case.message}"):
            op.call(*case.args, **case.kwargs)


@ops
def test_refused_by_the_fake(op: Op) -> None:
    for case in op.refused("cpu"):
        if case.contents:
            continue
        with FakeTensorMode() as mode:
            args = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in case.args]
            with pytest.raises(case.error, match=f"^{op.says or op.name}: .*{case.message}"):
                op.call(*args, **case.kwargs)


@ops
def test_threads_and_repetition(op: Op) -> None:
    threads = torch.get_num_threads()
    for sample in op.samples("cpu", torch.float32):
        if sample.args[0].dim() != 2:
            continue
        many = rows_of(op, sample, list(range(len(sample.args[0]))) * 40)
        try:
            torch.set_num_threads(1)
            expected = op.call(*many, **sample.kwargs)
            for n in (2, 3, 4):
                torch.set_num_threads(n)
                same(op.call(*many, **sample.kwargs), expected)
        finally:
            torch.set_num_threads(threads)


@ops
@floats
def test_autocast(op: Op, dtype: torch.dtype, device: str) -> None:
    sample = next(op.samples(device, dtype))
    expected = op.call(*sample.args, **sample.kwargs)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = op.call(*sample.args, **sample.kwargs)
    same(actual, expected)
    for out in outputs(actual):
        half = out.is_floating_point() and out.dtype.itemsize == 2
        assert not half or (op.like_input and out.dtype == dtype)


@ops
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph(op: Op) -> None:
    sample = next(op.samples("cuda", torch.float32))
    op.call(*sample.args, **sample.kwargs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op.call(*sample.args, **sample.kwargs)
    sample.args[0].copy_(sample.args[0].flip(0))
    graph.replay()
    torch.cuda.synchronize()
    same(captured, op.call(*sample.args, **sample.kwargs))
