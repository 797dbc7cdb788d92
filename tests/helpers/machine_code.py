"""docs/machine_code.md: what the compilers make of the GPU kernels, counted without a GPU.

    python tests/helpers/machine_code.py            every kernel, a few minutes; needs nvcc and triton
    python tests/helpers/machine_code.py --gemm     only the overlapped GEMM, some seconds

The table of the overlapped GEMM keeps a line for each revision of csrc/ that has changed its counts, so that a change
shows beside what was there before.
"""

import argparse
import datetime
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from cuda_tools import ROOT, SOURCES, compile_cubin, machine_code, nvcc, usage
from sass import Code, Loop, kernels

sys.path.insert(0, str(ROOT))
from benchmarks.markdown import table

PAGE = ROOT / "docs" / "machine_code.md"
GEMM = "gemm_sm90"
HOPPER_ARCH, COUNTED = "90a", "90"
ARCHS = ("80", "86", COUNTED, "100")
"""Of the kernels that run on every card; instructions are counted in the code for ``COUNTED``."""

LAYERS = 24
"""Layers that IGVA's plan reads: a warp loads 16 bytes a lane of each for 256 elements of the mixed row."""

LAYER_LOAD = r"(?:LDG|LDGSTS)\.\S*128"
"""16 bytes, to registers or to shared memory."""

COLD = r"kernelId|Li1E"
"""Kernels for fp64, and for rows that are not a multiple of 16 bytes: they serve tests and rare layouts."""


