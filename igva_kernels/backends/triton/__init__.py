"""The Triton backend: the GPU path that needs no CUDA toolkit on the user's machine (Triton asks for a C compiler).

Importing it never fails and touches no driver; where Triton is missing, ``why_not`` says so.

Kernels launch on the current stream of the tensors' device, wait for nothing, and take their scratch from torch, so
CUDA graphs capture them. That matters most around the block: the allocator's modules are 70 to 80 tiny kernels between
the tower and the mix, at one image longer than the block itself (modelled). At inference ``nn.WeightAllocator`` runs 16
instead (``allocator``). Capture the whole connector once a batch size and copy new inputs into the captured ones:

    with torch.cuda.graph(graph):                                       # after one warm-up call on a side stream
        weights = allocator(sentence, column_summaries(states, plan))   # the group CLS: one launch of the mix kernel
        out = layer_mix_mlp(states, plan, weights, ...)

What does not wait for the weights is done before them: the sources of a streamed tower, while it runs (only the mix and
the products of the block are left, and read 5 states instead of 25); the group CLS; and of the allocator whatever the
sentence has no part in, its first three launches. The two products of the block come after the weights as a whole.

In training, ``torch.cuda.make_graphed_callables(allocator, (sentence, summaries))`` makes the allocator one launch
forward and one backward; the block stays eager.
"""

from igva_kernels.backends.triton.backend import TritonBackend

BACKEND = TritonBackend()
