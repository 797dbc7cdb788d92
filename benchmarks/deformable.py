"""``python -m benchmarks.deformable``: deformable attention, beside the code that runs where no extension was built.

* core: MMFuser's attention, beside transformers' ``MultiScaleDeformableAttention`` (``grid_sample``), which computes in
  fp32 as all published code does.
* block: MMFuser's whole block, beside the same modules around that core.
* layers: layers of Deformable DETR, Grounding DINO and RT-DETR of transformers, patched and not.
* encoder: Deformable DETR's six layers, patched and not.

Weights are random. The memory is what a call takes beyond its arguments, at its peak. Outputs must agree, and in the
core the gradients too.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DeformableDetrConfig, GroundingDinoConfig, RTDetrConfig

import igva_kernels as ik
from benchmarks.injection import Row, medians
from benchmarks.markdown import digits, table
from igva_kernels.nn import DeformableFuser
from igva_kernels.ops.deform_attn.cases import DeformCase
from igva_kernels.testing import measure_memory, relative_error

GRID, HEADS, POINTS, WIDTH = (24, 24), 16, 4, 1024
"""Of MMFuser on CLIP ViT-L/336."""
LEVELS = (1, 4, 12)
"""Layer_Select_Fuse's E_M with one state, MMFuser, and E_M with half of the tower."""
PHOTO = ((100, 134), (50, 67), (25, 34), (13, 17))
"""The maps of an image of 800 x 1066, of strides 8 to 64."""
SQUARE = ((80, 80), (40, 40), (20, 20))
"""Those of an image of 640 x 640, of strides 8 to 32."""
AGREE = 0.02
"""The largest relative difference of two results, one of which may be in bf16."""

Call = Callable[[], Sequence[Tensor]]


def _detr(name: str) -> Any:
    return import_module(f"transformers.models.{name}.modeling_{name}")


class CoreInFp32(nn.Module):
    """The core of everybody's code, which casts to fp32 around it as that of MMFuser does."""

    def __init__(self) -> None:
        super().__init__()
        self.core = _detr("deformable_detr").MultiScaleDeformableAttention()

    def forward(self, value: Tensor, *args: Any) -> Tensor:
        """As transformers' core."""
        *sizes, locations, weights, step = args
        return self.core(value.float(), *sizes, locations.float(), weights.float(), step).to(value.dtype)


def centres(shapes: Sequence[tuple[int, int]]) -> Tensor:
    """The centres of the pixels of some maps ``[1, sum of H*W, 1, 2]``, (x, y) from 0 to 1."""
    parts = []
    for height, width in shapes:
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        parts.append(torch.stack([x / width, y / height], -1).flatten(0, 1))
    return torch.cat(parts)[None, :, None]


