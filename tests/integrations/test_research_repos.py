"""The patch on the code of the repositories themselves, where a clone of them is at hand.

    RESEARCH_REPOS=/folder/of/clones pytest tests/integrations/test_research_repos.py

The folder has clones named as on GitHub: YiZheng-zy/IGVA, haotian-liu/LLaVA, HJYao00/DenseConnector,
EIT-NLP/Layer_Select_Fuse_for_MLLM, yuecao0119/MMFuser, Linchenchen/TGIF. Most of them are a package called ``llava``,
so each runs in a process of its own. Their code is used as it is; stubs stand for packages that it imports and these
models never use, and ``integrations.msda`` for the CUDA extension of two of them.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from seeds import seeded

from igva_kernels.integrations import msda

CLONES = Path(os.environ.get("RESEARCH_REPOS", "/nowhere"))
CASES = {
    "IGVA": ("IGVA", {"aggregate_by_average": False}),
    "IGVA, average": ("IGVA", {"aggregate_by_average": True}),
    "LLaVA": ("LLaVA", {}),
    "LLaVA, given IGVA": ("LLaVA", {"attach": True}),
    "DenseConnector sci": ("DenseConnector", {"mm_dense_connector_type": "sci"}),
    "DenseConnector dci": ("DenseConnector", {"mm_dense_connector_type": "dci"}),
    "DenseConnector sci siglip": ("DenseConnector", {"mm_dense_connector_type": "sci", "siglip": True}),
    "DenseConnector dci siglip": ("DenseConnector", {"mm_dense_connector_type": "dci", "siglip": True}),
    **{f"Layer_Select_Fuse {name}": ("Layer_Select_Fuse_for_MLLM", {"layer_using_strategy": name})
       for name in ("18", "3-18-23", "former", "latter", "all")},
    "Layer_Select_Fuse latter siglip": (
        "Layer_Select_Fuse_for_MLLM", {"layer_using_strategy": "latter", "siglip": True}),
    **{f"Layer_Select_Fuse E_M {name}": (
        "Layer_Select_Fuse_for_MLLM", {"layer_using_strategy": name, "layer_fusing_strategy": "E_M"})
       for name in ("18", "3-18-23", "all")},
    "MMFuser": ("MMFuser", {"mm_vision_select_layer": [-22, -17, -12, -7, -2]}),
    "TGIF": ("TGIF", {}),
}  # fmt: skip


def in_a_process(function, name, folder):
    """What ``function(name, folder)`` of this file returns."""
    repo, _ = CASES[name]
    if not (CLONES / repo).exists():
        pytest.skip(f"no clone of {repo}: RESEARCH_REPOS={CLONES}")
    command = [sys.executable, __file__, function.__name__, name, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{name}: {found}")
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_repository_patched_answers_as_the_repository(tmp_path, name):
    found = in_a_process(compare, name, tmp_path)
    assert found["keys"] == found["restored"] is True
    assert found["outputs"] < 1e-5
    assert found["gradients"] < 1e-4
    assert found["operators"]


def test_several_images_work_in_igva_patched_and_fail_without(tmp_path):
    found = in_a_process(several, "IGVA", tmp_path)
    assert "aggregate_layers" in found["without"]
    assert found["outputs"] < 1e-5


@pytest.mark.parametrize("name", ["IGVA", "IGVA, average", "LLaVA"])
def test_converted_checkpoints_give_the_same_logits_in_the_repository(tmp_path, name):
    found = in_a_process(convert, name, tmp_path)
    assert found["to the repository"] < 1e-5
    assert found["from the repository"] < 1e-5
    assert found["tokens"]


PAGES = {"igva": "IGVA", "dense_connector": "DenseConnector", "layer_select_fuse": "Layer_Select_Fuse_for_MLLM",
         "mmfuser": "MMFuser", "tgif": "TGIF", "llava": "LLaVA"}  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_the_changes_that_a_page_shows_find_their_places_in_the_repository(tmp_path, page):
    """``tests/research_scripts/run.py`` runs what they make of it."""
    clone = CLONES / PAGES[page]
    if not clone.exists():
        pytest.skip(f"no clone of {clone.name}: RESEARCH_REPOS={CLONES}")
    script = Path(__file__).parents[1] / "research_scripts/run.py"
    spec = importlib.util.spec_from_file_location("research_scripts", script)
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    diffs = run.changes(f"{page}.md")
    for file in {file for file, _ in diffs}:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text((clone / file).read_text())
    run.apply(tmp_path, diffs)
    changed = "".join(path.read_text() for path in tmp_path.rglob("*.py"))
    assert "handle = ik.patch(model" in changed and "import igva_kernels as ik" in changed


# ---- in the child ----


def load(repo):
    """The modules ``llava_arch`` and ``llava_llama`` of a clone; its package's own ``__init__`` does not run."""
    root = "dc" if repo == "DenseConnector" else "llava"
    for name in (root, f"{root}.model"):
        package = ModuleType(name)
        package.__path__ = [str(CLONES / repo / name.replace(".", "/"))]
        sys.modules[name] = package
    _stub("sentence_transformers", SentenceTransformer=_Nothing)
    _stub("einops", rearrange=None)
    _stub("timm")
    _stub("timm.models")
    _stub("timm.models.layers", LayerNorm=None, LayerNorm2d=None)
    _stub("timm.models.regnet", RegStage=None)
    if repo in ("Layer_Select_Fuse_for_MLLM", "MMFuser"):
        msda.register()
    return importlib.import_module(f"{root}.model.llava_arch"), root


