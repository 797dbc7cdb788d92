"""The configuration of a card: a JSON file, shipped with the package or measured on the card by ``igva-kernels tune``.

A file holds the tile shapes of every Triton kernel, at most three per GEMM; the card's rates, from which ``cost``
chooses; and the order of the backends by speed, of which ``impl="auto"`` takes the first that can serve. A Triton GEMM
is chosen by its efficiency, which only a measurement sets: on a card of a kind that nobody measured, cuBLAS multiplies.

The package ships one file per architecture, and one under the name of each device that was tuned for it. ``tune``
writes such a file into ``$IGVA_KERNELS_CONFIG_DIR`` (``~/.cache/igva_kernels/triton`` by default). A file there comes
before one of the same name in the package, and that before the architecture's. Files are read once per process; nothing
is timed or written outside ``tune``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch

SHIPPED = Path(__file__).parent / "configs"
FORMAT = 2
"""Of the files; a file of another format names kernels otherwise, and would be passed over in silence."""

T = TypeVar("T")


class ByKernel(dict[str, T]):
    """What a configuration holds for each kernel. An operator may have a default for its own: ``get``."""

    def __missing__(self, kernel: str) -> NoReturn:
        raise NotImplementedError(
            f"the card's configuration has nothing for the Triton kernel {kernel!r}; `igva-kernels tune` measures it"
        )


class RowTile(NamedTuple):
    """The tile of a kernel over rows: ``block_p`` rows of ``block_d`` channels, and the warps of a program."""

    block_p: int
    block_d: int
    num_warps: int


@dataclass(frozen=True)
class RowConfig:
    """A kernel over rows (mix, its gradients, norm): elements of one layer that a program holds, and its warps."""

    elements: int
    num_warps: int

    def tile(self, width: int, num_rows: int, whole_blocks: int = 0) -> RowTile:
        """The tile for rows of this width; with ``whole_blocks`` a tile spans the width and that many blocks stay in
        registers."""
        divisor = width & -width
        if whole_blocks or divisor < 128:
            # Masked where the width is not a power of two.
            block_d = _next_power_of_2(width)
            block_d = block_d if whole_blocks else min(block_d, self.elements)
        else:
            block_d = min(divisor, self.elements)
        block_p = min(max(1, self.elements // block_d), _next_power_of_2(num_rows))
        if not whole_blocks:
            return RowTile(block_p, block_d, self.num_warps)
        # Warps for at most 64 fp32 values of the row per thread; beyond that, no more than read 16 bytes per thread.
        needed, useful = _next_power_of_2(-(-whole_blocks * block_d // 2048)), max(1, block_d // 256)
        return RowTile(1, block_d, min(max(needed, min(self.num_warps, useful)), 16))


@dataclass(frozen=True)
class GemmConfig:
    """A GEMM kernel: tile, warps, pipeline stages, and in how many column slices its epilogue works."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    slices: int
    tma: bool
    efficiency: float | None = None
    """Share of the card's matrix rate that a full wave of tiles reaches; None where nobody has measured it."""
    group_m: int = 8
    """Row tiles that run over all column tiles together, for the L2 cache."""


@dataclass(frozen=True)
class DeviceRates:
    """What the cost model knows of a card."""

    sms: int
    matmul_tflops: float
    """Dense bf16, as a large cuBLAS product reaches it."""
    copy_gbps: float
    """Device memory, bytes read plus bytes written."""
    launch_us: float
    """Gap between two small kernels of one stream."""


class ProductSize(NamedTuple):
    """The least ``[rows, ...] @ [..., columns]`` of some kind."""

    rows: int
    columns: int


