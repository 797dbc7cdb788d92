"""``graphed``: what a recording depends on, without a GPU; and on a GPU, that a replay is the call."""

import copy
import threading
import warnings
from typing import NamedTuple

import harness
import pytest
import torch
from torch import nn

import igva_kernels as ik
from igva_kernels import MixPlan, graphs, registry
from igva_kernels.nn import LayerMixProjector, WeightAllocator
from igva_kernels.nn.projector import column_summaries

PLAN = MixPlan.igva()
TOKENS, WIDTH, HIDDEN, SENTENCE = 69, 128, 264, 48


def layout(*args, **kwargs):
    return graphs.layout_of((args, kwargs), [])


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


# ---- without a GPU ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_call_says_so():
    with pytest.raises(ValueError, match="no CUDA device, which CUDA graphs need; call the function itself"):
        ik.graphed(nn.Linear(2, 2))(torch.randn(1, 2))


def test_arguments_of_graphed_are_checked():
    with pytest.raises(TypeError, match="function: got int"):
        ik.graphed(3)
    with pytest.raises(ValueError, match="max_graphs: got 0"):
        ik.graphed(nn.Linear(2, 2), max_graphs=0)


def test_numbers_in_tensors_are_no_part_of_a_layout_and_tensors_are_found_in_order():
    a, b, c = torch.randn(2, 3), torch.randn(4), torch.randn(5)
    tensors = []
    graphs.layout_of((((a, [b]), None), {"x": {"y": c}}), tensors)
    assert [*map(id, tensors)] == [id(a), id(b), id(c)]
    assert layout((a, [b]), x={"y": c}) == layout((a + 1, [b + 1]), x={"y": c + 1})
    assert hash(layout(a, x=b)) == hash(layout(a.clone(), x=b.clone()))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2, 2), torch.zeros(2, 2).t()),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2), torch.zeros(2, device="meta")),
        (torch.zeros(1, 2).expand(3, 2), torch.zeros(3, 2)),
        (None, torch.zeros(2)),
        ([torch.zeros(2), None], [None, torch.zeros(2)]),
        ([torch.zeros(2)], (torch.zeros(2),)),
        (Pair(torch.zeros(2), torch.zeros(2)), (torch.zeros(2), torch.zeros(2))),
        ({"a": torch.zeros(2)}, {"b": torch.zeros(2)}),
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        ("gelu", "relu"),
        (torch.float32, torch.bfloat16),
        (MixPlan.igva(), MixPlan.igva_uniform()),
    ],
)
def test_layouts_differ(one, other):
    assert layout(one) != layout(other)
    assert layout(one) == layout(one)
    assert layout(x=one) != layout(one)


@pytest.mark.parametrize("value", [object(), nn.Linear(1, 1), {1, 2}, torch.return_types.max((torch.ones(1),) * 2)])
def test_an_argument_that_may_stand_for_many_values_is_refused(value):
    with pytest.raises(TypeError, match=r"an argument holds a .*, need plain tensors"):
        layout([value])


def module():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    net.scale, net.table = 2.0, torch.ones(3)
    return net


def test_a_recording_follows_parameters_that_change_in_place():
    net = module()
    seen = graphs.Snapshot(net.modules())
    net.load_state_dict({name: value + 1 for name, value in net.state_dict().items()})
    torch.optim.SGD(net.parameters(), 0.1).step()
    net.table.zero_()
    assert not seen.is_outdated()


@pytest.mark.parametrize(
    "change",
    {
        "parameter": lambda net: setattr(net[0], "weight", nn.Parameter(net[0].weight.detach())),
        "data": lambda net: setattr(net[0].weight, "data", net[0].weight.data.clone()),
        "view of the data": lambda net: setattr(net[0].weight, "data", net[0].weight.data.t()),
        "rows of the data": lambda net: setattr(net[0].weight, "data", net[0].weight.data[:2]),
        "dtype": lambda net: net.double(),
        "no bias": lambda net: setattr(net[0], "bias", None),
        "frozen": lambda net: net.requires_grad_(False),
        "buffer": lambda net: setattr(net[1], "running_mean", torch.zeros(3)),
        "eval": lambda net: net.eval(),
        "submodule": lambda net: net.__setitem__(2, nn.Linear(3, 2)),
        "new submodule": lambda net: net.append(nn.ReLU()),
        "hook": lambda net: net[2].register_forward_hook(lambda *_: None),
        "forward": lambda net: setattr(net[2], "forward", lambda x: x),
        "attribute": lambda net: setattr(net, "scale", 3.0),
        "tensor": lambda net: setattr(net, "table", torch.ones(3)),
        "new attribute": lambda net: setattr(net, "other", 1),
    }.items(),
    ids=lambda change: change[0],
)
def test_any_other_change_of_a_module_is_noticed(change):
    net = module()
    seen = graphs.Snapshot(net.modules())
    change[1](net)
    assert seen.is_outdated()


