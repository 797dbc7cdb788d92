"""What the recipes of CONTRIBUTING.md for a backend and an activation promise, on small examples.

``test_operators`` does the same for an operator; ``test_contributing`` follows the text of all recipes to the letter.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import igva_kernels as ik
from igva_kernels import registry, verify
from igva_kernels.nn import LayerMixProjector
from igva_kernels.runtime.activations import ACTIVATIONS, Activation
from igva_kernels.runtime.backend import Backend

HERE = Path(__file__).parent
PLAN = ik.MixPlan.igva(4, 2)


# ---- a backend -----------------------------------------------------------------------------------------------------

WITH_THE_TOY = f"""
import sys
import igva_kernels.runtime, igva_kernels.ops.weighted_mix
from igva_kernels import cli
igva_kernels.runtime.__path__.append({str(HERE / "toy_backend" / "runtime")!r})
igva_kernels.ops.weighted_mix.__path__.append({str(HERE / "toy_backend" / "weighted_mix")!r})
sys.exit(cli.main(sys.argv[1:]))
"""


def run_with_the_toy(*arguments):
    return subprocess.run([sys.executable, "-c", WITH_THE_TOY, *arguments], capture_output=True, text=True, timeout=300)


def test_a_backend_is_a_folder_and_a_module_per_operator():
    """``verify`` judges it in every case of the operator that it serves, because it is there."""
    done = run_with_the_toy("verify", "--quick", "--backend", "toy", "--dtype", "fp32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "toy on cpu" in done.stdout and "WRONG" not in done.stdout
    report = json.loads(run_with_the_toy("info", "--json").stdout)
    (toy,) = (backend for backend in report["backends"] if backend["name"] == "toy")
    assert toy["available"] and toy["dtypes"] == ["fp32"]
    assert "toy" in report["operators"]["weighted_mix"] and "toy" not in report["operators"]["allocator"]


# ---- an activation ---------------------------------------------------------------------------------------------------


def quick_gelu(z):
    return z * torch.sigmoid(1.702 * z)


def quick_gelu_backward(grad, z):
    s = torch.sigmoid(1.702 * z)
    return grad * (s + 1.702 * z * s * (1 - s))


@pytest.fixture
def quick(monkeypatch):
    entry = Activation(quick_gelu, quick_gelu_backward, lambda z: z.copy_(quick_gelu(z)), ("quick_gelu",))
    monkeypatch.setitem(ACTIVATIONS, "quick_gelu", entry)
    registry.choose.cache_clear()
    yield
    registry.choose.cache_clear()


@pytest.mark.usefixtures("quick")
def test_an_entry_in_the_table_is_enough_for_every_caller_and_kernels_without_it_say_so():
    projector = LayerMixProjector(PLAN, 8, 12, activation="quick_gelu", skip_tokens=1)
    states, weights = [torch.randn(2, 4, 8) for _ in range(5)], torch.rand(2, 2)
    out = projector(states, weights)
    rows = ik.layer_mix(states, PLAN, weights, skip_tokens=1)
    torch.testing.assert_close(out, projector.linear_2(quick_gelu(projector.linear_1(rows))))
    out.sum().backward()
    weight, bias = projector.linear_1.weight, projector.linear_1.bias
    for backend in registry.backends()[1:]:
        if backend.available:
            with pytest.raises(NotImplementedError, match="no activation 'quick_gelu'"):
                ik.layer_mix_linear(
                    states, PLAN, weights, weight, bias, activation="quick_gelu", skip_tokens=1, impl=backend.name
                )


def test_an_activation_that_is_not_in_the_table_is_an_error_wherever_it_is_given():
    states, weights, weight = [torch.randn(2, 4, 8) for _ in range(5)], torch.rand(2, 2), torch.randn(12, 16)
    for impl in registry.implementations():
        with pytest.raises(ValueError, match="activation: got 'tanh', need None or one of 'gelu'"):
            ik.layer_mix_linear(states, PLAN, weights, weight, activation="tanh", impl=impl)
    for wrong in ("tanh", None):
        with pytest.raises(ValueError, match=f"activation: got {wrong!r}, need one of 'gelu'"):
            LayerMixProjector(PLAN, 8, 12, activation=wrong)


def test_a_backend_may_serve_another_type_of_device(monkeypatch):
    """It is asked about the types that it names, ``verify`` judges it there."""

    def why_not(device, dtype):
        return None if device.type == "meta" else f"it serves meta tensors, not {device.type!r}"

    there = Backend("there", 8, ("meta",), why_not)
    nowhere = Backend("nowhere", 9, ("xpu",), lambda device, dtype: f"no driver for {device.type}")
    monkeypatch.setattr(registry, "all_backends", lambda: {"there": there, "nowhere": nowhere})
    assert registry.backends()[1:] == [
        registry.BackendStatus("there", True, ("meta",), ""),
        registry.BackendStatus("nowhere", False, (), "no driver for xpu"),
    ]
    monkeypatch.setattr(verify, "all_backends", registry.all_backends)
    monkeypatch.setattr(registry.Operator, "why_not", lambda *_: None)
    monkeypatch.setattr(verify, "judge", lambda case, dtype, names, device, seed: [(device, *names)])
    assert {*verify.verify(dtypes=["fp32"])} == {("meta", "there")}
