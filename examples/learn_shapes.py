"""Train small LLaVA-IGVA models from scratch on drawn pictures, and see what they learn and which layers they read.

    python examples/learn_shapes.py            # about 10 minutes per seed on two cores; run again, it resumes

For every seed the recipe trains three connectors: the fused one over all layers, the plain torch code of the same, and
the fused one over the tower's last layer alone, first on captions, then on questions among captions. The report has
accuracy on held-out pictures by kind of question, loss curves, and mean layer weights by kind. A run is one process
with one thread, and resumes from its last checkpoint; a finished one is not run again.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import train_llava_igva
import transformers
from draw_shapes import CHANCE, KINDS, write_dataset
from llava_data import LlavaCollator, LlavaDataset
from shapes_model import save_checkpoint
from torch.utils.data import DataLoader
from transformers import AutoProcessor

from igva_kernels import __version__
from igva_kernels.models import LlavaIgvaForConditionalGeneration

CONNECTORS = {
    "fused": {"reads": "all layers", "impl": "auto"},
    "plain": {"reads": "all layers", "impl": "reference"},
    "last layer": {"reads": "last layer only", "impl": "auto"},
}
PICTURES, HELD_OUT = 8000, 400
"""Pictures for training and held out."""
CAPTION_STEPS, QUESTION_STEPS = 250, 500
"""Training steps on captions, then on questions among captions."""
BALANCE = 0.001
"""Factor of the negative entropy in the loss. The authors' 0.02 holds the weights of so small a model at 1/4 each."""


def train(data: Path, folder: Path, connector: str, seed: int) -> None:
    """Train one connector on captions, then on questions, and write its held-out accuracy to ``results.json``."""
    options = CONNECTORS[connector]
    if not (folder / "start" / "config.json").exists():
        save_checkpoint(folder / "start", options["reads"], seed)
    captions, questions = folder / "captions", folder / "questions"
    if not (captions / "model.safetensors").exists():
        _run(data, "captions", folder / "start", captions, CAPTION_STEPS, options["impl"], seed)
    if not (questions / "model.safetensors").exists():
        _run(data, "train", captions, questions, QUESTION_STEPS, options["impl"], seed)
    results: dict[str, Any] = evaluate(data, questions)
    results["losses"] = _losses(captions) + _losses(questions)
    (folder / "results.json").write_text(json.dumps(results))


def _run(data: Path, file: str, start: Path, output: Path, steps: int, impl: str, seed: int) -> None:
    options = {
        "model_name_or_path": start, "version": "checkpoint", "impl": impl, "balance_coefficient": BALANCE,
        "data_path": data / f"{file}.json", "image_folder": data / "images",
        "sentence_embeds": data / f"{file}.safetensors", "output_dir": output, "seed": seed,
        "per_device_train_batch_size": 64, "max_steps": steps, "learning_rate": 2e-3, "warmup_steps": 30,
        "lr_scheduler_type": "cosine", "adam_beta2": 0.98, "logging_steps": 1, "save_steps": 50, "save_total_limit": 1,
        "disable_tqdm": True,
    }  # fmt: skip
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    train_llava_igva.main([*arguments, "--unfreeze_vision_tower", "--use_cpu"])


def _losses(output: Path) -> list[float]:
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


