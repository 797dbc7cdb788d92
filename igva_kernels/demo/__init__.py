"""Asks a LLaVA-IGVA model about one image, with the plain connector and with the fused one, side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from igva_kernels.demo.compare import (
    CONNECTORS,
    ConnectorFigures,
    Conversation,
    Run,
    run_connector,
    run_model,
)
from igva_kernels.demo.figure import draw
from igva_kernels.demo.model import DESCRIPTION, load_model, random_model
from igva_kernels.models import LlavaIgvaConfig
from igva_kernels.ops.weighted_mix import MixPlan
from igva_kernels.runtime.errors import UserError, reading
from igva_kernels.testing import Verdict, relative_error

# Questions that need different layers (colour, place, meaning), and the answers that the training steps teach.
QUESTIONS = {
    "What colour is the saucer?": "The saucer is red.",
    "Where is the spoon?": "It lies on the saucer, to the right of the cup.",
    "What could one do with this?": "Drink the coffee while it is hot.",
}

RANDOM_STEPS = 4
"""Default number of training steps with random weights; with a checkpoint it is 0."""


def run(image: Path | None, ask: Sequence[str] | None, model_dir: str | None, output: Path, steps: int | None) -> int:
    """Runs the demo and prints what it finds.

    Args:
        image: a photograph; the bundled one if None.
        ask: instructions; the questions about the bundled photograph if None. As instructions of your own come without
            answers, the training steps teach the model to repeat them.
        model_dir: a checkpoint; random weights if None.
        output: directory of the figure.
        steps: training steps; None for ``RANDOM_STEPS`` with random weights and for 0 with a checkpoint.

    Returns:
        0 if both connectors give the same answers, except for ties, and the fused one keeps the rule of
        ``igva_kernels.testing``; 1 if not.

    Raises:
        UserError: the image or the model cannot be read, or the model cannot be asked.
    """
    start = time.perf_counter()
    console = _Console()
    disable_progress_bar()
    steps = (RANDOM_STEPS if model_dir is None else 0) if steps is None else steps
    questions = QUESTIONS if ask is None else {text: text for text in ask}
    instructions, answers = list(questions), list(questions.values())
    path = Path(str(files(__package__) / "coffee.jpg")) if image is None else image

    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
    ) as progress:
        task = progress.add_task("", total=2 + len(CONNECTORS) * (2 + steps))

        def begin(what: str) -> None:
            progress.update(task, description=what)
            if not console.is_terminal:  # there is no bar, so a line per task
                console.print(f"{what} ...", highlight=False)

        begin("building the model" if model_dir is None else "loading the model")
        with reading(path, "need a photograph, as JPEG or PNG for example"):
            photograph = Image.open(path).convert("RGB")
        model, processor = random_model([*instructions, *answers]) if model_dir is None else load_model(model_dir)
        try:
            conversation = Conversation(processor, photograph, instructions, answers, _sentence_dim(model.config))
        except (OSError, ValueError, ImportError) as error:
            raise UserError(str(error)) from error
        progress.advance(task)
        runs = {}
        for name, impl in CONNECTORS.items():
            begin(f"the model with the {name} connector: answers, {_count(steps, 'training step')}")
            runs[name] = run_model(model, conversation, impl, steps, lambda: progress.advance(task))
        begin("the connector alone: error against fp64, time, memory")
        figures = run_connector(model, conversation, next(iter(runs["plain"].layer_weights), None))

    console.print(f"image               {path.name}\n" + (DESCRIPTION if model_dir is None else f"model {model_dir}"))
    _print_answers(console, instructions, runs, steps)
    _print_agreement(console, runs)
    _print_figures(console, figures, runs)
    figure = _draw(output, instructions, model.config.plan, runs, steps, path.name, model_dir)
    drawn = "none, without layer weights and losses" if figure is None else figure
    console.print(f"figure: {drawn}    ({time.perf_counter() - start:.0f} s in all)")
    failures = _failures(instructions, runs, figures["fused"].verdicts, torch.finfo(model.dtype).eps ** 0.5)
    if failures:
        _print_failures(console, failures)
    return 1 if failures else 0


class _Console(Console):
    """Leaves a reader of the output that goes away to the command; rich would exit with the status of a failure."""

    def on_broken_pipe(self) -> None:
        raise


def _sentence_dim(config: LlavaIgvaConfig) -> int | None:
    """The width of the sentence embeddings by which the model weighs layers; None if it does not read them."""
    return config.sentence_embed_dim if config.reads_instructions else None


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _print_answers(console: Console, instructions: Sequence[str], runs: dict[str, Run], steps: int) -> None:
    table = Table("instruction", *runs, "same", title="Answers (greedy)", title_justify="left")
    stages = {"": [run.answers for run in runs.values()]}
    if steps:
        stages[f" (after {_count(steps, 'training step')})"] = [
            run.trained_answers for run in runs.values() if run.trained_answers
        ]
    for when, columns in stages.items():
        for instruction, *told in zip(instructions, *(answers.texts for answers in columns), strict=True):
            row = (instruction + when, *told, "yes" if len(set(told)) == 1 else "NO")
            table.add_row(*map(escape, row))
    console.print(table)


def _print_agreement(console: Console, runs: dict[str, Run]) -> None:
    """Prints how far apart the two models are."""
    plain, fused = runs.values()
    gradients = {name: relative_error(fused.grads[name], plain.grads[name]) for name in plain.grads}
    worst = max(gradients, key=lambda name: gradients[name])
    lines = [
        f"logits differ by {relative_error(fused.logits, plain.logits):.1e}",
        f"the gradients of {len(gradients)} weights by at most {gradients[worst]:.1e} ({worst})",
    ]
    apart = max(abs(f - p) / (abs(p) or 1.0) for f, p in zip(fused.losses, plain.losses, strict=True))
    lines.append(f"the losses of {_count(len(plain.losses), 'training step')} by at most {apart:.1e}")
    console.print("fused beside plain, relative: " + "; ".join(lines), highlight=False)


def _failures(
    instructions: Sequence[str], runs: dict[str, Run], verdicts: Sequence[Verdict], tie: float
) -> list[str]:  # fmt: skip
    """What is wrong, and by how much. Logits nearer than ``tie`` standard deviations are a tie."""
    plain, fused = (run.answers for run in runs.values())
    failures = []
    for row, instruction in enumerate(instructions):
        gap = plain.gap(fused, row)
        if gap > tie:
            failures.append(
                f"the answers to {instruction!r} differ: {plain.texts[row]!r} by the plain connector, "
                f"{fused.texts[row]!r} by the fused one; plain torch prefers its own by {gap:.1e} standard deviations "
                f"of the logits, and {tie:.1e} would be a tie"
            )
    # Small results are left to `igva-kernels verify`, which judges them on several draws.
    for verdict in verdicts:
        if not verdict.ok:
            times = f", {verdict.error / verdict.plain:.2f} times as much" if verdict.plain else ""
            failures.append(
                f"{verdict.name} of the fused connector: its error against fp64 is {verdict.error:.2e}, where "
                f"{verdict.budget:.2e} is allowed; plain torch's is {verdict.plain:.2e}{times}"
            )
    return failures


def _print_failures(console: Console, failures: Sequence[str]) -> None:
    console.print("\n[bold]FAILED:[/bold] the fused connector does not compute what the plain one does")
    for failure in failures:
        console.print(f"  * {escape(failure)}", highlight=False)
    console.print(
        "What is wrong here is wrong in your model: `igva-kernels verify` says at which shapes and in which dtypes.\n"
        "Please report this output with those of `igva-kernels verify` and `igva-kernels info`;\n"
        'until then impl="reference" computes everything in plain torch.',
        highlight=False,
    )


def _print_figures(console: Console, figures: dict[str, ConnectorFigures], runs: dict[str, Run]) -> None:
    table = Table("connector", "plain", "fused", "fused / plain", title="Figures of this run", title_justify="left")
    rows: list[tuple[str, str, list[float]]] = []
    for name in figures["plain"].errors:
        rows.append((f"error against fp64, {name}", ".1e", [f.errors[name] for f in figures.values()]))
    rows += [
        ("forward, ms", ".0f", [f.forward_ms for f in figures.values()]),
        ("forward and backward, ms", ".0f", [f.training_ms for f in figures.values()]),
        ("memory beyond inputs and output, MiB", ".1f", [f.inference_bytes / 2**20 for f in figures.values()]),
        ("kept for backward, MiB", ".1f", [f.saved_bytes / 2**20 for f in figures.values()]),
        ("whole model: answers, s", ".2f", [run.answer_seconds for run in runs.values()]),
        ("whole model: training step, s", ".2f", [median(run.step_seconds) for run in runs.values()]),
    ]
    for label, form, values in rows:
        ratio = f"{values[1] / values[0]:.2f}" if values[0] else ""
        table.add_row(label, *(format(value, form) for value in values), ratio)
    console.print(table)


def _draw(
    output: Path, instructions: Sequence[str], plan: MixPlan, runs: dict[str, Run], steps: int,
    image: str, model_dir: str | None,
) -> Path | None:  # fmt: skip
    """Where the figure is; None if there is nothing to draw."""
    plain, fused = runs.values()
    weights = {}
    if fused.layer_weights:
        weights["at the start"] = fused.layer_weights[0].tolist()
        if steps > 1:
            weights[f"after {_count(steps - 1, 'step')}"] = fused.layer_weights[-1].tolist()
    losses = {"plain": plain.losses, "fused": fused.losses} if steps > 1 else {}
    if not weights and not losses:
        return None
    note = f"{image}; " + ("random weights, so the shares mean nothing yet" if model_dir is None else model_dir)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "demo.png"
    draw(path, instructions, _weighed(plan), weights, losses, note)
    return path


def _weighed(plan: MixPlan) -> list[str]:
    """What each column of the layer weights weighs, as a formula."""
    entries = [entry for block in plan.blocks for entry in block]
    shares = [[e._replace(column=None) for e in entries if e.column == k] for k in range(plan.num_columns)]
    return [str(MixPlan((tuple(share),)))[1:-1] if share else "nothing" for share in shares]