def reads(function, *inputs, modules=()):
    with graphs.Reads(inputs, graphs.owners(function, modules), torch.device("cpu")):
        return function(*inputs)


def test_a_function_may_read_its_arguments_its_modules_and_what_it_makes():
    net, x = module().eval(), torch.randn(4, 3)
    assert torch.equal(reads(net, x), net(x))
    assert torch.equal(reads(net.forward, x), net(x))
    assert torch.equal(reads(lambda x: net(x[:2]) * 2 + torch.zeros(2) + net.table[:2], x, modules=[net]).sum(), (
        net(x[:2]) * 2 + 1).sum())  # fmt: skip


def test_a_tensor_that_nobody_would_miss_is_refused():
    net, x, table = module(), torch.randn(4, 3), torch.randn(3)
    with pytest.raises(ValueError, match=r"reads a tensor of shape \(3,\) and torch.float32 that is neither"):
        reads(lambda x: x + table, x)
    with pytest.raises(ValueError, match=r"name the module that owns it in graphed\(..., modules=\[...\]\)"):
        reads(lambda x: net(x), x)


def test_a_tensor_inside_a_list_of_an_operator_is_seen():
    states = [torch.randn(2, 5, 8) for _ in range(3)]
    plan = MixPlan.concat([0, 1, 2])
    with torch.no_grad():
        for _ in range(2):  # the second layout is known
            assert reads(lambda *states: ik.layer_mix(states, plan), *states).shape == (2, 5, 24)
            with pytest.raises(ValueError, match=r"shape \(2, 5, 8\)"):
                reads(lambda *some: ik.layer_mix([*some, states[2]], plan), *states[:2])


def test_a_function_that_looks_at_values_is_refused():
    with pytest.raises(ValueError, match="waits for the GPU"):
        reads(lambda x: x * x.sum().item(), torch.randn(4))


@pytest.mark.plain_memory
def test_torch_compile_takes_the_function_itself():
    net = nn.Linear(3, 2)
    fast = ik.graphed(net)
    x = torch.randn(4, 3)
    assert torch.equal(torch.compile(lambda x: fast(x) + 1, fullgraph=True, backend="eager")(x), net(x) + 1)


def test_a_copy_belongs_to_the_copied_module():
    net = nn.Linear(3, 2)
    fast, other = copy.deepcopy((ik.graphed(net.forward, max_graphs=3), net))
    assert fast.function.__self__ is other and other is not net
    assert fast.max_graphs == 3


# ---- on a GPU ----

ON_A_GPU = harness.on_a_gpu(registry.all_backends()["triton"])
IMPLS = [
    pytest.param(param.values[0].impl, id=param.values[0].impl, marks=[*param.marks, pytest.mark.plain_memory])
    for param in harness.subjects("weighted_mix", "cuda")
]


def gpu(test):
    for mark in (*ON_A_GPU, pytest.mark.plain_memory):
        test = mark(test)
    return test


class Connector(nn.Module):
    """Summaries, allocator, mix and projector, as the reference model calls them."""

    def __init__(self, impl="auto", dtype=torch.bfloat16):
        super().__init__()
        self.impl = impl
        self.allocator = WeightAllocator(SENTENCE, WIDTH, 4, hidden_dim=64)
        self.projector = LayerMixProjector(PLAN, WIDTH, HIDDEN, skip_tokens=1, impl=impl)
        self.to("cuda", dtype)

    def forward(self, states, sentences, image_index=None):
        summaries = column_summaries(states, PLAN, impl=self.impl)
        if image_index is not None:
            summaries = summaries[image_index]
        weights = self.allocator(sentences, summaries)
        return {"tokens": self.projector(states, weights, image_index=image_index), "weights": weights}


def draw(batch, dtype=torch.bfloat16, images=None):
    states = [torch.randn(images or batch, TOKENS, WIDTH, device="cuda", dtype=dtype) for _ in range(25)]
    return states, torch.randn(batch, SENTENCE, device="cuda", dtype=dtype)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("impl", IMPLS)
@torch.no_grad()
def test_a_replay_is_the_call_for_every_batch_and_its_result_stays(impl):
    net = Connector(impl)
    fast = ik.graphed(net)
    kept = []
    for batch in (1, 4, 2, 1, 4, 1):
        inputs = draw(batch)
        kept.append((fast(*inputs), net(*inputs)))
    assert fast.num_graphs == 3
    for one, other in kept:
        assert_same(one, other)


