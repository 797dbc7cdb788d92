"""Several projectors in one call: when they are one operator, and that every other way leads to the same numbers."""

import copy

import harness
import pytest
import torch
from recording import Dispatched
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from igva_kernels import MixPlan
from igva_kernels.nn import LayerMixProjector, LayerProjectors

PLANS = (MixPlan.igva(4, 2), MixPlan.concat([3, 1], 5), MixPlan.igva(4, 2))
IMPLS = harness.quick_impls("layer_project")


def make(impl="auto", plans=PLANS, **options):
    torch.manual_seed(0)
    return LayerProjectors(LayerMixProjector(plan, 8, 12, skip_tokens=1, impl=impl, **options) for plan in plans)


def draw(images=2):
    states = [torch.randn(images, 5, 8) for _ in range(5)]
    weights = [torch.rand(images, plan.num_columns) if plan.num_columns else None for plan in PLANS]
    return states, weights


def one_by_one(projectors, states, weights, **options):
    return tuple(projector(states, w, **options) for projector, w in zip(projectors, weights, strict=True))


def assert_same(projectors, expected, args, operators):
    """Outputs, the gradients of all parameters, and which operators ran."""
    results = []
    for call in (projectors, lambda *args: one_by_one(expected, *args)):
        with Dispatched() as seen:
            outs = call(*args)
        results.append((outs, seen.ours))
    (outs, ours), (wanted, _) = results
    assert ours == operators
    for out, want in zip(outs, wanted, strict=True):
        torch.testing.assert_close(out, want)
    leaves = [[p for p in module.parameters() if p.requires_grad] for module in (projectors, expected)]
    grads = [
        torch.autograd.grad(sum(out.square().sum() for out in outs), parameters)
        for outs, parameters in zip((outs, wanted), leaves, strict=True)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_plain_projectors_are_one_operator(impl, eps):
    projectors = make(impl, layernorm_eps=eps)
    assert_same(projectors, copy.deepcopy(projectors), draw(), ["layer_project"])


def test_the_keys_are_those_of_a_list():
    assert set(make(layernorm_eps=1e-5).state_dict()) == {
        f"{j}.{name}.{kind}"
        for j in range(3)
        for name in ("projector_layernorm", "linear_1", "linear_2")
        for kind in ("weight", "bias")
    }


def hook(projectors):
    projectors[1].register_forward_hook(lambda *_: None)


def hook_a_linear(projectors):
    projectors[1].linear_2.register_forward_hook(lambda *_: None)


def replace(projectors):
    projectors[2] = Wrapped(projectors[2])


def activate_otherwise(projectors):
    projectors[0].activation = "relu"


class Wrapped(nn.Module):
    """A stand-in for a projector, as peft's ``modules_to_save`` puts one there."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize(
    ("touch", "operators"),
    [
        (hook, ["projector"] * 3),
        (hook_a_linear, ["projector", "layer_mix", "projector"]),
        (replace, ["projector"] * 3),
        (activate_otherwise, ["projector"] * 3),
    ],
)
def test_a_projector_in_which_something_else_happens_is_called_as_the_module_that_it_is(touch, operators):
    projectors = make()
    touch(projectors)
    assert_same(projectors, copy.deepcopy(projectors), draw(), operators)


def test_an_adapter_on_one_linear_is_heard():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["1.linear_1"], init_lora_weights=False)
    projectors, args = make(), draw()
    plain = projectors(*args)
    adapted = peft.get_peft_model(projectors, config)
    outs = adapted(*args)
    assert torch.equal(outs[0], plain[0])
    assert torch.equal(outs[2], plain[2])
    assert not torch.allclose(outs[1], plain[1])
    outs[1].sum().backward()
    assert adapted.base_model.model[1].linear_1.lora_A["default"].weight.grad.abs().sum() > 0


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")
@pytest.mark.parametrize(
    ("units", "operators"),
    [
        (lambda projectors: [projectors], ["layer_project"]),
        (lambda projectors: [*projectors, projectors], ["projector"] * 3),
        (lambda projectors: [p.linear_1 for p in projectors], ["projector"] * 3),
    ],
    ids=["the list", "every projector", "the first Linears"],
)
def test_fsdp_gathers_each_weight_where_it_is_read(units, operators, process_group):
    """One operator only where the list itself is the unit."""
    fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard
    projectors, args = make(), draw()
    expected = one_by_one(projectors, *args)
    wanted = torch.autograd.grad(sum(out.square().sum() for out in expected), [*projectors.parameters()])
    mesh = init_device_mesh("cpu", (1,))
    for unit in units(projectors):
        fully_shard(unit, mesh=mesh)
    with Dispatched() as seen:
        outs = projectors(*args)
    assert [name for name in seen.ours if "backward" not in name] == operators
    for out, want in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, want)
    sum(out.square().sum() for out in outs).backward()
    for parameter, want in zip(projectors.parameters(), wanted, strict=True):
        grad = parameter.grad
        torch.testing.assert_close(grad.full_tensor() if isinstance(grad, DTensor) else grad, want)


def test_plans_of_reduced_sources_replace_their_own_and_rows_may_share_an_image():
    projectors, (states, weights), index = make(plans=PLANS[:1] * 2), draw(3), torch.tensor([1, 0, 1])
    sources, plan = PLANS[0].reduced()
    reduced = [
        sum(scale * states[layer] for layer, _, scale in block) if len(block) > 1 else states[block[0].layer]
        for block in sources.blocks
    ]
    outs = projectors(reduced, weights[0], plans=[plan, plan], image_index=index)
    for out, projector in zip(outs, projectors, strict=True):
        torch.testing.assert_close(out, projector([state[index] for state in states], weights[0]))


@pytest.mark.parametrize("name", ["mix_weights", "plans"])
def test_a_sequence_of_another_length_is_refused(name):
    states, weights = draw()
    args = {"mix_weights": weights, "plans": list(PLANS)}
    args[name] = args[name][:2]
    with pytest.raises(ValueError, match=f"{name}: need 3 entries, one for each projector, got 2"):
        make()(states, **args)


@pytest.mark.plain_memory
def test_torch_compile_takes_them_into_one_graph():
    projectors, args = make(), draw()
    compiled = torch.compile(projectors, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), projectors(*args))


@pytest.mark.plain_memory
def test_torch_export_serves_every_batch_size_and_survives_a_file(tmp_path):
    projectors, batch = make(plans=PLANS[1:2] * 2), torch.export.Dim("batch", min=1, max=64)
    shapes = {"hidden_states": ({0: batch},) * 5}
    with torch.no_grad():
        program = torch.export.export(projectors, (tuple(draw(4)[0]),), dynamic_shapes=shapes)
        torch.export.save(program, tmp_path / "program.pt2")
        program = torch.export.load(tmp_path / "program.pt2")
        for images in (1, 3):
            states = tuple(draw(images)[0])
            torch.testing.assert_close(program.module()(states), projectors(states))
    assert "igva_kernels.layer_project.default" in {str(node.target) for node in program.graph.nodes}
