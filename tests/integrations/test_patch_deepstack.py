"""transformers' models with DeepStack and the operators swapped in: the injection changes no bit, the mergers obey the
error rule."""

import copy
import types

import harness
import pytest
import torch
from seeds import seeded

import igva_kernels as ik

pytest.importorskip("transformers")

import transformers
from deepstack_hosts import HOSTS, VIDEO, deepstack_host, deepstack_inputs
from hosts import close, gradients, step
from recording import Dispatched

METHOD = "_deepstack_process"
IMPLS = ["reference", *(["auto"] if harness.quick_impls("inject_tokens") else [])]
GRIDS = {
    "images": {},
    "video": {"images": (), "videos": ((1, 4, 4),)},
    "images and video": {"videos": ((1, 4, 4),)},
    "images, padding at the right": {"padding": "right"},
    "text": {"images": ()},
}


def takes(host, grids):
    """Granite takes no videos, and transformers 4 itself cannot join images and videos in Qwen3-Omni."""
    if host == "GraniteDocling":
        return "video" not in grids
    return (host, grids) != ("Qwen3OmniMoe", "images and video") or transformers.__version__ >= "5"


@pytest.fixture(params=HOSTS)
def host(request, record_property):
    """Its name goes into the compatibility table."""
    record_property("host", request.param)
    return deepstack_host(request.param)


@pytest.fixture
def qwen():
    return deepstack_host("Qwen3VL")


def assert_identical(found, expected):
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert found[2].keys() == expected[2].keys()
    for name, grad in expected[2].items():
        assert torch.equal(found[2][name], grad), name


def assert_close_step(found, expected):
    close(found[1], expected[1])
    assert found[2].keys() == expected[2].keys()
    for name, grad in expected[2].items():
        assert (found[2][name] - grad).norm() <= 1e-3 * grad.norm() + 1e-6, name


def ran(model, inputs):
    with Dispatched() as seen, torch.no_grad():
        model(**inputs)
    return seen


