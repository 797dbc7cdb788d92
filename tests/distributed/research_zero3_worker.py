"""Losses of models of the research repositories, patched and untouched, under ZeRO-3, in the processes of one launch.

The file named on the command line gets ``{model: {how: losses}}``.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from research_hosts import IGVA, TGIF, DenseConnector, LLaVA, inputs, make
from tiny import EMBED, VISION

import igva_kernels as ik
from igva_kernels.nn import WeightAllocator

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},  # no parameter stays gathered
    "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
RUNS = {
    **{host: ("untouched", "patched before", "patched after") for host in (IGVA, DenseConnector, TGIF)},
    LLaVA: ("given a plan, plain torch", "given a plan"),
}


def train(host_class, how):
    """The losses of four steps."""
    model = make(host_class).train()
    batch = inputs((1, 1), labels=True, sentences=host_class in (IGVA, LLaVA), seed=torch.distributed.get_rank())
    if host_class is LLaVA:
        torch.manual_seed(5)
        allocator = WeightAllocator(EMBED, VISION, 2, hidden_dim=16, num_blocks=1, num_heads=2)
        impl = "reference" if "plain" in how else "auto"
        ik.patch(model, plan=ik.MixPlan.igva(4, 2), allocator=allocator, balance_coefficient=0.5, impl=impl)
    elif how == "patched before":
        ik.patch(model)
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG, model_parameters=list(model.parameters()))
    if how == "patched after":
        ik.patch(engine)
    losses = []
    for _ in range(4):
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    found = {host.__name__: {how: train(host, how) for how in hows} for host, hows in RUNS.items()}
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
