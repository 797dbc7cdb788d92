"""The fused allocator in the interpreter: against fp64, when it serves, and as an operator of torch."""

import copy

import pytest
import strides
import torch
from recording import Dispatched
from torch import nn

from igva_kernels.nn import WeightAllocator
from igva_kernels.testing import within_rule

pytest.importorskip("triton")

from igva_kernels.ops.allocator import allocate, api
from igva_kernels.ops.allocator import triton as kernels

pytestmark = pytest.mark.interpreted

OPS = torch.ops.igva_kernels
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]


def make(columns=4, width=32, heads=2, blocks=2, dtype=torch.float32):
    """A frozen allocator with biases and norms that do something."""
    module = WeightAllocator(20, 24, columns, width, blocks, heads, impl="triton").requires_grad_(False)
    for name, p in module.named_parameters():
        if p.dim() == 1:
            p.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
    return module.to(dtype)


def draw(batch, columns=4, dtype=torch.float32):
    return torch.randn(batch, 20).to(dtype), torch.randn(batch, columns, 24).to(dtype)


def check(make_module, make_inputs, dtype=torch.float32):
    """The rule over draws of modules and inputs."""
    for judge in within_rule(dtype):
        module, inputs = make_module(), make_inputs()
        actual = module(*inputs)
        assert actual.dtype == torch.float32
        oracle = copy.deepcopy(module).double()(*inputs, impl="reference")
        judge.add(actual, oracle, module(*inputs, impl="reference"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "columns", "width", "heads"),
    [(0, 4, 32, 2), (1, 1, 64, 4), (1, 8, 36, 4), (3, 5, 48, 3), (17, 3, 33, 3), (2, 16, 32, 1)],
)
def test_the_weights_obey_the_error_rule(batch, columns, width, heads, dtype):
    check(lambda: make(columns, width, heads, dtype=dtype), lambda: draw(batch, columns, dtype), dtype)


@pytest.mark.parametrize("columns", [2, 3, 6, 7])
def test_any_number_of_layer_groups(columns):
    check(lambda: make(columns, 24, 2, 1), lambda: draw(2, columns))


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_wide_tiles_and_heads_one_after_the_other(heads, monkeypatch):
    monkeypatch.setattr(kernels, "_HELD", 128 * 4)
    tile = kernels._tile
    monkeypatch.setattr(kernels, "_tile", lambda rows, columns, dtype, sms: tile(rows, columns, dtype, 1))
    check(lambda: make(4, 84, heads, dtype=torch.float16), lambda: draw(6, dtype=torch.float16), torch.float16)


def test_large_weights_do_not_overflow_the_softmax():
    def large():
        module = make()
        for block in module.blocks:
            block.cross_attention.in_proj_weight *= 30
        module.head.weight *= 100
        return module

    check(large, lambda: draw(3))


@pytest.mark.parametrize("layout", ["column of a matrix", "expanded"])
def test_the_registered_operator_gives_what_it_gives_for_a_dense_copy(layout):
    strides.check(OPS.allocate, arguments(make(), *draw(2)), layout, at_once=True)


def test_an_ffn_of_another_width():
    def wide():
        module = make()
        module.blocks[0].ffn = nn.Sequential(nn.Linear(32, 80), nn.ReLU(), nn.Linear(80, 32)).requires_grad_(False)
        return module

    check(wide, lambda: draw(2))


def test_sentences_of_another_dtype():
    module = make(dtype=torch.bfloat16)
    sentences, summaries = draw(2)
    weights = module(sentences, summaries)
    assert torch.equal(weights, module(sentences.bfloat16(), summaries.bfloat16()))


def test_four_blocks_are_16_launches(monkeypatch):
    launched = []
    monkeypatch.setattr(
        kernels, "launch", lambda *args, run=kernels.launch, **kw: launched.append(args[0].__name__) or run(*args, **kw)
    )
    make(width=16, blocks=4)(*draw(1))
    block = ["attend_kernel", "linear_kernel", "linear_kernel"]
    # Before the first attention, everything depends on the image alone, except one projection of the sentence.
    assert launched == ["linear_kernel", "linear_kernel", "fold_kernel", *4 * block, "head_kernel"]


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_same_bits_again_and_a_row_does_not_see_its_neighbours():
    module = make()
    sentences, summaries = draw(5)
    first = module(sentences, summaries)
    assert torch.equal(first, module(sentences, summaries))
    summaries[1] = float("nan")
    second = module(sentences, summaries)
    assert second[1].isnan().all()
    assert torch.equal(first[[0, 2, 3, 4]], second[[0, 2, 3, 4]])


# ---- when it serves ----


