"""What is measured: one definition of each workload, which every provider is given.

A workload fixes shape, dtype, plan and mode. From these follow the products and the bytes that no implementation can
avoid, and from those the achieved rates and the floors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from igva_kernels import testing
from igva_kernels.ops.weighted_mix import MixPlan
from igva_kernels.ops.weighted_mix.cases import VIP_LLAVA, Case, Inputs
from igva_kernels.registry import operators
from igva_kernels.verify import DTYPES

MODES = ("forward", "backward", "both")
"""In this order: inference; the backward of a training step alone; forward and backward."""

DISTINCT_IMAGES = 4
"""Images drawn at random; a larger batch repeats them, each copy in memory of its own."""


class Tower(NamedTuple):
    """What a vision tower returns."""

    tokens: int
    width: int
    layers: int
    skip: int
    """Tokens left out at the start of every state."""


CLIP_L = Tower(tokens=577, width=1024, layers=24, skip=1)
CLIP_L_TOKENS = {"clip-l-336": CLIP_L.tokens, "clip-l-224": 257}
"""Tokens of CLIP ViT-L by the size of ``Model``."""
SIGLIP_SO400M = Tower(tokens=729, width=1152, layers=27, skip=0)
HIDDEN = 4096
"""H, the width of the language model."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every row of the results is identified by."""

    name: str
    dtype: str
    batch: int
    """B, the samples; a sample of several tiles is as many rows of the operator."""
    mode: str = "forward"
    note: str = ""
    """What was changed for this machine; empty if nothing was."""

    is_model: ClassVar[bool] = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def title(self) -> str:
        """The name, and what distinguishes workloads of that name."""
        return f"{self.name} {self.mode} {self.dtype} B {self.batch}"

    @property
    def first_differs(self) -> bool:
        """Whether the first call does more than those that follow: a forward, or the setting up of an optimizer."""
        return self.mode == "backward" or (self.is_model and self.mode == "both")

    @property
    def flops(self) -> float | None:
        """Multiplications and additions that cannot be avoided; None if they are not counted."""
        return None

    @property
    def num_bytes(self) -> float | None:
        """Bytes that must be read or written; None if they are not counted."""
        return None

    @property
    def plain_flops(self) -> float:
        """Operations of a call of plain torch, roughly, as a measure of its cost."""
        return self.flops or 0.0

    @property
    def has_products(self) -> bool:
        """Whether most of its cost is matrix products."""
        return True


