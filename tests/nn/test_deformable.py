"""``DeformableFuser``: MMFuser's block by names, numbers and what is kept, however its modules are touched."""

import copy

import harness
import pytest
import torch
from published_fuser import PARAMETERS, published_fuser, random_weights
from recording import Dispatched
from seeds import seeded
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from igva_kernels.nn import DeformableFuser
from igva_kernels.testing import measure_memory, within_rule

WIDTH, LEVELS, HEADS, POINTS, GRID = 32, 3, 4, 2, (3, 4)
PLAIN = ["layer_project"] * 3 + ["deform_attn"]
"""The operators of one attention whose modules are plain."""


def make(seed=0, **options):
    return random_weights(DeformableFuser(WIDTH, LEVELS, HEADS, POINTS, skip_tokens=1, **options), seed)


def draw(seed=0, dtype=torch.float32, grad=False):
    """The levels and the query of two images, with a CLS token each."""
    torch.manual_seed(seeded(seed))
    patches = GRID[0] * GRID[1]
    return [torch.randn(2, 1 + patches, WIDTH).to(dtype).requires_grad_(grad) for _ in range(LEVELS + 1)]


def results(call, weights, states, grad_out):
    """The output and every gradient, by name."""
    out = call(states)
    leaves = {**weights, **{f"state {i}": state for i, state in enumerate(states)}}
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out.to(out.dtype))
    return {"output": out, **dict(zip(leaves, grads, strict=True))}


def published(weights):
    return lambda states: published_fuser(weights, states, HEADS, POINTS, skip=1, grid=GRID)


