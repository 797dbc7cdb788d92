"""Streaming equals the one-shot mix, and no state outlives its use."""

import copy
import gc
import weakref

import plain_torch
import pytest
import torch
from threads import in_threads
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

import igva_kernels as ik
from igva_kernels import MixPlan
from igva_kernels.streaming import encoder_layers

SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=2, image_size=28, patch_size=7
)
PLANS = {
    "igva": MixPlan.igva(6, 3),
    "concat": MixPlan.concat([-2, 0, -1]),
    "uniform": MixPlan.igva_uniform(6, 2),
    "means from the embeddings": MixPlan((((6, None, 1.0),), tuple((i, None, 1 / 3) for i in range(3))), 7),
    "uneven scales": MixPlan((((1, 0, 0.5), (2, 0, 0.25), (4, 1, 2.0)),), 7),
    "repeated layers": MixPlan(
        (((1, 0, 0.5), (2, 0, 1.0), (1, 0, 0.25), (1, 1, 2.0)), ((3, None, 0.5), (3, None, 0.5)), ((3, None, 1.0),)), 7
    ),
}


@pytest.fixture(params=["clip", "siglip"])
def tower(request):
    if request.param == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**SIZES)).eval().requires_grad_(False)
    return SiglipVisionModel(SiglipVisionConfig(**SIZES)).eval().requires_grad_(False)


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 28, 28)


def weights_of(plan, rows=2):
    return torch.rand(rows, plan.num_columns) if plan.num_columns else None


@pytest.mark.parametrize("mode", ["group", "layer"])
@pytest.mark.parametrize("name", PLANS)
def test_the_sources_give_the_one_shot_mix(tower, pixels, name, mode):
    plan = PLANS[name].resolve(7)
    weights = weights_of(plan)
    states = tower(pixels, output_hidden_states=True).hidden_states
    with ik.stream_hidden_states(tower, PLANS[name], mode=mode) as stream:
        output = tower(pixels)
    torch.testing.assert_close(output.last_hidden_state, tower(pixels).last_hidden_state)
    assert all(source.shape == states[0].shape for source in stream.sources)
    torch.testing.assert_close(
        ik.layer_mix(stream.sources, stream.plan, weights, skip_tokens=1),
        plain_torch.layer_mix(states, plan, weights, skip_tokens=1),
    )


def test_siglips_transposed_states_become_contiguous_at_the_first_layer(pixels):
    tower = SiglipVisionModel(SiglipVisionConfig(**SIZES)).eval().requires_grad_(False)
    plan = MixPlan.concat([0, 3, 6])
    assert tower(pixels, output_hidden_states=True).hidden_states[3].stride(-1) != 1, "nothing to mend any more"
    plain = tower(pixels)
    with ik.stream_hidden_states(tower, plan) as stream:
        streamed = tower(pixels)
    assert all(source.is_contiguous() for source in stream.sources)
    torch.testing.assert_close(streamed.last_hidden_state, plain.last_hidden_state)


@pytest.mark.parametrize("mode", ["group", "layer"])
def test_low_precision_sums_are_accumulated_in_fp32_and_rounded_once(pixels, mode):
    tower = CLIPVisionModel(CLIPVisionConfig(**SIZES)).eval().requires_grad_(False).bfloat16()
    plan = MixPlan.igva_uniform(6, 1, base=1)
    states = tower(pixels.bfloat16(), output_hidden_states=True).hidden_states
    with ik.stream_hidden_states(tower, plan, mode=mode) as stream:
        tower(pixels.bfloat16())
    exact = plain_torch.layer_mix([s.double() for s in states], plan)[..., 32:]
    assert stream.sources[1].dtype == torch.bfloat16
    torch.testing.assert_close(stream.sources[1], exact.bfloat16(), rtol=2**-7, atol=1e-6)


