"""docs/compatibility.md from the outcomes of tests, under several versions of transformers and with what is used on it.

    python tests/helpers/compatibility.py .venv-test/bin/python .venv-oldest/bin/python .venv-transformers4/bin/python \
        --clients .venv-clients/bin/python

Each interpreter runs the tests of the patch; a cell of its table sums up all tests of that model and check. The one of
the clients runs tests/clients, the others only what every version of transformers can run of it; these tests say with
``client_row`` which cell they stand for.
"""

import argparse
import subprocess
import tempfile
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
PATCH_TESTS = (
    "tests/integrations/test_patch_transformers.py",
    "tests/integrations/test_patch_deepstack.py",
    "tests/integrations/test_patch_deformable.py",
)
CLIENT_TESTS = "tests/clients"
EVERY_VERSION = "tests/clients/test_transformers.py"
MODELS = ("plain", "patched", "reference")
"""Columns of the table of clients."""

CHECKS = {
    "test_forward": "forward",
    "test_injection": "injection",
    "test_generate": "generate",
    "test_gradients": "gradients",
    "test_concat_gone": "no concat",
    "test_attention_is_left_alone": "attention",
    "test_autocast": "autocast",
    "test_bf16": "bf16",
    "test_gradient_checkpointing": "checkpointing",
    "test_compile": "compile",
    "test_offload": "offload",
    "test_lora": "LoRA",
    "test_fsdp2_units_down_to_the_linear": "FSDP2",
}
"""Columns: the tests behind them. The last ones run on two or three models, which stand for all."""

DEFORMABLE_CHECKS = {
    "test_outputs_and_gradients": "outputs and gradients",
    "test_whole_models": "whole model",
    "test_autocast": "autocast",
    "test_compile": "compile",
}
"""The same, of models with deformable attention."""

HEAD = """# What works with what

`make compatibility` writes this page from the outcomes of the tests: tiny models with random weights on a CPU, each
compared with the same model before the patch, or with plain code. [patching.md](patching.md) says how to patch.

yes: every test passed. FAILS: at least one did not. not run: a library is missing, or has no such thing for these
models. An empty cell: there is no such test. Any other word is the right answer of the tests that passed.

1. [Clients and models](#clients-and-models)
2. [Models of transformers that `ik.patch` serves](#models-of-transformers-that-ikpatch-serves)
3. [Deformable attention](#deformable-attention)

## Clients and models

A client is what people run on a Llava: loading, adapters, quantisation, offload, serving, evaluation. **plain**: a
Llava of transformers that reads three layers. **patched**: the same after `ik.patch`, before and after the client came.
**reference**: `LlavaIgvaForConditionalGeneration`.

{versions}

* **accelerate, hooks, peft, tensor parallelism**: loss, logits and all gradients of plain code; merged adapters;
  nothing is left after `revert`.
* **bitsandbytes, torchao**: logits and layer weights of plain code over the numbers that the quantised weights stand
  for. In 8 bit, bitsandbytes rounds the activations too. In 4 bit on a CPU with AVX512-BF16 it multiplies in bf16, and
  only Linears of whole blocks of 32 outputs: there an allocator's last Linear, with an output a group, belongs in
  `llm_int8_skip_modules` (`["model.weight_allocator.head", "lm_head"]`, or `.linear_2` where the text decides).
* **torch.export, ONNX**: what was exported answers other images. ONNX knows plain PyTorch only (`impl="reference"`).
* **transformers**: saved, loaded, trained for a step, asked.
"""

PATCH_HEAD = """## Models of transformers that `ik.patch` serves

* **forward**: equal logits in fp32. **generate**: the same greedy tokens. **gradients**: those of every parameter of
  the model. All three are tested with one, three and four layers; CLIP towers have a CLS token, SigLIP towers have
  none.
* **injection**: models with DeepStack whose mergers are left alone have the very bits of loss, logits and gradients,
  with images, videos and neither, padded at the left and at the right.
* **no concat**: nothing as wide as the concat of the layers is computed. **attention**: a registered attention, eager,
  sdpa.
* **checkpointing**: reentrant and not. **offload**: accelerate's, to CPU and disk. **LoRA**: peft's on the projector,
  with dropout, DoRA, modules_to_save. **FSDP2**: units down to the single Linear. The last three are tested with the
  patch before and after.
"""

DEFORMABLE_HEAD = """## Deformable attention

The attention module of each model, by its folder in transformers, in fp32. **whole model**: outputs and the gradients
of every parameter of a whole model. **autocast**: the dtype of transformers. **compile**: one graph.
"""

