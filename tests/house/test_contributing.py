"""The recipes of CONTRIBUTING.md, followed to the letter in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import igva_kernels

PACKAGE = Path(igva_kernels.__file__).parent
ROOT = PACKAGE.parent
RECIPES = ROOT / "CONTRIBUTING.md"


def section(title):
    """The text under a heading of CONTRIBUTING.md."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", RECIPES.read_text(), re.M | re.S)[1]


def files(text):
    """The files that a recipe writes out: a path in bold, then its content."""
    found = re.findall(r"\*\*`([^`]+)`\*\*\n\n *```python\n(.*?)\n *```", text, re.S)
    return {path: textwrap.dedent(content) + "\n" for path, content in found}


def run(tree, *command, **environment):
    done = subprocess.run(
        [sys.executable, *command], cwd=tree, capture_output=True, text=True, timeout=600,
        env=os.environ | {"PYTHONPATH": str(tree)} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def tree(tmp_path):
    """A copy of the package, its compiled modules too."""
    shutil.copytree(PACKAGE, tmp_path / "igva_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def write(tree, text):
    for path, content in files(text).items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(content)


def change(tree, text):
    """Makes the changes of a recipe: each diff and each formula goes into the file that its step names last."""
    for found in re.finditer(r"```(diff|cpp)\n(.*?)\n *```", text, re.S):
        language, block = found.groups()
        path = tree / re.findall(r"`([\w./]+\.(?:py|h|cuh))`", text[: found.start()])[-1]
        content, lines = path.read_text(), (textwrap.dedent(block) + "\n").splitlines(keepends=True)
        if language == "diff":
            old = "".join(line[1:] for line in lines if line[0] != "+")
            new = "".join(line[1:] for line in lines if line[0] != "-")
        else:  # a formula, after that of silu
            (old,) = re.findall(r"^struct Formula<Activation::silu> \{\n.*?^\};\n", content, re.M | re.S)
            new = f"{old}\n{''.join(lines)}"
        assert content.count(old) == 1, f"{path}: {old}"
        path.write_text(content.replace(old, new))


JUDGE = """
import sys
from igva_kernels import verify
from igva_kernels.ops.weighted_mix.cases import SMALL_CASES
(case,) = (case for case in SMALL_CASES if case.activation == "relu2")
for dtype in verify.DTYPES:
    for row in verify.judge(case, dtype, sys.argv[1:], "cpu"):
        assert row.ok, row.worst
        print(row.backend)
"""


@pytest.mark.slow
def test_an_activation(tree):
    for name in ("csrc", "CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    change(tree, section("An activation"))
    assert run(tree, "-c", JUDGE, "triton", TRITON_INTERPRET="1").split() == ["triton"] * 3
    run(tree, "setup.py", "build_ext", "--inplace", IGVA_KERNELS_SKIP_CUDA="1")
    assert run(tree, "-c", JUDGE, "cpu").split() == ["cpu"] * 3
    if nvcc := shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc"):
        source = tree / "csrc" / "dense" / "cuda" / "activation_grad.cu"
        command = [nvcc, "-std=c++17", "-arch=sm_80", f"-I{tree / 'csrc'}", "-c", source, "-o", tree / "activation.o"]
        subprocess.run(command, check=True, timeout=600)


@pytest.mark.slow
def test_a_backend(tree):
    write(tree, section("A backend"))
    info = run(tree, "-m", "igva_kernels", "info")
    assert re.search(r"^  toy +yes, on cpu, in fp32$", info, re.M)
    assert re.search(r"^  allocator .*\btoy\b", info, re.M) and not re.search(r"^  weighted_mix .*\btoy\b", info, re.M)
    judged = run(tree, "-m", "igva_kernels", "verify", "--quick", "--backend", "toy", "--dtype", "fp32")
    assert "toy on cpu" in judged and "WRONG" not in judged


@pytest.mark.slow
def test_an_operator(tree):
    write(tree, section("An operator"))
    assert re.search(r"^  scale_columns +reference, cpu$", run(tree, "-m", "igva_kernels", "info"), re.M)
    judged = run(tree, "-c", (
        "import sys; from igva_kernels import cli, registry\n"
        "operators = registry.operators(); [operators.pop(n) for n in [*operators] if n != 'scale_columns']\n"
        "sys.exit(cli.main(['verify', '--quick', '--verbose']))"
    ))  # fmt: skip
    assert judged.count("scale_columns, odd sizes") == 9 and "WRONG" not in judged


def test_an_integration(tree):
    text = section("An integration")
    write(tree, text)
    families = tree / "igva_kernels" / "integrations" / "__init__.py"
    (name,) = re.findall(r'`"(\w+)"`, to `FAMILIES`', text)
    families.write_text(families.read_text().replace("FAMILIES = (\n", f'FAMILIES = (\n    "{name}",\n', 1))
    run(tree, "-c", """
import copy, torch, igva_kernels as ik
from two_layer_vlm import TwoLayerVlm
model, states = TwoLayerVlm(), [torch.randn(2, 5, 64) for _ in range(7)]
expected = model.connector(states)
seen = []
class Spy(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen.append(func.name())
        return func(*args, **(kwargs or {}))
with ik.patched(model):
    with Spy():
        torch.testing.assert_close(model.connector(states), expected)
    copied = copy.deepcopy(model)
    copied.fc2.weight.data.zero_()
    assert not torch.allclose(copied.connector(states), expected)
assert "igva_kernels::projector" in seen, seen
assert torch.equal(model.connector(states), expected) and "connector" not in vars(model)
try:
    ik.patch(torch.nn.Linear(2, 2))
except ValueError as error:
    assert "TwoLayerVlm" in str(error), error
else:
    raise AssertionError("a Linear was patched")
""")  # fmt: skip
