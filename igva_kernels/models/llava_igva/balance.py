"""The balance loss under trainers that compute the cross-entropy themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from igva_kernels.models.llava_igva.modeling_llava_igva import (
    LlavaIgvaCausalLMOutputWithPast,
    LlavaIgvaModel,
    share_of_loss,
)
from igva_kernels.nn import balance_loss


class BalanceLossMixin:
    """Adds the balance loss in ``compute_loss`` of a trainer that does not use the loss of the model.

    trl's trainers compute the cross-entropy from the language model's last states, and transformers' own does with
    ``label_smoothing_factor`` or ``compute_loss_func``; the balance loss, which is part of the model's loss, is left
    out. Where the model's loss is used, nothing is added. In front of the trainer::

        class Trainer(BalanceLossMixin, SFTTrainer):
            pass
    """

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss and ``balance_coefficient`` times the balance loss, normalised as the model does.

        Raises:
            TypeError: ``model`` is no LLaVA-IGVA model, nor a wrapper around one.
            ValueError: ``inputs`` hold no ``labels``, by whose supervised tokens the balance loss is charged.
        """
        labels = inputs.get("labels")
        if labels is None:
            raise ValueError(f"inputs: the balance loss is charged per supervised token, need labels, got {[*inputs]}")
        with _forwards(model) as (core, backbone, whole):
            result = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        has_own = any(isinstance(out, LlavaIgvaCausalLMOutputWithPast) and out.loss is not None for out in whole[:1])
        # The first forward is that of the loss; trl makes another one for its metrics.
        if has_own or not backbone or backbone[0].layer_weights is None or not core.config.balance_coefficient:
            return result
        share = share_of_loss(labels, backbone[0].images_per_sample, len(backbone[0].layer_weights), num_items_in_batch)
        added = core.config.balance_coefficient * balance_loss(backbone[0].layer_weights, share)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:  # type: ignore[attr-defined]
            # The number counts the tokens of every rank, and DDP averages over ranks; both trainers undo that.
            added = added * (self.accelerator.num_processes // self.get_tp_size())  # type: ignore[attr-defined]
        return (result[0] + added, *result[1:]) if isinstance(result, tuple) else result + added


@contextmanager
def _forwards(model: nn.Module) -> Iterator[tuple[LlavaIgvaModel, list[Any], list[Any]]]:
    """The LLaVA-IGVA model inside, what it returns from now on, and what the model with its head returns."""
    cores = [module for module in model.modules() if isinstance(module, LlavaIgvaModel)]
    if len(cores) != 1:
        raise TypeError(f"model: need one LLaVA-IGVA model, got {len(cores)} in a {type(model).__name__}")
    heads = [module for module in model.modules() if getattr(module, "model", None) is cores[0]]
    backbone: list[Any] = []
    whole: list[Any] = []
    hooks = [cores[0].register_forward_hook(lambda module, args, output: backbone.append(output))]
    hooks += [head.register_forward_hook(lambda module, args, output: whole.append(output)) for head in heads]
    cores[0].trainer_adds_balance = True
    try:
        yield cores[0], backbone, whole
    finally:
        cores[0].trainer_adds_balance = False
        for hook in hooks:
            hook.remove()