@dataclass(frozen=True, kw_only=True)
class Connector(Workload):
    """One call of one operator on random tensors."""

    case: Case

    @property
    def rows(self) -> int:
        """M: rows of every product."""
        case = self.case
        return len(case.image_index or range(case.images)) * (case.tokens - case.skip)

    @property
    def row_width(self) -> int:
        """G * D."""
        return self.case.plan.num_blocks * self.case.width

    def draw(self, device: str, seed: int = 0) -> Inputs:
        """Inputs from a seed, in the workload's dtype."""
        case = self.case
        few = min(case.images, DISTINCT_IMAGES)
        if few == case.images:
            return case.draw(seed, self.torch_dtype, device)
        inputs = replace(case, images=few).draw(seed, self.torch_dtype, device)

        def repeat(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.repeat(case.images // few, *[1] * (tensor.ndim - 1))

        grad_out = repeat(inputs.grad_out)
        assert grad_out is not None
        return Inputs([*map(repeat, inputs.layers)], repeat(inputs.mix_weights), inputs.params, grad_out)

    def products(self) -> list[tuple[int, int, int]]:
        """``(m, n, k)`` of the matrix products that the mode cannot do without; the tower is frozen."""
        case, m, h = self.case, self.rows, self.case.hidden
        forward, backward = [], []
        if case.op != "layer_mix":
            forward.append((m, h, self.row_width))
            backward.append((h, self.row_width, m))
            # Only blocks with weights need the gradient of the row; under a LayerNorm with parameters all blocks do.
            into_row = self.row_width if case.norm_eps is not None else len(case.plan.weighted_blocks) * case.width
            backward.append((m, into_row, h))
        if case.op == "layer_mix_mlp":
            forward.append((m, h, h))
            backward += [(h, h, m), (m, h, h)]
        chosen = {"forward": forward, "backward": backward, "both": forward + backward}[self.mode]
        return [product for product in chosen if all(product)]

    @property
    def has_products(self) -> bool:
        """Whether most of its cost is matrix products."""
        return self.case.op != "layer_mix"

    @property
    def flops(self) -> float:
        """Multiplications and additions of the products and, except in a backward, of the mix."""
        entries = sum(len(block) for block in self.case.plan.blocks)
        mix = 2.0 * entries * self.rows * self.case.width if self.mode != "backward" else 0.0
        return mix + sum(2.0 * m * n * k for m, n, k in self.products())

    @property
    def num_bytes(self) -> float | None:
        """Bytes of a forward that touches states in use, parameters and result once each; None for other modes."""
        if self.mode != "forward":
            return None
        case = self.case
        states = len(case.plan.layers) * case.images * (case.tokens - case.skip) * case.width
        params = sum(n * k + n for _, n, k in self.products())
        return float(self.torch_dtype.itemsize * (states + params + self.rows * (case.hidden or self.row_width)))


@dataclass(frozen=True, kw_only=True)
class Operation(Workload):
    """A forward of any operator in the registry: one of its large cases."""

    operator: str
    case: testing.Case


def operations(device: str, dtype: str) -> list[Operation]:
    """The large cases of every operator that has no workloads of its own here and kernels that run on ``device``."""
    found = [(name, operator, case) for name, operator in operators().items() for case in operator.cases()]
    at = torch.device(device), DTYPES[dtype]
    return [
        Operation(name=case.name, dtype=dtype, batch=case.batch, operator=name, case=case)
        for name, operator, case in found
        if case.is_large and not isinstance(case, Case) and operator.candidates(*at, *case.demands)
    ]


def clones(inputs: Inputs, count: int) -> list[Inputs]:
    """``inputs`` and ``count - 1`` copies of it in memory of their own."""

    def clone(tensor: Tensor) -> Tensor:
        return tensor.clone()

    return [inputs, *(inputs.map(clone) for _ in range(count - 1))]


@dataclass(frozen=True, kw_only=True)
class Model(Workload):
    """The reference model with random weights: the whole vision tower before the connector."""

    task: str = "tower"
    """"tower": from pixels to visual tokens; "connector": from the tower's states to visual tokens; "questions": the
    visual tokens for ``questions`` instructions about one image; "another question": those for one more instruction
    about an image encoded before; "training step": forward, backward and optimizer."""
    size: str = "clip-l-336"
    questions: int = 1

    is_model: ClassVar[bool] = True

    @property
    def plain_flops(self) -> float:
        """Operations of a call of plain torch, roughly, as a measure of its cost."""
        if self.size not in CLIP_L_TOKENS or self.task == "connector":
            return 0.0
        # Per token and layer, 4 width**2 multiplications and additions of attention and 8 width**2 of the MLP.
        tower = 24 * CLIP_L.layers * CLIP_L_TOKENS[self.size] * CLIP_L.width**2
        return float(self.batch * self.questions * tower)


def connector(
    name: str, plan: MixPlan, batch: int, dtype: str, mode: str = "forward", *, op: str = "layer_mix_mlp",
    tower: Tower = CLIP_L, hidden: int = HIDDEN, tiles: int = 1, instructions: int = 1, norm_eps: float | None = None,
) -> Connector:  # fmt: skip
    """A connector behind ``tower``: ``batch`` samples of ``tiles`` images, or one image with ``instructions`` texts."""
    case = Case(
        name, op, plan.resolve(tower.layers + 1), batch * tiles, tower.tokens, tower.width,
        0 if op == "layer_mix" else hidden, skip=tower.skip,
        image_index=tuple(b for b in range(batch) for _ in range(instructions)) if instructions > 1 else None,
        activation=None if op == "layer_mix" else "gelu", norm_eps=norm_eps,
    )  # fmt: skip
    return Connector(name=name, dtype=dtype, batch=batch, mode=mode, case=case)


IGVA = MixPlan.igva()


def igva(batch: int, dtype: str, mode: str = "forward") -> Connector:
    """IGVA's connector in stage 2, the main workload."""
    return connector("igva-2", IGVA, batch, dtype, mode)


def igva_mix(batch: int, dtype: str) -> Connector:
    """The mix of that connector alone."""
    return connector("igva-2-mix", IGVA, batch, dtype, op="layer_mix")


def igva_linear(batch: int, dtype: str) -> Connector:
    """The mix, first Linear and GELU of that connector."""
    return connector("igva-2-linear", IGVA, batch, dtype, op="layer_mix_linear")


def stage_1(batch: int, dtype: str, mode: str = "forward") -> Connector:
    """IGVA's connector in stage 1, with uniform weights."""
    return connector("igva-1", MixPlan.igva_uniform(), batch, dtype, mode)


def family(batch: int, dtype: str) -> list[Connector]:
    """The other connectors of this form, as their authors' code has them, and IGVA's with other inputs."""
    return [
        connector("dense-connector-sci", MixPlan.dense_connector("sci"), batch, dtype),
        connector("dense-connector-dci", MixPlan.dense_connector("dci"), batch, dtype),
        connector("lsf-3-18-23", MixPlan.layer_select("3-18-23"), batch, dtype),
        connector("lsf-all", MixPlan.layer_select("all"), batch, dtype),
        connector("vip-llava", MixPlan.concat(VIP_LLAVA, 25), batch, dtype, norm_eps=1e-5),
        connector("tgif", MixPlan.weighted_sum(range(1, 25), -2, 25), batch, dtype, norm_eps=1e-5),
        connector("siglip-so400m", MixPlan.igva(27, 3), batch, dtype, tower=SIGLIP_SO400M),
        connector("igva-2-anyres-5-tiles", IGVA, batch, dtype, tiles=5),
        connector("igva-2-8-instructions", IGVA, batch, dtype, instructions=8),
    ]


def scaling(batch: int, dtype: str) -> list[Connector]:
    """One size at a time: L and D of the mix, L and H of the connector. Growth in B shows in the other workloads."""
    varied: list[Connector] = []
    for layers in (6, 12, 24, 48):
        plan, tower = MixPlan.igva(layers, 3), CLIP_L._replace(layers=layers)
        varied.append(connector("mix-by-layers", plan, batch, dtype, op="layer_mix", tower=tower))
        varied.append(connector("block-by-layers", plan, batch, dtype, tower=tower, hidden=1024))
    for width in (256, 512, 1024, 2048):
        tower = CLIP_L._replace(width=width)
        varied.append(connector("mix-by-width", IGVA, batch, dtype, op="layer_mix", tower=tower))
    for hidden in (512, 1024, 2048, 4096):
        varied.append(connector("block-by-hidden", IGVA, batch, dtype, hidden=hidden))
    return varied


def allocator_and_connector(batch: int, dtype: str) -> Model:
    """All that runs between the tower and the language model."""
    return Model(name="allocator-and-connector", dtype=dtype, batch=batch, task="connector")


def models(dtype: str, batch: int) -> list[Model]:
    """The whole vision side and a training step."""
    return [
        Model(name="vision-tower", dtype=dtype, batch=batch, task="tower"),
        Model(name="8-questions", dtype=dtype, batch=1, task="questions", questions=8),
        Model(name="another-question", dtype=dtype, batch=1, task="another question"),
        Model(name="training-step", dtype=dtype, batch=1, mode="both", task="training step"),
    ]


def cpu_suite() -> list[Workload]:
    """What two cores measure in minutes; fp32, which takes four times as long on them, at fewer sizes."""
    most: list[Workload] = [igva(batch, "bf16") for batch in (1, 2, 4, 8)]
    most += [igva(batch, "fp32") for batch in (1, 2, 4)]
    most += [igva_mix(batch, dtype) for dtype in ("bf16", "fp32") for batch in (1, 2, 4, 8)]
    most += [igva(2, "bf16", "both"), igva(2, "fp32", "both"), igva(2, "bf16", "backward")]
    most += [igva_linear(2, "bf16"), stage_1(2, "bf16"), stage_1(2, "bf16", "both"), stage_1(2, "fp32")]
    most += [*models("bf16", 1), allocator_and_connector(1, "bf16")]
    return [*most, *family(1, "bf16"), *scaling(1, "bf16"), igva(1, "fp16")]


def gpu_suite() -> list[Workload]:
    """What one GPU measures in minutes, the most telling first."""
    most: list[Workload] = [igva(64, "bf16"), igva_mix(64, "bf16"), igva(64, "bf16", "both")]
    most += [igva_linear(batch, "bf16") for batch in (16, 64)]
    most += [allocator_and_connector(batch, "bf16") for batch in (1, 64)]
    most += [igva(batch, "bf16") for batch in (1, 4, 16, 128)] + [igva_mix(batch, "bf16") for batch in (1, 4, 16, 128)]
    most += [igva(batch, "bf16", "both") for batch in (1, 16)] + [igva(64, "bf16", "backward")]
    most += [igva_linear(batch, "bf16") for batch in (32, 128)]
    most += [stage_1(16, "bf16"), stage_1(16, "bf16", "both"), *models("bf16", 4), *family(4, "bf16")]
    most += [workload for batch in (2, 8, 32) for workload in (igva(batch, "bf16"), igva_mix(batch, "bf16"))]
    return [*most, *scaling(16, "bf16"), igva(16, "fp16"), igva(4, "fp32")]


def affordable(workloads: Sequence[Workload], rates: Mapping[str, float]) -> list[Workload]:
    """The workloads, made cheaper for a machine on which plain torch multiplies slowly in some dtypes.

    In such a dtype, IGVA's forward is kept at B 1 and 2. Everything else with products is measured in fp32, IGVA's
    forward at B 4 at most, the vision tower at 224 pixels, and eight questions become three. (On an AVX2 CPU a backward
    in bf16 took two thirds of the suite's time, and the tower at 336 pixels in fp32 half of it.) A workload that is
    changed says so in its note, and none comes twice.

    Args:
        workloads: as they are listed.
        rates: FLOP/s of plain torch's products, by dtype.
    """
    found: dict[Workload, Workload] = {}
    for workload in workloads:
        slower = rates["fp32"] / rates.get(workload.dtype, math.inf)
        if slower > SLOWER and workload.has_products and not _is_small_block(workload):
            workload = _cheaper(workload, f"{workload.dtype} products of plain torch are {slower:.1f} x slower here")
        known = replace(workload, note="")
        if not workload.note:
            found.pop(known, None)
        found.setdefault(known, workload)
    return list(found.values())


SLOWER = 2.0
"""A dtype is slow if its products take this many times as long as fp32's: a CPU without instructions for it takes five
times or more, one with them half."""


def _is_small_block(workload: Workload) -> bool:
    return workload.name == "igva-2" and workload.mode == "forward" and workload.batch <= 2


def _cheaper(workload: Workload, why: str) -> Workload:
    if workload.name == "igva-2" and workload.mode == "forward":
        return replace(igva(min(workload.batch, 4), "fp32"), note=f"fp32: {why}")
    if isinstance(workload, Model) and workload.plain_flops:
        questions = min(workload.questions, 3)
        name = f"{workload.name if questions == 1 else f'{questions}-questions'}-224px"
        note = f"fp32, 224 pixels a side{f', {questions} questions' if questions > 1 else ''}: {why}"
        return replace(workload, name=name, size="clip-l-224", questions=questions, dtype="fp32", note=note)
    return replace(workload, dtype="fp32", note=f"fp32: {why}")


def quick_suite(device: str) -> list[Workload]:
    """What shows in a minute whether everything works, and roughly how fast it is."""
    batch = 1 if device == "cpu" else 16
    return [igva(batch, "bf16"), igva_mix(batch, "bf16"), igva(batch, "bf16", "both")]


def shapes_suite() -> list[Workload]:
    """IGVA's connector at 72 shapes, to compare kernels at each of them."""
    return [
        connector(f"block-by-shape-{tokens}", IGVA, batch, "bf16", tower=CLIP_L._replace(tokens=tokens, width=width))
        for tokens in (257, 577, 729) for width in (768, 1024, 1152) for batch in (1, 2, 4, 8, 16, 32, 64, 128)
    ]  # fmt: skip


def suite(name: str, device: str) -> Sequence[Workload]:
    """The workloads of "full", "quick", "shapes" or "none"."""
    if name == "none":
        return []
    if name == "shapes":
        return shapes_suite()
    if name == "quick":
        return quick_suite(device)
    return [
        *(cpu_suite() if device == "cpu" else gpu_suite()),
        *operations(device, "fp32" if device == "cpu" else "bf16"),
    ]
