"""Compiles what the Triton launchers would launch, without a GPU: they run on meta tensors, and each launch is built
for a target by Triton's own compiler and read by cuobjdump."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from igva_kernels.ops.allocator import triton as allocator
from igva_kernels.ops.deform_attn import triton as deform
from igva_kernels.ops.inject_tokens import triton as injection
from igva_kernels.ops.layer_project import triton as bank
from igva_kernels.ops.weighted_mix.triton import gemm as mix_gemm
from igva_kernels.ops.weighted_mix.triton import mix
from igva_kernels.runtime.triton import gemm, norm

SHARED_MEMORY = {80: 101_376, 90: 232_448, 100: 232_448}
"""Bytes per block, by architecture. The sm_80 file serves 8.6 and 8.9 too, which have less than 8.0."""

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}


class Built(NamedTuple):
    """One compiled kernel."""

    name: str
    shared: int
    registers: int
    stack: int
    """Bytes per thread, spills included."""
    ttir: str
    ptx: str
    cubin: bytes


def record(monkeypatch, call):
    """The launches ``(kernel, args, constants)`` of ``call``, which gets meta tensors."""
    launches = []
    for module in (allocator, bank, deform, injection, gemm, mix, mix_gemm, norm):
        monkeypatch.setattr(module, "launch", lambda kernel, _, __, *args, **kw: launches.append((kernel, args, kw)))
    call()
    return launches


def build(launch, capability):
    """Compile one launch for ``sm_<capability>``."""
    kernel, _, constants = launch
    options = {name: constants[name] for name in ("num_warps", "num_stages")}
    options["enable_fp_fusion"] = constants.get("enable_fp_fusion", True)
    source = ASTSource(kernel, **specialised(launch))
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert not carried_bounds(compiled.asm["ttir"]), kernel.__name__
    usage = _resource_usage(compiled.asm["cubin"])
    return Built(
        kernel.__name__, compiled.metadata.shared, usage["REG"], usage["STACK"], compiled.asm["ttir"],
        compiled.asm["ptx"], compiled.asm["cubin"],
    )  # fmt: skip


def carried_bounds(ttir):
    """The loops whose bounds follow from what an outer loop carries from one pass to the next.

    Triton (3.6 and 3.7) compiles them wrongly, and says nothing: the inner loop begins with the outer one's first value
    in every pass. The interpreter does not do so.
    """
    found, carried, around = [], set(), []
    for line in ttir.splitlines():
        text = line.partition(" loc(")[0].strip()
        results, _, operation = text.partition(" = ")
        names = set(re.findall(r"%\w+", results))
        loop = re.match(r"(?:.* = )?scf\.for %\w+ = (%[\w#]+) to (%[\w#]+)", text)
        if loop is not None:
            found += [text] if _are_carried(loop.groups(), carried) else []
            carried |= set(re.findall(r"(%\w+) = %", text.partition("iter_args(")[2]))
        elif _are_carried(re.findall(r"%[\w#]+", operation or text), carried):
            carried |= names
            # What a condition or a loop inside a loop passes on.
            if text.startswith("scf.yield") and any(is_loop for _, is_loop in around[:-1]):
                carried |= around[-1][0]
        opens, closes = line.rstrip().endswith("{"), text.startswith("}")
        if opens and not closes:
            around.append((names, loop is not None))
        elif closes and not opens:
            around.pop()
    return found


def _are_carried(names, carried):
    return any(name.partition("#")[0] in carried for name in names)


def specialised(launch):
    """What a kernel is compiled for: a launch on a GPU that differs in it compiles anew."""
    kernel, args, constants = launch
    names = kernel.arg_names
    given = dict(zip(names, args, strict=False)) | {name: constants[name] for name in names if name in constants}
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(names):
        if name in constants:
            signature[name], constexprs[(i,)] = "constexpr", given[name]
        elif kernel.params[i].do_not_specialize:
            signature[name] = _plain(given[name])
        else:
            signature[name] = _specialise(given[name], (i,), constexprs, attributes)
    return {"signature": signature, "constexprs": constexprs, "attrs": attributes}


def _plain(value):
    """The type of an argument that is not specialised."""
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    assert isinstance(value, int)
    return "i32"


def _specialise(value, path, constexprs, attributes):
    """The type of an argument as a launch on a GPU specialises it: by alignment, and on the value 1."""
    if isinstance(value, tuple):
        return tuple(_specialise(v, (*path, i), constexprs, attributes) for i, v in enumerate(value))
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if value is None or (isinstance(value, int) and value == 1):
        constexprs[path] = value
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, torch.Tensor) or value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, torch.Tensor):
        return _plain(value)
    return "i32" if value < 2**31 else "i64"


def _resource_usage(cubin):
    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout  # fmt: skip
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", report)}