@pytest.mark.parametrize("impl", IMPLS)
@torch.no_grad()
def test_a_replay_follows_rows_that_share_images(impl):
    net = Connector(impl)
    fast = ik.graphed(net)
    for index in ([0, 0, 1], [1, 0, 1], None):
        inputs = draw(3, images=2 if index else 3)
        index = None if index is None else torch.tensor(index, device="cuda")
        assert_same(fast(*inputs, index), net(*inputs, index))
        assert_same(fast(*inputs, image_index=index), net(*inputs, index))


@gpu
@torch.no_grad()
def test_layers_may_be_views_and_may_be_absent():
    net = Connector()
    fast = ik.graphed(net)
    for _ in range(2):
        states, sentences = draw(2)
        wide = [torch.randn(2, TOKENS + 3, WIDTH, device="cuda", dtype=torch.bfloat16)[:, 3:] for _ in states]
        assert_same(fast(wide, sentences), net(wide, sentences))
        few = [None, *states[1:]]  # IGVA's plan reads layers 1 to 24
        assert_same(fast(few, sentences), net(few, sentences))
        one = sentences[:1].expand(2, -1)
        assert_same(fast(states, one), net(states, one))
    assert fast.num_graphs == 3


@gpu
@torch.no_grad()
def test_weights_that_change_in_place_are_followed_without_another_recording():
    net = Connector()
    fast = ik.graphed(net)
    inputs = draw(2)
    before = fast(*inputs)
    (graph,) = fast._graphs.values()
    for parameter in net.parameters():
        parameter.mul_(1.5)
    after = fast(*inputs)
    assert_same(after, net(*inputs))
    assert not torch.equal(before["tokens"], after["tokens"])
    net.load_state_dict(Connector().state_dict())
    assert_same(fast(*inputs), net(*inputs))
    assert [*fast._graphs.values()] == [graph]


@gpu
@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    {
        "parameter": lambda net: setattr(net.projector.linear_1, "weight", nn.Parameter(
            torch.randn_like(net.projector.linear_1.weight))),
        "there and back": lambda net: net.cpu().to("cuda"),
        "Linear": lambda net: setattr(net.projector, "linear_2", nn.Linear(HIDDEN, HIDDEN).to("cuda", torch.bfloat16)),
        "activation": lambda net: setattr(net.projector, "activation", "relu"),
        "hook": lambda net: net.projector.linear_2.register_forward_hook(lambda *args: args[-1] * 2),
        "impl": lambda net: setattr(net.projector, "impl", "reference"),
    }.items(),
    ids=lambda change: change[0],
)  # fmt: skip
def test_any_other_change_of_the_modules_is_recorded_anew(change):
    net = Connector()
    fast = ik.graphed(net)
    inputs = draw(2)
    fast(*inputs)
    change[1](net)
    assert_same(fast(*inputs), net(*inputs))


@gpu
def test_torchs_modes_are_part_of_a_layout():
    net = Connector(dtype=torch.float32)
    fast = ik.graphed(net)
    inputs = draw(2, torch.float32)
    for factor in (1.0, 1.5):  # under autocast too, whose cache of casts a recording must not use
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(factor)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert_same(fast(*inputs), net(*inputs))
            with mode(), torch.autocast("cuda", torch.bfloat16):
                got = fast(*inputs)
            with mode(), torch.autocast("cuda", torch.bfloat16):
                assert_same(got, net(*inputs))
            assert got["tokens"].dtype == torch.bfloat16
            assert got["tokens"].is_inference() == (mode is torch.inference_mode)
    assert fast.num_graphs == 4


@gpu
def test_a_call_that_would_need_a_gradient_is_refused_and_a_frozen_one_is_not():
    net = Connector()
    fast = ik.graphed(net)
    inputs = draw(2)
    with pytest.raises(ValueError, match=r"output of Connector requires a gradient: graphed is for inference"):
        fast(*inputs)
    net.requires_grad_(False)
    assert_same(fast(*inputs), net(*inputs))
    states, sentences = inputs
    with pytest.raises(ValueError, match="an argument of Connector requires a gradient"):
        fast(states, sentences.clone().requires_grad_())
    net.requires_grad_(True)
    with pytest.raises(ValueError, match="output of Connector requires a gradient"):
        fast(*inputs)


@gpu
@torch.no_grad()
def test_results_that_are_not_copied_are_overwritten_by_the_next_call():
    net = Connector()
    fast = ik.graphed(net, copy_outputs=False)
    first = fast(*draw(2))["tokens"]
    inputs = draw(2)
    second = fast(*inputs)["tokens"]
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(first, net(*inputs)["tokens"])


