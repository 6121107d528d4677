"""scripts/cuda_resources.py, on recorded output of nvcc and ptxas 13.0, and with nvcc itself."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

import cuda_resources as resources  # noqa: E402
from cuda_resources import Resources  # noqa: E402

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4oodk4cuda8spillingEPf' for 'sm_90'
ptxas info    : Function properties for _ZN4oodk4cuda8spillingEPf
    952 bytes stack frame, 1048 bytes spill stores, 1340 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 952 bytes cumulative stack size
ptxas info    : Compile time = 58.194 ms
ptxas info    : Compiling entry function '_ZN4oodk4cuda7boundedI6__halffEEvPKT_PT0_i' for 'sm_90'
ptxas info    : Function properties for _ZN4oodk4cuda7boundedI6__halffEEvPKT_PT0_i
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 1 barriers, 256 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 1.686 ms
ptxas info    : Function properties for _ZN4oodk4cuda6calledEPfi
    0 bytes stack frame, 592 bytes spill stores, 888 bytes spill loads
"""
SPILLING = "_ZN4oodk4cuda8spillingEPf"
BOUNDED = "_ZN4oodk4cuda7boundedI6__halffEEvPKT_PT0_i"
CALLED = "_ZN4oodk4cuda6calledEPfi"

PTX = """\
.visible .entry _ZN4oodk4cuda7boundedI6__halffEEvPKT_PT0_i(
	.param .u64 _ZN4oodk4cuda7boundedI6__halffEEvPKT_PT0_i_param_0,
	.param .align 8 .b8 _ZN4oodk4cuda7boundedI6__halffEEvPKT_PT0_i_param_1[64]
)
.maxntid 256, 1, 1
.minnctapersm 2
{
	ret;
}
	// .globl	_ZN4oodk4cuda9unboundedIlEEvPT_
.entry _ZN4oodk4cuda9unboundedIlEEvPT_(
	.param .u64 _ZN4oodk4cuda9unboundedIlEEvPT__param_0
)
{
	ret;
}
.entry two_dimensional()
.reqntid 16, 8
{
	ret;
}
"""


def test_parse_ptxas() -> None:
    assert resources.parse_ptxas(PTXAS) == {
        SPILLING: Resources(32, 0, 952, 1048, 1340),
        BOUNDED: Resources(12, 256, 0, 0, 0),
        CALLED: Resources(None, 0, 0, 592, 888),
    }
    with pytest.raises(ValueError, match=SPILLING):
        resources.parse_ptxas(PTXAS.replace("spill stores", "of something new"))


def test_parse_bounds() -> None:
    assert resources.parse_bounds(PTX) == {BOUNDED: 256, "two_dimensional": 128}


def test_wide_stores() -> None:
    wide = "\tst.global.cs.v4.u32 \t[%rd1], {%r1, %r2, %r3, %r4};\n"
    ptx = PTX.replace("{\n\tret;", "{\n" + wide + "\tst.global.cs.u32 [%rd1], %r1;\n\tret;", 1)
    found = resources.wide_stores(ptx)
    assert found[BOUNDED] == 1
    assert found["two_dimensional"] == 0
    rows = [
        {"kernel": f"mos_backward<{t}>", "source": "mos.cu", "architecture": 90, "wide_stores": n}
        for t, n in (("half", 1), ("float", 0))
    ]
    rows.append({**rows[1], "kernel": "mos_forward<float>"})
    assert resources.narrow_gradients(rows) == ["mos_backward<float> (mos.cu) on sm_90"]


def test_launch_threads() -> None:
    source = """
        constexpr int kOneThreads = 128; // of a block
        template <typename... P> void launch(void (*kernel)(P...), int64_t blocks, int threads);
        void f() {
          launch(one<Key>, (n + kOneThreads * 2 - 1) / 2, kOneThreads, 0, stream, x);
          launch(unknown, blocks, threads, 0, stream, kOneThreads);
          launch(
              two, std::max(blocks(1), std::min<int64_t>(2, 3)), kTwoThreads, shared, stream);
        }
        constexpr int kTwoThreads = 64;
    """
    assert resources.launch_threads(source) == {"one": 128, "two": 64}


def test_every_launched_kernel_of_the_sources_has_a_block_size() -> None:
    """Those that have no launch bounds."""
    source = "\n".join(f.read_text() for f in resources.SOURCES.glob("*.cu*"))
    threads = resources.launch_threads(source)
    assert threads["make_keys"] == threads["sum_chunks"] == threads["sum_blocks"] == 128