def hook(module):
    module.blocks[1].ffn[0].register_forward_hook(lambda *_: None)


def rebind(module):
    module.cls_proj.forward = module.cls_proj.forward


def gelu(module):
    module.blocks[0].ffn[1] = nn.GELU()


def wrap(module):
    module.head = nn.Sequential(module.head)
    module.head.in_features, module.head.out_features = 32, 4


def unbias(module):
    module.sentence_proj.bias = None


def shrink(module):
    module.blocks[1].ffn[2].weight = nn.Parameter(torch.zeros(32, 16), requires_grad=False)


def drop(module):
    module.blocks[0].cross_attention.dropout = 0.1


CHANGES = {
    "a hook": (hook, "a submodule is hooked"),
    "a forward of its own": (rebind, "a submodule is hooked"),
    "another activation": (gelu, "a submodule is hooked, sharded, quantised or replaced"),
    "a wrapped head": (wrap, "a submodule is hooked, sharded, quantised or replaced"),
    "no bias": (unbias, "a submodule is hooked, sharded, quantised or replaced"),
    "a parameter of another shape": (shrink, r"parameter 24 has the shape \(32, 16\), need \(32, 32\)"),
    "dropout": (drop, "a submodule is hooked, sharded, quantised or replaced"),
    "a parameter of another dtype": (lambda m: m.head.half(), "not all of one dtype"),
    "a trainable parameter": (lambda m: m.head.requires_grad_(), "a gradient is asked for"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_it_cannot_serve_is_refused_by_name(name):
    change, reason = CHANGES[name]
    module = make()
    change(module)
    with pytest.raises(NotImplementedError, match=f"impl='triton' cannot serve this call of the allocator: .*{reason}"):
        module(*draw(1))


def by_function(module, sentences, summaries):
    """What ``module(sentences, summaries)`` computes, by the function that ``igva-kernels verify`` judges."""
    block = module.blocks[0]
    eps = [block.norm1.eps, block.norm2.eps] * len(module.blocks)
    return allocate(
        sentences, summaries, [*module.parameters()], block.cross_attention.num_heads, eps, impl=module.impl
    )  # fmt: skip


WAYS = {"module": lambda module, *inputs: module(*inputs), "function": by_function}


@pytest.mark.parametrize("way", WAYS)
def test_autocast_wide_rows_fp64_and_gradients_are_refused_by_name(way):
    call, inputs = WAYS[way], draw(1)
    with torch.autocast("cpu"), pytest.raises(NotImplementedError, match="autocast is on"):
        call(make(), *inputs)
    with pytest.raises(NotImplementedError, match="5 keys of width 3000 are 32768 elements"):
        call(make(5, 3000, 3, 1), *draw(1, 5))
    with pytest.raises(NotImplementedError, match="float64"):
        call(make().double(), *(x.double() for x in inputs))
    with pytest.raises(NotImplementedError, match="a gradient is asked for"):
        call(make().requires_grad_(), *inputs)


def test_one_decision_serves_the_module_and_the_function(monkeypatch):
    module, inputs = make(), draw(1)
    assert torch.equal(by_function(module, *inputs), module(*inputs))
    monkeypatch.setattr(api, "_why_not", lambda *_: "the test says so")
    for call in WAYS.values():
        with pytest.raises(NotImplementedError, match=r"impl='triton' cannot serve this call .*: the test says so"):
            call(module, *inputs)


def test_trainable_parameters_are_served_where_no_gradient_is_asked_for():
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            check(lambda: make().requires_grad_(), lambda: draw(2))


# ---- as an operator ----


def arguments(module, sentences, summaries):
    return sentences, summaries, list(module.parameters()), 2, [1e-5] * 4, "triton"


@pytest.mark.plain_memory
def test_opcheck_passes():
    torch.library.opcheck(OPS.allocate.default, arguments(make(width=16), *draw(2)))


@pytest.mark.plain_memory
def test_it_compiles_without_a_graph_break():
    torch.compiler.reset()
    module, inputs = make(width=16), draw(1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), module(*inputs))


def test_a_dispatch_mode_sees_it():
    module, inputs = make(), draw(1)
    with Dispatched() as seen:
        module(*inputs)
    assert seen.ours == ["allocate"]


def test_a_gradient_is_refused_by_name():
    module = make().requires_grad_()
    with pytest.raises(NotImplementedError, match="is for inference"):
        OPS.allocate(*arguments(module, *draw(1))).sum().backward()


def test_parameters_may_be_shared():
    def tied():
        module = make()
        module.blocks[1].ffn[0].weight = module.blocks[0].ffn[0].weight
        return module

    check(tied, lambda: draw(2))