def _stub(name, **attributes):
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


def _Nothing(*args):
    from torch import nn

    return nn.Module()


def build(repo, folder, siglip=False, **settings):
    """The repository's model, tiny."""
    import torch
    from tiny import EMBED, VISION, liven, text_config, vision_config
    from torch import nn
    from transformers import CLIPImageProcessor, CLIPVisionModel, LlamaForCausalLM, LlamaModel

    arch, root = load(repo)
    torch.manual_seed(seeded())
    layers = 24 if repo in ("DenseConnector", "Layer_Select_Fuse_for_MLLM", "MMFuser") else 4
    tower = Path(folder) / ("siglip" if siglip else "clip")
    liven(CLIPVisionModel(vision_config(num_hidden_layers=layers))).save_pretrained(tower)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(tower)
    config = text_config()
    width = 3 * VISION if repo == "DenseConnector" else VISION
    for name, value in {
        "mm_vision_tower": str(tower), "mm_hidden_size": width, "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2, "vit_base_layer": -2, "vit_aggregate_groups": "[[1,2],[3,4]]",
        "sentence_embedder": "", "sentence_embed_dim": EMBED, "aggregator_num_transformers": 2,
        "aggregator_num_heads": 2, "aggregator_hidden_dim": 16, **settings,
    }.items():  # fmt: skip
        setattr(config, name, value)
    if repo != "IGVA":
        del config.vit_aggregate_groups
    if repo == "TGIF":
        config.mm_projector_type = "layer_selector"
    if repo == "Layer_Select_Fuse_for_MLLM":
        config.layer_fusing_strategy = settings.get("layer_fusing_strategy", "E_D")

    if repo in ("IGVA", "LLaVA"):
        model_class = importlib.import_module(f"{root}.model.language_model.llava_llama").LlavaLlamaForCausalLM
        config.pretraining_tp = 1
    else:

        class Core(arch.LlavaMetaModel, LlamaModel):
            pass

        class model_class(LlamaForCausalLM, arch.LlavaMetaForCausalLM):
            def __init__(self, config):
                super(LlamaForCausalLM, self).__init__(config)
                self.model = Core(config)
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

            def get_model(self):
                return self.model

    model = model_class(config)
    wrapper = model.get_vision_tower()
    if siglip:  # theirs is as large as so400m, with 729 patches
        encoder = sys.modules[type(wrapper).__module__]
        wrapper.config = encoder.SigLipVisionConfig(VISION, intermediate_size=32, num_attention_heads=2)
        wrapper.vision_tower = encoder.SigLipVisionModel(wrapper.config).requires_grad_(False)
        wrapper.is_loaded = True
    else:
        wrapper.load_model()
        if repo == "TGIF":  # it asks for attentions, which sdpa does not return
            wrapper.vision_tower.set_attn_implementation("eager")
    model = liven(model.eval())
    for name, parameter in model.named_parameters():
        if "gamma" in name or "sampling_offsets.bias" in name:  # zeros, and places on kinks of the interpolation
            torch.nn.init.normal_(parameter)
    return model


def difference(a, b):
    """The largest, as a fraction of the largest number; 1 for tokens that differ."""
    if not a.is_floating_point():
        return float(not a.equal(b))
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def several(name, folder):
    """One picture as a list, beside the same in one tensor."""
    from research_hosts import inputs

    import igva_kernels as ik

    model, batch = build(CASES[name][0], folder, **CASES[name][1]), inputs((1, 0, 1), sentences=True)
    pictures = {**batch, "images": list(batch["images"])}
    try:
        model(**pictures)
        without = "nothing"
    except AttributeError as error:
        without = str(error)
    with ik.patch(model):
        return {"without": without, "outputs": difference(model(**pictures).logits, model(**batch).logits)}


