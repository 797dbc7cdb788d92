"""transformers' LLaVA family with the operator swapped in: the same answers and gradients, and no concat."""

import copy
import functools
import io
import pickle

import harness
import pytest
import torch
from seeds import seeded
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import igva_kernels as ik
from igva_kernels.integrations.lazy import LazyConcat
from igva_kernels.nn import is_plain
from igva_kernels.ops.weighted_mix import cpu
from igva_kernels.runtime.activations import hidden_acts
from igva_kernels.testing import measure_memory

pytest.importorskip("transformers")

from hosts import VISION, features, gradients, host_inputs, host_model, matrices, pixels
from threads import in_threads
from transformers import AttentionInterface

KERNELS = harness.quick_impls("weighted_mix")
IMPL = KERNELS[0] if KERNELS else "reference"
needs_kernel = pytest.mark.skipif(not KERNELS, reason="no kernel serves CPU tensors here")

SINGLE, LIST = -2, [-2, -3, 1]
HOSTS = {
    "Llava": ("Llava", "clip", False),
    "VipLlava": ("VipLlava", "clip", False),
    "LlavaNext": ("LlavaNext", "clip", False),
    "Granite Vision (LlavaNext, SigLIP)": ("LlavaNext", "siglip", False),
    "LlavaOnevision": ("LlavaOnevision", "siglip", False),
    "LlavaOnevision, video": ("LlavaOnevision", "siglip", True),
    "LlavaNextVideo": ("LlavaNextVideo", "clip", False),
    "LlavaNextVideo, video": ("LlavaNextVideo", "clip", True),
    "VideoLlava": ("VideoLlava", "clip", False),
    "VideoLlava, video": ("VideoLlava", "clip", True),
}
"""Rows of docs/compatibility.md: class, tower, whether the inputs are a video."""


@pytest.fixture(params=HOSTS)
def host(request, record_property):
    """Its name goes into the compatibility table."""
    record_property("host", request.param)
    return HOSTS[request.param]


@pytest.fixture(params=[SINGLE, LIST, [-4, -3, -2, -1]], ids=["single", "three", "four"])
def layers(request):
    return request.param


def model_and_inputs(host, layers, labels=False, **overrides):
    name, tower, video = host
    model = host_model(name, layers, tower, **overrides)
    return model, host_inputs(model, video, labels)


def llava(layers=LIST, labels=False, name="Llava", **overrides):
    return model_and_inputs((name, "clip", False), layers, labels, **overrides)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5)


def assert_same_gradients(model, expected):
    assert gradients(model).keys() == expected.keys()
    for name, grad in gradients(model).items():
        close(grad, expected[name])