# ---- the same answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("host", "grids"), [(host, grids) for host in HOSTS for grids in GRIDS if takes(host, grids)], indirect=["host"]
)
def test_injection(host, grids, impl):
    """Loss, logits and every gradient, bit for bit in fp32."""
    inputs = deepstack_inputs(host, labels=True, **GRIDS[grids])
    expected = step(host.model, inputs)
    with ik.patch(host.model, impl=impl, mergers=False):
        assert_identical(step(host.model, inputs), expected)
    assert_identical(step(host.model, inputs), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_bf16(host, impl):
    """The injection alone is exact in bf16 too: a sum of two numbers is rounded once."""
    inputs = deepstack_inputs(host)
    model = host.model.bfloat16()
    inputs = {key: x.bfloat16() if x.is_floating_point() else x for key, x in inputs.items()}
    expected = model(**inputs).logits
    with ik.patch(model, impl=impl, mergers=False):
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("mergers", [False, True])
def test_generate(host, mergers):
    inputs = deepstack_inputs(host)
    options = {"max_new_tokens": 5, "do_sample": False}
    tokens = host.model.generate(**inputs, **options)
    with ik.patch(host.model, mergers=mergers):
        assert torch.equal(host.model.generate(**inputs, **options), tokens)


def test_forward(host):
    inputs = deepstack_inputs(host)
    expected = host.model(**inputs).logits
    handle = ik.patch(host.model)
    close(host.model(**inputs).logits, expected)
    handle.revert()
    assert torch.equal(host.model(**inputs).logits, expected)


def test_gradients(host):
    inputs = deepstack_inputs(host, labels=True)
    host.model.train()
    expected = step(host.model, inputs)
    assert any("merger" in name for name in expected[2])
    with ik.patch(host.model):
        assert_close_step(step(host.model, inputs), expected)


def test_every_merger_and_every_injection_is_an_operator_and_nothing_is_indexed_by_a_mask(host):
    if IMPLS[-1] == "reference":
        pytest.skip("no kernel serves CPU tensors here")
    inputs = deepstack_inputs(host)
    by_mask = ran(host.model, inputs).names.count("aten::index_put_")
    with ik.patch(host.model):
        seen = ran(host.model, inputs)
    assert seen.ours.count("projector") == len(host.mergers) == 3
    assert seen.ours.count("inject_tokens") == 3
    assert seen.names.count("aten::index_put_") == by_mask - 3


@pytest.mark.parametrize("mergers", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(host, reentrant, mergers):
    inputs = deepstack_inputs(host, labels=True)
    model = host.model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    expected = step(model, inputs)
    with ik.patch(model, mergers=mergers):
        (assert_close_step if mergers else assert_identical)(step(model, inputs), expected)


def test_decode_steps_do_not_inject(qwen):
    calls = []
    injecting = type(qwen.language_model)._deepstack_process
    with ik.patch(qwen.model):
        patched = vars(qwen.language_model)[METHOD]
        vars(qwen.language_model)[METHOD] = lambda *args: calls.append(args) or patched(*args)
        qwen.model.generate(**deepstack_inputs(qwen), max_new_tokens=4, do_sample=False)
        vars(qwen.language_model)[METHOD] = patched
    assert len(calls) == 3  # one a layer, in the prefill
    assert type(qwen.language_model)._deepstack_process is injecting


# ---- the injection itself -------------------------------------------------------------------------------------------


def tokens_and_features(count=3, width=32):
    generator = torch.Generator().manual_seed(seeded(0))
    mask = torch.tensor([[False, True, True, False], [True, False, False, False]])
    return torch.randn(2, 4, width, generator=generator), mask, torch.randn(count, width, generator=generator)


@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_an_add_not_a_replace_and_a_new_tensor(qwen, impl):
    hidden, mask, features = tokens_and_features()
    before = hidden.clone()
    with ik.patch(qwen.model, impl=impl):
        out = qwen.language_model._deepstack_process(hidden, mask, features)
    expected = before.clone()
    expected[mask] += features
    assert torch.equal(out, expected)
    assert torch.equal(hidden, before) and out.data_ptr() != hidden.data_ptr()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_index_spaces_differ(qwen, impl):
    """Vision layers 0, 2, 4 feed layers 0, 1, 2 of the language model, not the layers of their own numbers."""
    inputs, seen = deepstack_inputs(qwen), []
    with ik.patch(qwen.model, impl=impl), torch.no_grad():
        made = [merger.register_forward_hook(lambda module, args, out: seen.append(out)) for merger in qwen.mergers]
        patched = vars(qwen.language_model)[METHOD]
        given = []
        vars(qwen.language_model)[METHOD] = lambda *args: given.append(args[2]) or patched(*args)
        qwen.model(**inputs)
        vars(qwen.language_model)[METHOD] = patched
        for hook in made:
            hook.remove()
    assert len(given) == len(seen) == 3
    for features, merged in zip(given, seen, strict=True):
        assert torch.equal(features, merged)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("count", [2, 4])
def test_features_that_do_not_fit_the_mask_are_an_error(qwen, impl, count):
    hidden, mask, features = tokens_and_features(count)
    wrong = f"visual_embeds.* got {count} rows for 3 tokens"
    with ik.patch(qwen.model, impl=impl), pytest.raises(ValueError, match=wrong):
        qwen.language_model._deepstack_process(hidden, mask, features)


@pytest.mark.parametrize("count", [2, 4])
def test_in_compiled_code_too(qwen, count):
    if IMPLS[-1] == "reference":
        pytest.skip("no kernel serves CPU tensors here")
    hidden, mask, features = tokens_and_features(count)
    with ik.patch(qwen.model):
        compiled = torch.compile(qwen.language_model._deepstack_process, fullgraph=True, backend="eager")
        with pytest.raises(ValueError, match="token_rows"):
            compiled(hidden, mask, features)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_mask_that_was_changed_in_place_is_read_again(qwen, impl):
    hidden, mask, features = tokens_and_features()
    with ik.patch(qwen.model, impl=impl):
        qwen.language_model._deepstack_process(hidden, mask, features)
        mask.copy_(~mask)
        features = features[[0, 1, 2, 0, 1]]
        expected = hidden.clone()
        expected[mask] += features
        assert torch.equal(qwen.language_model._deepstack_process(hidden, mask, features), expected)


def test_compile(qwen, record_property):
    """Without a break, in one graph for any number of visual tokens."""
    record_property("host", "Qwen3VL")
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    hidden, mask, features = tokens_and_features()
    with ik.patch(qwen.model):
        compiled = torch.compile(qwen.language_model._deepstack_process, fullgraph=True, backend=backend, dynamic=True)
        for last in (False, True):
            mask[1, 3] = last
            now = features if not last else torch.cat([features, features[:1]])
            expected = hidden.clone()
            expected[mask] += now
            assert torch.equal(compiled(hidden, mask, now), expected)
    assert len(graphs) == 1


# ---- on and off, and what else is around a model --------------------------------------------------------------------


def test_revert_restores_the_very_objects(host):
    before = {name: dict(vars(module)) for name, module in host.model.named_modules()}
    keys = list(host.model.state_dict())
    handle = ik.patch(host.model)
    assert list(host.model.state_dict()) == keys
    assert METHOD in vars(host.language_model)
    handle.revert()
    for name, module in host.model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(vars(module)[key] is value for key, value in before[name].items())


def test_a_copy_is_patched_with_its_own_weights_and_reverted_too(qwen):
    inputs = deepstack_inputs(qwen)
    handle = ik.patch(qwen.model)
    expected = qwen.model(**inputs).logits
    duplicate = copy.deepcopy(qwen.model)
    with torch.no_grad():
        for merger in qwen.mergers:
            merger.linear_fc1.weight.zero_()
    assert torch.equal(duplicate(**inputs).logits, expected)
    handle.revert()
    assert not any(METHOD in vars(module) or "forward" in vars(module) for module in duplicate.modules())


@pytest.mark.parametrize("of", ["the instance", "the class"])
def test_a_method_that_someone_else_has_replaced_is_refused_by_name(qwen, of, monkeypatch):
    """ms-swift replaces it for sequence parallelism, and a patch would undo that silently."""

    def sequence_parallel(self, hidden_states, visual_pos_masks, visual_embeds):
        return hidden_states

    if of == "the class":
        monkeypatch.setattr(type(qwen.language_model), METHOD, sequence_parallel)
    else:
        qwen.language_model._deepstack_process = types.MethodType(sequence_parallel, qwen.language_model)
    with pytest.raises(ValueError, match=rf"{METHOD} of its Qwen3VLTextModel.*{__name__}\..*sequence_parallel"):
        ik.patch(qwen.model)
    assert not any("forward" in vars(module) for module in qwen.mergers)


def test_an_unknown_signature_and_an_unknown_merger_are_refused(qwen):
    qwen.mergers[1].extra = torch.nn.Linear(2, 2)
    with pytest.raises(NotImplementedError, match=r"Qwen3VLVisionPatchMerger.*transformers \d.*extra"):
        ik.patch(qwen.model)
    assert METHOD not in vars(qwen.language_model)
    ik.patch(qwen.model, mergers=False).revert()


def test_options_that_cannot_be_served_are_refused_at_once(qwen):
    with pytest.raises(NotImplementedError, match="cuda"):
        ik.patch(qwen.model, impl="cuda", mergers=False)
    with pytest.raises(ValueError, match="check: got 'always'"):
        ik.patch(qwen.model, check="always")
    with pytest.raises(ValueError, match="impl"):
        ik.patch(qwen.model, impl="fast")


def test_the_handle_says_what_serves(qwen):
    handle = ik.patch(qwen.model, impl="reference")
    qwen.mergers[1].linear_fc1.register_forward_hook(lambda *_: None)
    printed = str(handle)
    assert "model.language_model: features are injected by plain PyTorch (float32 on cpu)" in printed
    assert "deepstack_merger_list.0: by plain PyTorch" in printed
    assert "deepstack_merger_list.1: runs its own modules" in printed


LORA = {
    "Linears": {"target_modules": ["linear_fc1", "linear_fc2"], "lora_dropout": 0.2},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["deepstack_merger_list.1"]},
}


@pytest.mark.parametrize("options", LORA.values(), ids=LORA)
@pytest.mark.parametrize("first", ["peft", "patch"])
def test_lora(first, options, record_property):
    peft = pytest.importorskip("peft")
    record_property("host", "Qwen3VL")

    def adapted(patch):
        host = deepstack_host("Qwen3VL")
        inputs = deepstack_inputs(host, labels=True)
        handle = ik.patch(host.model) if patch and first == "patch" else None
        torch.manual_seed(seeded(1))
        model = peft.get_peft_model(host.model, peft.LoraConfig(init_lora_weights=False, r=2, **options))
        handle = handle or (ik.patch(model) if patch else None)
        torch.manual_seed(seeded(2))  # of the dropout
        found = step(model.train(), inputs)
        if handle is not None:
            handle.revert()
        return found

    assert_close_step(adapted(patch=True), adapted(patch=False))


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("units", ["mergers", "Linears"])
@pytest.mark.parametrize("first", ["shard", "patch"])
def test_fsdp2_units_down_to_the_linear(qwen, first, units, one_rank, record_property):
    from torch.distributed.fsdp import fully_shard

    record_property("host", "Qwen3VL")
    inputs = deepstack_inputs(qwen, labels=True)
    expected = step(qwen.model, inputs)
    qwen.model.zero_grad()
    handle = ik.patch(qwen.model) if first == "patch" else None
    for merger in qwen.mergers:
        for unit in [m for m in merger.children() if units == "Linears" and list(m.parameters())] + [merger]:
            fully_shard(unit)
    for layer in qwen.language_model.layers:
        fully_shard(layer)
    fully_shard(qwen.model)
    handle = handle or ik.patch(qwen.model)
    qwen.model(**inputs).loss.backward()
    found = {name: grad.full_tensor() for name, grad in gradients(qwen.model).items()}
    assert_close_step((None, expected[1], found), expected)
    handle.revert()


def test_video_tokens_are_there(qwen):
    """The cases with a video have one: what the tests above compare would otherwise be a text."""
    assert (deepstack_inputs(qwen, **GRIDS["video"])["input_ids"] == VIDEO).any()


# ---- Granite 4 Vision, which adds before the layers ------------------------------------------------------------------


@pytest.fixture
def granite():
    """The language model, features for two of its layers, and the arguments of a call."""
    if not hasattr(transformers, "Granite4VisionTextModel"):
        pytest.skip(f"transformers {transformers.__version__} has no Granite4Vision")
    torch.manual_seed(seeded())
    config = transformers.Granite4VisionTextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Granite4VisionTextModel(config)
    mask = torch.rand(2, 9) < 0.5
    features = {layer: torch.randn(int(mask.sum()), 32, requires_grad=True) for layer in (0, 3)}
    embeds = torch.randn(2, 9, 32, requires_grad=True)
    return model, {"inputs_embeds": embeds, "vision_mask": mask[..., None], "deepstack_features": features}


def granite_step(model, call):
    leaves = [call["inputs_embeds"], *call["deepstack_features"].values(), *model.parameters()]
    for leaf in leaves:
        leaf.grad = None
    out = model(**call).last_hidden_state
    out.square().sum().backward()
    return [out, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_features_are_added_before_layers_with_the_same_bits(granite, use_reentrant):
    model, call = granite
    expected = granite_step(model, call)
    assert len(expected) > 4
    if use_reentrant is not None:
        model.train().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    handle = ik.patch(model)
    if use_reentrant and "checkpoint" not in type(model.layers[0]).forward.__code__.co_name:
        with pytest.raises(NotImplementedError, match="use_reentrant=False"):  # the checkpoint is around the forward
            granite_step(model, call)
    else:
        for ours, theirs in zip(granite_step(model, call), expected, strict=True):
            assert torch.equal(ours, theirs)
    handle.revert()
    assert "forward" not in vars(model) and all("forward" not in vars(layer) for layer in model.layers)


def test_other_numbers_of_features_than_tokens_are_refused_before_layers_too(granite):
    model, call = granite
    call["deepstack_features"][3] = torch.zeros(1, 32)
    with ik.patch(model), pytest.raises(ValueError, match="visual_embeds: need one row per visual token, got 1 rows"):
        model(**call)
