"""Counts in machine code, on small programs whose counts are known."""

import pytest
from cuda_tools import compile_cubin, cuobjdump, machine_code, nvcc
from machine_code import GEMM, HOPPER_ARCH, LAYERS, gemm_parts, spills
from sass import kernels


def disassembly(*lines, name="kernel"):
    """As cuobjdump prints it: an instruction every 16 bytes, and its encoding in two comments."""
    text = [f"\t\tFunction : {name}"]
    for i, line in enumerate(lines):
        text.append(f"        /*{16 * i:04x}*/                   {line} ;   /* 0x0000{i:04x}ff017b82 */")
        text.append(" " * 90 + "/* 0x000fe20000000800 */")
    return "\n".join(text)


def kernel(*lines):
    return kernels(disassembly(*lines))["kernel"]


NESTED = (
    "S2R R0, SR_TID.X",  # 00
    "ISETP.GE.AND P0, PT, R0, c[0x0][0x210], PT",  # 10
    "@P0 EXIT",  # 20
    "LDG.E R2, desc[UR4][R2.64]",  # 30: the outer loop
    "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]",  # 40: the inner loop
    "LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x200]",  # 50
    "@!P1 BRA 0x40",  # 60
    "@P2 BRA 0xb0",  # 70: a rare case behind the others
    "STG.E.128 desc[UR4][R6.64], R4",  # 80
    "@P3 BRA 0x30",  # 90
    "EXIT",  # a0
    "IADD3 R4, R4, 0x1, RZ",  # b0
    "BRA 0x80",  # c0
    "BRA 0xd0",  # d0: what the compiler fills up with
    "NOP",
)


def test_loops_are_found_by_control_flow():
    code = kernel(*NESTED)
    assert len(code) == 13 and code.count("NOP") == 0
    outer, inner = code.loops
    assert (outer.header, inner.header) == (0x30, 0x40) and outer.inner == [inner] and not inner.inner
    assert len(inner) == 3
    # The rare case belongs to the loop, although it lies behind its end; its branch back makes no loop.
    assert [each.address for each in outer.own] == [0x30, 0x70, 0x80, 0x90, 0xB0, 0xC0]


def test_opcodes_are_counted_with_their_modifiers():
    code = kernel(*NESTED)
    assert code.count("LDG") == 3 and code.count(r"LDG\.\S*128") == 2 and code.count("LD") == 0
    assert code.count("LDG|STG") == 4 and code.has("LDG", "EXIT") and not code.has("LDG", "HGMMA")


def test_the_common_pass_is_the_shortest_one_with_all_loads():
    outer, inner = kernel(*NESTED).loops
    assert [each.address for each in inner.common_pass("LDG")] == [0x40, 0x50, 0x60]
    assert [each.address for each in outer.common_pass("LDG")] == [*range(0x30, 0xA0, 0x10)]
    (loop,) = kernel(
        "LDG R0, [R2.64]", "@P0 BRA 0x40", "LDG R4, [R2.64]", "IADD3 R4, R4, 0x1, RZ", "@P1 BRA 0x0", "EXIT"
    ).loops
    assert len(loop.common_pass("LDG")) == 5 and len(loop.common_pass("STG")) == 3


def test_back_edges_to_one_block_are_one_loop():
    (loop,) = kernel("NOP", "@P0 BRA 0x0", "NOP", "@P1 BRA 0x0", "EXIT").loops
    assert len(loop) == 4


@pytest.mark.parametrize(
    ("branch", "goes_on"),
    [("@P0 BRA 0x30", True), ("BRA P1, 0x30", True), ("BRA.U UP0, 0x30", True), ("BRA.DIV ~URZ, 0x30", True),
     ("BRA 0x30", False), ("@PT BRA 0x30", False), ("EXIT", False), ("@P0 EXIT", True), ("CALL.REL.NOINC 0x30", True),
     ("RET.REL.NODEC R2 0x0", False)],
)  # fmt: skip
def test_what_may_follow_a_branch(branch, goes_on):
    assert kernel("NOP", branch, "NOP", "EXIT").instructions[1].goes_on == goes_on


def overlapped(epilogue=("STG.E.128 desc[UR4][R6.64], R4",), mixer=()):
    """A kernel of the overlapped GEMM's shape: warps that multiply, and warps that mix."""
    tile = [
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, !UPT",
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24",
        "@P1 BRA {multiply}",
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
        *epilogue,
        "@P2 BRA {tile}",
        "EXIT",
    ]
    mix = ["ATOMG.E.ADD.STRONG.GPU PT, R0, desc[UR4][R2.64], R1", "LDG.E.128 R4, desc[UR4][R2.64]", "@P3 BRA {load}"]
    mix += [*mixer, "STG.E.128 desc[UR4][R6.64], R4", "@P4 BRA {load}", "@P5 BRA {ticket}", "EXIT"]
    at = {"tile": 1, "multiply": 2, "ticket": 1 + len(tile), "load": 2 + len(tile), "after": 7 + len(tile)}
    lines = ["@P0 BRA {ticket}", *tile, *mix]
    return kernel(*(line.format(**{name: hex(16 * i) for name, i in at.items()}) for line in lines))


def test_mixers_and_epilogue_of_the_overlapped_gemm_are_found_by_what_they_do():
    mixers, epilogue = gemm_parts(overlapped())
    assert [each.opcode for each in epilogue] == ["WARPGROUP.DEPBAR.LE", "STG.E.128", "BRA"]
    assert [[each.opcode for each in loop] for loop in mixers] == [["LDG.E.128", "BRA", "STG.E.128", "BRA"]]
    mixers, epilogue = gemm_parts(overlapped(["LDG.E R0, desc[UR4][R2.64]", "STG.E desc[UR4][R6.64], R4"], ["NOP"] * 9))
    assert epilogue.count("LDG") == 1 and len(mixers[0]) == 13


def test_a_kernel_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="0 loops that mix and 0 over tiles"):
        gemm_parts(kernel(*NESTED[:3], "EXIT"))


def test_spills_are_accesses_of_local_memory():
    assert spills(kernel("STL.64 [R1], R2", "LDL R2, [R1]", "LDG.E R2, desc[UR4][R2.64]", "EXIT")) == 2


def test_the_mixer_with_most_loads_in_a_pass_is_counted_for_all_layers():
    parts = gemm_parts(overlapped(mixer=["LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]", "@P6 BRA {after}", "NOP"]))
    # Two loads and three others, and a NOP that a branch goes around.
    assert parts.mix() == (6 * LAYERS // 2, 7 * LAYERS // 2, 2)


@pytest.mark.skipif(nvcc() is None or cuobjdump() is None, reason="no nvcc or no cuobjdump")
def test_the_parts_of_the_compiled_gemm_are_found(tmp_path):
    for code in kernels(machine_code(compile_cubin(GEMM, HOPPER_ARCH, tmp_path))).values():
        parts = gemm_parts(code)
        least, most, loads = parts.mix()
        assert 0 < least <= most and loads == 12
        assert parts.epilogue.count(r"STG\.\S*128") and not parts.epilogue.count("HGMMA|UTMALDG|ATOMG|LDG|LD|LDS|LDL")
        assert spills(code) == 0