def step(model, inputs):
    """Loss and gradients of one backward pass."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


class Seen(TorchDispatchMode):
    """The operators of ours that ran, and the shapes of all that was computed outside them."""

    def __init__(self):
        super().__init__()
        self.ours, self.shapes, self.cats = [], [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "igva_kernels":
            self.ours.append(func.name().removeprefix("igva_kernels::"))
        elif isinstance(out, torch.Tensor):
            self.shapes.append(tuple(out.shape))
            if func is torch.ops.aten.cat.default:
                self.cats.append(tuple(out.shape))
        return out


def watch(model, inputs):
    with Seen() as seen, torch.no_grad():
        model(**inputs)
    return seen


def test_forward(host, layers):
    model, inputs = model_and_inputs(host, layers)
    logits = model(**inputs).logits
    handle = ik.patch(model, impl=IMPL)
    close(model(**inputs).logits, logits)
    handle.revert()
    assert torch.equal(model(**inputs).logits, logits)


def test_generate(host, layers):
    model, inputs = model_and_inputs(host, layers)
    options = {"max_new_tokens": 6, "do_sample": False}
    tokens = model.generate(**inputs, **options)
    with ik.patch(model, impl=IMPL):
        assert torch.equal(model.generate(**inputs, **options), tokens)


def test_gradients(host, layers):
    model, inputs = model_and_inputs(host, layers, labels=True)
    model.train()
    loss, expected = step(model, inputs)
    assert any("_tower" in name for name in expected)
    with ik.patch(model, impl=IMPL):
        patched_loss, _ = step(model, inputs)
        close(patched_loss, loss)
        assert_same_gradients(model, expected)


@needs_kernel
@pytest.mark.parametrize("layers", [LIST, [-4, -3, -2, -1]], ids=["three", "four"])
def test_concat_gone(host, layers):
    """Nothing as wide as the concat is computed, not for the images and not for the frames of a video."""

    def wide(shapes):  # tokens of a tile: patches, with CLS, pooled
        return [s for s in shapes if len(s) == 3 and s[1] in (16, 17, 4) and s[2] == VISION * len(layers)]

    model, inputs = model_and_inputs(host, layers)
    assert wide(watch(model, inputs).cats)
    with ik.patch(model):
        seen = watch(model, inputs)
    assert "projector" in seen.ours
    assert not wide(seen.shapes)


@needs_kernel
def test_a_single_layer_is_the_same_operator(host):
    model, inputs = model_and_inputs(host, SINGLE)
    with ik.patch(model):
        assert "projector" in watch(model, inputs).ours


@needs_kernel
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_profile_of_allocations_shows_the_concat_gone(tower, monkeypatch):
    # Blocks of rows and scratch memory that are as small beside this model as they are beside a large one.
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 64 << 10)
    monkeypatch.setattr(cpu, "TRAINING_BYTES", 64 << 10)
    model = host_model("Llava", [-4, -3, -2, -1], tower)
    images = pixels(model)["pixel_values"].repeat(256, 1, 1, 1)
    concat = 512 * 16 * 4 * VISION * 4  # images, patches, layers, width, bytes

    def memory():
        return measure_memory(lambda: model.model.get_image_features(pixel_values=images))[1]

    memory()
    plain = memory()
    with ik.patch(model):
        patched = memory()
    assert patched.kept <= plain.kept - concat
    assert patched.peak <= plain.peak - concat


def test_what_the_tower_returned_is_returned_as_tensors():
    model, _ = llava()
    images = pixels(model)
    expected = model.model.get_image_features(**images)
    with ik.patch(model):
        out = model.model.get_image_features(**images)
        assert type(out) is type(expected)
        if hasattr(out, "hidden_states"):  # transformers 5 gives the caller the tower's output
            for state, other in zip(out.hidden_states, expected.hidden_states, strict=True):
                assert (state is None) == (other is None)
                assert state is None or torch.equal(state, other)
    for rows, other in zip(matrices(out), matrices(expected), strict=True):
        close(rows, other)


def test_hooks_of_the_tower_and_subclasses_see_what_they_saw():
    model, inputs = llava()
    model.model.__class__ = type("Own", (type(model.model),), {})
    seen = []
    model.model.vision_tower.register_forward_hook(lambda module, args, out: seen.append(out))
    with ik.patch(model, impl=IMPL):
        model(**inputs)
    (out,) = seen
    assert all(isinstance(state, torch.Tensor) for state in out.hidden_states if state is not None)


def test_a_subclass_with_a_method_of_its_own_is_refused():
    model, _ = llava()
    model.model.__class__ = type("Own", (type(model.model),), {"get_image_features": lambda self: None})
    with pytest.raises(NotImplementedError, match=rf"Own.get_image_features.*overridden in {__name__}"):
        ik.patch(model)


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_threads_that_share_a_patched_model(impl):
    model, _ = llava()
    prompts = [host_inputs(model, seed=seed) for seed in range(4)]
    with torch.no_grad():
        logits = [model(**prompt).logits for prompt in prompts]

    @torch.no_grad()
    def ask(client):
        for i in [(client + turn) % 4 for turn in range(4)]:
            close(model(**prompts[i]).logits, logits[i])

    with ik.patched(model, impl=impl):
        in_threads(ask)


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_torch_func_over_a_patched_model(impl):
    model, inputs = llava(use_cache=False)
    params = {name: p.detach() for name, p in model.named_parameters()}
    projector = model.model.multi_modal_projector
    two = {name: torch.stack([p, 2 * p]) for name, p in projector.named_parameters()}
    rows = torch.randn(2, 4, VISION * len(LIST))

    def results():
        def loss(params):
            return functional_call(model, params, (), inputs).logits.square().mean()

        frozen = {name: p.detach() for name, p in projector.named_parameters()}
        return (
            torch.func.grad(loss)(params),
            torch.vmap(lambda params: functional_call(projector, params, (rows,)))(two),
            torch.func.jvp(lambda rows: functional_call(projector, frozen, (rows,)), (rows,), (rows,))[1],
        )

    plain = results()
    with ik.patched(model, impl=impl):
        torch.testing.assert_close(results(), plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_a_patched_model_on_meta_and_with_fake_tensors(impl):
    model, inputs = llava()
    shapes = [rows.shape for rows in features(model, inputs)]
    ik.patch(model, impl=impl)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = features(model, {"pixel_values": torch.empty(inputs["pixel_values"].shape)})
    assert [rows.shape for rows in fake] == shapes
    meta = features(model.to("meta"), {"pixel_values": inputs["pixel_values"].to("meta")})
    assert [(rows.shape, rows.device.type) for rows in meta] == [(shape, "meta") for shape in shapes]


@pytest.mark.parametrize("mode", ["max", "average"])
def test_frames_are_pooled_a_layer_at_a_time(mode):
    model, inputs = model_and_inputs(("LlavaNextVideo", "clip", True), LIST, spatial_pool_mode=mode)
    logits = model(**inputs).logits
    with ik.patch(model, impl=IMPL):
        close(model(**inputs).logits, logits)


def test_a_convolution_over_the_frames_stays_as_it_is():
    model, inputs = model_and_inputs(("LlavaNextVideo", "clip", True), SINGLE, spatial_pool_mode="conv")
    logits = model(**inputs).logits
    with ik.patch(model, impl=IMPL):
        assert "forward" not in vars(model.model.vision_resampler)
        close(model(**inputs).logits, logits)


def test_layers_that_the_call_names_win_over_the_config():
    model, inputs = llava([-2, -3])
    inputs["vision_feature_layer"] = [1, 2]
    logits = model(**inputs).logits
    with ik.patch(model, impl=IMPL):
        close(model(**inputs).logits, logits)


# ---- the way back ---------------------------------------------------------------------------------------------------


def test_revert_restores_the_very_objects(host):
    model, _ = model_and_inputs(host, LIST)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    keys, tensors = list(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    handle = ik.patch(model)
    assert list(model.state_dict()) == keys
    assert [p.data_ptr() for p in model.parameters()] == tensors
    handle.revert()
    for name, module in model.named_modules():
        assert module.forward.__func__ is type(module).forward
        assert vars(module).keys() == before[name].keys()
        assert all(vars(module)[key] is value for key, value in before[name].items())


def test_patching_twice_is_an_error_and_changes_nothing():
    model, inputs = llava()
    logits = model(**inputs).logits
    with ik.patch(model):
        for again in (model, model.model):
            with pytest.raises(ValueError, match="patched already"):
                ik.patch(again)
        close(model(**inputs).logits, logits)
    assert torch.equal(model(**inputs).logits, logits)


def test_a_copy_of_a_patched_model_is_patched_and_its_own_until_the_patch_is_reverted():
    model, inputs = llava()
    logits = model(**inputs).logits
    handle = ik.patch(model, impl=IMPL)
    duplicate = copy.deepcopy(model)
    twice = copy.deepcopy(duplicate)
    assert duplicate.model.get_image_features.__self__ is duplicate.model
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight.zero_()
    for one in (duplicate, twice):
        close(one(**inputs).logits, logits)  # it reads its own weights
        with pytest.raises(ValueError, match="patched already"):
            ik.patch(one)
    del one, twice  # a copy that is gone is not looked for
    handle.revert()
    for one in (model, duplicate):
        assert not any(name in vars(module) for module in one.modules() for name in ("forward", "get_image_features"))
    assert torch.equal(duplicate(**inputs).logits, logits)
    ik.patch(duplicate).revert()


@pytest.mark.parametrize("wrap", ["a wrapper", "compiled"])
def test_a_method_that_someone_else_replaced_is_named_and_patched_once_it_is_back(wrap):
    model, _ = llava()
    core = model.model
    if wrap == "compiled":
        core.get_image_features = torch.compile(core.get_image_features)
    else:
        projector = core.multi_modal_projector
        projector.forward = functools.partial(type(projector).forward, projector)
    with pytest.raises(ValueError, match=r"has been replaced by .*patch first.*compile"):
        ik.patch(model)
    del vars(core if wrap == "compiled" else projector)["get_image_features" if wrap == "compiled" else "forward"]
    ik.patch(model).revert()


def test_a_reverted_model_is_copied_pickled_and_saved():
    model, inputs = host_model("Llava", LIST), llava()[1]  # a model of transformers 5 that has run is not pickled
    ik.patch(model).revert()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for duplicate in copies:
        with ik.patch(duplicate, impl=IMPL):
            close(duplicate(**inputs).logits, model(**inputs).logits)


@needs_kernel
def test_two_models_of_a_process_are_patched_each_in_its_own_way():
    one, two, three = llava()[0], llava()[0], llava()[0]
    inputs = host_inputs(one)
    with ik.patch(one, impl=IMPL), ik.patch(two, impl="reference"):
        assert "projector" in watch(one, inputs).ours
        assert not watch(two, inputs).ours
        assert "forward" not in vars(three.model.multi_modal_projector)
        close(one(**inputs).logits, three(**inputs).logits)
        close(two(**inputs).logits, three(**inputs).logits)


def test_patching_under_no_grad_leaves_the_gradients():
    model, inputs = llava(labels=True)
    _, expected = step(model, inputs)
    with torch.no_grad():
        handle = ik.patch(model, impl=IMPL)
    step(model, inputs)
    assert_same_gradients(model, expected)
    handle.revert()


# ---- what else is around a model ------------------------------------------------------------------------------------


def test_attention_is_left_alone(host):
    """A registered attention, as flash-attn's is, serves the patched model too: all of it, or the tower alone."""
    calls = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        calls.append(type(module).__name__)
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        out = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, is_causal=False)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("look_alike", attention)
    model, inputs = model_and_inputs(host, LIST)
    for implementation in ("look_alike", {"vision_config": "look_alike", "text_config": "eager"}, "eager", "sdpa"):
        model.set_attn_implementation(implementation)
        expected = watch_attention(model, inputs, calls)
        with ik.patch(model, impl=IMPL):
            logits, names = watch_attention(model, inputs, calls)
        assert names == expected[1]
        assert bool(names) == (implementation not in ("eager", "sdpa"))
        close(logits, expected[0])


