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

import igva_kernels as ik


def run(argv: list[str], patch: bool) -> None:
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = json.loads(Path(sys.argv[1]).read_text())
    if any("--deepspeed" in r["argv"] for r in runs) and "RANK" in os.environ:
        import deepspeed

        # Without a GPU nobody has made the process group when zero.Init first asks for the number of ranks.
        deepspeed.init_distributed(dist_backend="gloo")
    for r in runs:
        run(**r)
