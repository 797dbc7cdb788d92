"""Runs a training script of a repository: ``python launch.py LOSSES SCRIPT ARGUMENTS``, in the repository's folder.

It seeds torch, as the scripts build the projector before the Trainer seeds anything; it writes the losses, which the
Trainer rounds, to the file LOSSES; and it lets DeepSpeed run on a CPU: the scripts wait for CUDA before it saves, and
accelerate 0.21 asks its state for a name that it lacks there.
"""

import os
import runpy
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from transformers import Trainer

losses = Path(sys.argv[1])
step = Trainer.training_step


def training_step(self, *args, **kwargs):
    loss = step(self, *args, **kwargs)
    if os.environ.get("RANK", "0") == "0":
        with losses.open("a") as file:
            file.write(f"{float(loss)!r}\n")
    return loss


Trainer.training_step = training_step
torch.cuda.synchronize = lambda *_: None
AcceleratorState.use_ipex = False
torch.manual_seed(0)
sys.argv = sys.argv[2:]
sys.path.insert(0, ".")
runpy.run_path(sys.argv[0], run_name="__main__")
