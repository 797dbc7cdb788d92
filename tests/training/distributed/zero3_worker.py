"""Losses of models under ZeRO-3, untouched and patched, in the processes of one launch.

The command line names a family, ``transformers`` or ``research``, and a file, which gets ``{model: {how: losses}}``.
The reference model is with ``transformers``. The first losses of a model are those that its others must equal.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))

import research_hosts
from hosts import host_inputs, host_model
from research_hosts import IGVA, TGIF, DenseConnector, LLaVA
from seeds import seeded
from tiny import EMBED, VISION, batch, igva_model

import igva_kernels as ik
from igva_kernels.nn import WeightAllocator

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},  # no parameter stays gathered
    "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
PATCHED = ("never", "before", "after")
IMPLS = ("reference", "auto")
FUSED_IN = {"fuser": {"levels": [1, 2], "heads": 4}, "injection": {"taps": [1, 2], "layers": [0, 1]}}
"""Fields of the reference model's config."""


def train(model, inputs, patched="never"):
    """The losses of four steps of a model patched before or after the engine takes it."""
    handle = ik.patch(model) if patched == "before" else None
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG, model_parameters=list(model.parameters()))
    if patched == "after":
        handle = ik.patch(engine)
    losses = []
    for _ in range(4):
        loss = engine(**inputs).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert handle is None or "mixes in its own forward" in str(handle), handle  # DeepSpeed's hooks do not hinder it
    return losses


def train_transformers(name, patched):
    model = host_model(name, [-2, -3, 1]).train()
    return train(model, host_inputs(model, labels=True, seed=torch.distributed.get_rank()), patched)


def train_research(host_class, patched):
    sentences = host_class is IGVA
    inputs = research_hosts.inputs((1, 1), labels=True, sentences=sentences, seed=torch.distributed.get_rank())
    return train(research_hosts.make(host_class).train(), inputs, patched)


def train_with_a_plan(impl):
    """A LLaVA that was given IGVA's plan and an allocator; plain torch is ``impl="reference"``."""
    model = research_hosts.make(LLaVA).train()
    torch.manual_seed(seeded(5))
    allocator = WeightAllocator(EMBED, VISION, 2, hidden_dim=16, num_blocks=1, num_heads=2)
    ik.patch(model, plan=ik.MixPlan.igva(4, 2), allocator=allocator, balance_coefficient=0.5, impl=impl)
    return train(model, research_hosts.inputs((1, 1), labels=True, sentences=True, seed=torch.distributed.get_rank()))


def train_reference_model(field, impl):
    """Plain torch is ``impl="reference"``."""
    model = igva_model(**{field: FUSED_IN[field]}, impl=impl).train()
    return train(model, batch(labels=True, seed=torch.distributed.get_rank()))


def losses_of(family):
    if family == "transformers":
        hosts = {name: {how: train_transformers(name, how) for how in PATCHED} for name in ("Llava", "VipLlava")}
        return hosts | {name: {impl: train_reference_model(name, impl) for impl in IMPLS} for name in FUSED_IN}
    hosts = {
        host.__name__: {how: train_research(host, how) for how in PATCHED} for host in (IGVA, DenseConnector, TGIF)
    }
    return {**hosts, "LLaVA": {impl: train_with_a_plan(impl) for impl in IMPLS}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    found = losses_of(sys.argv[1])
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    # Together, and before Python ends: threads of the group that are still there then abort the process.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
