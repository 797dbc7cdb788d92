"""The CUDA sources as machine code, without a GPU: every architecture compiles, nothing spills, budgets hold, and the
Hopper kernel is made of Hopper's own instructions."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from cuda_tools import ROOT, compile_cubin, cuobjdump, machine_code, nvcc, usage
from machine_code import LAYER_LOAD, gemm_parts
from sass import Kernel, kernels, parse

pytestmark = [
    pytest.mark.skipif(nvcc() is None, reason="no nvcc"),
    pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump"),
]

PORTABLE = ["activation_grad", "attend", "inject", "layer_grads", "levels_grad", "mix", "mix_norm", "mix_weights_grad"]
PORTABLE += ["norm_grad", "places_grad"]
ARCHS = ["80", "86", "89", "90", "100", "120"]
"""What the portable kernels are built for by default; the PTX is 90's, and the Hopper GEMM has 90a."""

BUDGET = {
    "activation_grad_kernel": 64,
    "attend_kernel": 80,
    "attend_resident_kernel": 128,
    "column_sums_kernel": 64,
    "dots_kernel": 64,
    "features_grad_kernel": 64,
    "inject_kernel": 64,
    "layer_grads_kernel": 64,
    "levels_grad_resident_kernel": 128,
    "mix_kernel": 80,
    "mix_norm_kernel": 80,
    "norm_grad_kernel": 64,
    "norm_param_grads_kernel": 64,
    "places_grad_kernel": 128,
    "places_grad_resident_kernel": 128,
    "points_kernel": 64,
    "sorted_grad_kernel": 64,
}
"""Registers of the 16-byte kernels in fp32 and 16 bits. With 256 threads, 80 leave three blocks on a multiprocessor and
128 two, which is as many as have room for a ViT's map in shared memory; levels_grad_resident_kernel has 512."""

SHARED = {"activation_grad_kernel": 9216, "attend_resident_kernel": 3072, "places_grad_resident_kernel": 8192}
"""Bytes of static shared memory, of which the driver takes 1024 from sm_90 on; 2048 for the other kernels."""

VECTORS = {
    "activation_grad_kernel": 2,  # z and the gradient
    "attend_kernel": 8,  # corners inside a level, and at its border
    "attend_resident_kernel": 1,
    "dots_kernel": 2,
    "features_grad_kernel": 2,
    "inject_kernel": 3,  # the states with a feature and without
    "layer_grads_kernel": 1,
    "levels_grad_resident_kernel": 1,
    "mix_kernel": 6,
    "mix_norm_kernel": 8,  # with the norm's weight and bias
    "norm_grad_kernel": 6,  # two passes over the gradient, the rows and the weight
    "places_grad_kernel": 9,
    "places_grad_resident_kernel": 2,
    "sorted_grad_kernel": 2,  # a point and its query's gradient
}
"""Loads of 16 bytes that the source has; the compiler makes more of them where it unrolls."""

HOPPER = {"gemm_sm90_kernel": 168}
"""Registers, exactly: 65536 of a multiprocessor for 384 threads, in steps of 8. setmaxnreg moves them between warps."""

COLD = r"kernelId|Li1E"
"""fp64, and the scalar path of odd sizes: they serve tests and rare layouts."""


def kernel_of(name):
    return re.search(r"igva4cuda\d+(\w+?_kernel)", name)[1]


def check_budgets(kernels):
    for name, used in kernels.items():
        kernel = kernel_of(name)
        if kernel in HOPPER:
            assert used.registers == HOPPER[kernel], (name, used)
        elif re.search(COLD, name):
            continue
        else:
            assert used.registers <= BUDGET[kernel], (name, used)
            assert used.shared <= SHARED.get(kernel, 2048), (name, used)
        assert used.stack == used.local == 0, (name, used)


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    """A portable source as compiled for sm_90, without a warning; each once."""
    folder = tmp_path_factory.mktemp("portable")
    return cache(lambda source: compile_cubin(source, "90", folder))


@pytest.mark.parametrize("source", PORTABLE)
def test_the_portable_kernels_read_16_bytes_at_a_time(source, cubins):
    check_budgets(usage(cubins(source)))
    for name, code in kernels(machine_code(cubins(source))).items():
        if kernel_of(name) in VECTORS and not re.search(COLD, name):
            assert code.count(r"(LDG|LDGSTS)\.\S*128") >= VECTORS[kernel_of(name)], name
            assert not code.has(r"LDG\.\S*[SU](8|16)"), name


