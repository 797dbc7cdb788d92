"""A new operator is one folder: ``layer_max`` in tests/helpers, which nothing in the package names."""

import json

import layer_max as package
import pytest
import torch
from layer_max import layer_max
from layer_max.op import OPERATOR

from benchmarks.measure import draw, exact_results
from benchmarks.providers import providers
from benchmarks.workloads import Operation, suite
from igva_kernels import cli, registry, verify

OPS = torch.ops.igva_kernels


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """The registry knows it in these tests only, and ``verify`` judges no other."""
    registry.operators()  # so that the package's own are not found later
    monkeypatch.setattr(registry, "_OPERATORS", {OPERATOR.name: OPERATOR})
    registry.choose.cache_clear()
    yield
    registry.choose.cache_clear()


def layers(**options):
    return [torch.randn(2, 5, 8, **options) for _ in range(3)]


def test_it_lives_outside_the_package_and_the_package_does_not_name_it():
    assert package.__name__ == OPERATOR.package == "layer_max"
    assert registry.operators() == {"layer_max": OPERATOR}


def test_a_name_belongs_to_one_package():
    with pytest.raises(ValueError, match="'layer_max': both layer_max and another define it"):
        registry.Operator("layer_max", "another")
    assert registry.operators() == {"layer_max": OPERATOR}
    again = registry.Operator("layer_max", "layer_max")  # as when its module is loaded anew
    assert registry.operators()["layer_max"] is again


def test_impl_is_resolved_by_the_registry():
    h = layers()
    expected = layer_max(h, impl="reference")
    assert torch.equal(layer_max(h), expected) and torch.equal(layer_max(h, impl="cpu"), expected)
    assert OPERATOR.select("auto", h[0].device, h[0].dtype, h) == "cpu"
    with pytest.raises(ValueError, match="impl: got 'fast'"):
        layer_max(h, impl="fast")
    with pytest.raises(NotImplementedError, match=r"impl='cuda' cannot serve torch.float32 tensors on 'cpu'"):
        layer_max(h, impl="cuda")


@pytest.mark.plain_memory
def test_it_is_an_operator_of_torch():
    h = layers(requires_grad=True)
    torch.library.opcheck(OPS.layer_max.default, (h, "cpu"))
    torch.compiler.reset()
    out = torch.compile(layer_max, fullgraph=True, backend="aot_eager")(h)
    assert torch.equal(out, layer_max(h))
    assert all(grad is not None for grad in torch.autograd.grad(out.sum(), h))
    with pytest.raises(NotImplementedError, match="forward-mode AD"), torch.autograd.forward_ad.dual_level():
        OPS.layer_max([torch.autograd.forward_ad.make_dual(torch.ones(1, 1, 1), torch.ones(1, 1, 1))], "cpu")


def test_verify_judges_it(capsys):
    rows = list(verify.verify(quick=True))
    assert {(row.case, row.backend, row.dtype) for row in rows} == {
        ("maximum", "cpu", dtype) for dtype in verify.DTYPES
    }
    assert all(row.ok and len(row.verdicts) == 4 for row in rows)
    assert cli.main(["verify", "--quick"]) == 0
    assert "maximum" in capsys.readouterr().out


def test_info_names_it(capsys):
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["operators"] == {"layer_max": {"reference": [], "cpu": []}}


def test_the_benchmarks_measure_its_large_case():
    (workload,) = (workload for workload in suite("full", "cpu") if isinstance(workload, Operation))
    assert workload.name == "maximum at a real shape"
    inputs = draw(workload, "cpu")
    exact = exact_results(workload, inputs)
    found = providers(workload, "cpu")
    assert list(found) == ["plain", "cpu"]
    for provider in found.values():
        assert torch.equal(provider.bind(inputs).call()["output"].double(), exact["output"])
