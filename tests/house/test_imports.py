"""Imports run one way: tools and models, nn, operators, the registry, the runtime; and there is no circle."""

import ast
import json
from pathlib import Path

import igva_kernels

ROOT = Path(igva_kernels.__file__).parent
CHECKOUT = ROOT.parent
FLOORS = (
    ("runtime", "testing", "version"),
    ("registry",),
    ("ops",),
    ("nn", "streaming", "graphs"),
    ("models", "integrations"),
    ("__init__", "demo", "evaluation", "verify", "info", "tune", "cli", "__main__"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules():
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
            for path in ROOT.rglob("*.py")}  # fmt: skip


def imports(path, known):
    """The modules of the package that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "igva_kernels":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "igva_kernels"]
        for name in names:
            inner = name.removeprefix("igva_kernels").strip(".")
            while inner and inner not in known:
                inner = inner.rpartition(".")[0]
            yield inner or "__init__"


def edges():
    known = modules()
    return {name: set(imports(path, known)) - {name} for name, path in known.items()}


def test_no_import_runs_upward():
    upward = [
        f"{name} imports {target}"
        for name, targets in edges().items()
        for target in targets
        if FLOOR[target.split(".")[0]] > FLOOR[name.split(".")[0]]
    ]
    assert not upward


def test_no_import_runs_in_a_circle():
    graph, done = edges(), set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in graph[name]:
                visit(target, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


COMPOSED_OF = {"layer_project": {"weighted_mix"}}


def test_an_operator_imports_no_other_but_to_be_composed_of_it():
    pairs = {
        (name.split(".")[1], target.split(".")[1])
        for name, targets in edges().items()
        for target in targets
        if name.startswith("ops.") and target.startswith("ops.")
    }
    composed = {(name, part) for name, parts in COMPOSED_OF.items() for part in parts}
    assert {(name, part) for name, part in pairs if name != part} == composed


def operators():
    """The names of the operators, which are those of their folders."""
    found = [path.name for path in (ROOT / "ops").iterdir() if (path / "op.py").exists()]
    assert len(found) >= 2
    return found


def test_what_is_shared_names_no_operator():
    shared = [
        *(ROOT / f"{name}.py" for name in ("registry", "verify", "tune", "info", "testing", "cli")),
        *ROOT.glob("runtime/**/*.py"),
        CHECKOUT / "tests" / "helpers" / "harness.py",
    ]
    named = [
        f"{path.relative_to(CHECKOUT)}: {name}"
        for path in shared
        for name in operators()
        if any(form in path.read_text() for form in (f"ops.{name}", f"ops/{name}", f'"{name}"'))
    ]
    assert not named


def test_the_benchmarks_look_no_operator_up():
    """A module that is about one operator imports it; what is true of all of them asks for its name."""
    looked_up = [
        f"{path.name}: {name}"
        for path in (CHECKOUT / "benchmarks").glob("*.py")
        for name in operators()
        if f'operators()["{name}"]' in path.read_text()
    ]
    assert not looked_up


def test_configurations_name_the_kernels_of_an_operator_after_it():
    for path in sorted(ROOT.glob("runtime/configs/*.json")):
        data = json.loads(path.read_text())
        for kind, of_the_runtime in (("rows", {"norm_backward"}), ("gemms", {"linear", "linear_grad_input"})):
            assert of_the_runtime <= {*data[kind]}
            for name in {*data[kind]} - of_the_runtime:
                assert name.split(".")[0] in operators() and "." in name, f"{path.name}: {name}"


def kernel_arguments(paths):
    """What the Triton kernels of these files take at a launch, their constants left out."""
    return {
        argument.arg
        for path in paths
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef) and "kernel" in map(ast.unparse, function.decorator_list)
        for argument in function.args.args
        if argument.annotation is None
    }


def test_the_runtime_names_no_argument_of_an_operators_kernels():
    runtime = [*ROOT.glob("runtime/triton/*.py")]
    of_operators = kernel_arguments([*ROOT.glob("ops/*/triton.py"), *ROOT.glob("ops/*/triton/*.py")])
    assert {"num_patches", "stride_wb"} <= of_operators
    named = {
        node.value
        for path in runtime
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
    }
    assert not named & (of_operators - kernel_arguments(runtime))