@pytest.mark.slow
@pytest.mark.parametrize("source", ["attend", "levels_grad", "places_grad"])
def test_a_head_is_copied_to_shared_memory_and_gathered_from_there_16_bytes_at_a_time(source, cubins):
    code = machine_code(cubins(source))
    resident = [part for part in code.split("Function :")[1:] if "_resident_kernel" in part.split()[0]]
    assert len(resident) == 4
    for code in resident:
        assert "LDGSTS.E.BYPASS.128" in code and "LDS.128" in code
        assert not re.search(r"\bLD\.E|ATOMG|ATOM\.E|RED\.|STL|LDL", code)  # no generic access, no float atomic


@pytest.fixture(scope="module")
def gemm_cubin(tmp_path_factory):
    return compile_cubin("gemm_sm90", "90a", tmp_path_factory.mktemp("gemm"))


@pytest.fixture(scope="module")
def gemm_kernels(gemm_cubin):
    """The machine code of the Hopper GEMM, of bf16 and fp16 in both forms."""
    kernels = machine_code(gemm_cubin).split("Function :")[1:]
    assert len(kernels) == 4
    return kernels


def test_the_hopper_gemm_is_made_of_hoppers_instructions_and_spills_nothing(gemm_cubin, gemm_kernels):
    check_budgets(usage(gemm_cubin))
    code = "".join(gemm_kernels)
    for instruction in (
        "HGMMA.64x256x16.F32.BF16",
        "HGMMA.64x256x16.F32 ",
        "HGMMA.64x192x16.F32.BF16",
        "HGMMA.64x192x16.F32 ",
        "UTMALDG.2D ",
        "UTMALDG.2D.MULTICAST",
        "USETMAXREG",
        "LDGSTS.E.BYPASS.128",
        "STG.E.128",
    ):
        assert instruction in code, instruction
    assert "STL" not in code and "LDL" not in code
    # Products accumulate in place, four per step, and only the last one of a step is waited for.
    products = re.findall(r"HGMMA\S* (R\d+), gdesc\[UR\d+\], (\S+?)(, gsb0)? ;", code)
    assert all(to == also for to, also, _ in products)
    assert [bool(waited) for *_, waited in products] == [False, False, False, True] * (len(products) // 4)
    for part in gemm_kernels:
        # Nothing between two products waits for memory or empties a cache, as an arrival at the scope of the cluster
        # would.
        assert not re.search("MEMBAR|CCTL", part[part.index("HGMMA") : part.rindex("HGMMA")])
        # After giving registers away, copying and mixing use no more than they kept.
        (given,) = part.split("USETMAXREG.DEALLOC.CTAPOOL")[1:]
        assert max(int(n) for n in re.findall(r"\bR(\d+)\b", given)) < int(given.split()[0], 16)


def test_the_epilogue_of_the_hopper_gemm_loads_nothing(gemm_kernels):
    """After the last product of a tile there are the stores of Z, of Y, and of Y through GELU; the bias was in the
    accumulators before."""
    for part in gemm_kernels:
        _, epilogue = gemm_parts(Kernel("gemm", parse(part)))
        columns = int(re.search(r"HGMMA\.64x(\d+)x16", part)[1])
        assert epilogue.count(r"STG\.E\.128") == 3 * columns // 16
        assert not epilogue.has("LDG|LD|LDS|LDL")


def test_a_mixer_of_the_hopper_gemm_has_12_loads_under_way_and_takes_600_instructions_for_256_elements(gemm_kernels):
    """Of IGVA's plan, 24 layers in four groups: the loop over the groups covers 512 elements of six layers a round."""
    for part in gemm_kernels:
        found = parse(part[part.index("USETMAXREG.DEALLOC") :])
        wait = next(i for i, each in enumerate(found) if each.opcode == "DEPBAR.LE" and each.operands.startswith("SB0"))
        assert found[wait].operands == "SB0, 0x2"  # of three units of six loads, the last two are not waited for
        before = [each.opcode for each in found[:wait]]
        assert (before.count("LDGSTS.E.BYPASS.128"), before.count("LDGDEPBAR")) == (3 * 6, 3)
        parts = gemm_parts(Kernel("gemm", parse(part)))
        group = max((loop.common_pass(LAYER_LOAD) for loop in parts.mixers), key=lambda code: code.count(LAYER_LOAD))
        assert group.count(r"LDGSTS\.E\.BYPASS\.128") == group.count(r"LDS\.128") == 12
        assert 4 * len(group) / 2 == parts.mix()[0] <= 600
        # No load is waited for but by the groups of copies, and the ticket's answer is used one claim later.
        assert not group.has("LDG|LD|ATOM|ATOMG|MEMBAR|MUFU")


# ---- installation ----


def build_wheel(folder, **environment):
    """``pip wheel`` in an isolated environment, from sources of its own: builds of one tree at a time share files."""
    unwanted = shutil.ignore_patterns(".*", "build", "*.so", "__pycache__")
    sources = shutil.copytree(ROOT, folder / "sources", ignore=unwanted)
    command = [sys.executable, "-m", "pip", "wheel", str(sources), "--no-deps", "-w", str(folder)]
    subprocess.run(command, check=True, env=os.environ | environment, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def code_in(module, option):
    """How often the module has code for each architecture: files of machine code (``elf``) or of ``ptx``."""
    listed = subprocess.run([cuobjdump(), f"--list-{option}", str(module)], capture_output=True, text=True, check=True)
    return Counter(re.findall(rf"\.sm_(\w+)\.{'cubin' if option == 'elf' else 'ptx'}", listed.stdout))


@pytest.mark.slow
def test_a_wheel_has_machine_code_of_every_architecture_that_spills_nothing_and_says_what_was_built(tmp_path):
    """One build of all, some minutes long, for all that can be read from it; an "a" at 100 changes nothing."""
    asked = "80 86 89 90a 100a 120 42 sm_90"
    with build_wheel(tmp_path, IGVA_KERNELS_FORCE_CUDA="1", IGVA_KERNELS_CUDA_ARCHS=asked) as wheel:
        modules = {Path(name).name.split(".")[0]: name for name in wheel.namelist() if name.endswith(".so")}
        cuda = json.loads(wheel.read("igva_kernels/build_info.json"))["cuda"]
        assert modules.keys() == {"_native", "_cuda"}
        module = wheel.extract(modules["_cuda"], tmp_path)
    assert {"42", "sm_90"} <= {*cuda["left_out"]}
    portable = [arch for arch in cuda["archs"] if arch != "90a"]
    assert {*ARCHS} - {*portable} <= {arch.rstrip("a") for arch in cuda["left_out"]} and {*portable} <= {*ARCHS}
    assert cuda["reason"] == "" and cuda["ptx"] == "90"
    spec = importlib.util.spec_from_file_location("_cuda", module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)  # no symbol is missing
    assert loaded.versions()[1] >= 12000
    for arch in portable:
        kernels = usage(module, "-arch", f"sm_{arch}")
        hopper = HOPPER if arch == "90" else {}  # which counts those of 90a among its own
        assert {kernel_of(name) for name in kernels} == {*BUDGET, *hopper}, arch
        check_budgets(kernels)
    elf = code_in(module, "elf")
    files = elf["80"]  # one of each source
    assert elf == dict.fromkeys(portable, files) | {"90a": elf["90a"]} and 0 < elf["90a"] < files
    assert code_in(module, "ptx") == {"90": files}


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
@pytest.mark.parametrize(
    ("asked", "archs", "ptx"),
    [("80", ["80"], "80"), ("120;80,90a 90", ["80", "90", "90a", "120"], "90"), ("90 89", ["89", "90"], "90"),
     ("120 100a", ["100", "120"], "100")],
)  # fmt: skip
def test_ptx_is_that_of_90_where_it_is_built_and_the_hopper_gemm_needs_90a(asked, archs, ptx, tmp_path):
    pybind11 = pytest.importorskip("pybind11")
    options = [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}", "-GNinja"]
    environment = os.environ | {"IGVA_KERNELS_CUDA_ARCHS": asked}
    subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path, *options], check=True, env=environment, capture_output=True)
    cuda = json.loads((tmp_path / "build_info.json").read_text())["cuda"]
    if cuda["left_out"]:
        pytest.skip(f"this nvcc does not know {', '.join(cuda['left_out'])}")
    assert (cuda["archs"], cuda["ptx"]) == (archs, ptx)


@pytest.mark.slow
def test_forced_cuda_fails_where_it_cannot_be_built(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as failure:
        build_wheel(tmp_path, IGVA_KERNELS_FORCE_CUDA="1", IGVA_KERNELS_CUDA_ARCHS="42")
    assert b"knows none of the architectures" in failure.value.stderr + failure.value.stdout
