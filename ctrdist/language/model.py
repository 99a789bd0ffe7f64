"""A Hugging Face language model as this project uses it: token ids -> one vector a text, or logits of words."""

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
)

from ctrdist.allocator import keep_few_kernels
from ctrdist.dropout import quicken
from ctrdist.errors import UserError, nearest
from ctrdist.language import attention, source
from ctrdist.language.lora import ADAPTER, LoraConfig, add_lora, merged_state
from ctrdist.optim import split_decay

POOLINGS = ("cls", "mean", "last", "first-last", "top-2")
_MODES = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
_BESIDE_LAST = {"first-last": 1, "top-2": -2}
"""The layer, counted as Hugging Face counts hidden states, whose states are averaged with the last one's."""

POOLING_NOTE = "pooling.json"


class LanguageModel(nn.Module):
    """An encoder (BERT, RoBERTa, ...), a decoder (GPT-2, OPT, Qwen, ...) or an encoder-decoder that fills in masked
    words (BART) with a pooling. The decoder of the last one reads the same text one token later, so that its states
    stand for the tokens that they predict, as an encoder's do.

    Make one with `load`. It has no pooler layer: every parameter that `parameter_groups` names gets a gradient.

    Args:
        model: the Hugging Face model, bare or with the head that predicts words.
        tokenizer: its tokenizer, padding on the right.
        pooling: `cls` (the first real token), `mean` (of the real tokens), `last` (the last real token), `first-last`
            (mean over the real tokens of the average of the first and the last layer's states) or `top-2` (the same of
            the last two layers).
        drawn: names of the model's parameters that the checkpoint lacked, so that they were drawn at random.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, pooling: str, drawn: frozenset[str] = frozenset()
    ) -> None:
        super().__init__()
        assert pooling in POOLINGS
        quicken(model)
        if model.config._attn_implementation == "sdpa":
            with source.quiet():  # a family that cannot keeps its own
                model.set_attn_implementation(attention.NAME)
        self.model, self.tokenizer, self.pooling, self.drawn = model, tokenizer, pooling, drawn
        self.lora: LoraConfig | None = None

    @classmethod
    def load(cls, name: str, pooling: str = "auto", head: bool = False) -> "LanguageModel":
        """Load in float32, in training mode, without running code from the checkpoint.

        Args:
            name: a folder, or a Hugging Face name such as `sentence-transformers/all-MiniLM-L6-v2`.
            pooling: one of `POOLINGS`, or `auto`: what the folder says (`1_Pooling/config.json` of sentence encoders,
                `classifier_pooling` in ModernBERT's configuration), else `cls` for encoders and `last` for the others.
            head: with the head that predicts words: masked ones for an encoder, each next one for a decoder. Where the
                checkpoint has none it is drawn from torch's random state; its output matrix is the input embeddings
                in all families that tie the two.

        Raises:
            UserError: no such model or pooling, missing weights, or a head asked of a model that has none.
        """
        keep_few_kernels()
        folder = source.fetch(name)
        with source.quiet():
            try:
                config = AutoConfig.from_pretrained(folder)
                tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
                _check(name, config, head)
                pooling = _pooling(pooling, folder, config)
                model, drawn = _weights(name, folder, config, head)
            except (OSError, ValueError, KeyError) as error:
                if isinstance(error, UserError):
                    raise
                reason = str(error).strip().splitlines()[0]
                raise UserError(
                    f"language model '{name}': {folder} cannot be loaded: {reason}. It needs config.json, a tokenizer "
                    "and *.safetensors of an architecture that transformers knows without remote code"
                ) from error
        return cls(model, _set_up(tokenizer, config), pooling, drawn).train()

    @property
    def base(self) -> nn.Module:
        """The Hugging Face model without head: it returns hidden states."""
        return self.model.base_model

    @property
    def is_decoder(self) -> bool:
        """Whether each state has read the tokens up to its own only, so that it can predict the next one."""
        return _is_decoder(self.base.config)

    @property
    def width(self) -> int:
        """Length of a pooled vector."""
        return _width(self.base.config)

    @property
    def vocabulary_size(self) -> int:
        """Rows of the input embeddings, at least the tokenizer's length."""
        return self.base.get_input_embeddings().num_embeddings

    @property
    def has_head(self) -> bool:
        """Whether `token_logits` works."""
        return self.model is not self.base

    def states(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        """What the head reads, the last layer's states, and what `pool` pools, that or an average of two layers'.

        B may be 0: the model then runs on one padding row whose result is dropped, so that each of its parameters
        gets a gradient of zero.

        Args:
            input_ids: [B, L] int64.
            attention_mask: [B, L] int64, 1 = real token.
            inputs: more of what the Hugging Face model takes, or passes on to its attention.

        Returns:
            Both [B, L, width].
        """
        rows = input_ids.shape[0]
        if rows == 0:
            input_ids = input_ids.new_full((1, max(input_ids.shape[1], 1)), self.tokenizer.pad_token_id or 0)
            attention_mask = torch.ones_like(input_ids)
        options = inputs | ({"use_cache": False} if getattr(self.base.config, "use_cache", False) else {})
        beside = _BESIDE_LAST.get(self.pooling)
        if beside is not None:
            options["output_hidden_states"] = [beside]
        out = self.base(input_ids=input_ids, attention_mask=attention_mask, **options)
        last = out.last_hidden_state[:rows]
        return last, last if beside is None else (last + out.hidden_states[beside][:rows]) / 2

    def pool(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """States [B, L, width], the second of `states`, -> one vector a text [B, width]; padding never counts."""
        if self.pooling == "cls":
            position = attention_mask.argmax(1)
        elif self.pooling == "last":
            position = (attention_mask * torch.arange(states.shape[1], device=states.device)).argmax(1)
        else:
            mask = attention_mask.unsqueeze(-1).to(states.dtype)
            return (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        return states[torch.arange(states.shape[0], device=states.device), position]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids [B, L] and mask [B, L] -> pooled vectors [B, width]."""
        return self.pool(self.states(input_ids, attention_mask)[1], attention_mask)

    def token_logits(self, hidden: Tensor) -> Tensor:
        """Last states of some positions [M, width] -> logits over the vocabulary [M, V].

        Takes the positions that predict a word only: [B, L, V] would be the largest tensor of a step by far.
        """
        assert self.has_head, "load with head=True"
        return _head(self.model)(hidden)

    def adapt(self, config: LoraConfig) -> None:
        """Add low-rank adapters, if `config` wants them on such a model: of the loaded weights none is trained then."""
        if config.use == "always" or (config.use == "auto" and self.is_decoder):
            assert self.lora is None, "the model has adapters"
            add_lora(self.base, config)
            self.lora = config

    def checkpoint_layers(self) -> None:
        """Keep only each layer's input for the backward pass, which computes the rest again (gradient checkpointing).

        Raises:
            UserError: the model's family cannot do it.
        """
        if not self.base.supports_gradient_checkpointing:
            raise UserError(f"lm.gradient_checkpointing: not for {self.base.config.model_type}; leave it out")
        self.base.activation_checkpointing_enable({"use_reentrant": False})

    def parameter_groups(self, lr: float, weight_decay: float, drawn_lr: float | None = None) -> list[dict[str, Any]]:
        """AdamW groups of what is trained: all parameters but poolers, or with adapters these and what was drawn.

        No weight decay on biases and normalisation (see `split_decay`).

        Args:
            lr: learning rate of the loaded parameters; adapters have their own (`LoraConfig.lr`).
            drawn_lr: learning rate of the parameters that were drawn at random; `lr` if not given.
        """
        named = [(name, p) for name, p in self.model.named_parameters() if "pooler" not in name]
        drawn = [(name, p) for name, p in named if name in self.drawn]
        loaded = [(name, p) for name, p in named if name not in self.drawn]
        if self.lora is not None:
            loaded, lr = [(name, p) for name, p in loaded if ADAPTER in name], self.lora.lr
            drawn_lr = self.lora.lr if drawn_lr is None else drawn_lr
        rates = ((loaded, lr), (drawn, lr if drawn_lr is None else drawn_lr))
        return [group for named, rate in rates for group in split_decay([p for _, p in named], rate, weight_decay)]

    def save(self, folder: str | Path) -> None:
        """Write weights (safetensors, with the head if there is one), configuration, tokenizer and pooling.

        Adapters are merged into the weights: the folder holds a plain model, which `load` and transformers read, and
        sentence-transformers where it knows the pooling.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with source.quiet():
            self.model.save_pretrained(folder, state_dict=merged_state(self.model))
            self.tokenizer.save_pretrained(folder)
        if self.pooling not in _MODES:
            (folder / POOLING_NOTE).write_text(json.dumps({"pooling": self.pooling}))
            return
        (folder / POOLING_NOTE).unlink(missing_ok=True)
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
        return _digest(merged_state(self.base), self.pooling)


def check_model(name: str, head: bool) -> None:
    """Raise the UserError that `LanguageModel.load` would, as far as the configuration tells: no weights are read."""
    folder = source.fetch(name)
    with source.quiet():
        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"language model '{name}': {folder}: {reason}") from error
    _check(name, config, head)


def draws_head(name: str) -> bool:
    """Whether `LanguageModel.load(name, head=True)` draws a head, or a part of it. No weights are read.

    Raises UserError as `load` does.
    """
    folder = source.fetch(name)
    with source.quiet():
        config = AutoConfig.from_pretrained(folder)
        _check(name, config, head=True)
        _, report = _loader(config, head=True).from_pretrained(folder, device_map="meta", **_OPTIONS)
    return bool(report["missing_keys"])


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that `LanguageModel.load(name)` has, without the model. Raises UserError for a missing model."""
    folder = source.fetch(name)
    with source.quiet():
        return _set_up(AutoTokenizer.from_pretrained(folder, use_fast=True), AutoConfig.from_pretrained(folder))


def _set_up(tokenizer: PreTrainedTokenizerBase, config: Any) -> PreTrainedTokenizerBase:
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    positions = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    if config.model_type in POSITIONS_FROM_PADDING:
        positions -= config.pad_token_id + 1
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


def fingerprint(module: nn.Module, salt: str = "") -> str:
    """Twelve hex digits of SHA-256 over a module's weights (names, shapes, dtypes, bytes) and `salt`."""
    return _digest(module.state_dict(), salt)


def _digest(state: dict[str, Tensor], salt: str) -> str:
    digest = hashlib.sha256(salt.encode())
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


POSITIONS_FROM_PADDING = ("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet")
"""Families whose first position is `pad_token_id + 1`, so that they read that much less than they have positions."""

_OPTIONS: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}


def _is_decoder(config: Any) -> bool:
    return type(config) not in MODEL_FOR_MASKED_LM_MAPPING and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def _is_encoder_decoder(config: Any) -> bool:
    return getattr(config, "is_encoder_decoder", False)


def _width(config: Any) -> int:
    """OPT may project its states to the width of its word embeddings."""
    return getattr(config, "word_embed_proj_dim", config.hidden_size)


def _loader(config: Any, head: bool) -> Any:
    if not head:
        return AutoModel
    return AutoModelForCausalLM if _is_decoder(config) else AutoModelForMaskedLM


def _check(name: str, config: Any, head: bool) -> None:
    if _is_encoder_decoder(config) and type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise UserError(
            f"language model '{name}' is an encoder-decoder ({config.model_type}) that fills in no masked words, as "
            "BART does; take an encoder"
        )
    if head and not _is_decoder(config) and type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise UserError(
            f"language model '{name}' ({config.model_type}) predicts no words. Take an encoder such as "
            "sentence-transformers/all-MiniLM-L6-v2, or a decoder; --pretrain.mlm-weight 0 leaves that loss out, and "
            "--pretrain.epochs 0 all of domain-adaptive pre-training"
        )


def _weights(name: str, folder: str, config: Any, head: bool) -> tuple[nn.Module, frozenset[str]]:
    options = dict(_OPTIONS)
    if not head and "add_pooling_layer" in inspect.signature(MODEL_MAPPING[type(config)].__init__).parameters:
        options["add_pooling_layer"] = False
    model, report = _loader(config, head).from_pretrained(folder, **options)
    if head:
        prefix = model.base_model_prefix + "."
        lost = [key for key in report["missing_keys"] if key.startswith(prefix)]
        if not _head_agrees(model):
            raise UserError(
                f"language model '{name}': the head of {config.model_type} is not supported; --pretrain.mlm-weight 0 "
                "goes without it"
            )
    else:
        lost = [key for key in report["missing_keys"] if "pooler" not in key]
    if lost:
        raise UserError(
            f"language model '{name}': {folder} lacks {len(lost)} weights of {config.model_type}, such as "
            f"'{sorted(lost)[0]}'; download it again or name another model"
        )
    return model, frozenset(dict(model.named_parameters())) & set(report["missing_keys"])


@torch.no_grad()
def _head_agrees(model: nn.Module) -> bool:
    """Whether `_head`, applied to the states, gives the family's own logits (some scale or cap them)."""
    head, ids = _head(model), torch.zeros(1, 2, dtype=torch.int64)
    states = model.base_model(input_ids=ids).last_hidden_state
    return head is not None and torch.allclose(head(states), model(input_ids=ids).logits, rtol=1e-3, atol=1e-4)


def _head(model: nn.Module) -> Any:
    """The function [M, width] -> [M, V] of a model that predicts words, None where its family is not known here."""
    for name in ("cls", "lm_head", "predictions"):
        if hasattr(model, name):
            return getattr(model, name)
    if hasattr(model, "lm_predictions"):
        return lambda hidden: model.lm_predictions(hidden, model.get_input_embeddings())
    if hasattr(model, "vocab_projector"):
        return lambda hidden: model.vocab_projector(
            model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))
        )
    if hasattr(model, "head") and hasattr(model, "decoder"):
        return lambda hidden: model.decoder(model.head(hidden))
    return None


def _pooling(pooling: str, folder: str, config: Any) -> str:
    if pooling == "auto":
        pooling = _own_pooling(Path(folder), config)
    elif pooling not in POOLINGS:
        raise UserError(f"pooling: unknown '{pooling}'; {nearest(pooling, (*POOLINGS, 'auto'))}")
    if pooling in _BESIDE_LAST and _is_encoder_decoder(config):
        raise UserError(f"pooling: not '{pooling}' for an encoder-decoder ({config.model_type}), which has two stacks")
    if pooling in _BESIDE_LAST and _width(config) != config.hidden_size:
        raise UserError(
            f"pooling: not '{pooling}' for this model, whose last states ({_width(config)}) are not as wide as those "
            f"of its layers ({config.hidden_size})"
        )
    return pooling


def _own_pooling(folder: Path, config: Any) -> str:
    """What the folder says of the pooling, else the family's."""
    note, path = folder / POOLING_NOTE, folder / "1_Pooling" / "config.json"
    if note.exists():
        return json.loads(note.read_text())["pooling"]
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
    last = _is_decoder(config) or _is_encoder_decoder(config)
    return "last" if last else getattr(config, "classifier_pooling", "cls")