@pytest.mark.parametrize("impl", ["reference", *harness.quick_impls("deform_attn")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_block_and_all_its_gradients_are_those_of_the_published_one(impl, dtype):
    for seed, judge in enumerate(within_rule(dtype)):
        fuser, states = make(seed, impl=impl).to(dtype), draw(seed, dtype, grad=True)
        grad_out = torch.randn(2, GRID[0] * GRID[1], WIDTH).to(dtype)
        weights = dict(fuser.named_parameters())
        exact = {name: weight.detach().double().requires_grad_() for name, weight in weights.items()}
        inputs = [state.detach().double().requires_grad_() for state in states]
        oracle = results(published(exact), exact, inputs, grad_out)
        plain = results(published(weights), weights, states, grad_out)
        ours = results(lambda states, fuser=fuser: fuser(states, grid=GRID), weights, states, grad_out)
        for name, value in oracle.items():
            judge.add(ours[name], value, plain[name], name)


def test_parameters_have_the_names_and_initial_values_of_the_published_block():
    fuser = DeformableFuser(32, 2, n_heads=8, n_points=3)
    assert set(fuser.state_dict()) == PARAMETERS
    states = [torch.randn(2, 9, 32) for _ in range(3)]
    assert torch.equal(fuser(states), states[-1])
    offsets = fuser.cross_attn.sampling_offsets.bias.detach().view(8, 2, 3, 2)
    corners = torch.tensor([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)])
    for point in range(3):
        expected = (point + 1) * corners[:, None].expand(-1, 2, -1).float()
        torch.testing.assert_close(offsets[:, :, point], expected)
    for name in ("sampling_offsets.weight", "attention_weights.weight", "attention_weights.bias", "value_proj.bias"):
        assert not fuser.get_parameter(f"cross_attn.{name}").any()
    before = copy.deepcopy(fuser.state_dict())
    liven = random_weights(fuser).state_dict()
    assert all(not torch.equal(before[name], liven[name]) for name in before)
    fuser.reset_parameters()
    drawn = {name for name, value in fuser.state_dict().items() if not torch.equal(value, before[name])}
    assert drawn == {f"{which}_attn.{name}_proj.weight" for which in ("cross", "self") for name in ("value", "output")}


def test_a_step_reaches_gamma1_first_and_the_attentions_after_it():
    fuser = DeformableFuser(WIDTH, LEVELS, HEADS, POINTS, skip_tokens=1)
    optimizer = torch.optim.SGD(fuser.parameters(), lr=0.5)
    target, states, losses = torch.randn(2, 12, WIDTH), draw(), []
    for step in range(4):
        optimizer.zero_grad()
        loss = (fuser(states, grid=GRID) - target).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        reached = {name for name, p in fuser.named_parameters() if p.grad.any()}
        if step == 0:
            assert reached == {"gamma1"}
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert {"gamma2", "cross_attn.value_proj.weight", "cross_attn.sampling_offsets.bias", "feat_norm.bias"} <= reached


def test_plain_modules_are_read_by_operators_and_the_states_are_not_copied():
    fuser, states = make(), draw()
    with Dispatched() as seen, torch.no_grad():
        out = fuser(states, grid=GRID)
    assert seen.ours == PLAIN * 2
    assert not {"aten::cat", "aten::stack", "aten::native_layer_norm"} & set(seen.names)
    wide = torch.randn(2, 13, LEVELS + 1, WIDTH + 8)[..., :WIDTH]
    strided = list(wide.unbind(2))
    torch.testing.assert_close(fuser(strided, grid=GRID), fuser([s.contiguous() for s in strided], grid=GRID))
    assert out.shape == (2, 12, WIDTH)


def test_the_backward_keeps_what_was_read_and_no_normalised_state():
    fuser, width, heads = DeformableFuser(128, 4, 4, 4), 128, 4
    states = [torch.randn(1, 144, width) for _ in range(5)]
    kept = measure_memory(lambda: fuser(states))[1].kept
    state, points = 144 * width * 4, 144 * heads * 5 * 4 * 3 * 4
    # Values and what was read of them, twice each; the attentions' results; offsets and logits; the output.
    own = (4 + 1 + 1 + 1 + 1 + 1 + 1) * state + points
    rows = 2 * 4 * 144 * (4 + 2 + 3)  # a mean and a deviation for each row that a Linear reads
    assert kept <= own + rows + 4096


# ---- modules in which something else happens ----


def hook(module):
    module.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("name", "operators"),
    [
        ("cross_attn.value_proj", ["layer_project"] * 2 + ["deform_attn", *PLAIN]),
        ("feat_norm", ["layer_project"] * 2 + ["deform_attn", *PLAIN]),
        ("cross_attn.attention_weights", ["layer_project", "deform_attn", *PLAIN]),
        ("norm1", [*PLAIN, "deform_attn"]),
        ("self_attn.output_proj", PLAIN * 2),
        ("self_attn", PLAIN * 2),
    ],
)
def test_a_module_with_a_hook_is_called_with_tensors(name, operators):
    fuser, states, seen_by_hook = make(), draw(), []
    expected = fuser(states, grid=GRID)
    fuser.get_submodule(name).register_forward_hook(lambda module, args, out: seen_by_hook.append(args[0]))
    with Dispatched() as seen:
        out = fuser(states, grid=GRID)
    torch.testing.assert_close(out, expected)
    assert seen.ours == operators
    assert len(seen_by_hook) == (LEVELS if name in ("cross_attn.value_proj", "feat_norm") else 1)
    assert name == "self_attn" or all(isinstance(given, torch.Tensor) for given in seen_by_hook)


@pytest.mark.parametrize("target", ["value_proj", "sampling_offsets", "output_proj"])
def test_an_adapter_is_heard_and_learns(target):
    peft = pytest.importorskip("peft")
    fuser, states = make(), draw()
    plain = fuser(states, grid=GRID)
    adapted = peft.get_peft_model(fuser, peft.LoraConfig(target_modules=[target], init_lora_weights=False))
    out = adapted(states, grid=GRID)
    assert not torch.allclose(out, plain)
    out.sum().backward()
    lora = [p for name, p in adapted.named_parameters() if "lora_" in name]
    assert len(lora) == 4 and all(p.grad.any() for p in lora)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(states, grid=GRID), out, rtol=1e-4, atol=1e-5)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def leaves(fuser):
    return [module for module in fuser.modules() if isinstance(module, (nn.Linear, nn.LayerNorm))]


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")
@pytest.mark.parametrize(
    "units",
    [lambda f: [f], lambda f: [f.cross_attn, f.self_attn, f], lambda f: [*leaves(f), f]],
    ids=["the block", "the attentions", "every Linear and norm"],
)
def test_fsdp_gathers_each_weight_where_it_is_read(units, process_group):
    fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard
    fuser, states = make(), draw()
    expected = fuser(states, grid=GRID)
    wanted = torch.autograd.grad(expected.square().sum(), [*fuser.parameters()])
    mesh = init_device_mesh("cpu", (1,))
    for unit in units(fuser):
        fully_shard(unit, mesh=mesh)
    out = fuser(states, grid=GRID)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    for parameter, want in zip(fuser.parameters(), wanted, strict=True):
        grad = parameter.grad
        torch.testing.assert_close(
            grad.full_tensor() if isinstance(grad, DTensor) else grad, want, rtol=1e-4, atol=1e-4
        )


