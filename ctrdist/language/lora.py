"""Low-rank adapters on a language model, by peft, and the plain model that they amount to."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ctrdist.errors import UserError
from ctrdist.language import source

BASE, ADAPTER = ".base_layer.", ".lora_"
"""What peft puts into the names of an adapted layer's own weights, and of its adapter's."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (Hu et al. 2022): W + alpha / rank · B A, of which only B and A are trained, and a head that
    was drawn anew. What is saved has W + alpha / rank · B A for W: a plain model.

    Args:
        use: `auto` for decoders only, `always`, or `never`: all weights are trained then.
        rank: rows of A, columns of B.
        alpha: B A counts alpha / rank times.
        dropout: on what A reads. Where a model has no dropout of its own it makes SimCSE's two views differ.
        lr: learning rate of A and B.
        targets: names of the linear layers that are adapted. `()` leaves it to peft: queries and values in most
            families, every linear layer in one that it does not know.
    """

    use: Literal["auto", "always", "never"] = "auto"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.1
    lr: float = 1e-4
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lm.lora.rank: {self.rank} is under 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lm.lora.dropout: {self.dropout} is not 0 or more and under 1")


def add_lora(base: nn.Module, config: LoraConfig) -> None:
    """Adapt a Hugging Face model without head, in place; A is drawn from torch's random state, B is 0.

    Raises:
        UserError: the model has none of the layers that `targets` names.
    """
    import peft
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    targets = list(config.targets) or KNOWN.get(base.config.model_type, "all-linear")
    options = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets
    )
    with source.quiet():
        try:
            peft.inject_adapter_in_model(options, base)
        except ValueError as error:
            linear = sorted({name.rsplit(".", 1)[-1] for name, m in base.named_modules() if isinstance(m, nn.Linear)})
            raise UserError(
                f"lm.lora.targets: {base.config.model_type} cannot be adapted at {targets}: its linear layers are "
                f"{', '.join(linear)}"
            ) from error


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the plain model that an adapted one amounts to, by the plain model's names.

    Those of a model without adapters are its own. Adapted matrices are new tensors, all others are shared.
    """
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    state = {}
    for name, value in model.state_dict().items():
        if ADAPTER in name:
            continue
        owner, _, rest = name.partition(BASE)
        if rest == "weight":
            value = value + layers[owner].get_delta_weight("default")
        state[f"{owner}.{rest}" if rest else name] = value
    return state
