"""Losses of patched and untouched transformers models under ZeRO-3, in the processes of one launch.

The file named on the command line gets ``{model: {when it was patched: losses}}``.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from hosts import host_inputs, host_model

import igva_kernels as ik

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},  # no parameter stays gathered
    "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def train(name: str, patched: str) -> list[float]:
    """The losses of four steps."""
    model = host_model(name, [-2, -3, 1]).train()
    inputs = host_inputs(model, labels=True, seed=torch.distributed.get_rank())
    if patched == "before":
        ik.patch(model)
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG, model_parameters=model.parameters())
    if patched == "after":
        ik.patch(engine)
    losses = []
    for _ in range(4):
        loss = engine(**inputs).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    found = {name: {when: train(name, when) for when in ("never", "before", "after")} for name in ("Llava", "VipLlava")}
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
