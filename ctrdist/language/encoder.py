"""A language model with a projection: an item's text -> a vector in the space of the item's embeddings."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ctrdist.errors import UserError
from ctrdist.language.model import LanguageModel, fingerprint

HEAD, _INTO_TABLE = "projection.safetensors", "into_table"


class TextEncoder(nn.Module):
    """Text -> vector, e_t = head(LM(x_t)) (CELA eq. 9).

    Args:
        language_model: pools a text to [width].
        out: length of the vector, f * d for f item-side fields of width d.
        hidden: widths of the head's hidden layers, with ReLU between; `()` is eq. 9's single linear map.
        norm: ReLU and LayerNorm after the last layer, as in the authors' code.
        into_table: whether the text table takes these vectors, and not the language model's pooled states.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        out: int,
        hidden: Sequence[int] = (128,),
        norm: bool = False,
        into_table: bool = False,
    ) -> None:
        super().__init__()
        self.language_model = language_model
        widths = [language_model.width, *hidden, out]
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.head = nn.Sequential(*layers, nn.LayerNorm(out)) if norm else nn.Sequential(*layers[:-1])
        self.out, self.widths, self.norm, self.into_table = out, (*hidden, out), norm, into_table

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The language model's."""
        return self.language_model.tokenizer

    @property
    def width(self) -> int:
        """Length of a vector, named as the language model's is."""
        return self.out

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids [B, L] and mask [B, L] -> vectors [B, out]; B may be 0."""
        return self.head(self.language_model(input_ids, attention_mask))

    def fingerprint(self) -> str:
        """Twelve hex digits that change with any weight that the vectors depend on."""
        return fingerprint(self.head, self.language_model.fingerprint())

    def save(self, folder: str | Path) -> None:
        """Write the language model's folder and the head beside it (`projection.safetensors`)."""
        self.language_model.save(folder)
        state = {key: value.contiguous() for key, value in self.head.state_dict().items()}
        save_file(state, Path(folder) / HEAD, {_INTO_TABLE: "yes"} if self.into_table else None)

    @classmethod
    def load(cls, folder: str | Path) -> "TextEncoder":
        """Read what `save` wrote.

        Raises:
            UserError: the folder is missing or holds no aligned model.
        """
        path = Path(folder) / HEAD
        if not path.exists():
            raise UserError(f"{path}: no such file. The folder holds no aligned text encoder; run the alignment first")
        state: dict[str, Tensor] = load_file(path)
        weights = [state[key] for key in sorted((k for k in state if k.endswith("weight")), key=_layer)]
        widths = [weight.shape[0] for weight in weights if weight.ndim == 2]
        norm, into_table = weights[-1].ndim == 1, _into_table(path)
        encoder = cls(LanguageModel.load(str(folder)), widths[-1], widths[:-1], norm, into_table)
        encoder.head.load_state_dict(state)
        return encoder


def load_encoder(folder: str | Path, pooling: str = "auto") -> LanguageModel | TextEncoder:
    """What makes the text table's vectors, [B, width] of token ids and mask: the language model of a folder, with its
    head where alignment trained the head alone.

    Args:
        pooling: as `LanguageModel.load` takes it; with a head it is the one that the head was trained on.
    """
    path = Path(folder) / HEAD
    return TextEncoder.load(folder) if path.exists() and _into_table(path) else LanguageModel.load(str(folder), pooling)


def _into_table(path: Path) -> bool:
    with safe_open(path, "pt") as file:
        return _INTO_TABLE in (file.metadata() or {})


def _layer(key: str) -> int:
    return int(key.split(".")[0])
