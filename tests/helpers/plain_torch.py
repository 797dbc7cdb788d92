"""The public functions as plain torch computes them."""

from functools import partial

import igva_kernels as ik

layer_mix = partial(ik.layer_mix, impl="reference")
layer_mix_linear = partial(ik.layer_mix_linear, impl="reference")
layer_mix_mlp = partial(ik.layer_mix_mlp, impl="reference")
