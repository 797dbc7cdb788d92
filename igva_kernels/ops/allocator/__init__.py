"""The weight allocator at inference: ``allocate`` computes what ``nn.WeightAllocator`` does.

On a GPU its modules launch 70 to 80 tiny kernels between the tower and the mix, which at one image take longer than the
connector itself (modelled); ``allocate`` launches 16. A CUDA graph gains most here: capture the whole connector once
per batch size and copy new inputs into the captured ones:

    with torch.cuda.graph(graph):                                       # after one warm-up call on a side stream
        weights = allocator(sentence, column_summaries(states, plan))   # the group CLS: one launch of the mix kernel
        out = layer_mix_mlp(states, plan, weights, ...)

What does not depend on the weights can run before them: the sources of a streamed tower, while the tower runs; the
group CLS; and the allocator's first three launches, which read the image and, of the sentence, no more than the
projection that the first of them makes. Both products of the connector need the weights and come after them.

In training, ``torch.cuda.make_graphed_callables(allocator, (sentence, summaries))`` makes the allocator one launch
forward and one backward; the connector stays eager.
"""

from igva_kernels.ops.allocator.api import Parts, allocate, fused
from igva_kernels.ops.allocator.weights import AllocatorBlockWeights, AllocatorWeights

__all__ = ["AllocatorBlockWeights", "AllocatorWeights", "Parts", "allocate", "fused"]
