"""What every CUDA kernel takes of a multiprocessor, as the compiler reports it.

    python scripts/cuda_resources.py [--check] [--out FILE] [--arch 80 90] [--jobs 4]

Compiles the device code of each csrc/cuda/*.cu for the oldest architecture nvcc knows, Ampere (80),
Hopper (90) and the newest, and writes registers, static shared memory, stack, spills and occupancy
of each kernel of namespace oodk to benchmarks/results/cuda_resources.json. ``--check`` exits with 1
where a kernel spills registers to memory, unless it is one of float64, which is nobody's hot path,
and where one that writes a gradient (``..._backward``) has no store of 16 bytes in its PTX.
Needs nvcc, ptxas and an installed torch, no GPU.

Occupancy: resident warps over the most there can be, at the block size of ``__launch_bounds__``
(which PTX repeats), or else at the ``k...Threads`` constant that the source hands to launch();
null where there is neither. Dynamic shared memory, chosen at launch, is not in the report and may
lower it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
RESULTS = ROOT / "benchmarks" / "results" / "cuda_resources.json"
OURS = "oodk::"
FLAGS = [
    *("-std=c++20", "--expt-relaxed-constexpr", "-w"),
    *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
]


# --- the compiler's reports -----------------------------------------------------------------------


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one architecture, or of a function that kernels call; memory in bytes."""

    registers: int | None  # None for a function
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


def parse_ptxas(report: str) -> dict[str, Resources]:
    """Mangled name -> resources, from the output of ``ptxas -v``."""
    found = {}
    for part in re.split(r"Function properties for (?=\S)", report)[1:]:
        name = part.split("\n", 1)[0].strip()
        memory = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        if memory is None:
            raise ValueError(f"ptxas reported nothing that can be read about {name}:\n{part}")
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        found[name] = Resources(
            int(registers[1]) if registers else None,
            int(shared[1]) if shared else 0,
            *map(int, memory.groups()),
        )
    return found


def parse_bounds(ptx: str) -> dict[str, int]:
    """Mangled name -> threads of a block, of the kernels of a PTX file with launch bounds."""
    found = {}
    for name, directives in re.findall(r"\.entry\s+(\S+?)\s*\([^)]*\)([^{]*)\{", ptx):
        bound = re.search(r"\.(?:maxntid|reqntid)\s+([\d, ]+)", directives)
        if bound:
            threads = 1
            for extent in bound[1].split(","):
                threads *= int(extent)
            found[name] = threads
    return found


