"""Compare systems of multi-layer visual fusion: each is one line of the reference model's config.

    python examples/compare_connectors.py                                  # tiny: seconds
    python examples/compare_connectors.py --size real --only IGVA TGIF     # CLIP-L/336 or SigLIP-so400m, H 4096

For each system, the table has its parameters besides the tower and the language model, what is kept per encoded image,
and, given the states of the tower, time and memory of its connector, plain torch / fused. Weights are random.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, SiglipVisionConfig

from igva_kernels import MixPlan
from igva_kernels.models import LlavaIgvaConfig, LlavaIgvaModel
from igva_kernels.testing import measure_memory, relative_error

IMPLS = ("reference", "auto")
ALL = range(1, 25)
SYSTEMS: dict[str, dict[str, Any]] = {
    "LLaVA-1.5": {"mix_plan": {"concat": {"layers": [-2]}}},
    "IGVA": {},
    "IGVA, stage 1": {"aggregation": "uniform"},
    "DenseConnector SCI": {"mix_plan": {"dense_connector": {"kind": "sci"}}},
    "DenseConnector DCI": {"mix_plan": {"dense_connector": {"kind": "dci"}}},
    "DenseConnector SCI, SigLIP": {"mix_plan": {"dense_connector": {"kind": "sci", "tower": "siglip"}}},
    "DenseConnector DCI, SigLIP": {"mix_plan": {"dense_connector": {"kind": "dci", "tower": "siglip"}}},
    "Layer_Select_Fuse 18": {"mix_plan": {"layer_select": {"strategy": "18"}}},
    "Layer_Select_Fuse 3-18-23": {"mix_plan": {"layer_select": {"strategy": "3-18-23"}}},
    "Layer_Select_Fuse former": {"mix_plan": {"layer_select": {"strategy": "former"}}},
    "Layer_Select_Fuse latter": {"mix_plan": {"layer_select": {"strategy": "latter"}}},
    "Layer_Select_Fuse all": {"mix_plan": {"layer_select": {"strategy": "all"}}},
    "VipLlava": {"mix_plan": {"concat": {"layers": [-2, -5, -8, -11, 6]}}, "projector_layernorm_eps": 1e-5},
    "Granite Vision, SigLIP": {"mix_plan": {"concat": {"layers": [-24, -20, -12, -1]}}},
    "TGIF": {
        "mix_plan": {"weighted_sum": {"layers": ALL, "residual": -2}}, "projector_layernorm_eps": 1e-5,
        "aggregation": "text", "allocator_hidden_dim": 512,
    },
    "COMM Mean": {"mix_plan": {"weighted_sum": {"layers": ALL}}, "aggregation": "uniform"},
    "COMM Layerscale": {"mix_plan": {"weighted_sum": {"layers": ALL}}, "aggregation": "learned"},
}  # fmt: skip
"""The fields of ``LlavaIgvaConfig`` that make each system, for a tower of 24 layers (see ``tower_layers``)."""

FUSERS: dict[str, dict[str, Any]] = {
    "MMFuser": {"fuser": {"mmfuser": {}}},
    "Layer_Select_Fuse E_M 18": {"fuser": {"layer_select": {"strategy": "18"}}},
    "Layer_Select_Fuse E_M 3-18-23": {"fuser": {"layer_select": {"strategy": "3-18-23"}}},
    "Layer_Select_Fuse E_M all": {"fuser": {"layer_select": {"strategy": "all"}}},
}
"""The same of systems with deformable fusion: a block before the projector."""

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"clip": (16, 32, 2, 28, 14), "siglip": (16, 32, 2, 28, 14), "text": 32},
    "real": {"clip": (1024, 4096, 16, 336, 14), "siglip": (1152, 4304, 16, 384, 14), "text": 4096},
}
"""Of each tower: width, width of the MLP, heads, pixels per side of an image and of a patch. "text": width of the
language model."""


CHOICES = [*SYSTEMS, *FUSERS]


def tower_layers(system: str) -> int:
    """Layers of the system's tower: DenseConnector cuts the last of SigLIP's 27."""
    if "SigLIP" not in system:
        return 24
    return 26 if "DenseConnector" in system else 27


def make_config(system: str, size: str = "tiny", **overrides: Any) -> LlavaIgvaConfig:
    """The reference model as this system, with a language model of one layer, which takes no part here."""
    tower = "siglip" if "SigLIP" in system else "clip"
    width, inner, heads, image, patch = SIZES[size][tower]
    vision_class = SiglipVisionConfig if tower == "siglip" else CLIPVisionConfig
    hidden = SIZES[size]["text"]
    fields = {
        "vision_config": vision_class(
            hidden_size=width, intermediate_size=inner, num_hidden_layers=tower_layers(system),
            num_attention_heads=heads, image_size=image, patch_size=patch,
        ),
        "text_config": LlamaConfig(
            hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=1, num_attention_heads=8, vocab_size=64
        ),
        "image_token_index": 60,
        **(SYSTEMS | FUSERS)[system],
        **overrides,
    }  # fmt: skip
    return LlavaIgvaConfig(**fields)


def measure(system: str, size: str, batch: int, rounds: int) -> list[str]:
    """The cells of the system's row."""
    torch.manual_seed(0)
    config = make_config(system, size)
    model = LlavaIgvaModel(config).eval()
    projector, allocator, fuser = model.multi_modal_projector, model.weight_allocator, model.fuser
    parameters = [p for module in (projector, allocator, fuser) if module is not None for p in module.parameters()]
    pixels = torch.randn(batch, 3, config.vision_config.image_size, config.vision_config.image_size)
    kept = model.encode_images(pixels).nbytes / batch
    with torch.no_grad():
        states = model.vision_tower(pixels, output_hidden_states=True).hidden_states
    weights = torch.randn(batch, config.plan.num_columns).softmax(-1).requires_grad_() if allocator else None

    def connect(impl: str) -> Tensor:
        projector.impl = impl
        if fuser is None or config.fuser_plan is None:
            return projector(states, weights)
        fuser.impl = impl
        fused = fuser([states[layer] for layer in (*config.fuser_plan.levels, *config.plan.layers)])
        return projector([fused], plan=MixPlan.concat([0], 1))

    def infer(impl: str) -> Tensor:
        with torch.no_grad():
            return connect(impl)

    def step(impl: str) -> None:
        connect(impl).sum().backward()

    error = relative_error(infer("auto"), infer("reference"))
    assert error < 1e-4, f"{system}: fused and plain differ by {error:.1e}"
    seconds: dict[tuple[Any, str], list[float]] = {}
    for _ in range(rounds):
        for call in (infer, step):
            for impl in IMPLS:
                start = time.perf_counter()
                call(impl)
                seconds.setdefault((call, impl), []).append(time.perf_counter() - start)
    cells = [f"{sum(p.numel() for p in parameters) / 1e6:.3g}", f"{kept / 2**20:.3g}"]
    cells += [" / ".join(f"{1e3 * median(seconds[call, impl]):.1f}" for impl in IMPLS) for call in (infer, step)]
    peaks, saved = [], []
    for impl in IMPLS:
        out, memory = measure_memory(lambda: infer(impl))  # noqa: B023
        peaks.append(memory.peak - out.nbytes)
        saved.append(measure_memory(lambda: connect(impl))[1].kept - out.nbytes)  # noqa: B023
    return [*cells, *(" / ".join(f"{n / 2**20:.3g}" for n in pair) for pair in (peaks, saved))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=CHOICES, default=CHOICES, metavar="SYSTEM")
    parser.add_argument("--batch", type=int, default=2, help="images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls (default: %(default)s)")
    args = parser.parse_args()
    title = f"{args.size}, {args.batch} images, fp32; plain / fused where there are two numbers"
    table = Table(
        "system", "parameters, M", "kept per image, MiB", "inference, ms", "training step, ms", "inference, MiB",
        "kept for backward, MiB", title=title, title_justify="left",
    )  # fmt: skip
    for system in track(args.only, "systems", transient=True):
        table.add_row(system, *measure(system, args.size, args.batch, args.rounds))
    Console().print(table)


if __name__ == "__main__":
    main()