@torch.no_grad()
def evaluate(data: Path, checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Accuracy and mean layer weights on held-out pictures, by kind of question.

    An answer is right if every one of its tokens is the most likely one, so that greedy decoding would write it.
    """
    model = LlavaIgvaForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    dataset = LlavaDataset(
        data / "held_out.json", data / "images", processor.sentence_encoder, data / "held_out.safetensors"
    )
    kinds = [sample["id"].rsplit("_", 1)[1] for sample in dataset.samples]
    right, weights = defaultdict(list), defaultdict(list)
    row = 0
    for batch in DataLoader(dataset, batch_size=100, collate_fn=LlavaCollator(processor)):
        labels = batch.pop("labels")[:, 1:]
        out = model(**batch)
        hits = (out.logits[:, :-1].argmax(dim=-1) == labels) | (labels == -100)
        for i, hit in enumerate(hits.all(dim=1).tolist()):
            right[kinds[row]].append(hit)
            if out.layer_weights is not None:
                weights[kinds[row]].append(out.layer_weights[i].tolist())
            row += 1
    return {
        "accuracy": {kind: mean(map(float, right[kind])) for kind in KINDS},
        "weights": {kind: [mean(column) for column in zip(*weights[kind], strict=True)] for kind in weights},
    }


def report(results: dict[str, dict[int, dict[str, Any]]], folder: Path) -> None:
    """Write ``learn_shapes.csv``, ``learn_shapes.md`` and the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "learn_shapes.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["connector", "seed", "kind", "accuracy", *(f"weight_{k + 1}" for k in range(4))])
        for connector, runs in results.items():
            for seed, run in runs.items():
                for kind in KINDS:
                    writer.writerow([connector, seed, kind, run["accuracy"][kind], *run["weights"].get(kind, [])])
    (folder / "learn_shapes.md").write_text("\n".join(_table(results)) + "\n")
    _draw(results, folder)


def _table(results: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    lines = ["| connector | seeds | " + " | ".join(KINDS) + " | mean |", "|---" * (len(KINDS) + 3) + "|"]
    chance = [*CHANCE.values(), mean(CHANCE.values())]
    lines.append("| chance | | " + " | ".join(f"{100 * value:.1f}" for value in chance) + " |")
    for connector, runs in results.items():
        by_kind = [[100 * run["accuracy"][kind] for run in runs.values()] for kind in KINDS]
        columns = [*by_kind, [mean(values) for values in zip(*by_kind, strict=True)]]
        lines.append(f"| {connector} | {len(runs)} | " + " | ".join(map(_spread, columns)) + " |")
    versions = f"igva_kernels {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    lines += [
        "",
        f"Held-out accuracy in percent, mean ± standard deviation over seeds; {HELD_OUT} pictures, "
        f"{HELD_OUT * len(KINDS)} questions. {versions}, Python {platform.python_version()}, {platform.machine()} CPU, "
        f"{datetime.date.today().isoformat()}.",
        "",
        "| seed | first step that differs by 1e-5 | by 1e-3 | largest difference | mean of the last 100 steps |",
        "|---|---|---|---|---|",
    ]
    for seed in sorted(set(results["fused"]) & set(results["plain"])):
        gaps = _gaps(results, seed)
        firsts = [next((str(i) for i, gap in enumerate(gaps) if gap > limit), "none") for limit in (1e-5, 1e-3)]
        tail = [mean(results[name][seed]["losses"][-100:]) for name in ("fused", "plain")]
        lines.append(f"| {seed} | {' | '.join(firsts)} | {max(gaps):.1e} | {tail[0]:.4f} and {tail[1]:.4f} |")
    lines += [
        "",
        "Training loss, fused and plain from the same seed; differences are relative, the last column has both.",
    ]
    return lines


def _spread(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _gaps(results: dict[str, dict[int, dict[str, Any]]], seed: int) -> list[float]:
    pairs = zip(results["fused"][seed]["losses"], results["plain"][seed]["losses"], strict=True)
    return [abs(fused - plain) / plain for fused, plain in pairs]


def _draw(results: dict[str, dict[int, dict[str, Any]]], folder: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (curves, gaps) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=[2, 1], layout="constrained")
    seed = min(results["fused"])
    for (connector, runs), style in zip(results.items(), ("-", "--", "-"), strict=True):
        if seed in runs:
            losses = torch.tensor(runs[seed]["losses"]).unfold(0, 10, 1).mean(dim=1)
            curves.plot(range(9, 9 + len(losses)), losses, style, label=connector, linewidth=1.2)
    curves.axvline(CAPTION_STEPS, color="grey", linewidth=0.8)
    curves.set(ylabel="training loss (mean of 10 steps)", title=f"captions, then questions; seed {seed}")
    curves.legend()
    for seed in sorted(set(results["fused"]) & set(results["plain"])):
        gaps.semilogy([max(gap, 1e-9) for gap in _gaps(results, seed)], linewidth=0.8, label=f"seed {seed}")
    gaps.axvline(CAPTION_STEPS, color="grey", linewidth=0.8)
    gaps.set(xlabel="step", ylabel="|fused - plain| / plain\n(0 is drawn as 1e-9)")
    gaps.legend(loc="lower right")
    figure.savefig(folder / "learn_shapes_loss.png", dpi=150)

    fused = results["fused"].values()
    figure, axes = plt.subplots(1, len(KINDS), figsize=(10, 2.8), sharey=True, layout="constrained")
    for axis, kind in zip(axes, KINDS, strict=True):
        columns = list(zip(*(run["weights"][kind] for run in fused), strict=True))
        error = [stdev(column) for column in columns] if len(fused) > 1 else None
        axis.bar(range(1, 5), [mean(column) for column in columns], yerr=error, capsize=3, color="tab:blue")
        axis.axhline(0.25, color="grey", linewidth=0.8, linestyle="--")
        axis.set(title=kind, xticks=range(1, 5), xticklabels=["1-2", "3-4", "5-6", "7-8"])
    axes[0].set_ylabel("mean weight")
    figure.supxlabel("layers of the group")
    figure.savefig(folder / "learn_shapes_weights.png", dpi=150)
    plt.close("all")


def main() -> None:
    """Train what is missing, as many runs at a time as there are cores unless told otherwise, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("learn_shapes"), help="for data, checkpoints and results")
    parser.add_argument("--report", type=Path, help="where table and figures go (default: --folder)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--one", nargs=2, metavar=("CONNECTOR", "SEED"), help="train this one, in this process")
    args = parser.parse_args()
    data = args.folder / "data"
    if args.one:
        connector, seed = args.one[0], int(args.one[1])
        torch.set_num_threads(1)
        train(data, args.folder / f"{connector}-{seed}", connector, seed)
        return
    if not (data / "held_out.json").exists():
        write_dataset(data, PICTURES, HELD_OUT)

    def finish(connector: str, seed: int) -> dict[str, Any]:
        file = args.folder / f"{connector}-{seed}" / "results.json"
        if not file.exists():
            command = [sys.executable, __file__, "--folder", str(args.folder), "--one", connector, str(seed)]
            subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        return json.loads(file.read_text())

    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {(name, seed): pool.submit(finish, name, seed) for seed in args.seeds for name in CONNECTORS}
    results = {name: {seed: runs[name, seed].result() for seed in args.seeds} for name in CONNECTORS}
    report(results, args.report or args.folder)


if __name__ == "__main__":
    main()