@pytest.fixture
def quick_collections():
    """Leaves what is alive already out of garbage collections, which would spend most of their time on it."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("quick_collections")
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "frozen training"])
@pytest.mark.parametrize("mode", ["group", "layer"])
def test_no_state_is_alive_after_its_group_is_folded(tower, pixels, mode, grad):
    plan = MixPlan.igva(6, 3)  # taps 5; groups 1-2, 3-4, 5-6
    alive: dict[int, weakref.ref] = {}
    held_at = {}

    def watch(index):
        def hook(module, args, output):
            alive[index] = weakref.ref(output[0] if isinstance(output, tuple) else output)
            gc.collect()
            held_at[index] = {i for i, ref in alive.items() if ref() is not None}

        return hook

    layers = encoder_layers(tower)
    with ik.stream_hidden_states(tower, plan, mode=mode) as stream, torch.set_grad_enabled(grad):
        handles = [layer.register_forward_hook(watch(i)) for i, layer in enumerate(layers, start=1)]
        tower(pixels)
        for handle in handles:
            handle.remove()
    # When layer i returns, its input i - 1 is alive, and of the rest only the group that is not yet folded and the tap.
    assert held_at[4] <= {3, 4}
    assert held_at[5] <= {4, 5}
    assert held_at[6] <= {5, 6}
    gc.collect()
    assert {i for i, ref in alive.items() if ref() is not None} <= {5}
    assert alive[5]() is stream.sources[0]


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("mode", ["group", "layer"])
def test_a_trainable_tower_gets_every_gradient_also_with_checkpointing(tower, pixels, mode, reentrant):
    tower.requires_grad_(True).train()
    if reentrant is not None:
        tower.gradient_checkpointing_enable({"use_reentrant": reentrant})
        pixels.requires_grad_()
    plan = MixPlan.igva(6, 3)
    weights = weights_of(plan)
    tower(pixels, output_hidden_states=True)
    grads = []
    for streamed in (False, True):
        tower.zero_grad()
        if streamed:
            with ik.stream_hidden_states(tower, plan, mode=mode) as stream:
                tower(pixels)
            row = ik.layer_mix(stream.sources, stream.plan, weights)
        else:
            row = ik.layer_mix(tower(pixels, output_hidden_states=True).hidden_states, plan, weights)
        row.square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    # Some gradients, such as those of the key biases, are sums that cancel to zero: only rounding is left of them.
    largest = max(grad.abs().max().item() for grad in grads[0].values())
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], rtol=1e-3, atol=5e-6 * largest)


def test_checkpointed_layers_that_run_again_in_the_backward_are_not_counted(tower, pixels):
    tower.requires_grad_(True).train()
    tower.gradient_checkpointing_enable({"use_reentrant": False})
    plan = MixPlan.igva(6, 3)
    with ik.stream_hidden_states(tower, plan) as stream:
        tower(pixels)
        before = [source.clone() for source in stream.sources]
        ik.layer_mix(stream.sources, stream.plan, weights_of(plan)).sum().backward()
        for source, copy in zip(stream.sources, before, strict=True):
            assert torch.equal(source, copy)


def test_an_exception_in_the_tower_leaves_no_hook_and_no_state(tower, pixels):
    layers = encoder_layers(tower)
    plan = MixPlan.igva(6, 3)

    def fail(*_):
        raise RuntimeError("in the middle")

    handle = layers[3].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"), ik.stream_hidden_states(tower, plan) as stream:
        tower(pixels)
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (tower, *layers))
    with pytest.raises(RuntimeError, match="has not run to its end"):
        _ = stream.sources
    with ik.stream_hidden_states(tower, plan) as stream:
        tower(pixels)
    assert len(stream.sources) == 4


def test_two_towers_and_two_streams_at_once(pixels):
    towers = [CLIPVisionModel(CLIPVisionConfig(**SIZES)).eval() for _ in range(2)]
    plans = [MixPlan.igva(6, 3), MixPlan.concat([1, 2])]
    with (
        torch.no_grad(),
        ik.stream_hidden_states(towers[0], plans[0]) as first,
        ik.stream_hidden_states(towers[0], plans[1]) as second,
        ik.stream_hidden_states(towers[1], plans[0]) as third,
    ):
        towers[0](pixels)
        towers[1](pixels)
        for tower, stream, plan in (
            (towers[0], first, plans[0]),
            (towers[0], second, plans[1]),
            (towers[1], third, plans[0]),
        ):
            states = tower(pixels, output_hidden_states=True).hidden_states
            weights = weights_of(plan)
            torch.testing.assert_close(
                ik.layer_mix(stream.sources, stream.plan, weights),
                plain_torch.layer_mix(states, plan.resolve(7), weights),
            )


def test_threads_with_plans_of_their_own_share_a_tower():
    tower = CLIPVisionModel(CLIPVisionConfig(**SIZES)).eval().requires_grad_(False)
    plans = [MixPlan.igva_uniform(6, 3), MixPlan.concat([-2, 0, -1])]
    images = torch.randn(4, 1, 3, 28, 28)
    states = [tower(image, output_hidden_states=True).hidden_states for image in images]

    def ask(client):
        plan, mode = plans[client % 2], ("group", "layer")[client // 2]
        for i in [(client + turn) % 4 for turn in range(8)]:
            with torch.no_grad(), ik.stream_hidden_states(tower, plan, mode=mode) as stream:
                tower(images[i])
            expected = plain_torch.layer_mix(states[i], plan.resolve(7))
            torch.testing.assert_close(ik.layer_mix(stream.sources, stream.plan), expected)
            torch.testing.assert_close(tower(images[i]).last_hidden_state, states[i][-1])

    in_threads(ask)
    assert not tower._forward_pre_hooks


def test_a_stream_sees_the_runs_of_its_own_thread_only(tower, pixels):
    plan = MixPlan.concat([-2])

    with ik.stream_hidden_states(tower, plan) as stream:
        in_threads(lambda _: tower(pixels), 1)
        with pytest.raises(RuntimeError, match="in the thread that opened it"):
            _ = stream.sources
        tower(pixels)
        own = stream.sources[0]
        in_threads(lambda _: tower(pixels + 1), 1)
        assert stream.sources[0] is own


def test_a_tower_copied_inside_the_block_feeds_nobody(tower, pixels):
    plan = MixPlan.igva(6, 3)
    with ik.stream_hidden_states(tower, plan) as stream:
        tower(pixels)
        own = list(stream.sources)
        copied = copy.deepcopy(tower)
        torch.testing.assert_close(copied(pixels + 1), tower(pixels + 1))
        tower(pixels)
        copied(pixels + 1)
        for source, expected in zip(stream.sources, own, strict=True):
            torch.testing.assert_close(source, expected)
    with ik.stream_hidden_states(copied, plan) as stream:
        copied(pixels)
    for source, expected in zip(stream.sources, own, strict=True):
        torch.testing.assert_close(source, expected)


def test_each_run_starts_anew(tower, pixels):
    plan = MixPlan.igva(6, 3)
    with ik.stream_hidden_states(tower, plan) as stream:
        tower(pixels)
        first = stream.sources
        tower(pixels + 1)
        assert stream.sources[0] is not first[0]
        tower(pixels)
        for a, b in zip(first, stream.sources, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.plain_memory
def test_a_compiled_tower_streams(pixels):
    torch.compiler.reset()
    tower = CLIPVisionModel(CLIPVisionConfig(**{**SIZES, "num_hidden_layers": 2})).eval().requires_grad_(False)
    plan = MixPlan.igva(2, 2)
    weights = weights_of(plan)
    expected = plain_torch.layer_mix(tower(pixels, output_hidden_states=True).hidden_states, plan, weights)
    compiled = torch.compile(tower, backend="aot_eager")
    compiled(pixels)
    with ik.stream_hidden_states(compiled, plan) as stream:
        compiled(pixels)
    torch.testing.assert_close(ik.layer_mix(stream.sources, stream.plan, weights), expected)
    with ik.stream_hidden_states(compiled, plan) as stream:
        in_threads(lambda _: compiled(pixels), 1)  # not by the code that was compiled for this thread's stream
        with pytest.raises(RuntimeError, match="in the thread that opened it"):
            _ = stream.sources
        compiled(pixels)
    torch.testing.assert_close(ik.layer_mix(stream.sources, stream.plan, weights), expected)


def test_a_tower_on_an_offloading_device_map_streams(pixels):
    from accelerate import cpu_offload

    tower = CLIPVisionModel(CLIPVisionConfig(**SIZES)).eval().requires_grad_(False)
    plan = MixPlan.igva(6, 3)
    weights = weights_of(plan)
    expected = plain_torch.layer_mix(tower(pixels, output_hidden_states=True).hidden_states, plan, weights)
    cpu_offload(tower, execution_device=torch.device("cpu"))
    with ik.stream_hidden_states(tower, plan) as stream:
        tower(pixels)
    torch.testing.assert_close(ik.layer_mix(stream.sources, stream.plan, weights), expected)


def test_wrong_arguments_are_named(tower):
    with (
        pytest.raises(ValueError, match="mode: got 'token'"),
        ik.stream_hidden_states(tower, PLANS["igva"], mode="token"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="vision_tower: need a module whose encoder layers"),
        ik.stream_hidden_states(nn.Linear(2, 2), PLANS["igva"]),
    ):
        pass
    with (
        pytest.raises(ValueError, match="made for 25 hidden states, got 7"),
        ik.stream_hidden_states(tower, MixPlan.igva()),
    ):
        pass
    with pytest.raises(TypeError, match="plan: need a MixPlan, got list"), ik.stream_hidden_states(tower, [-2]):
        pass
    with (
        pytest.raises(TypeError, match="vision_tower: need a module, got function"),
        ik.stream_hidden_states(lambda x: x, PLANS["igva"]),
    ):
        pass


def test_a_tower_that_was_cut_is_counted_from_its_layers(pixels):
    tower = CLIPVisionModel(CLIPVisionConfig(**SIZES)).eval().requires_grad_(False)
    del encoder_layers(tower)[-1:]
    with ik.stream_hidden_states(tower, MixPlan.concat([-1])) as stream:
        output = tower(pixels)
    torch.testing.assert_close(stream.sources[0], output.last_hidden_state)


# ---- towers of other kinds ----


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, state):
        return state + self.linear(state).tanh()


class ExpertLayer(nn.Module):
    """Holds more experts than the tower has layers."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(Layer() for _ in range(9))

    def forward(self, state):
        return torch.stack([expert(state) for expert in self.experts]).mean(0)