class PublishedBlock(nn.Module):
    """MMFuser's ``MSCrossAttnBlock`` of transformers' modules; parameters have the names of ``DeformableFuser``."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        kind = _detr("deformable_detr").DeformableDetrMultiscaleDeformableAttention

        def attention(count: int) -> nn.Module:
            made = kind(DeformableDetrConfig(d_model=WIDTH, num_feature_levels=count), HEADS, POINTS)
            made.attn = CoreInFp32()
            return made

        self.cross_attn, self.self_attn = attention(levels), attention(1)
        self.query_norm, self.feat_norm, self.norm1 = (nn.LayerNorm(WIDTH, 1e-6) for _ in range(3))
        self.gamma1, self.gamma2 = (nn.Parameter(torch.zeros(WIDTH)) for _ in range(2))

    def forward(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """As ``DeformableFuser``, without CLS."""
        *levels, query = (state[:, 1:] for state in hidden_states)

        def attend(module: nn.Module, asks: Tensor, feats: Tensor, count: int) -> Tensor:
            shapes = [GRID] * count
            found: Tensor = module(
                asks, encoder_hidden_states=feats, reference_points=centres([GRID]).expand(-1, -1, count, -1),
                spatial_shapes=torch.tensor(shapes), spatial_shapes_list=shapes,
            )[0]  # fmt: skip
            return found

        found = attend(self.cross_attn, self.query_norm(query), self.feat_norm(torch.cat(levels, 1)), len(levels))
        rows = self.norm1(found)
        return query + self.gamma1 * (found + self.gamma2 * attend(self.self_attn, rows, rows, 1))


def compare(what: str, pair: Sequence[Call], rounds: int) -> Row:
    """Seconds and memory of the published code and of ours, which must agree."""
    results, memories = zip(*(measure_memory(call) for call in pair), strict=True)
    for theirs, ours in zip(*results, strict=True):
        error = relative_error(ours, theirs)
        if not error <= AGREE:
            raise AssertionError(f"{what}: the results differ by {error:.2g}, need {AGREE} at the most")
    plain, own = medians(pair, rounds)
    return Row(what, plain, own, *(memory.peak for memory in memories))


def modes(
    what: str, pair: Sequence[Callable[[], Tensor]], leaves: Sequence[Sequence[Tensor]], rounds: int,
    check_grads: bool = False,
) -> Iterator[Row]:  # fmt: skip
    """A row for the forward, and one for forward and backward."""

    @torch.no_grad()
    def forward(call: Callable[[], Tensor]) -> list[Tensor]:
        return [call()]

    def both(call: Callable[[], Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
        out = call()
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        return [out.detach(), *grads] if check_grads else [out.detach()]

    yield compare(f"{what}, forward", [partial(forward, call) for call in pair], rounds)
    calls = [partial(both, call, each) for call, each in zip(pair, leaves, strict=True)]
    yield compare(f"{what}, forward and backward", calls, rounds)


def core(rounds: int, levels: Sequence[int] = LEVELS) -> Iterator[Row]:
    """MMFuser's attention, from the values on."""
    theirs = CoreInFp32()
    for count in levels:
        for batch in (1, 2):
            for dtype in (torch.float32, torch.bfloat16):
                case = DeformCase("", batch, (GRID,) * count, HEADS, WIDTH // HEADS, POINTS, joined=True)
                (value,), offsets, logits, *_ = case.draw(0, dtype, "cpu")
                shapes, leaves = list(case.shapes), [value, offsets, logits]
                for leaf in leaves:
                    leaf.requires_grad_()
                reference = centres([GRID])[:, :, :, None, None]

                def published(
                    value: Tensor, offsets: Tensor, logits: Tensor, reference: Tensor = reference,
                    shapes: list[tuple[int, int]] = shapes,
                ) -> Tensor:  # fmt: skip
                    weights = logits.flatten(3).softmax(-1).view_as(logits)
                    locations = reference + offsets / torch.tensor(GRID[::-1])
                    return theirs(value, None, shapes, None, locations, weights, 64)

                def ours(
                    value: Tensor, offsets: Tensor, logits: Tensor, shapes: list[tuple[int, int]] = shapes
                ) -> Tensor:
                    return ik.deform_attn(value, shapes, offsets, logits)

                pair = [partial(call, *leaves) for call in (published, ours)]
                yield from modes(f"core, L {count}, B {batch}, {str(dtype)[6:]}", pair, [leaves] * 2, rounds, True)


def block(rounds: int, levels: Sequence[int] = LEVELS) -> Iterator[Row]:
    """MMFuser's block on states of CLIP ViT-L/336, with gradients of its parameters."""
    for count in levels:
        for dtype in (torch.float32, torch.bfloat16):
            ours = DeformableFuser(WIDTH, count, HEADS, POINTS, init_values=0.5, skip_tokens=1)
            nn.init.normal_(ours.cross_attn.sampling_offsets.weight, std=WIDTH**-0.5)
            nn.init.normal_(ours.self_attn.sampling_offsets.weight, std=WIDTH**-0.5)
            theirs = PublishedBlock(count)
            theirs.load_state_dict(ours.state_dict())
            states = [torch.randn(1, 1 + math.prod(GRID), WIDTH).to(dtype) for _ in range(count + 1)]
            pair = [partial(module.to(dtype), states) for module in (theirs, ours)]
            leaves = [list(module.parameters()) for module in (theirs, ours)]
            yield from modes(f"block, L {count}, B 1, {str(dtype)[6:]}", pair, leaves, rounds)


def maps(shapes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """What says how the rows of an encoder lie in maps."""
    sizes = torch.tensor(shapes)
    rows = sizes.prod(1)
    return {
        "attention_mask": torch.ones(1, int(rows.sum()), dtype=torch.bool),
        "spatial_shapes": sizes, "spatial_shapes_list": list(shapes),
        "level_start_index": torch.cat([rows.new_zeros(1), rows.cumsum(0)[:-1]]),
    }  # fmt: skip


def patched(
    what: str, module: nn.Module, rows: Tensor, given: dict[str, Any], rounds: int, first: Callable[[Any], Tensor]
) -> Iterator[Row]:
    """A module of transformers as it is, and a patched copy; ``first`` finds the tensor of its output."""
    module.eval()
    own = copy.deepcopy(module)
    ik.patch(own)
    pair = [lambda module=module: first(module(rows, **given)) for module in (module, own)]
    leaves = [[rows, *module.parameters()] for module in (module, own)]
    yield from modes(what, pair, leaves, rounds)


def layers(
    rounds: int, shapes: Sequence[tuple[int, int]] = PHOTO, square: Sequence[tuple[int, int]] = SQUARE
) -> Iterator[Row]:
    """A layer of three detectors: two encoders that look at every pixel, and a decoder with 300 queries."""
    given = maps(shapes)
    count = given["attention_mask"].shape[1]
    given["reference_points"] = centres(shapes).expand(-1, -1, len(shapes), -1)
    rows = torch.randn(1, count, 256, requires_grad=True)
    name = f"{count} rows, fp32"
    detr = _detr("deformable_detr").DeformableDetrEncoderLayer(DeformableDetrConfig(num_feature_levels=len(shapes)))
    yield from patched(f"Deformable DETR's encoder layer, {name}", detr, rows, given, rounds, lambda out: out)
    dino = _detr("grounding_dino").GroundingDinoDeformableLayer(GroundingDinoConfig(num_feature_levels=len(shapes)))
    yield from patched(f"Grounding DINO's deformable layer, {name}", dino, rows, given, rounds, lambda out: out[0])
    given = maps(square)
    count = given.pop("attention_mask").shape[1]
    given |= {
        "encoder_hidden_states": torch.randn(1, count, 256),
        "reference_points": torch.rand(1, 300, 1, 4) * 0.5 + 0.2,
        "object_queries_position_embeddings": torch.randn(1, 300, 256),
    }
    config = RTDetrConfig(num_feature_levels=len(square), decoder_n_levels=len(square))
    config._attn_implementation = "sdpa"
    decoder = _detr("rt_detr").RTDetrDecoderLayer(config)
    rows = torch.randn(1, 300, 256, requires_grad=True)
    what = f"RT-DETR's decoder layer, 300 queries of {count} rows, fp32"
    yield from patched(what, decoder, rows, given, rounds, lambda out: out[0] if isinstance(out, tuple) else out)


def encoder(rounds: int, shapes: Sequence[tuple[int, int]] = PHOTO) -> Iterator[Row]:
    """Deformable DETR's encoder."""
    config = DeformableDetrConfig(num_feature_levels=len(shapes))
    given = maps(shapes)
    count = given["attention_mask"].shape[1]
    given |= {"valid_ratios": torch.ones(1, len(shapes), 2), "spatial_position_embeddings": torch.randn(1, count, 256)}
    module = _detr("deformable_detr").DeformableDetrEncoder(config)
    rows = torch.randn(1, count, 256, requires_grad=True)
    what = f"Deformable DETR's encoder, {config.encoder_layers} layers, {count} rows, fp32"
    yield from patched(what, module, rows, given, rounds, lambda out: out.last_hidden_state)


PARTS: dict[str, Callable[[int], Iterator[Row]]] = {"core": core, "block": block, "layers": layers, "encoder": encoder}


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """A markdown table."""
    heads = ("", "published, ms", "igva_kernels, ms", "ratio", "memory, MiB")
    mebi = [[(bytes_of or 0) / 2**20 for bytes_of in (row.plain_bytes, row.our_bytes)] for row in rows]
    return table(
        heads,
        (
            [row.what, digits(1e3 * row.plain), digits(1e3 * row.ours), f"{row.plain / row.ours:.1f}",
             " / ".join(map(digits, memory))]
            for row, memory in zip(rows, mebi, strict=True)
        ),
    )  # fmt: skip


def main() -> None:
    """Prints a markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deformable", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"among {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each (default: 7)")
    given = parser.parse_args()
    unknown = [part for part in given.parts if part not in PARTS]
    if unknown:
        parser.error(f"part: got {', '.join(unknown)}, need some of {', '.join(PARTS)}")
    torch.manual_seed(0)
    rows = [row for part in given.parts or PARTS for row in PARTS[part](given.rounds)]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads\n")
    print("\n".join(lines(rows)))


if __name__ == "__main__":
    main()