def watch_attention(model, inputs, calls):
    calls.clear()
    with torch.no_grad():
        return model(**inputs).logits, list(calls)


def test_autocast(host):
    model, inputs = model_and_inputs(host, LIST, labels=True)
    _, exact = step(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        _, plain = step(model, inputs)
        with ik.patch(model, impl=IMPL):
            _, patched = step(model, inputs)
    assert {name: grad.dtype for name, grad in patched.items()} == {name: grad.dtype for name, grad in plain.items()}

    # Some gradients, such as those of the key biases, are zero except for rounding.
    least = 1e-3 * torch.stack([grad.norm() for grad in exact.values()]).norm()

    def errors(grads):
        return torch.stack([(grads[name] - grad).norm() / (grad.norm() + least) for name, grad in exact.items()])

    ours, rule = errors(patched), errors(plain)
    # Plain torch may be right by luck in one gradient of few numbers, but not in all gradients together.
    assert ours.norm() <= 2 * rule.norm()
    assert (ours <= 2 * rule + 0.1).all()


def test_bf16(host):
    model, inputs = model_and_inputs(host, LIST)
    exact = model(**inputs).logits
    model.bfloat16()
    inputs = {key: x.bfloat16() if x.is_floating_point() else x for key, x in inputs.items()}
    plain = model(**inputs).logits
    with ik.patch(model, impl=IMPL):
        patched = model(**inputs).logits
    assert patched.dtype == torch.bfloat16
    assert (patched - exact).norm() <= 1.5 * (plain - exact).norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(host, reentrant):
    model, inputs = model_and_inputs(host, LIST, labels=True)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    _, expected = step(model, inputs)
    with ik.patch(model, impl=IMPL):
        step(model, inputs)
        assert_same_gradients(model, expected)


def test_a_frozen_tower():
    model, inputs = llava(labels=True)
    model.model.vision_tower.requires_grad_(False)
    _, expected = step(model, inputs)
    with ik.patch(model, impl=IMPL):
        step(model, inputs)
        assert_same_gradients(model, expected)


@needs_kernel
@pytest.mark.plain_memory
@pytest.mark.parametrize("name", ["Llava", "VipLlava", "VideoLlava"])
def test_compile(name, record_property):
    """Without a break, and the graph has the operator in place of the concat."""
    record_property("host", name)
    model = host_model(name, LIST)
    model.model.get_image_features(**pixels(model))  # transformers installs its hooks at the first call
    expected = features(model, pixels(model))
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    with ik.patch(model):
        method = torch.compile(model.model.get_image_features, fullgraph=True, backend=backend)
        out = method(*pixels(model).values())
    for rows, other in zip(matrices(out), expected, strict=True):
        close(rows, other)
    assert any("projector" in target for target in graphs[0])


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("first", ["offload", "patch"])
@pytest.mark.parametrize("name", ["Llava", "VipLlava"])
def test_offload(name, first, offload, tmp_path, record_property):
    accelerate = pytest.importorskip("accelerate")
    record_property("host", name)
    model, inputs = llava(name=name)
    logits = model(**inputs).logits

    def send_away():
        if offload == "cpu":
            accelerate.cpu_offload(model, execution_device="cpu")
        else:
            accelerate.disk_offload(model, tmp_path, execution_device="cpu")

    for change in (send_away, lambda: ik.patch(model, impl=IMPL))[:: 1 if first == "offload" else -1]:
        change()
    assert model.model.multi_modal_projector.linear_1.weight.device.type == "meta"
    seen = watch(model, inputs)
    close(model(**inputs).logits, logits)
    if KERNELS:
        assert "projector" in seen.ours


def test_a_device_map():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = llava()
    logits = model(**inputs).logits
    devices = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "": "cpu"}
    accelerate.dispatch_model(model, devices, main_device="cpu", force_hooks=True)
    handle = ik.patch(model, impl=IMPL)
    close(model(**inputs).logits, logits)
    handle.revert()
    assert torch.equal(model(**inputs).logits, logits)


