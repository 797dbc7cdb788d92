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
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from recipe import run_recipe


def shard_on_cpu() -> None:
    """Let accelerate take its FSDP branch, which it keeps for accelerators: what it does there runs on gloo as well."""
    init = AcceleratorState.__init__

    def init_sharded(state: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        init(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)

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
        run_recipe(**r)
    if torch.distributed.is_initialized():
        # Together, and before Python ends: threads of the group that are still there then abort the process.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