def test_names() -> None:
    names = resources.demangle([SPILLING, BOUNDED, "_ZN4oodk4cuda9unboundedIlEEvPT_"])
    assert [resources.short_name(n) for n in names] == [
        "spilling",
        "bounded<half, float>",
        "unbounded<long>",
    ]
    nested = "void oodk::cuda::f<__nv_bfloat16, oodk::g<(anonymous namespace)::h<int> > >(int*)"
    assert resources.short_name(nested) == "f<bfloat16, g<h<int>>>"


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "blocks", "share"),
    [
        (90, 128, 64, 0, 8, 0.5),  # registers: 65536 / (64 x 128)
        (90, 128, 65, 0, 7, 0.4375),  # of which a warp takes 256 at a time
        (90, 128, 16, 0, 16, 1.0),  # warps
        (90, 32, 16, 0, 32, 0.5),  # blocks
        (90, 128, 16, 48 << 10, 4, 0.25),  # shared memory: 228 KiB / (48 + 1)
        (75, 128, 16, 32 << 10, 2, 0.25),  # 64 KiB, none of it the system's
        (80, 1024, 64, 0, 1, 0.5),
        (121, 256, 40, 0, 6, 1.0),
        (75, 100, 16, 0, 8, 1.0),  # a block takes whole warps
    ],
)
def test_occupancy(
    architecture: int, threads: int, registers: int, shared: int, blocks: int, share: float
) -> None:
    use = Resources(registers, shared, 0, 0, 0)
    assert resources.occupancy(architecture, threads, use) == (blocks, share)


def test_occupancy_of_what_is_not_known() -> None:
    assert resources.occupancy(90, None, Resources(16, 0, 0, 0, 0)) is None
    assert resources.occupancy(999, 128, Resources(16, 0, 0, 0, 0)) is None
    assert resources.occupancy(90, 128, Resources(None, 0, 0, 0, 0)) is None


def test_spills_that_fail() -> None:
    row = {"kernel": "f<float, g<float>>", "source": "f.cu", "architecture": 90, "stack": 8}
    spilling = {**row, "spill_stores": 4, "spill_loads": 0}
    assert resources.spills([spilling]) == [
        "f<float, g<float>> (f.cu) on sm_90: 4 bytes of spill stores, 0 of spill loads, 8 of stack"
    ]
    assert resources.spills([{**row, "spill_stores": 0, "spill_loads": 0}]) == []
    assert resources.spills([{**spilling, "kernel": "f<double, g<double>>"}]) == []


def test_every_kernel_can_be_launched() -> None:
    """With the threads that it is launched with, a multiprocessor has the registers for a block."""
    kernels = json.loads(resources.RESULTS.read_text())["kernels"]
    impossible = [row for row in kernels if row["threads"] and row["blocks"] == 0]
    assert kernels
    assert not impossible
    assert resources.occupancy(90, 1024, Resources(80, 0, 0, 0, 0))[0] == 0


def test_architectures() -> None:
    known = "".join(f"compute_{n}\n" for n in (75, 80, 86, 89, 90, 100, 103, 120, 121))
    assert resources.architectures(known) == [75, 80, 90, 121]
    assert resources.architectures("compute_70\ncompute_80\ncompute_86\n") == [70, 80, 86]


needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None or shutil.which("ptxas") is None, reason="needs nvcc"
)
HARMLESS = """
namespace oodk::cuda {
constexpr int kHarmlessThreads = 128;
template <typename T> __global__ void harmless(T* y) { y[threadIdx.x] = T(threadIdx.x); }
inline void f(float* y) { launch(harmless<float>, 1, kHarmlessThreads, 0, 0, y); }
template __global__ void harmless<float>(float*);
}
namespace other { __global__ void not_ours() {} }
"""
# A hundred values alive at once, in the 32 registers that its bounds leave.
PLANTED = """
namespace oodk::cuda {
__global__ void __launch_bounds__(1024, 2) spilling(float* y) {
  float v[100], s = 0;
#pragma unroll
  for (int i = 0; i < 100; ++i) v[i] = y[threadIdx.x + 1024 * i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 100; ++i) s += v[i] * v[99 - i];
#pragma unroll
  for (int i = 0; i < 100; ++i) y[threadIdx.x + 1024 * i] = s * v[i];
}
}
"""


@needs_nvcc
def test_a_planted_spill_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resources, "SOURCES", tmp_path)
    launch = "template <typename... A> void launch(A... a);\n"
    (tmp_path / "harmless.cu").write_text(launch + HARMLESS)
    out = tmp_path / "found.json"
    arguments = ["--out", str(out), "--arch", "90", "--jobs", "2"]
    assert resources.main([*arguments, "--check"]) == 0
    rows = json.loads(out.read_text())["kernels"]
    assert [(row["kernel"], row["architecture"]) for row in rows] == [("harmless<float>", 90)]
    assert (rows[0]["threads"], rows[0]["occupancy"]) == (128, 1)

    (tmp_path / "planted.cu").write_text(PLANTED)
    assert resources.main([*arguments, "--check"]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("register spills: spilling (planted.cu) on sm_90: ")
    assert resources.main(arguments) == 0  # records it, without a check
    rows = json.loads(out.read_text())["kernels"]
    assert [row["spill_loads"] > 0 for row in rows] == [False, True]


@needs_nvcc
def test_a_source_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "SOURCES", tmp_path)
    (tmp_path / "broken.cu").write_text("__global__ void f() { undefined(); }\n")
    with pytest.raises(SystemExit, match='identifier "undefined" is undefined'):
        resources.main(["--out", str(tmp_path / "x"), "--arch", "90"])


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDACXX", raising=False)
    with pytest.raises(SystemExit, match="cuda_resources: nvcc was not found"):
        resources.main([])