def convert(name, folder):
    """Our model in the repository's layout, read by the repository; and the repository's checkpoint, read by us."""
    import torch
    from research_hosts import inputs
    from tiny import IMAGE, igva_model, llava_config
    from tiny import batch as our_batch
    from transformers import LlavaForConditionalGeneration

    from igva_kernels.models.llava_igva.convert import from_repo, to_repo

    repo, settings = CASES[name]
    theirs = build(repo, folder, **settings)
    batch, ours = inputs((1, 1), sentences=repo == "IGVA"), our_batch((1, 1))
    batch["images"] = ours["pixel_values"]
    ours["input_ids"], ours["attention_mask"] = _expanded(batch["input_ids"], batch["attention_mask"], IMAGE)
    ours = {k: v for k, v in ours.items() if k != "sentence_embeds"}
    if repo == "IGVA":
        ours["sentence_embeds"] = batch["sentence_embeds"]
        model = igva_model(aggregation="uniform" if settings["aggregate_by_average"] else "instruction")
    else:
        torch.manual_seed(seeded(3))
        model = LlavaForConditionalGeneration(llava_config()).eval()
    to_repo(model, Path(folder) / "theirs")
    read = type(theirs).from_pretrained(Path(folder) / "theirs").eval()
    read.get_vision_tower().load_model()
    theirs.save_pretrained(Path(folder) / "saved", max_shard_size="20KB")
    back = from_repo(Path(folder) / "saved", image_token=IMAGE).eval()
    kept = ours["attention_mask"].bool()
    with torch.no_grad():
        prompt = {"max_new_tokens": 6, "do_sample": False}
        one = {k: v[:1] for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
        their_tokens = theirs.generate(batch["input_ids"][:1, :7], **one, **prompt)
        one = {k: v[:1] for k, v in ours.items() if k not in ("input_ids", "attention_mask")}
        our_tokens = back.generate(ours["input_ids"][:1, :10], **one, **prompt)
        return {
            "to the repository": difference(read(**batch).logits[kept], model(**ours).logits[kept]),
            "from the repository": difference(back(**ours).logits[kept], theirs(**batch).logits[kept]),
            "tokens": torch.equal(their_tokens, our_tokens[:, 10:]),
        }


def _expanded(ids, mask, token):
    """Each -200 as 4 image tokens, padded on the right."""
    import torch

    rows = [
        torch.cat([torch.full((4,), token) if i < 0 else i[None] for i in row[keep.bool()]])
        for row, keep in zip(ids, mask, strict=True)
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad([torch.ones_like(row) for row in rows], batch_first=True)


def compare(name, folder):
    """Largest differences of the patched model, in outputs and gradients, as fractions of the largest number."""
    import torch
    from recording import Dispatched
    from research_hosts import inputs
    from tiny import EMBED, VISION

    import igva_kernels as ik
    from igva_kernels.nn import WeightAllocator

    repo, settings = CASES[name]
    settings = dict(settings)
    attach = settings.pop("attach", False)
    model = build(repo, folder, **settings)
    batch = inputs((1, 1), labels=True, sentences=name == "IGVA")
    options = {}
    if attach:
        torch.manual_seed(seeded(5))
        allocator = WeightAllocator(EMBED, VISION, 2, hidden_dim=16, num_blocks=1, num_heads=2)
        options = {"plan": ik.MixPlan.igva(4, 2), "allocator": allocator}
    whole = repo in ("IGVA", "LLaVA")
    if settings.get("siglip"):
        batch["images"] = torch.randn(2, 3, 384, 384)
    text = {"text_embeddings": torch.randn(2, 32)} if repo == "TGIF" else {}

    def run(extra):
        model.zero_grad()
        if whole:
            outputs = model(**batch, **extra)
            outputs.loss.backward()
            prompt = {k: v for k, v in {**batch, **extra}.items() if k in ("images", "sentence_embeds")}
            prompt = {k: v[:1] for k, v in prompt.items()}
            tokens = model.generate(batch["input_ids"][:1, :7], **prompt, max_new_tokens=6, do_sample=False)
            results = [outputs.loss, outputs.logits, tokens]
        else:
            out = model.encode_images(batch["images"], **text)
            results = list(out) if isinstance(out, tuple) else [out]
            (results[0] * torch.linspace(-1, 1, results[0].numel()).view_as(results[0])).sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return [r.detach() for r in results], grads

    expected, grads = run({})
    keys = list(model.state_dict())
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    handle = ik.patch(model, **options)
    with Dispatched() as calls:
        results, patched_grads = run({"sentence_embeds": torch.randn(2, EMBED)} if attach else {})
    if attach:  # the part that LLaVA's own weight became; what is new has gradients of its own
        first = patched_grads["model.mm_projector.0.weight"]
        assert first[:, VISION:].any()
        patched_grads["model.mm_projector.0.weight"] = first[:, :VISION]
        patched_grads = {n: g for n, g in patched_grads.items() if "weight_allocator" not in n}
    same_keys = [k for k in model.state_dict() if "weight_allocator" not in k] == keys
    handle.revert()
    assert grads.keys() == patched_grads.keys()
    return {
        "outputs": max(difference(a, b) for a, b in zip(results, expected, strict=True)),
        "gradients": max(difference(patched_grads[n], g) for n, g in grads.items() if g.any()),
        "operators": sum("igva_kernels" in call for call in calls.names),
        "keys": same_keys,
        "restored": all(
            vars(module).keys() == before[path].keys() and all(vars(module)[k] is v for k, v in before[path].items())
            for path, module in model.named_modules()
        ),
    }


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