class Gemm(NamedTuple):
    """The parts of the overlapped GEMM that its speed hangs on."""

    mixers: list[Loop]
    """The innermost loops that load layers, 16 bytes at a time, and multiply nothing. There are several where the
    kernel has special cases."""
    epilogue: Code
    """What a tile of the result takes after its last product: bias, activation, stores."""

    def mix(self):
        """Instructions for 256 elements of IGVA's row by the mixer that has most loads in a pass: the least, which is
        the shortest pass with all of them, and the most, with every branch; and those loads."""
        found = []
        for loop in self.mixers:
            least = loop.common_pass(LAYER_LOAD)
            loads = least.count(LAYER_LOAD)
            found.append((-loads, len(least) * LAYERS // loads, len(loop.own) * LAYERS // loads))
        loads, least, most = min(found)
        return least, most, -loads


def gemm_parts(kernel):
    """Finds them by what they do, wherever the compiler has put them.

    Raises:
        ValueError: there is no such loop, or there are several that multiply and store.
    """
    mixers = kernel.innermost(LAYER_LOAD, without=("HGMMA",))
    tiles = [loop for loop in kernel.loops if loop.has("HGMMA", "STG")]
    if not mixers or len(tiles) != 1:
        raise ValueError(f"{kernel.name}: {len(mixers)} loops that mix and {len(tiles)} over tiles, need some and one")
    return Gemm(mixers, tiles[0].after_last("HGMMA"))


def spills(code):
    """Accesses of local memory."""
    return code.count("STL|LDL")


def _write(section, lines):
    """Puts lines between the marks of a section of the page."""
    text = PAGE.read_text()
    begin, end = f"<!-- {section} -->\n", f"<!-- end of {section} -->"
    head, rest = text.split(begin)
    PAGE.write_text(head + begin + "\n" + "\n".join(lines).rstrip() + "\n\n" + end + rest.split(end)[1])


def _lines_of(section):
    """The rows of a section's table as they are now, as lists of cells."""
    inside = PAGE.read_text().split(f"<!-- {section} -->\n")[1].split(f"<!-- end of {section} -->")[0]
    rows = [line for line in inside.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def _revision():
    """The last change of csrc/, and a plus where the working tree has others."""
    git = ["git", "-C", str(ROOT)]
    last = subprocess.run([*git, "log", "-1", "--format=%h", "--", "csrc"], capture_output=True, text=True, check=True)
    dirty = subprocess.run([*git, "status", "--porcelain", "--", "csrc"], capture_output=True, text=True, check=True)
    return last.stdout.strip() + "+" * bool(dirty.stdout)


def _compiler():
    said = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {re.search(r'V([0-9.]+)', said)[1]}"


def _readable(names):
    """Kernels as C++ writes them, shortened: ``mix_kernel<bf16, 8>``."""
    said = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    short = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32", "igva::cuda::": "", "void ": ""}
    return {name: _replaced(text.partition("(")[0], short) for name, text in zip(names, said, strict=True)}


def _replaced(text, words):
    for word, other in words.items():
        text = text.replace(word, other)
    return text


def write_gemm(folder):
    """The line of this revision in the table of the overlapped GEMM."""
    cubin = compile_cubin(GEMM, HOPPER_ARCH, folder)
    used, code = usage(cubin), kernels(machine_code(cubin))
    names, revision = _readable(list(code)), _revision()
    lines = [row for row in _lines_of("gemm") if row[0].rstrip("+") != revision.rstrip("+") and "+" not in row[0]]
    for name, kernel in sorted(code.items(), key=lambda item: names[item[0]]):
        parts = gemm_parts(kernel)
        epilogue = parts.epilogue
        least, most, loads = parts.mix()
        counts = [
            f"`{names[name]}`", f"{used[name].registers}", f"{len(kernel):,}", f"{least:,} / {most:,}", f"{loads}",
            f"{len(epilogue):,}", f"{epilogue.count('LDG|LD')}", f"{epilogue.count('BRA')}", f"{spills(kernel)}",
        ]  # fmt: skip
        before = [row[2:] for row in lines if row[2] == counts[0]]
        if counts not in before[-1:]:
            lines.append([revision, f"{datetime.date.today()}", *counts])
    heads = [
        "revision of csrc/",
        "date",
        "kernel",
        "registers",
        "instructions",
        "a mixer's for 256 elements, least / most",
    ]
    heads += ["loads a pass", "epilogue", "its loads", "its branches", "spills"]
    _write("gemm", table(heads, lines))


def write_cuda(folder):
    """Every kernel of CUDA C++, but for fp64, odd widths and fp16, which is bf16's code with other conversions."""
    used, code, lines = {}, {}, []
    for source in sorted(file.stem for file in SOURCES.rglob("*.cu") if "__global__" in file.read_text()):
        archs = [HOPPER_ARCH] if source.endswith("_sm90") else ARCHS
        for arch in archs:
            cubin = compile_cubin(source, arch, folder)
            for name, each in usage(cubin).items():
                used.setdefault(name, {})[arch] = each
            if arch in (HOPPER_ARCH, COUNTED):
                code |= kernels(machine_code(cubin))
    names = _readable([name for name in used if not re.search(COLD, name)])
    for name, readable in sorted(names.items(), key=lambda item: item[1]):
        if "fp16" in readable:
            continue
        registers = " / ".join(f"{each.registers}" for each in used[name].values())
        spilled = max(each.stack + each.local for each in used[name].values())
        counted = used[name].get(COUNTED) or used[name][HOPPER_ARCH]
        lines.append([f"`{readable}`", registers, f"{counted.shared:,}", f"{spilled}", *_counts(code[name])])
    heads = ["kernel", "registers, sm_" + " / ".join(ARCHS), "shared memory", "spilled", *COUNTS]
    _write("cuda", [f"{_compiler()}, csrc/ at {_revision()}.", "", *table(heads, lines)])


WAITING = 12
"""Instructions of a loop that only polls a barrier, at most."""

COUNTS = ("instructions", "global loads", "of 16 bytes", "stores", "shared loads", "products", "largest innermost loop")


def _counts(kernel):
    work = [loop for loop in kernel.loops if not any(map(_is_work, loop.nest()[1:])) and _is_work(loop)]
    columns = ("LDG|LD|LDGSTS|UTMALDG", r"(?:LDG|LDGSTS)\.\S*128", "STG|ST", "LDS|LDSM", "HGMMA|HMMA|IMMA|UTC[A-Z]*MMA")
    largest = "none"
    if work:
        loop = max(work, key=len)
        largest = f"{len(loop)}, {loop.count('LDG|LDS')} loads"
    return [f"{len(kernel):,}", *(f"{kernel.count(each)}" for each in columns), largest]


def _is_work(loop):
    """Whether it is no loop that only waits."""
    return len(loop) > WAITING


def write_triton():
    """Triton's kernels of the connector as they are launched for IGVA at the shapes of a ViT-L and a 7B model."""
    import pytest
    import triton
    from triton_build import build, record

    from igva_kernels import MixPlan
    from igva_kernels.ops.weighted_mix.steps import Keep, MixArgs
    from igva_kernels.ops.weighted_mix.triton import mix
    from igva_kernels.runtime import config
    from igva_kernels.runtime.triton import gemm

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    plan = MixPlan.igva().compact()[1]
    layers = [meta(2, 577, 1024) for _ in range(plan.num_states)]
    args = MixArgs(layers, plan, meta(2, plan.num_columns, dtype=torch.float32), None, 1)
    lines = []
    for arch in (80, 90, 100):
        shipped = config.shipped(f"sm_{arch}")
        calls = {
            "mix": lambda s=shipped: mix.mix(args, torch.bfloat16, None, Keep.NOTHING, s.rows["weighted_mix.mix"]),
            "linear": lambda s=shipped: gemm.linear(
                meta(1152, 2048), meta(4096, 2048), meta(4096), "gelu", False, s.gemms["linear"][0]
            ),
        }
        for name, call in calls.items():
            with pytest.MonkeyPatch.context() as patch:
                (launch,) = record(patch, call)
            built = build(launch, arch)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                Path(file.name).write_bytes(built.cubin)
                ((_, kernel),) = kernels(machine_code(file.name)).items()
            cells = [f"{built.registers}", f"{built.shared:,}", f"{built.stack}", *_counts(kernel)]
            lines.append([f"`{name}`", f"sm_{arch}", *cells])
    heads = ["kernel", "card", "registers", "shared memory", "spilled", *COUNTS]
    _write("triton", [f"triton {triton.__version__}.", "", *table(heads, lines)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gemm", action="store_true", help="only the overlapped GEMM")
    with tempfile.TemporaryDirectory() as folder:
        given = parser.parse_args()
        write_gemm(folder)
        if not given.gemm:
            write_cuda(folder)
            write_triton()


if __name__ == "__main__":
    main()
