"""A Hugging Face language model as this project uses it: token ids -> one vector a text, or logits of masked words."""

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING, MODEL_MAPPING

from ctrdist.errors import UserError, nearest
from ctrdist.language import source

POOLINGS = ("cls", "mean", "last")
_MODES = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}


class LanguageModel(nn.Module):
    """An encoder (BERT, RoBERTa, ...) or a decoder (GPT-2, OPT, Qwen, ...) with a pooling.

    Make one with `load`. It has no pooler layer: every parameter that `parameter_groups` names gets a gradient.

    Args:
        model: the Hugging Face model, bare or with its masked-word head.
        tokenizer: its tokenizer, padding on the right.
        pooling: `cls` (the first real token), `mean` (of the real tokens) or `last` (the last real token).
        drawn: names of the model's parameters that the checkpoint lacked, so that they were drawn at random.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, pooling: str, drawn: frozenset[str] = frozenset()
    ) -> None:
        super().__init__()
        assert pooling in POOLINGS
        self.model, self.tokenizer, self.pooling, self.drawn = model, tokenizer, pooling, drawn

    @classmethod
    def load(cls, name: str, pooling: str = "auto", masked_lm: bool = False) -> "LanguageModel":
        """Load in float32, in training mode, without running code from the checkpoint.

        Args:
            name: a folder, or a Hugging Face name such as `sentence-transformers/all-MiniLM-L6-v2`.
            pooling: `cls`, `mean`, `last`, or `auto`: what the model's own `1_Pooling/config.json` says, else `cls`
                for encoders and `last` for decoders.
            masked_lm: with the head that predicts masked words. Where the checkpoint has none it is drawn from
                torch's random state; its output matrix is the input embeddings.

        Raises:
            UserError: no such model or pooling, missing weights, or a head asked of a model that has none.
        """
        folder = source.fetch(name)
        with source.quiet():
            try:
                config = AutoConfig.from_pretrained(folder)
                tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
                _check(name, config, masked_lm)
                model, drawn = _weights(name, folder, config, masked_lm)
            except (OSError, ValueError, KeyError) as error:
                if isinstance(error, UserError):
                    raise
                reason = str(error).strip().splitlines()[0]
                raise UserError(
                    f"language model '{name}': {folder} cannot be loaded: {reason}. It needs config.json, a tokenizer "
                    "and *.safetensors of an architecture that transformers knows without remote code"
                ) from error
        return cls(model, _set_up(tokenizer, config), _pooling(pooling, folder, config), drawn).train()

    @property
    def base(self) -> nn.Module:
        """The Hugging Face model without head: it returns hidden states."""
        return self.model.base_model

    @property
    def width(self) -> int:
        """Length of a pooled vector."""
        return self.base.config.hidden_size

    @property
    def vocabulary_size(self) -> int:
        """Rows of the input embeddings, at least the tokenizer's length."""
        return self.base.get_input_embeddings().num_embeddings

    @property
    def has_head(self) -> bool:
        """Whether `token_logits` works."""
        return self.model is not self.base

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states [B, L, width] of token ids [B, L] (int64) under a mask [B, L] (int64, 1 = real token).

        B may be 0: the model then runs on one padding row whose result is dropped, so that each of its parameters
        gets a gradient of zero.
        """
        rows = input_ids.shape[0]
        if rows == 0:
            input_ids = input_ids.new_full((1, max(input_ids.shape[1], 1)), self.tokenizer.pad_token_id or 0)
            attention_mask = torch.ones_like(input_ids)
        options = {"use_cache": False} if getattr(self.base.config, "use_cache", False) else {}
        return self.base(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state[:rows]

    def pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states [B, L, width] -> one vector a text [B, width]; padding never counts."""
        if self.pooling == "mean":
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        if self.pooling == "cls":
            position = attention_mask.argmax(1)
        else:
            position = (attention_mask * torch.arange(hidden.shape[1], device=hidden.device)).argmax(1)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), position]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids [B, L] and mask [B, L] -> pooled vectors [B, width]."""
        return self.pool(self.hidden(input_ids, attention_mask), attention_mask)

    def token_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states of masked positions [M, width] -> logits over the vocabulary [M, V].

        Takes the masked positions only: [B, L, V] would be the largest tensor of a step by far.
        """
        assert self.has_head, "load with masked_lm=True"
        return _head(self.model)(hidden)

    def parameter_groups(self, lr: float, weight_decay: float, drawn_lr: float | None = None) -> list[dict[str, Any]]:
        """AdamW groups of all parameters but poolers; no weight decay on biases and normalisation (see `decayed`).

        Args:
            drawn_lr: learning rate of the parameters that were drawn at random; `lr` if not given.
        """
        named = [(name, p) for name, p in self.model.named_parameters() if "pooler" not in name]
        drawn = [(name, p) for name, p in named if name in self.drawn]
        loaded = [(name, p) for name, p in named if name not in self.drawn]
        groups = decayed(loaded, lr, weight_decay) + decayed(drawn, lr if drawn_lr is None else drawn_lr, weight_decay)
        return [group for group in groups if group["params"]]

    def save(self, folder: str | Path) -> None:
        """Write weights (safetensors, with the head if there is one), configuration, tokenizer and pooling.

        The folder is read by `load`, by transformers, and by sentence-transformers.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with source.quiet():
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds)
        ]
        pooling = {f"pooling_mode_{mode}": key == self.pooling for key, mode in _MODES.items()}
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "modules.json").write_text(json.dumps(modules, indent=2))
        content = {"word_embedding_dimension": self.width, **pooling}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(content, indent=2))

    def fingerprint(self) -> str:
        """Twelve hex digits that change with any weight of the base model and with the pooling, not with the head."""
        return fingerprint(self.base, self.pooling)


def check_model(name: str, masked_lm: bool) -> None:
    """Raise the UserError that `LanguageModel.load` would, as far as the configuration tells: no weights are read."""
    folder = source.fetch(name)
    with source.quiet():
        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"language model '{name}': {folder}: {reason}") from error
    _check(name, config, masked_lm)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that `LanguageModel.load(name)` has, without the model. Raises UserError for a missing model."""
    folder = source.fetch(name)
    with source.quiet():
        return _set_up(AutoTokenizer.from_pretrained(folder, use_fast=True), AutoConfig.from_pretrained(folder))


