"""What an implementation executes: the members, by the implementation of ``weighted_mix`` on the same backend."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from igva_kernels.ops.weighted_mix.steps import Mixed, Projection, WeightedMix
from igva_kernels.registry import Implementation


class LayerProject(Implementation):
    """One member after the other, each into its part of the result."""

    def __init__(self, member: WeightedMix) -> None:
        self.member = member

    def why_not(self, *demands: str | None) -> str | None:
        """See ``Implementation.why_not``; the demands are the activation and the codes of the plans, as far as
        known."""
        activation, *codes = demands or (None,)
        reasons = (self.member.why_not(activation, code) for code in codes or (None,))
        return next((reason for reason in reasons if reason is not None), None)

    def project(self, calls: Sequence[Projection], out: Tensor) -> list[tuple[Mixed, Tensor | None]]:
        """The members' results into ``out`` ``[J, B, P, H]``; of each what ``WeightedMix.project`` returns beside."""
        return [
            self.member.project(*call, own.flatten(0, 1))[1:] for call, own in zip(calls, out.unbind(), strict=True)
        ]
