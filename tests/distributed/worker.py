"""Runs of the recipe one after another in one process, or in the processes of one launch: starting torch is slow.

The file named on the command line holds a list of runs: ``argv`` of the recipe, and ``patch``, whether the loaded model
is patched.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import train_llava_igva
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

import igva_kernels as ik


def run(argv: list[str], patch: bool = False) -> None:
    """One run of the recipe."""
    load = train_llava_igva.load_model

    def load_patched(args: Any) -> torch.nn.Module:
        model = load(args)
        ik.patch(model)
        return model

    train_llava_igva.load_model = load_patched if patch else load
    try:
        train_llava_igva.main(argv)
    finally:
        train_llava_igva.load_model = load


def shard_on_cpu() -> None:
    """Let accelerate take its FSDP branch without an accelerator: what it does there runs on gloo as well."""
    init = AcceleratorState.__init__

    def init_sharded(state: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init_sharded


if __name__ == "__main__":
    torch.set_num_threads(1)
    shard_on_cpu()
    runs = json.loads(Path(sys.argv[1]).read_text())
    if any("--deepspeed" in r["argv"] for r in runs) and "RANK" in os.environ:
        import deepspeed

        # Without a GPU nobody has made the process group when zero.Init first asks for the number of ranks.
        deepspeed.init_distributed(dist_backend="gloo")
    for r in runs:
        run(**r)
