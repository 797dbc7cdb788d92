"""The modules: what the allocator computes, which path the projector takes, and what the balance loss counts."""

import copy
import math

import harness
import plain_torch
import pytest
import torch
from seeds import seeded
from torch import nn
from torch.nn.utils import parametrize

from igva_kernels import MixPlan
from igva_kernels.integrations import PatchHandle
from igva_kernels.integrations.lazy import patch_projector
from igva_kernels.nn import (
    Connector,
    LayerMixProjector,
    MixInput,
    TextAllocator,
    WeightAllocator,
    balance_loss,
    column_plan,
    column_summaries,
    is_one_operator,
    is_plain,
    mixes_in_linear,
    negative_entropy,
    widen,
)

IMPLS = ["reference", *harness.quick_impls("weighted_mix")]
PLAN = MixPlan.igva(4, 2)


def states(images=2, tokens=5, width=8):
    return [torch.randn(images, tokens, width) for _ in range(5)]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- allocator ----


def attention(q, k, v, module):
    wq, wk, wv = module.in_proj_weight.chunk(3)
    bq, bk, bv = module.in_proj_bias.chunk(3)
    q, k, v = (
        (x @ w.T + b).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for x, w, b in ((q, wq, bq), (k, wk, bk), (v, wv, bv))
    )
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return module.out_proj((scores @ v).transpose(1, 2).flatten(2))


def test_the_allocator_is_cross_attention_norm_ffn_norm_and_a_softmax_over_the_groups():
    allocator = WeightAllocator(6, 8, 3, hidden_dim=16, num_blocks=2, num_heads=4)
    sentences, summaries = torch.randn(2, 6), torch.randn(2, 3, 8)
    x, keys = allocator.sentence_proj(sentences)[:, None], allocator.cls_proj(summaries)
    for block in allocator.blocks:
        x = block.norm1(x + attention(x, keys, keys, block.cross_attention))
        x = block.norm2(x + block.ffn[2](block.ffn[0](x).relu()))
    close(allocator(sentences, summaries), allocator.head(x[:, 0]).softmax(-1))


def test_the_allocator_of_igva_has_27_million_parameters():
    with torch.device("meta"):
        allocator = WeightAllocator(768, 1024, 4)
    assert round(sum(p.numel() for p in allocator.parameters()) / 1e6, 2) == 27.05


def test_the_allocator_loads_weights_named_as_the_authors_name_them():
    allocator = WeightAllocator(6, 8, 3, hidden_dim=16, num_blocks=1, num_heads=2)
    names = [f"{m}.{k}" for m in ("sentence_proj", "cls_proj", "linear") for k in ("weight", "bias")]
    block = ("cross_attention.in_proj_weight", "cross_attention.in_proj_bias", "cross_attention.out_proj.weight",
             "cross_attention.out_proj.bias", "ffn.0.weight", "ffn.0.bias", "ffn.2.weight", "ffn.2.bias",
             "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")  # fmt: skip
    names += [f"transformers.0.{k}" for k in block]
    renamed = {n.replace("transformers.", "blocks.").replace("linear.", "head.") for n in names}
    assert renamed == set(allocator.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_weights_are_a_softmax_in_at_least_fp32(dtype):
    allocator = WeightAllocator(6, 8, 3, hidden_dim=16).to(dtype)
    weights = allocator(torch.randn(2, 6), torch.randn(2, 3, 8).to(dtype))
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(weights.sum(-1), torch.ones(2, dtype=weights.dtype))


def test_sentence_embeddings_made_under_inference_mode_can_be_trained_with():
    allocator = WeightAllocator(6, 8, 3, hidden_dim=16)
    with torch.inference_mode():
        sentences = torch.randn(2, 6)
    allocator(sentences, torch.randn(2, 3, 8))[:, 0].sum().backward()
    assert allocator.sentence_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("sentences", "summaries", "name"),
    [((2, 7), (2, 3, 8), "sentence_embeds"), ((1, 6), (2, 3, 8), "sentence_embeds"), ((2, 6), (2, 4, 8), "summaries")],
)
def test_the_allocator_names_the_argument_that_does_not_fit(sentences, summaries, name):
    with pytest.raises(ValueError, match=name):
        WeightAllocator(6, 8, 3, hidden_dim=16)(torch.randn(sentences), torch.randn(summaries))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="num_heads"):
        WeightAllocator(6, 8, 3, hidden_dim=18, num_heads=4)


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_a_backend_without_kernels_for_the_allocator_says_so_and_auto_takes_the_modules(impl):
    allocator, inputs = WeightAllocator(6, 8, 3, hidden_dim=16, impl=impl), (torch.randn(2, 6), torch.randn(2, 3, 8))
    with pytest.raises(
        NotImplementedError, match=f"'{impl}' cannot serve .* has no kernels for the operator allocator"
    ):
        allocator(*inputs)
    results = []
    for allocator.impl in ("auto", "reference"):
        with torch.no_grad():
            results.append(allocator(*inputs))
    assert torch.equal(*results)