class Tower(nn.Module):
    """Returns all of its states; runs its layers in ``order``."""

    def __init__(self, kinds=(Layer,) * 4, order=range(4)):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(kind() for kind in kinds)
        self.order = order

    def forward(self, state):
        states = [state]
        for index in self.order:
            states.append(self.encoder.layers[index](states[-1]))
        return states


@pytest.mark.parametrize("mode", ["group", "layer"])
@pytest.mark.parametrize("kinds", [[ExpertLayer] * 4, [Layer, ExpertLayer] * 2], ids=["all", "every other"])
def test_a_list_inside_a_layer_is_no_list_of_layers_however_long(kinds, mode):
    tower, plan, state = Tower(kinds).requires_grad_(False), MixPlan.igva_uniform(4, 2), torch.randn(2, 5, 8)
    assert encoder_layers(tower) is tower.encoder.layers
    with ik.stream_hidden_states(tower, plan, mode=mode) as stream:
        states = tower(state)
    torch.testing.assert_close(ik.layer_mix(stream.sources, stream.plan), plain_torch.layer_mix(states, plan))


WRONG_STATES = {
    "no batch": (lambda state: state[0], r"the output of layer 2 is a tensor of shape \[5, 8\], need a tensor"),
    "no tensor": (lambda state: {"state": state}, r"the output of layer 2 is dict, need a tensor \[I, T, D\]"),
    "one image": (lambda state: state[:1], r"the output of layer 2 has shape \[1, 5, 8\], need \[2, 5, 8\]"),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["group", "layer"])