def _set_up(tokenizer: PreTrainedTokenizerBase, config: Any) -> PreTrainedTokenizerBase:
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    positions = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


def fingerprint(module: nn.Module, salt: str = "") -> str:
    """Twelve hex digits of SHA-256 over a module's weights (names, shapes, dtypes, bytes) and `salt`."""
    digest = hashlib.sha256(salt.encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def decayed(named: list[tuple[str, nn.Parameter]], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: matrices with `weight_decay`, and without it what has one dimension (biases, LayerNorm)."""
    matrices = [p for _, p in named if p.ndim > 1]
    vectors = [p for _, p in named if p.ndim < 2]
    return [
        {"params": matrices, "lr": lr, "weight_decay": weight_decay},
        {"params": vectors, "lr": lr, "weight_decay": 0.0},
    ]


def _check(name: str, config: Any, masked_lm: bool) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"language model '{name}' is an encoder-decoder ({config.model_type}); take an encoder")
    if masked_lm and type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise UserError(
            f"language model '{name}' ({config.model_type}) predicts no masked words. Domain-adaptive pre-training "
            "needs an encoder such as sentence-transformers/all-MiniLM-L6-v2; --pretrain.epochs 0 leaves it out"
        )


def _weights(name: str, folder: str, config: Any, masked_lm: bool) -> tuple[nn.Module, frozenset[str]]:
    options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    if masked_lm:
        model, report = AutoModelForMaskedLM.from_pretrained(folder, **options)
        prefix = model.base_model_prefix + "."
        lost = [key for key in report["missing_keys"] if key.startswith(prefix)]
        if _head(model) is None:
            raise UserError(f"language model '{name}': the masked-word head of {config.model_type} is not supported")
    else:
        if "add_pooling_layer" in inspect.signature(MODEL_MAPPING[type(config)].__init__).parameters:
            options["add_pooling_layer"] = False
        model, report = AutoModel.from_pretrained(folder, **options)
        lost = [key for key in report["missing_keys"] if "pooler" not in key]
    if lost:
        raise UserError(
            f"language model '{name}': {folder} lacks {len(lost)} weights of {config.model_type}, such as "
            f"'{sorted(lost)[0]}'; download it again or name another model"
        )
    return model, frozenset(dict(model.named_parameters())) & set(report["missing_keys"])


def _head(model: nn.Module) -> Any:
    """The function [M, width] -> [M, V] of a masked-word model, None where its family is not known here."""
    for name in ("cls", "lm_head", "predictions"):
        if hasattr(model, name):
            return getattr(model, name)
    if hasattr(model, "vocab_projector"):
        return lambda hidden: model.vocab_projector(
            model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))
        )
    if hasattr(model, "head") and hasattr(model, "decoder"):
        return lambda hidden: model.decoder(model.head(hidden))
    return None


def _pooling(pooling: str, folder: str, config: Any) -> str:
    if pooling != "auto":
        if pooling not in POOLINGS:
            raise UserError(f"pooling: unknown '{pooling}'; {nearest(pooling, (*POOLINGS, 'auto'))}")
        return pooling
    path = Path(folder) / "1_Pooling" / "config.json"
    if path.exists():
        content = json.loads(path.read_text())
        found = content.get("pooling_mode") or [
            key.removeprefix("pooling_mode_").removesuffix("s").removesuffix("_token")
            for key, on in content.items()
            if key.startswith("pooling_mode_") and on
        ]
        found = [found] if isinstance(found, str) else found
        known = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
        if len(found) != 1 or found[0] not in known:
            raise UserError(f"{path}: pooling {found} is not supported; set pooling to {', '.join(POOLINGS)}")
        return known[found[0]]
    return "cls" if type(config) in MODEL_FOR_MASKED_LM_MAPPING else "last"