# ---- torch around it ----


def test_autocast_computes_in_its_dtype_and_the_sum_in_that_of_the_parameters():
    for seed, judge in enumerate(within_rule(torch.bfloat16)):
        fuser, states = make(seed), draw(seed)
        weights = dict(fuser.named_parameters())
        exact = {name: weight.detach().double() for name, weight in weights.items()}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            ours, plain = fuser(states, grid=GRID), published(weights)(states)
        assert ours.dtype == plain.dtype == torch.float32
        judge.add(ours, published(exact)([state.double() for state in states]), plain)


def test_states_of_another_dtype_or_made_in_inference_mode_are_taken():
    fuser = make()
    with torch.inference_mode():
        states = draw(dtype=torch.bfloat16)
    out = fuser(states, grid=GRID)
    hook(fuser.feat_norm)
    hook(fuser.query_norm)
    assert out.dtype == torch.float32
    fuser.bfloat16()
    fuser(states, grid=GRID).sum().backward()
    assert fuser.feat_norm.weight.grad.isfinite().all()


@pytest.mark.plain_memory
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_torch_compile_takes_it_into_one_graph(dynamic):
    fuser, states = make(), draw()
    compiled = torch.compile(fuser, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(states, grid=GRID), fuser(states, grid=GRID))


def test_activation_checkpointing_gives_the_same_gradients():
    fuser, states = make(), draw(grad=True)
    found = []
    for run in (fuser, lambda *args, **kw: torch.utils.checkpoint.checkpoint(fuser, *args, use_reentrant=False, **kw)):
        out = run(states, grid=GRID)
        found.append(torch.autograd.grad(out.square().sum(), [*fuser.parameters(), *states]))
    assert all(map(torch.equal, *found))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_heads": 5}, "n_heads: got 5, need a divisor of d_model=32"),
        ({"n_heads": 0}, "n_heads: got 0, need 1 or more"),
        ({"n_points": 0}, "n_points: got 0, need 1 or more"),
        ({"n_levels": 0}, "n_levels: got 0, need 1 or more"),
    ],
)
def test_sizes_that_make_no_block_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        DeformableFuser(**{"d_model": 32, "n_levels": 2, "n_heads": 4, **options})


def test_states_and_grids_that_do_not_fit_are_refused():
    fuser, states = make(), draw()
    with pytest.raises(ValueError, match=r"grid: need \(height, width\) of the 12 patches .* got 3 x 3"):
        fuser(states)
    with pytest.raises(ValueError, match=r"grid: .* got 2 x 5"):
        fuser(states, grid=(2, 5))
    with pytest.raises(ValueError, match="hidden_states: need 3 levels and the query, got 3 states"):
        fuser(states[1:], grid=GRID)
    with pytest.raises(ValueError, match=r"hidden_states\[1\]: .* \[2, 13, 32\], got \[2, 12, 32\]"):
        fuser([states[0], states[1][:, 1:], *states[2:]], grid=GRID)
    with pytest.raises(TypeError, match=r"hidden_states: need a sequence .* not stacked"):
        fuser(torch.stack(states), grid=GRID)


def test_729_patches_of_siglip_are_a_square():
    fuser = DeformableFuser(8, 1, 2, 1)
    assert fuser([torch.randn(1, 729, 8)] * 2).shape == (1, 729, 8)