def wide_stores(ptx: str) -> dict[str, int]:
    """Mangled name -> how many streaming stores of 16 bytes a kernel has."""
    parts = re.split(r"\.entry\s+(\S+?)\s*\(", ptx)
    wide = r"\bst\.global\.cs\.v4\.[ubf]32\b"
    return {
        n: len(re.findall(wide, body)) for n, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def launch_threads(source: str) -> dict[str, int]:
    """Name of a kernel -> threads, where it is launched with a k...Threads constant."""
    constants = dict(re.findall(r"constexpr int (k\w*Threads) = (\d+)\b", source))
    launches = re.findall(r"\blaunch\(\s*(\w+)[^;]*?,\s*(k\w*Threads)\s*,", source)
    return {kernel: int(constants[name]) for kernel, name in launches if name in constants}


def demangle(names: list[str]) -> list[str]:
    done = subprocess.run(
        [find("c++filt")], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def short_name(demangled: str) -> str:
    """``void oodk::cuda::f<__half>(int)`` -> ``f<half>``."""
    name = demangled.removeprefix("void ")
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0 and not name.startswith("(anonymous", i):
            name = name[:i]
            break
    name = re.sub(r"\(anonymous namespace\)::|(?:\w+::)+", "", name)
    name = name.replace("__nv_bfloat16", "bfloat16").replace("__half", "half")
    return re.sub(r" +>", ">", name)


# --- occupancy ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Multiprocessor:
    """What blocks share: the table of compute capabilities of the CUDA C++ Programming Guide."""

    warps: int
    blocks: int
    shared_kib: int

    def resident_blocks(self, architecture: int, threads: int, use: Resources) -> int:
        warps = -(-threads // 32)
        registers_of_warp = -(-(use.registers or 1) * 32 // 256) * 256
        by_registers = 65536 // registers_of_warp // 4 * 4 // warps
        # From Ampere on, a KiB of every block is the system's.
        unit, reserved = (256, 0) if architecture < 80 else (128, 1024)
        shared = -(-(use.shared + reserved) // unit) * unit
        by_shared = self.shared_kib * 1024 // shared if shared else self.blocks
        return min(self.blocks, self.warps // warps, by_registers, by_shared)


MULTIPROCESSORS = {
    75: Multiprocessor(32, 16, 64),
    80: Multiprocessor(64, 32, 164),
    86: Multiprocessor(48, 16, 100),
    87: Multiprocessor(48, 16, 164),
    89: Multiprocessor(48, 24, 100),
    90: Multiprocessor(64, 32, 228),
    100: Multiprocessor(64, 32, 228),
    103: Multiprocessor(64, 32, 228),
    110: Multiprocessor(48, 24, 228),
    120: Multiprocessor(48, 24, 100),
    121: Multiprocessor(48, 24, 100),
}


def occupancy(architecture: int, threads: int | None, use: Resources) -> tuple[int, float] | None:
    """Resident blocks, and resident warps over the most; None where something is not known."""
    limits = MULTIPROCESSORS.get(architecture)
    if limits is None or threads is None or use.registers is None:
        return None
    blocks = limits.resident_blocks(architecture, threads, use)
    return blocks, blocks * -(-threads // 32) / limits.warps


# --- compilation ----------------------------------------------------------------------------------


def find(name: str, path: str | None = None) -> str:
    found = shutil.which(name, path=path)
    if found is None:
        sys.exit(f"cuda_resources: {name} was not found: put it on PATH")
    return found


def find_nvcc() -> str:
    return find(os.environ.get("CUDACXX", "nvcc"))


def find_ptxas(nvcc: str) -> str:
    """On PATH, or beside nvcc."""
    return find("ptxas", os.pathsep.join([os.environ["PATH"], str(Path(nvcc).resolve().parent)]))


def output_of(command: list[str]) -> str:
    """Standard output and standard error."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"cuda_resources: {' '.join(command)} failed:\n{done.stdout}")
    return done.stdout


def architectures(known: str) -> list[int]:
    """The oldest, Ampere, Hopper and the newest of ``nvcc --list-gpu-arch``."""
    all_of_them = sorted(int(n) for n in re.findall(r"compute_(\d+)\b", known))
    wanted = {all_of_them[0], 80, 90, all_of_them[-1]}
    return sorted(wanted & set(all_of_them))


def torch_include() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("cuda_resources: needs torch's headers: install torch")
    return Path(spec.submodule_search_locations[0], "include")


def compile_one(source: Path, architecture: int, work: Path) -> list[dict[str, object]]:
    ptx = work / f"{source.stem}.{architecture}.ptx"
    include = ["-I", str(ROOT / "csrc"), "-isystem", str(torch_include())]
    target = f"-arch=compute_{architecture}"
    nvcc = find_nvcc()
    output_of([nvcc, "-ptx", *FLAGS, *include, target, str(source), "-o", str(ptx)])
    options = ["-v", "--gpu-name", f"sm_{architecture}", "-o", os.devnull]
    found = parse_ptxas(output_of([find_ptxas(nvcc), *options, str(ptx)]))
    bounds, wide = parse_bounds(ptx.read_text()), wide_stores(ptx.read_text())
    launched = launch_threads("\n".join(f.read_text() for f in sorted(SOURCES.rglob("*.cu*"))))
    rows = []
    for (mangled, use), name in zip(found.items(), demangle(list(found)), strict=True):
        if OURS not in name.split("(")[0]:
            continue
        kernel = short_name(name)
        threads = bounds.get(mangled, launched.get(kernel.split("<")[0]))
        resident = occupancy(architecture, threads, use)
        rows.append(
            {
                "kernel": kernel,
                "source": source.name,
                "architecture": architecture,
                "threads": threads,
                **vars(use),
                "wide_stores": wide.get(mangled, 0),
                "blocks": resident and resident[0],
                "occupancy": resident and round(resident[1], 4),
            }
        )
    return rows


def spills(rows: list[dict[str, object]]) -> list[str]:
    return [
        "{kernel} ({source}) on sm_{architecture}: {spill_stores} bytes of spill stores, "
        "{spill_loads} of spill loads, {stack} of stack".format(**row)
        for row in rows
        if (row["spill_stores"] or row["spill_loads"]) and "<double" not in str(row["kernel"])
    ]


def narrow_gradients(rows: list[dict[str, object]]) -> list[str]:
    return [
        "{kernel} ({source}) on sm_{architecture}".format(**row)
        for row in rows
        if str(row["kernel"]).split("<")[0].endswith("_backward") and not row["wide_stores"]
    ]


def write(path: Path, head: dict[str, object], rows: list[dict[str, object]]) -> None:
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    path.write_text(f'{json.dumps(head, indent=2)[:-2]},\n  "kernels": [\n{lines}\n  ]\n}}\n')


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Registers, spills and occupancy of the kernels")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 on register spills or narrow stores"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--arch", type=int, nargs="+", help="architectures, such as 80 90")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)

    nvcc = find_nvcc()
    start = time.monotonic()
    version = re.search(r"V([\d.]+)", output_of([nvcc, "--version"]))
    targets = options.arch or architectures(output_of([nvcc, "--list-gpu-arch"]))
    # The largest first, lest it be the last to finish.
    sources = sorted(SOURCES.glob("*.cu"), key=lambda f: -f.stat().st_size)
    with (
        tempfile.TemporaryDirectory() as work,
        ThreadPoolExecutor(options.jobs) as pool,
    ):
        tasks = [pool.submit(compile_one, s, a, Path(work)) for s in sources for a in targets]
        rows = [row for task in tasks for row in task.result()]
    rows.sort(key=lambda row: (row["source"], row["kernel"], row["architecture"]))
    head = {"nvcc": version and version[1], "architectures": targets}
    write(options.out, head, rows)
    names = {row["kernel"] for row in rows}
    print(
        f"{len(names)} kernels of {len(sources)} files on {targets}: {options.out} "
        f"({time.monotonic() - start:.0f} s)"
    )
    spilled = spills(rows)
    for line in spilled:
        print(f"register spills: {line}", file=sys.stderr)
    narrow = narrow_gradients(rows)
    for line in narrow:
        print(f"no store of 16 bytes: {line}", file=sys.stderr)
    return 1 if (spilled or narrow) and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
