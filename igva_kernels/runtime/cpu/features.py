"""What decides who multiplies on this CPU: its vendor and features, our kernels, the libraries that torch brought."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from igva_kernels.runtime import native

INTEL = "GenuineIntel"

# The level of instructions that each value of oneDNN's variable allows, and the least level that has a feature.
_ONEDNN_LEVELS = {
    "SSE41": 0, "AVX": 0, "AVX2": 0, "AVX2_VNNI": 0, "AVX2_VNNI_2": 0,
    "AVX512_CORE": 1, "AVX512_CORE_VNNI": 1, "AVX512_CORE_BF16": 2, "AVX512_CORE_FP16": 3, "AVX10_1_512": 3,
    "AVX512_CORE_AMX": 4, "AVX10_1_512_AMX": 4,
}  # fmt: skip
_LEAST_LEVEL = {"avx512f": 1, "avx512bf16": 2, "avx512fp16": 3, "amxbf16": 4, "amxfp16": 5}


class Cpu(NamedTuple):
    """A CPU and the libraries of a torch, as far as products depend on them."""

    vendor: str
    """As the CPU calls it ("GenuineIntel", "AuthenticAMD"); empty where that is not known."""
    features: frozenset[str]
    """The features that may be used, in Linux's names without underscores ("avx512f", "avx512bf16", "amxbf16")."""
    mkl: bool
    """Whether torch multiplies with MKL."""
    onednn: bool
    """Whether torch brought oneDNN."""
    isa: str
    """The instruction set of our kernels; empty where they were not built."""


def this_cpu() -> Cpu:
    """This CPU, limited to the instruction sets that the environment names."""
    vendor, features = _vendor_and_features()
    module = native.load()[0]
    return Cpu(
        vendor,
        allowed(features, os.environ),
        torch.backends.mkl.is_available(),
        torch.backends.mkldnn.is_available(),
        "" if module is None else module.isa(),
    )


def allowed(features: frozenset[str], environment: Mapping[str, str]) -> frozenset[str]:
    """The features that the variables of our kernels and of oneDNN allow."""
    limit = environment.get("ONEDNN_MAX_CPU_ISA", environment.get("DNNL_MAX_CPU_ISA", "")).upper()
    level = _ONEDNN_LEVELS.get(limit, 5)  # like oneDNN, which takes an unknown name as no limit
    if native.forced_isa(environment) in ("scalar", "avx2"):
        level = 0
    return frozenset(feature for feature in features if _LEAST_LEVEL.get(feature, 0) <= level)


def _vendor_and_features() -> tuple[str, frozenset[str]]:
    known = {}
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    # Windows names the vendor last: "AMD64 Family 25 Model 1 Stepping 1, AuthenticAMD".
    vendor = known.get("vendor_id") or platform.processor().rpartition(" ")[2]
    if hasattr(torch.cpu, "get_capabilities"):
        features = [name for name, value in torch.cpu.get_capabilities().items() if value is True]
    else:  # an older torch
        features = known.get("flags", known.get("Features", "")).split()
    return vendor, frozenset(feature.replace("_", "") for feature in features)