LORA = {
    "linear_1": {"target_modules": ["linear_1"]},
    "linear_1 and linear_2 with dropout": {"target_modules": ["linear_1", "linear_2"], "lora_dropout": 0.2},
    "dora": {"target_modules": ["linear_1"], "use_dora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]},
}


@pytest.mark.parametrize("options", LORA.values(), ids=LORA)
@pytest.mark.parametrize("first", ["peft", "patch"])
@pytest.mark.parametrize("name", ["Llava", "VipLlava"])
def test_lora(name, first, options, record_property):
    peft = pytest.importorskip("peft")
    record_property("host", name)

    def adapted(patch):
        model, inputs = llava(name=name, labels=True)
        handle = ik.patch(model, impl=IMPL) if patch and first == "patch" else None
        torch.manual_seed(seeded(1))
        model = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, r=2, **options))
        handle = handle or (ik.patch(model, impl=IMPL) if patch else None)
        torch.manual_seed(seeded(2))  # of the dropout
        loss, grads = step(model.train(), inputs)
        logits = model.eval().merge_and_unload()(**inputs).logits
        return loss, grads, logits, handle

    loss, expected, merged, _ = adapted(patch=False)
    patched_loss, grads, patched_merged, handle = adapted(patch=True)
    close(patched_loss, loss)
    assert grads.keys() == expected.keys()
    for key, grad in grads.items():
        close(grad, expected[key])
    close(patched_merged, merged)
    handle.revert()


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_model_inside_ddp(one_rank):
    model, inputs = llava(labels=True)
    _, expected = step(model, inputs)
    model.zero_grad()
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    with ik.patch(wrapped, impl=IMPL):
        wrapped(**inputs).loss.backward()
        assert_same_gradients(model, expected)


