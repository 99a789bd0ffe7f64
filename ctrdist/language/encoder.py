"""A language model with a projection: an item's text -> a vector in the space of the item's embeddings."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctrdist.errors import UserError
from ctrdist.language.model import LanguageModel, fingerprint

HEAD = "projection.safetensors"


class TextEncoder(nn.Module):
    """Text -> vector, e_t = head(LM(x_t)) (CELA eq. 9).

    Args:
        language_model: pools a text to [width].
        out: length of the vector, f * d for f item-side fields of width d.
        hidden: widths of the head's hidden layers, with ReLU between; `()` is eq. 9's single linear map.
    """

    def __init__(self, language_model: LanguageModel, out: int, hidden: Sequence[int] = (128,)) -> None:
        super().__init__()
        self.language_model = language_model
        widths = [language_model.width, *hidden, out]
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.head = nn.Sequential(*layers[:-1])
        self.out, self.widths = out, (*hidden, out)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids [B, L] and mask [B, L] -> vectors [B, out]; B may be 0."""
        return self.head(self.language_model(input_ids, attention_mask))

    def fingerprint(self) -> str:
        """Twelve hex digits that change with any weight that the vectors depend on."""
        return fingerprint(self.head, self.language_model.fingerprint())

    def save(self, folder: str | Path) -> None:
        """Write the language model's folder and the head beside it (`projection.safetensors`)."""
        self.language_model.save(folder)
        save_file({key: value.contiguous() for key, value in self.head.state_dict().items()}, Path(folder) / HEAD)

    @classmethod
    def load(cls, folder: str | Path) -> "TextEncoder":
        """Read what `save` wrote.

        Raises:
            UserError: the folder is missing or holds no aligned model.
        """
        path = Path(folder) / HEAD
        if not path.exists():
            raise UserError(f"{path}: no such file. The folder holds no aligned text encoder; run the alignment first")
        state: dict[str, torch.Tensor] = load_file(path)
        widths = [state[key].shape[0] for key in sorted((k for k in state if k.endswith("weight")), key=_layer)]
        encoder = cls(LanguageModel.load(str(folder)), widths[-1], widths[:-1])
        encoder.head.load_state_dict(state)
        return encoder


def _layer(key: str) -> int:
    return int(key.split(".")[0])
