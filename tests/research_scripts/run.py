"""Runs the training scripts of the research repositories, as they are and patched by their pages in docs/research.

    RESEARCH_REPOS=/folder/of/clones PYTHON tests/research_scripts/run.py llava igva dense_connector ...

PYTHON has the versions that docs/research/llava.md names, and this package. The clones are named as on GitHub: LLaVA,
IGVA, DenseConnector, Layer_Select_Fuse_for_MLLM, TGIF. Models, tokenizer, pictures and questions are tiny and made by
``assets.py``; nothing is downloaded and no GPU is needed. One training takes some 20 seconds, and each check says what
it found.

The changes that a page shows are read from the page and made in a copy of the clone: what runs is what the page says.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLONES = Path(os.environ.get("RESEARCH_REPOS", "/nowhere"))
STEPS = 6


def changes(page: str) -> list[tuple[str, list[str]]]:
    """The diffs of a page in docs/research: ``(file, lines)``, each under the file's name in bold."""
    found, file, lines = [], None, None
    for line in (ROOT / "docs/research" / page).read_text().splitlines():
        if name := re.fullmatch(r"\*\*`(.+)`\*\*.*", line):
            file = name[1]
        elif line == "```diff":
            lines = []
        elif line == "```" and lines is not None:
            found.append((file, lines))
            lines = None
        elif lines is not None:
            lines.append(line)
    return found


def apply(folder: Path, diffs: list[tuple[str, list[str]]]) -> None:
    """Make the changes; each must find its place, once."""
    for name, lines in diffs:
        # The page may cut the blank at the end of a line.
        old, new = ([x[1:].rstrip() for x in lines if x[:1] != skipped] for skipped in "+-")
        text = [line.rstrip() for line in (folder / name).read_text().splitlines()]
        places = [i for i in range(len(text)) if text[i : i + len(old)] == old]
        assert len(places) == 1, f"{name}: {len(places)} places for\n" + "\n".join(lines)
        text[places[0] : places[0] + len(old)] = new
        (folder / name).write_text("\n".join(text) + "\n")


