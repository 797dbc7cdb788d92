"""What streaming saves on a CPU: memory of the tower with its connector, and time of many questions about one image.

    python benchmarks/streaming_cpu.py [--batch B] [--questions N] [--rounds N]

CLIP-L/336 in fp32 and the connector of IGVA at H 4096, random weights. Memory is the peak that torch allocates beyond
the weights and pixels, each variant in a process of its own. Times are medians of rounds in which the variants take
turns; visual tokens are compared first. Prints tables and writes ``benchmarks/results/streaming_cpu.csv``.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from igva_kernels import info, stream_hidden_states
from igva_kernels.demo.model import LANGUAGE_MODEL, TOWER
from igva_kernels.models import LlavaIgvaConfig, LlavaIgvaModel
from igva_kernels.testing import measure_memory, relative_error

RESULTS = Path(__file__).parent / "results" / "streaming_cpu.csv"
VARIANTS = ("tower alone", "plain", "group", "layer")


def make_model() -> LlavaIgvaModel:
    """The vision side at its real size; of the language model one layer, which takes no part."""
    torch.manual_seed(0)
    config = LlavaIgvaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**LANGUAGE_MODEL, vocab_size=64),
        image_token_index=60,
    )
    return LlavaIgvaModel(config).eval()


@torch.no_grad()
def peak_memory(variant: str, batch: int) -> int:
    """Bytes beyond weights and pixels."""
    model = make_model()
    pixels = torch.randn(batch, 3, TOWER["image_size"], TOWER["image_size"])
    sentences = torch.randn(batch, model.config.sentence_embed_dim)
    projector = model.multi_modal_projector

    def tower_alone() -> Tensor:
        return model.vision_tower(pixels).last_hidden_state

    def plain() -> list[Tensor]:
        projector.impl = "reference"
        return model.get_image_features(pixels, sentences).pooler_output

    def streamed() -> Tensor:
        with stream_hidden_states(model.vision_tower, projector.plan, mode=variant) as stream:
            model.vision_tower(pixels)
        sources = stream.sources
        summaries = torch.stack([source[:, 0] for source in sources[1:]], dim=1)
        return projector(sources, model.weight_allocator(sentences, summaries), plan=stream.plan)

    call: Callable[[], object] = {"tower alone": tower_alone, "plain": plain}.get(variant, streamed)
    call()  # what torch allocates once and keeps does not count
    return measure_memory(call)[1].peak


@torch.no_grad()
def question_times(questions: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round: N plain forwards, the same with encoded features, and one question more of each."""
    model = make_model()
    pixels = torch.randn(1, 3, TOWER["image_size"], TOWER["image_size"])
    sentences = torch.randn(questions, model.config.sentence_embed_dim)
    index = torch.zeros(questions, dtype=torch.int64)
    features = model.encode_images(pixels)

    def plain(count: int) -> Tensor:
        model.multi_modal_projector.impl = "reference"
        tokens = [model.get_image_features(pixels, sentences[i : i + 1]).pooler_output[0] for i in range(count)]
        model.multi_modal_projector.impl = "auto"
        return torch.stack(tokens)

    def encoded() -> Tensor:
        once = model.encode_images(pixels)
        return torch.stack(
            model.get_image_features(sentence_embeds=sentences, image_features=once, image_index=index).pooler_output
        )

    variants: dict[str, Callable[[], object]] = {
        f"{questions} plain forwards": lambda: plain(questions),
        f"encode once, ask {questions}": encoded,
        "one plain forward": lambda: plain(1),
        "one more question": lambda: model.get_image_features(sentence_embeds=sentences[:1], image_features=features),
    }
    error = relative_error(encoded(), plain(questions))
    assert error < 1e-5, f"visual tokens differ by {error:.1e}"
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in track(range(rounds), "questions", transient=True):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2, help="images of the memory table (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--peak-of", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print(peak_memory(args.peak_of, args.batch))
        return

    console = Console()
    report = info.collect()
    rows: list[dict[str, object]] = []
    table = Table("variant", "MiB", "x tower alone", title=f"peak memory, B {args.batch}, fp32", title_justify="left")
    peaks: dict[str, int] = {}
    for variant in track(VARIANTS, "memory", transient=True):
        command = [sys.executable, __file__, "--peak-of", variant, "--batch", str(args.batch)]
        peaks[variant] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for variant, peak in peaks.items():
        ratio = peak / peaks["tower alone"]
        table.add_row(variant, f"{peak / 2**20:.1f}", f"{ratio:.2f}")
        rows.append({"group": "memory", "variant": variant, "unit": "MiB", "value": peak / 2**20, "ratio": ratio})
    console.print(table)

    seconds = question_times(args.questions, args.rounds)
    table = Table("variant", "s", "plain / this", title="vision side, one image", title_justify="left")
    names = list(seconds)
    for name, base in zip(names, (names[0], names[0], names[2], names[2]), strict=True):
        ratio = median(a / b for a, b in zip(seconds[base], seconds[name], strict=True))
        table.add_row(name, f"{median(seconds[name]):.3f}", f"{ratio:.2f}")
        rows.append({"group": "time", "variant": name, "unit": "s", "value": median(seconds[name]), "ratio": ratio})
    console.print(table)

    cpu = report["cpu"]
    where = {"cpu": cpu["name"], "threads": cpu["threads"], "torch": report["packages"]["torch"]}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *where])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} | where)
    console.print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