@gpu
@torch.no_grad()
@pytest.mark.parametrize("copy_outputs", [True, False])
@pytest.mark.parametrize(("limit", "left"), [(1, [2]), (2, [1, 2]), (3, [3, 1, 2])])
def test_the_layout_that_was_not_used_for_longest_is_dropped(limit, left, copy_outputs):
    net = Connector()
    fast = ik.graphed(net, max_graphs=limit, copy_outputs=copy_outputs)
    kept = []  # results may outlive their graph
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for batch in (1, 2, 1, 3, 1, 2):
            inputs = draw(batch)
            kept.append(fast(*inputs))
            assert_same(kept[-1], net(*inputs))
    assert fast.num_graphs == limit
    assert bool(said) == (limit < 3) and all(w.category is ik.GraphLimitWarning for w in said)
    assert [graph.outputs[0].shape[0] for graph in fast._graphs.values()] == left


@gpu
@torch.no_grad()
def test_a_method_in_the_place_of_itself_and_functions_of_modules():
    net = Connector()
    states, sentences = draw(2)
    expected = net(states, sentences)
    fast = ik.graphed(lambda x, s: net(x, s)["tokens"], modules=[net])
    assert torch.equal(fast(states, sentences), expected["tokens"])
    net.projector.forward = ik.graphed(net.projector.forward)
    for _ in range(2):
        assert_same(net(states, sentences), expected)
    outer = ik.graphed(net)  # the inner one is recorded as part of it
    for _ in range(2):
        assert_same(outer(states, sentences), expected)


@gpu
@torch.no_grad()
def test_a_replay_does_not_wait_for_the_gpu():
    net = Connector()
    fast = ik.graphed(net)
    inputs = draw(2)
    fast(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = fast(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(out, net(*inputs))


@gpu
@torch.no_grad()
def test_calls_from_streams_and_threads_take_turns():
    net = Connector()
    fast = ik.graphed(net)
    inputs = [draw(batch) for batch in (1, 2, 1, 2)]
    expected = [net(*each) for each in inputs]
    torch.cuda.synchronize()
    wrong = []

    def work(i):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                out = fast(*inputs[i])
                if not all(torch.equal(out[name], expected[i][name]) for name in out):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and fast.num_graphs == 2


@gpu
@torch.no_grad()
def test_inside_a_graph_of_the_caller_the_function_itself_is_recorded():
    net = nn.Linear(64, 64).cuda()
    fast = ik.graphed(net)
    x = torch.randn(2, 64, device="cuda")
    fast(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fast(x)
    x.normal_()
    graph.replay()
    assert torch.equal(out, net(x))


@gpu
@torch.no_grad()
def test_what_a_recording_would_freeze_is_refused_before_it():
    x, table = torch.randn(4, 4, device="cuda"), torch.randn(4, device="cuda")
    scale = nn.Module()
    scale.register_buffer("factor", torch.tensor(2.0))
    refused = {
        "neither an argument nor a parameter": ik.graphed(lambda x: x + table),
        "waits for the GPU or copies": ik.graphed(lambda x: x * float(x.sum())),
        "or copies from the CPU": ik.graphed(lambda x: x + torch.ones(4).to(x.device)),
        "a graph would freeze its value": ik.graphed(lambda x: x * scale.factor, modules=[scale]),
        "changes an argument of shape": ik.graphed(lambda x: x.add_(1)),
    }
    for message, fast in refused.items():
        with pytest.raises(ValueError, match=message):
            fast(x)
        assert fast.num_graphs == 0
    with pytest.raises(ValueError, match=r"arguments: got .*\[0\] on cuda:0, .*\[1\] on cpu; a CUDA graph needs all"):
        ik.graphed(torch.add)(x, x.cpu())
    with pytest.raises(TypeError, match=r"returns a builtins\.object"):
        ik.graphed(lambda x: (x + 1, object()))(x)


@gpu
@torch.no_grad()
def test_what_sets_attributes_at_every_call_is_refused():
    class Counting(nn.Linear):
        def forward(self, x):
            self.calls = [x.shape]
            return super().forward(x)

    fast = ik.graphed(Counting(4, 4).cuda())
    with pytest.raises(ValueError, match="sets attributes of its modules at every call"):
        fast(torch.randn(2, 4, device="cuda"))


@gpu
@torch.no_grad()
def test_reset_gives_the_memory_back():
    net = Connector()
    fast = ik.graphed(net)
    inputs = draw(4)
    before = None
    for _ in range(4):
        out = fast(*inputs)
        assert_same(out, net(*inputs))
        del out
        fast.reset()
        assert fast.num_graphs == 0
        before = before or torch.cuda.memory_allocated()  # cuBLAS keeps a workspace for the stream of the recordings
    assert torch.cuda.memory_allocated() <= before