ALLOCATORS = {
    "of instruction and image": lambda: WeightAllocator(6, 8, 3, hidden_dim=16, num_blocks=2, num_heads=2),
    "of the instruction alone": lambda: TextAllocator(6, 3, hidden_dim=16),
}


@pytest.fixture(params=ALLOCATORS)
def allocator_and_inputs(request):
    """An allocator that listens, and two instructions about one image."""
    allocator = ALLOCATORS[request.param]()
    for parameter in allocator.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    sentence, image = torch.randn(1, 6), torch.randn(1, 3, 8)
    inputs = torch.cat([sentence, -sentence]), image.expand(2, -1, -1)
    return allocator.eval(), inputs if "image" in request.param else inputs[:1]


class IntegerLinear(nn.Linear):
    """Its weight is integers, as bitsandbytes and others keep them: only this forward can read it."""

    def __init__(self, linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.scale = float(linear.weight.abs().max()) / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_allocator_weighs_as_it_did_within_the_error_of_its_integers(allocator_and_inputs, dtype):
    allocator, inputs = allocator_and_inputs
    want = allocator(*inputs)
    heard = (want[0] - want[1]).abs().max()
    for name, linear in [*allocator.named_modules()]:
        if isinstance(linear, nn.Linear):
            allocator.set_submodule(name, IntegerLinear(linear))
    assert (allocator.to(dtype)(*inputs) - want).abs().max() < heard / 4


@torch.no_grad()
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_allocator_whose_weights_lie_elsewhere_fetches_each_where_it_is_read(allocator_and_inputs, where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    allocator, inputs = allocator_and_inputs
    want = allocator(*inputs)
    if where == "cpu":
        accelerate.cpu_offload(allocator, "cpu")
    else:
        accelerate.disk_offload(allocator, tmp_path, "cpu")
    assert all(parameter.is_meta for parameter in allocator.parameters())
    close(allocator(*inputs), want)


@torch.no_grad()
def test_an_adapter_is_heard_on_every_linear_of_an_allocator(allocator_and_inputs):
    peft = pytest.importorskip("peft")
    allocator, inputs = allocator_and_inputs
    plain = allocator(*inputs)
    linears = [name for name, module in allocator.named_modules() if isinstance(module, nn.Linear)]
    for name in linears:
        config = peft.LoraConfig(target_modules=[name], init_lora_weights=False)
        adapted = peft.get_peft_model(copy.deepcopy(allocator), config).eval()
        found = adapted(*inputs)
        assert (found - plain).abs().max() > 1e-4, name
        close(adapted.merge_and_unload()(*inputs), found)


# ---- summaries ----


def test_a_column_weighs_what_its_entries_sum():
    assert column_plan(PLAN) == MixPlan((((1, None, 0.5), (2, None, 0.5)), ((3, None, 0.5), (4, None, 0.5))), 5)
    assert column_plan(MixPlan.weighted_sum([0, 3], residual=-1)).blocks == (((0, None, 1.0),), ((3, None, 1.0),))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("has_cls", [True, False])
def test_a_summary_is_the_cls_of_a_group_mean_or_its_mean_over_the_tokens(impl, has_cls):
    hidden = states()
    groups = [torch.stack(hidden[1:3]).mean(0), torch.stack(hidden[3:]).mean(0)]
    expected = torch.stack([g[:, 0] if has_cls else g.mean(1) for g in groups], dim=1)
    close(column_summaries([None, *hidden[1:]], PLAN, has_cls, impl), expected)


def test_summaries_of_the_reduced_sources_are_those_of_the_layers():
    hidden = states()
    sources, plan = PLAN.reduced()
    reduced = [plain_torch.layer_mix(hidden, MixPlan((block,))) for block in sources.blocks]
    close(column_summaries(reduced, plan, impl="reference"), column_summaries(hidden, PLAN, impl="reference"))


# ---- projector ----


def projector(impl="reference", plan=PLAN, **options):
    torch.manual_seed(seeded(1))
    return LayerMixProjector(plan, 8, 12, skip_tokens=1, impl=impl, **options)


def run(module, hidden, weights, **kwargs):
    """Output and gradients of every parameter and of the weights."""
    weights = weights.clone().requires_grad_()
    out = module(hidden, weights, **kwargs)
    params = [p for p in module.parameters() if p.requires_grad]
    grads = torch.autograd.grad(out.square().sum(), [weights, *params])
    return [out, *grads]


class LowRank(nn.Module):
    """A module in place of a Linear, as LoRA puts one there: it needs a tensor."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    def forward(self, x):
        assert x.dtype == torch.float32
        return self.base_layer(x)


class ShardedLinear(nn.Linear):
    """What FSDP2 makes of a unit: a subclass, put in place of the instance's class."""


def disguise(module, how):
    calls = []
    if how == "hooked":
        for name in ("linear_1", "linear_2"):
            getattr(module, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    elif how == "rebound":
        for name in ("linear_1", "linear_2"):
            linear = getattr(module, name)
            linear.forward = lambda x, forward=linear.forward, name=name: (calls.append(name), forward(x))[1]
    elif how == "sharded":
        for name in ("linear_1", "linear_2"):
            linear = getattr(module, name)
            linear.__class__ = type("Sharded", (type(linear),), {})
            linear.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    elif how == "wrapped":
        module.linear_1, module.linear_2 = LowRank(module.linear_1), LowRank(module.linear_2)
    return calls


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("how", ["plain", "hooked", "rebound", "sharded", "wrapped"])
def test_every_road_through_the_projector_leads_to_the_same_outputs_and_gradients(impl, eps, how):
    hidden, weights = states(), torch.rand(2, 2)
    expected = run(projector(layernorm_eps=eps), hidden, weights)
    module = projector(impl, layernorm_eps=eps)
    calls = disguise(module, how)
    for got, want in zip(run(module, hidden, weights), expected, strict=True):
        close(got, want)
    assert calls == ([] if how in ("plain", "wrapped") else ["linear_1", "linear_2"])


def test_the_projector_is_the_specification():
    hidden, weights, module = states(), torch.rand(2, 2), projector(activation="gelu_tanh", layernorm_eps=1e-3)
    norm, one, two = module.projector_layernorm, module.linear_1, module.linear_2
    want = plain_torch.layer_mix_mlp(
        hidden, PLAN, weights, one.weight, one.bias, two.weight, two.bias,
        activation="gelu_tanh", norm=(norm.weight, norm.bias, 1e-3), skip_tokens=1,
    )  # fmt: skip
    close(module(hidden, weights), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_projector_reads_reduced_sources_and_many_rows_of_one_image(impl):
    hidden, weights, index = states(), torch.rand(3, 2), torch.tensor([1, 1, 0])
    sources, plan = PLAN.reduced()
    reduced = [plain_torch.layer_mix(hidden, MixPlan((block,))) for block in sources.blocks]
    out = projector(impl)(reduced, weights, plan=plan, image_index=index)
    close(out, projector()([h[index] for h in hidden], weights))


class Endless:
    """No index is out of its range, and Python's loop over it has no end."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        assert index < 100, "read for ever"
        return torch.randn(2, 5, 8)


@pytest.mark.parametrize("stacked", [Endless(), torch.randn(5, 2, 5, 8)], ids=["endless", "a tensor"])
def test_what_is_no_sequence_of_states_is_refused_before_it_is_read(stacked):
    for call in (lambda: projector()(stacked, torch.rand(2, 2)), lambda: column_summaries(stacked, PLAN)):
        with pytest.raises(TypeError, match="hidden_states: need a sequence of tensors"):
            call()


@pytest.mark.parametrize("has_cls", [True, False])
def test_states_without_their_batch_are_refused(has_cls):
    lost = [state[0] for state in states()]
    with pytest.raises(ValueError, match=r"hidden_states\[1\]: need shape \[I, T, D\]"):
        column_summaries(lost, PLAN, has_cls)
    with pytest.raises(ValueError, match=r"hidden_states\[1\]: need shape \[I, T, D\], got \[5, 8\]"):
        projector()(lost, torch.rand(2, 2))


class Host(nn.Module):
    """A projector as it comes from elsewhere, with the LayerNorm that is given."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.linear_1, self.act, self.linear_2 = norm, nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 12)

    def forward(self, rows):
        return self.linear_2(self.act(self.linear_1(self.norm(rows))))


def children(module):
    return Connector(module.norm, module.linear_1, module.act, module.linear_2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("way", ["one operator", "apart", "hooked"])
@pytest.mark.parametrize("options", [{"elementwise_affine": False}, {"bias": False}, {}], ids=str)
def test_a_patched_norm_may_lack_its_weight_and_its_bias(options, way, impl):
    hidden, weights, host = states(), torch.rand(2, 2, requires_grad=True), Host(nn.LayerNorm(16, **options))
    for parameter in host.norm.parameters():
        nn.init.normal_(parameter)

    def run_host(rows):
        out = host(rows)
        return [out, *torch.autograd.grad(out.square().sum(), [weights, *host.parameters()])]

    expected = run_host(plain_torch.layer_mix(hidden, PLAN, weights, skip_tokens=1))
    seen = []
    if way == "hooked":
        host.act.register_forward_hook(lambda module, args, out: seen.append((type(args[0]), type(out))))
    elif way == "apart":
        host.linear_2 = nn.Sequential(host.linear_2)
    with PatchHandle() as edits:
        patch_projector(edits, host, children, "gelu", impl, "host")
        assert is_one_operator(children(host)) == (way == "one operator")
        assert mixes_in_linear(children(host)) == (way != "hooked")
        results = run_host(MixInput(tuple(hidden), weights, None, None, PLAN, 1, "gelu", impl))
    assert seen == ([(torch.Tensor, torch.Tensor)] if way == "hooked" else [])
    for got, want in zip(results, expected, strict=True):
        close(got, want)


def test_a_linear_is_plain_until_something_would_happen_in_its_forward():
    assert is_plain(nn.Linear(2, 2))
    assert is_plain(projector().linear_1)
    hooked = nn.Linear(2, 2)
    hooked.register_full_backward_hook(lambda *_: None)
    rebound = nn.Linear(2, 2)
    rebound.forward = rebound.forward
    parametrized = nn.Linear(2, 2)
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    released = nn.Linear(2, 2)
    released.weight.untyped_storage().resize_(0)
    emptied = nn.Linear(2, 2)
    emptied.weight.data = torch.empty(0)
    subclassed = nn.Linear(2, 2)
    subclassed.weight = nn.Parameter(subclassed.weight.data.as_subclass(type("Quantised", (torch.Tensor,), {})))
    for module in (
        hooked,
        rebound,
        parametrized,
        released,
        emptied,
        subclassed,
        ShardedLinear(2, 2),
        nn.Bilinear(2, 2, 2),
    ):
        assert not is_plain(module)


@pytest.mark.parametrize("layers", [[3], [-2, 0], [3, 0, -2]])
def test_a_widened_linear_computes_the_same_also_of_a_layer_that_comes_twice(layers):
    hidden, weight = states(), torch.randn(12, 8 * len(layers))
    plan = MixPlan((*MixPlan.concat([0, 3]).blocks, *MixPlan.igva_uniform(4, 2).blocks[1:]), 5)
    row, wide_row = (plain_torch.layer_mix(hidden, p) for p in (MixPlan.concat(layers, 5), plan))
    close(wide_row @ widen(weight, layers, plan).T, row @ weight.T)
    with pytest.raises(ValueError, match="the model reads layer 2, need a block of that layer alone"):
        widen(weight, [2] * len(layers), plan)


def test_the_keys_of_the_projector_are_those_of_transformers():
    pytest.importorskip("transformers")
    from tiny import llava_config, text_config, vision_config
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
    from transformers.models.vipllava.configuration_vipllava import VipLlavaConfig
    from transformers.models.vipllava.modeling_vipllava import VipLlavaMultiModalProjector

    assert set(projector().state_dict()) == set(LlavaMultiModalProjector(llava_config()).state_dict())
    vip = VipLlavaMultiModalProjector(VipLlavaConfig(vision_config=vision_config(), text_config=text_config()))
    assert set(projector(layernorm_eps=1e-5).state_dict()) == set(vip.state_dict())


# ---- balance ----


def test_negative_entropy_runs_from_minus_log_k_to_zero():
    weights = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0]], requires_grad=True)
    torch.testing.assert_close(negative_entropy(weights), torch.tensor([-math.log(4), 0.0]))
    negative_entropy(weights).sum().backward()
    assert weights.grad.isfinite().all()


def test_the_weights_are_not_softmaxed_again():
    weights = torch.tensor([[0.7, 0.2, 0.1]])
    torch.testing.assert_close(balance_loss(weights), (weights * weights.log()).sum())


def test_shares_that_sum_to_one_make_the_balance_loss_independent_of_the_split():
    weights, share = torch.rand(4, 3).softmax(-1), torch.tensor([0.1, 0.4, 0.3, 0.2])
    halves = balance_loss(weights[:2], share[:2]) + balance_loss(weights[2:], share[2:])
    torch.testing.assert_close(balance_loss(weights, share), halves)
    torch.testing.assert_close(balance_loss(weights), balance_loss(weights, torch.full((4,), 0.25)))