class Repository:
    """A copy of a clone in which scripts are run."""

    def __init__(self, name: str, work: Path, diffs: list[tuple[str, list[str]]] = ()) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=work))
        self.assets = work / "assets"
        shutil.copytree(CLONES / name, self.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git", "images"))
        apply(self.folder, diffs)
        # A CUDA extension that Layer_Select_Fuse imports, and that the runs do not use; its page registers another.
        if not any("msda" in line for _, lines in diffs for line in lines):
            (self.folder / "MultiScaleDeformableAttention.py").touch()

    def run(self, *command: object, processes: int = 1) -> str:
        """What a Python script of the repository prints; its errors are ours."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes]
        start = [sys.executable] if processes == 1 else launcher
        environment = {**os.environ, "PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1",
                       "OMP_NUM_THREADS": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}  # fmt: skip
        done = subprocess.run(
            [str(x) for x in (*start, *command)], cwd=self.folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    def train(self, script: str, output: Path, *options: object, processes: int = 1) -> list[float]:
        """The losses of the steps."""
        common = (
            "--model_name_or_path", self.assets / "vicuna", "--vision_tower", self.assets / "clip",
            "--image_folder", self.assets / "images", "--mm_projector_type", "mlp2x_gelu", "--output_dir", output,
            "--mm_use_im_start_end", False, "--mm_use_im_patch_token", False, "--image_aspect_ratio", "pad",
            "--per_device_train_batch_size", 4 // processes, "--max_steps", STEPS, "--learning_rate", 1e-3,
            "--lr_scheduler_type", "constant", "--logging_steps", 1, "--save_steps", 1000, "--report_to", "none",
            "--model_max_length", 256, "--use_cpu", True, "--lazy_preprocess", True,
        )  # fmt: skip
        losses = self.folder / "losses"
        losses.unlink(missing_ok=True)
        launch = ROOT / "tests/research_scripts/launch.py"
        self.run(launch, losses, script, *common, *options, processes=processes)
        return [float(line) for line in losses.read_text().split()]


def report(claim: str, holds: bool, found: object = "") -> None:
    """One line of the result."""
    print(f"{'PASS' if holds else 'FAIL'}  {claim}  {found}", flush=True)
    FAILED.extend([] if holds else [claim])


FAILED: list[str] = []


def difference(a: list[float], b: list[float]) -> float:
    """The largest difference of two runs' losses, as a fraction of a loss; infinite where a step is missing."""
    return max(abs(x / y - 1) for x, y in zip(a, b, strict=True)) if len(a) == len(b) == STEPS else float("inf")


STAGE_1 = ("--tune_mm_mlp_adapter", True, "--version", "plain", "--gradient_checkpointing", True)
STAGE_2 = ("--version", "v1", "--gradient_checkpointing", True)
BF16 = ("--bf16", True)
TOLERANCES = {"fp32": 1e-6, "bf16": 5e-3}


def patch_only(script: str, module: str) -> list[tuple[str, list[str]]]:
    """The patch without a plan."""
    return [
        (script, [f" from {module}.mm_utils import tokenizer_image_token", "+import igva_kernels as ik"]),
        (script, ["         vision_tower = model.get_vision_tower()", "+        handle = ik.patch(model)"]),
    ]


def compare(
    name: str,
    work: Path,
    script: str,
    diffs: list[tuple[str, list[str]]],
    options: tuple[object, ...],
    dtypes: tuple[str, ...] = ("fp32", "bf16"),
) -> None:
    """The losses of a repository as it is, and patched."""
    plain, patched = Repository(name, work), Repository(name, work, diffs)
    for dtype in dtypes:
        more = BF16 if dtype == "bf16" else ()
        losses = [
            repository.train(script, work / f"llava-{name}-{dtype}-{i}", *options, *more)
            for i, repository in enumerate((plain, patched))
        ]
        found = difference(*losses)
        claim = f"{name}, {dtype}: the losses of {STEPS} steps are the same patched"
        report(claim, found <= TOLERANCES[dtype], f"{found:.1e}")


def llava(work: Path) -> None:
    """LLaVA as it is, patched, and by its page with a plan: both stages, LoRA, resuming, merging, inference."""
    script, assets = "llava/train/train.py", work / "assets"
    captions, questions = ("--data_path", assets / "captions.json"), ("--data_path", assets / "questions.json")
    layer = ("--mm_vision_select_layer", -2)
    compare("LLaVA", work, script, patch_only(script, "llava"), (*STAGE_2, *questions, *layer))

    page = Repository("LLaVA", work, changes("llava.md"))
    embed(page, work)
    stage_1 = work / "llava-stage-1"
    losses = page.train(script, stage_1, *STAGE_1, *captions, *layer)
    report("LLaVA, stage 1 by the page: it learns", losses[-1] < losses[0], losses)
    check(page, stage_1, assets / "vicuna", "LLaVA, stage 1: its projector is loaded for inference")

    adapter = ("--pretrain_mm_mlp_adapter", stage_1 / "mm_projector.bin", "--sentence_embeds", work / "embeds.pt")
    options = (*STAGE_2, *questions, *layer, *adapter)
    stage_2 = work / "llava-stage-2"
    losses = page.train(script, stage_2, *options, "--save_steps", 3)
    report("LLaVA, stage 2 by the page: it learns", losses[-1] < losses[0], losses)
    check(page, stage_2, None, "LLaVA, stage 2: the model and its allocator are loaded for inference")
    for file in stage_2.iterdir():  # as if it had been stopped behind step 3
        if file.name != "checkpoint-3":
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    found = difference(losses[:3] + page.train(script, stage_2, *options), losses)
    report("LLaVA, stage 2: a run that is resumed ends as the whole one", found < 1e-5, f"{found:.1e}")

    lora = work / "llava-lora"
    losses = page.train(script, lora, *options, "--lora_enable", True, "--lora_r", 4, "--lora_alpha", 8)
    report("LLaVA, stage 2 with LoRA by the page: it learns", losses[-1] < losses[0], losses)
    logits = check(page, lora, assets / "vicuna", "LLaVA, LoRA: adapter, projector and allocator are loaded")
    merged = work / "llava-merged"
    page.run(
        "scripts/merge_lora_weights.py", "--model-path", lora, "--model-base", assets / "vicuna",
        "--save-model-path", merged,
    )  # fmt: skip
    again = check(page, merged, None, "LLaVA, LoRA merged: the model and its allocator are loaded")
    report("LLaVA, LoRA merged: it answers as before it was merged", abs(logits - again) < 1e-3, f"{logits} {again}")


def embed(page: Repository, work: Path) -> None:
    """Embeddings by the page's program, whose encoder is a tiny one of the same width."""
    text = (ROOT / "docs/research/llava.md").read_text()
    program = text.split("**`embed.py`**\n\n```python\n")[1].split("```")[0]
    (page.folder / "embed.py").write_text(program)
    page.run("embed.py", work / "assets/questions.json", work / "assets/mpnet", work / "embeds.pt")


def check(page: Repository, model: Path, base: Path | None, claim: str) -> float:
    """Loads a model as the page says, and returns a number that depends on all that it computes."""
    program = ROOT / "tests/research_scripts/load.py"
    found = json.loads(page.run(program, model, base or "", page.assets).splitlines()[-1])
    report(claim, found["differ"] == [] and found["patched"], found)
    return found["logits"]


GROUPS = "[[1,2,3,4,5,6],[7,8,9,10,11,12],[13,14,15,16,17,18],[19,20,21,22,23,24]]"


def igva(work: Path) -> None:
    """IGVA by its page; as it is, its loss asks for weights that its model does not return."""
    script, assets = "llava/train/train_balance(1).py", work / "assets"
    page = Repository("IGVA", work, changes("igva.md"))
    groups = ("--vit_base_layer", -2, "--vit_aggregate_groups", GROUPS)
    captions = ("--data_path", assets / "captions.json", "--aggregate_by_average", True, "--lambda_balance", 0)
    stage_1 = work / "llava-igva-1"
    losses = page.train(script, stage_1, *STAGE_1, *captions, *groups)
    report("IGVA, stage 1 by the page: it learns", losses[-1] < losses[0], losses)
    # Its stage 2 reads the embedding of a sample from a file that the sample names.
    samples = json.loads((assets / "questions.json").read_text())
    for sample in samples:
        if "image" in sample:
            sample["sentence_embed"] = "0.pt"
    (work / "igva.json").write_text(json.dumps(samples))
    page.run("-c", f"import torch; torch.save(torch.randn(768), {str(work / '0.pt')!r})")
    embeds = ("--data_path", work / "igva.json", "--sentence_embed_folder", work, "--sentence_embed_dim", 768)
    aggregator = ("--aggregator_num_transformers", 1, "--aggregator_num_heads", 2, "--aggregator_hidden_dim", 16)
    more = (*embeds, *aggregator, "--sentence_embedder", assets / "mpnet", "--lambda_balance", 0.02)
    adapter = ("--pretrain_mm_mlp_adapter", stage_1 / "mm_projector.bin", "--aggregate_by_average", False)
    losses = page.train(script, work / "llava-igva-2", *STAGE_2, *groups, *adapter, *more)
    report("IGVA, stage 2 by the page: it learns", losses[-1] < losses[0], losses)


def dense_connector(work: Path) -> None:
    """DenseConnector (dci) as it is, and by its page; without --bf16 it loads fp16, which no CPU trains."""
    questions = ("--data_path", work / "assets/questions.json", "--mm_vision_select_layer", -2)
    options = (*STAGE_2, *questions, "--mm_dense_connector_type", "dci")
    compare("DenseConnector", work, "dc/train/train.py", changes("dense_connector.md"), options, ("bf16",))


def layer_select_fuse(work: Path) -> None:
    """Layer_Select_Fuse (E_D, former) as it is, and by its page."""
    questions = ("--data_path", work / "assets/questions.json", "--mm_vision_select_layer", -2)
    options = (*STAGE_2, *questions, "--layer_fusing_strategy", "E_D", "--layer_using_strategy", "former")
    name, page = "Layer_Select_Fuse_for_MLLM", changes("layer_select_fuse.md")
    compare(name, work, "llava/train/train.py", page, options)


def tgif(work: Path) -> None:
    """TGIF as it is, and by its page."""
    questions = ("--data_path", work / "assets/questions.json", "--mm_vision_select_layer", -2)
    options = (*STAGE_2, *questions, "--mm_projector_type", "layer_selector")
    compare("TGIF", work, "llava/train/train.py", changes("tgif.md"), options)


def parallel(work: Path) -> None:
    """LLaVA by its page in two processes: DDP, which looks for unused parameters, and DeepSpeed ZeRO-2."""
    page = Repository("LLaVA", work, changes("llava.md"))
    if not (work / "embeds.pt").exists():
        embed(page, work)
    questions = ("--data_path", work / "assets/questions.json", "--sentence_embeds", work / "embeds.pt")
    options = ("--version", "v1", *questions, "--mm_vision_select_layer", -2)
    ways = {"DDP": ("--ddp_backend", "gloo"), "ZeRO-2": (*BF16, "--deepspeed", "scripts/zero2.json")}
    for name, more in ways.items():
        output = work / f"llava-{name}"
        losses = page.train("llava/train/train.py", output, *options, *more, processes=2)
        report(f"LLaVA by the page, {name}: it learns", losses[-1] < losses[0], losses)
        check(page, output, None, f"LLaVA, {name}: the model and its allocator are loaded for inference")


CASES = {
    "llava": llava,
    "igva": igva,
    "dense_connector": dense_connector,
    "layer_select_fuse": layer_select_fuse,
    "tgif": tgif,
    "parallel": parallel,
}


def main() -> None:
    """Runs what is named on the command line, or everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="by default all")
    parser.add_argument("--work", type=Path, help="keep everything in this folder")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "assets").exists():
        subprocess.run([sys.executable, ROOT / "tests/research_scripts/assets.py", work / "assets"], check=True)
    for case in arguments.cases or CASES:
        CASES[case](work)
    if arguments.work is None:
        shutil.rmtree(work)
    sys.exit(len(FAILED) > 0)


if __name__ == "__main__":
    main()