@dataclass(frozen=True, eq=False)
class Config:
    """Everything that is chosen for one card."""

    status: str
    """Where the figures come from: "measured on <card>", "modelled" (then no product has an efficiency, and all go to
    cuBLAS), or "interpreted" (no card: Triton is always chosen)."""
    backends: tuple[str, ...]
    """Kernel backends for this card, the fastest first: impl="auto" takes the first that can serve. Where their kernels
    are as fast, the first is the one whose calls take the host less."""
    rates: DeviceRates
    rows: Mapping[str, RowConfig]
    """By kernel; an operator's own bear its name: ``<operator>.<kernel>``."""
    gemms: Mapping[str, tuple[GemmConfig, ...]]
    """By kernel, likewise."""
    faster_from: Mapping[str, ProductSize] = field(default_factory=dict)
    """By CUDA kernel that does what other kernels do in several steps: the product from which on it was measured to be
    faster than these. One that is not here was never measured on such a card, and is not taken."""

    def __post_init__(self) -> None:
        for name in ("rows", "gemms"):
            object.__setattr__(self, name, ByKernel(getattr(self, name)))
        for name, tiles in self.gemms.items():
            if self.status == "modelled" and any(tile.efficiency is not None for tile in tiles):
                raise ValueError(f"efficiency of {name!r}: got one in a modelled configuration, need a measured one")

    @property
    def interpreted(self) -> bool:
        """Whether there is no card, and what counts is that kernels run at all."""
        return self.status == "interpreted"

    def to_json(self) -> str:
        """The file's text; ``from_json`` reads it."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The configuration that ``to_json`` wrote; KeyError, TypeError or ValueError for anything else."""
        data: dict[str, Any] = json.loads(text)
        if data["format"] != FORMAT:
            raise ValueError(f"format: got {data['format']!r}, need {FORMAT}")
        return cls(
            data["status"],
            tuple(data["backends"]),
            DeviceRates(*(data["rates"][rate.name] for rate in fields(DeviceRates))),  # earlier versions had more
            {name: RowConfig(**row) for name, row in data["rows"].items()},
            {name: tuple(GemmConfig(**tile) for tile in tiles) for name, tiles in data["gemms"].items()},
            {name: ProductSize(*least) for name, least in data.get("faster_from", {}).items()},
        )


def tuned_dir() -> Path:
    """Where ``tune`` writes."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "igva_kernels" / "triton"
    return Path(os.environ.get("IGVA_KERNELS_CONFIG_DIR", default))


def file_name(device_name: str) -> str:
    """The configuration file of a device: ``NVIDIA H200`` -> ``NVIDIA_H200.json``."""
    return "".join(c if c.isalnum() else "_" for c in device_name) + ".json"


def shipped(architecture: str) -> Config:
    """The shipped configuration of an architecture: "sm_80", "sm_90" or "sm_100"."""
    return Config.from_json((SHIPPED / f"{architecture}.json").read_text())


def architecture(capability: tuple[int, int]) -> str:
    """The architecture whose configuration a card uses. Consumer Blackwell (sm_120) has neither wgmma nor tcgen05 and
    small shared memory: it is served as Ampere."""
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(capability[0], "sm_80")


@cache
def of_device(index: int | None) -> Config:
    """The configuration of a CUDA device; None is the interpreter, which runs the shipped sm_90 tiles, made small.

    Raises:
        ValueError: the device's file was not written by this version.
    """
    if index is None:
        return _small(shipped("sm_90"))
    name = file_name(torch.cuda.get_device_name(index))
    base = shipped(architecture(torch.cuda.get_device_capability(index)))
    for folder in (tuned_dir(), SHIPPED):
        if (folder / name).is_file():
            try:
                found = Config.from_json((folder / name).read_text())
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{folder / name}: not a configuration of this version ({error!r}); delete it, or write it anew "
                    f"with `igva-kernels tune`"
                ) from error
            # A file that was measured before a kernel existed says nothing about it; the shipped one does.
            return replace(
                found, rows={**base.rows, **found.rows}, gemms={**base.gemms, **found.gemms},
                faster_from={**base.faster_from, **found.faster_from},
            )  # fmt: skip
    return base


def fastest_first(device: torch.device, backends: Sequence[str]) -> list[str]:
    """These backends in the order of the device's configuration; on a CPU, as they are."""
    if device.type != "cuda":
        return list(backends)
    known = of_device(torch.cuda.current_device() if device.index is None else device.index).backends
    # Backends that the configuration does not know, since they are newer, come last.
    return sorted(backends, key=lambda name: known.index(name) if name in known else len(known))


def _small(config: Config) -> Config:
    """The same choices with tiles for the interpreter, whose tests have a few dozen rows."""
    return Config(
        "interpreted",
        config.backends,
        config.rates,
        {name: RowConfig(1024, row.num_warps) for name, row in config.rows.items()},
        {
            name: tuple(GemmConfig(64, 64, 64, 4, 2, gemm.slices, gemm.tma, gemm.efficiency, 2) for gemm in gemms)
            for name, gemms in config.gemms.items()
        },
    )


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
