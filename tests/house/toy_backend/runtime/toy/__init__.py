"""A backend as a newcomer would add it: plain torch on the CPU, in fp32."""

import torch

from igva_kernels.runtime.backend import Backend


def why_not(device, dtype):
    if device.type != "cpu":
        return f"it serves CPU tensors, not {device.type!r}"
    return None if dtype == torch.float32 else f"it serves torch.float32, not {dtype}"


BACKEND = Backend("toy", 9, ("cpu",), why_not)
