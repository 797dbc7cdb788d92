"""docs/compatibility.md from the outcomes of test_patch_transformers.py under several versions of transformers.

    python tests/helpers/compatibility.py .venv-test/bin/python .venv-oldest/bin/python .venv-transformers4/bin/python

Each interpreter runs the tests; a cell of the table sums up all tests of that model and check.
"""

import argparse
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
TESTS = "tests/integrations/test_patch_transformers.py"
CHECKS = {
    "test_forward": "forward",
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

HEAD = """# Which transformers models `ik.patch` serves

`make compatibility` writes this page from the outcomes of the tests: tiny models with random weights on a CPU, each
compared with the same model before the patch. [patching.md](patching.md) says how to patch.

* **forward**: equal logits in fp32. **generate**: the same greedy tokens. **gradients**: those of every parameter of
  the model. All three are tested with one, three and four layers; CLIP towers have a CLS token, SigLIP towers have
  none.
* **no concat**: nothing as wide as the concat of the layers is computed. **attention**: a registered attention, eager,
  sdpa.
* **checkpointing**: reentrant and not. **offload**: accelerate's, to CPU and disk. **LoRA**: peft's on the projector,
  with dropout, DoRA, modules_to_save. **FSDP2**: units down to the single Linear. The last three are tested with the
  patch before and after.
* yes: every test passed. FAILS: at least one did not. not run: a library is missing. An empty cell: this model has no
  such test.
"""


def outcomes(python: str) -> tuple[str, dict[tuple[str, str], set[str]]]:
    """The version of transformers, and ``{(model, check): outcomes}``."""
    version = subprocess.check_output([python, "-c", "import transformers; print(transformers.__version__)"], text=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [python, "-m", "pytest", "-q", "--junitxml", report, ROOT / TESTS]
        subprocess.run(command, cwd=ROOT)  # failures are in the report
        cases = ElementTree.parse(report).iter("testcase")
        found = defaultdict(set)
        for case in cases:
            host = case.find("properties/property[@name='host']")
            check = CHECKS.get(case.attrib["name"].partition("[")[0])
            if host is not None and check is not None:
                bad = case.find("failure") is not None or case.find("error") is not None
                outcome = "FAILS" if bad else "not run" if case.find("skipped") is not None else "yes"
                found[host.attrib["value"], check].add(outcome)
    return version.strip(), found


def table(found: dict[tuple[str, str], set[str]]) -> str:
    rows = [["model", *CHECKS.values()], ["---"] * (len(CHECKS) + 1)]
    for host in dict.fromkeys(host for host, _ in found):
        cells = (found.get((host, check), {""}) for check in CHECKS.values())
        rows.append([host, *(next(word for word in ("FAILS", "not run", "yes", "") if word in cell) for cell in cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="+", help="interpreters, each with another version of transformers")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "compatibility.md")
    args = parser.parse_args()
    sections = [f"## transformers {version}\n\n{table(found)}\n" for version, found in map(outcomes, args.pythons)]
    args.output.write_text("\n".join([HEAD, *sections]))


if __name__ == "__main__":
    main()