@pytest.mark.parametrize(("change", "said"), WRONG_STATES.values(), ids=WRONG_STATES)
def test_a_layer_that_gives_no_state_is_named(change, said, mode):
    tower, plan = Tower().requires_grad_(False), MixPlan.igva_uniform(4, 1)
    forward = tower.encoder.layers[1].forward
    tower.encoder.layers[1].forward = lambda state: change(forward(state))
    with pytest.raises(NotImplementedError, match=said), ik.stream_hidden_states(tower, plan, mode=mode):
        tower(torch.randn(2, 5, 8))


def test_a_first_layer_that_is_called_without_its_state_is_named():
    tower = Tower().requires_grad_(False)
    first = tower.encoder.layers[0]
    first.forward = lambda x: x
    tower.forward = lambda state: first(x=state)
    said = "vision_tower: its first layer is called with x, need the state as the first argument or as hidden_states"
    with pytest.raises(NotImplementedError, match=said), ik.stream_hidden_states(tower, MixPlan.concat([-1])):
        tower(torch.randn(2, 5, 8))


@pytest.mark.parametrize("mode", ["group", "layer"])
@pytest.mark.parametrize(
    ("order", "said"),
    [((0, 1, 1, 3), "the output of layer 2 came twice"), ((0, 1, 3), r"a run left out layers \[3\], need each")],
)
def test_a_run_that_repeats_or_leaves_out_a_layer_is_refused(order, said, mode):
    tower = Tower(order=order).requires_grad_(False)
    with pytest.raises(RuntimeError, match=said), ik.stream_hidden_states(tower, MixPlan.igva_uniform(4, 1), mode=mode):
        tower(torch.randn(2, 5, 8))