@pytest.mark.parametrize("first", ["shard", "patch"])
@pytest.mark.parametrize("name", ["Llava", "VipLlava"])
def test_fsdp2_units_down_to_the_linear(name, first, one_rank, record_property):
    """The weights of a unit are there in its own forward only."""
    from torch.distributed.fsdp import fully_shard

    record_property("host", name)
    model, inputs = llava(name=name, labels=True)
    _, expected = step(model, inputs)
    model.zero_grad()
    projector = model.model.multi_modal_projector
    handle = ik.patch(model, impl=IMPL) if first == "patch" else None
    tower = model.model.vision_tower  # as a unit it loses its hidden states, patched or not: transformers' hooks
    units = [module for module in tower.modules() if type(module).__name__ == "CLIPEncoderLayer"]
    for unit in (*units, *projector.children(), projector, model):
        if list(unit.parameters()):
            fully_shard(unit)
    handle = handle or ik.patch(model, impl=IMPL)
    assert not is_plain(projector.linear_1)
    model(**inputs).loss.backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for key, grad in found.items():
        close(grad.full_tensor(), expected[key])
    handle.revert()


# ---- what is refused ------------------------------------------------------------------------------------------------


class Int8Linear(nn.Linear):
    """A Linear as quantisation libraries make it: with integer weights and a forward of its own."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.scale = linear.weight.abs().max() / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


@pytest.mark.parametrize("first", ["quantisation", "patch"])
@pytest.mark.parametrize("name", ["linear_1", "linear_2"])
def test_a_quantised_linear_is_called_as_the_module_it_is(name, first):
    model, inputs = llava()
    projector = model.model.multi_modal_projector
    quantised = Int8Linear(getattr(projector, name))
    handle = ik.patch(model, impl=IMPL) if first == "patch" else None
    setattr(projector, name, quantised)
    if handle is None:
        with ik.patch(model, impl=IMPL) as printed:
            assert ("Int8Linear" in str(printed)) == (name == "linear_1")
            patched = model(**inputs).logits
    else:
        patched = model(**inputs).logits
        handle.revert()
    assert type(projector.linear_1).forward in (nn.Linear.forward, Int8Linear.forward)
    close(patched, model(**inputs).logits)


def test_a_projector_of_another_shape_is_refused():
    model, _ = llava()
    model.model.multi_modal_projector.linear_3 = nn.Linear(2, 2)
    with pytest.raises(NotImplementedError, match=r"LlavaMultiModalProjector.*transformers \d.*linear_3"):
        ik.patch(model)
    assert "get_image_features" not in vars(model.model)


def test_an_activation_that_the_operator_lacks_is_refused():
    with pytest.raises(NotImplementedError, match="QuickGELU"):
        ik.patch(llava(projector_hidden_act="quick_gelu")[0])


@pytest.mark.parametrize("activation", hidden_acts())
def test_the_activation_is_known_by_what_it_computes(activation):
    model, inputs = llava(projector_hidden_act=activation)
    logits = model(**inputs).logits
    with ik.patch(model, impl=IMPL):
        close(model(**inputs).logits, logits)


def test_a_backend_that_cannot_serve_the_model_is_refused():
    model, _ = llava()
    with pytest.raises(NotImplementedError, match="cuda"):
        ik.patch(model, impl="cuda")
    with pytest.raises(TypeError, match="speed"):
        ik.patch(model, speed=2)
    assert not any("forward" in vars(module) for module in model.modules())


# ---- the lazy concat ------------------------------------------------------------------------------------------------


def test_a_lazy_concat_stays_lazy_in_what_hosts_do_and_is_a_tensor_in_all_else():
    states = [torch.randn(2, 5, 4) for _ in range(3)]
    lazy = [LazyConcat((h,)) for h in states]
    rows = torch.cat(states, dim=-1)[:, 1:]
    for concat in (torch.cat(lazy, dim=-1)[:, 1:], torch.cat([h[:, 1:] for h in lazy], -1), torch.cat(lazy, 2)[:, 1:]):
        assert isinstance(concat, LazyConcat)
        assert concat.layers == tuple(states)
        assert torch.equal(concat.tensor, rows)
    moved = torch.cat(lazy, dim=-1).to(torch.float64)
    assert isinstance(moved, LazyConcat) and moved.tensor.dtype == torch.float64
    assert lazy[0].tensor is states[0]
    concat = torch.cat(lazy, dim=-1)[:, 1:]
    cases = [
        (concat.mean(dim=1), rows.mean(dim=1)),
        (concat * 2 + 1, rows * 2 + 1),
        (torch.cat([concat, concat], dim=1), torch.cat([rows, rows], dim=1)),
        (
            torch.cat([lazy[0], lazy[1][:, 1:][:, :1].expand(2, 5, 4)], -1),
            torch.cat([states[0], states[1][:, 1:2].expand(2, 5, 4)], -1),
        ),
        (torch.stack(lazy), torch.stack(states)),
        (nn.functional.layer_norm(concat, (12,)), nn.functional.layer_norm(rows, (12,))),
        (concat[:, -2:], rows[:, -2:]),
        (concat[0], rows[0]),
        (rows - concat, rows - rows),
    ]
    for got, expected in cases:
        assert torch.equal(got, expected)
    assert concat.shape == rows.shape and len(concat) == len(rows)