CLIENTS = ("accelerate", "bitsandbytes", "lmms-eval", "onnxruntime", "peft", "torch", "torchao", "transformers", "trl")
"""Distributions whose versions the page names."""


PEFT = "peft: "
"""What the rows of peft's methods begin with, which have a table of their own."""


class Outcome(NamedTuple):
    """Of one test: its function, the properties that it recorded, and the word for a cell."""

    test: str
    properties: dict[str, str]
    word: str


def outcomes(python: str, *tests: str) -> list[Outcome]:
    """What becomes of the tests under an interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        parallel = ("-n", "2", "--dist", "worksteal")
        command = [python, "-m", "pytest", "-q", "-m", "not gpu", *parallel, "--junitxml", report, *tests]
        subprocess.run(command, cwd=ROOT)  # failures are in the report
        return [outcome(case) for case in ElementTree.parse(report).iter("testcase")]


def outcome(case: ElementTree.Element) -> Outcome:
    """Of a test case of a JUnit report; of a property that was recorded twice, the last value counts."""
    properties = {each.attrib["name"]: each.attrib["value"] for each in case.iterfind("properties/property")}
    bad = case.find("failure") is not None or case.find("error") is not None
    skipped = case.find("skipped") is not None
    word = "FAILS" if bad else "not run" if skipped else properties.get("passed", "yes")
    return Outcome(case.attrib["name"].partition("[")[0], properties, word)


def cell(words: set[str]) -> str:
    """The worst of the words decides; what tests say in place of "yes" is listed beside it."""
    if not words or words & {"FAILS", "not run"}:
        return next((word for word in ("FAILS", "not run") if word in words), "")
    return ", ".join(sorted(words, key=lambda word: (word != "yes", word)))


def table(first: str, columns: Sequence[str], cells: Iterable[tuple[str, str, str]]) -> str:
    """A Markdown table of ``(row, column, word)``, its rows in the order in which they come."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for row, column, word in cells:
        found[row][column].add(word)
    lines = [[first, *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(cell(words.get(column, set())) for column in columns)] for row, words in found.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def patch_cells(found: Sequence[Outcome], row: str, checks: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """Of the tests of the patch that recorded this property: ``(its value, check, word)``, by its value."""
    of_rows = [each for each in found if row in each.properties and each.test in checks]
    for each in sorted(of_rows, key=lambda each: each.properties[row].casefold()):
        yield each.properties[row], checks[each.test], each.word


def client_cells(found: Sequence[Outcome]) -> list[tuple[str, str, str]]:
    """Of the tests of clients: ``(client, model, word)``, by name."""
    cells = [
        (each.properties["client"], each.properties["model"], each.word)
        for each in found
        if "client" in each.properties
    ]
    return sorted(cells, key=lambda each: each[0].casefold())


def version(python: str, *distributions: str) -> str:
    """Of the distributions that the interpreter has: ``"peft 0.21.2, ..."``."""
    code = (
        "import importlib.metadata as m, sys\n"
        "have = {d.name.lower().replace('_', '-') for d in m.distributions()}\n"
        "print(', '.join(f'{name} {m.version(name)}' for name in sys.argv[1:] if name in have))"
    )
    return subprocess.check_output([python, "-c", code, *distributions], text=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="+", help="interpreters, each with another version of transformers")
    parser.add_argument("--clients", required=True, help="the interpreter that has the clients")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "compatibility.md")
    args = parser.parse_args()

    of_clients = outcomes(args.clients, CLIENT_TESTS)
    sections, deformable = [PATCH_HEAD], [DEFORMABLE_HEAD]
    for python in args.pythons:
        found = outcomes(python, *PATCH_TESTS, EVERY_VERSION)
        of_clients += found
        for part, row, checks in ((sections, "host", CHECKS), (deformable, "deformable", DEFORMABLE_CHECKS)):
            cells = table("model", list(checks.values()), patch_cells(found, row, checks))
            part.append(f"### {version(python, 'transformers')}\n\n{cells}")
    rows = client_cells(of_clients)
    methods = [(client.removeprefix(PEFT), *rest) for client, *rest in rows if client.startswith(PEFT)]
    others = [row for row in rows if not row[0].startswith(PEFT)]
    clients = [table("client", MODELS, others), table("method of peft", MODELS, methods)]
    head = HEAD.format(versions=textwrap.fill(f"Tested with {version(args.clients, *CLIENTS)}.", 120))
    args.output.write_text("\n".join([head, *clients, *sections, *deformable]))


if __name__ == "__main__":
    main()
