"""ClickPrompt's bridge: what a CTR model knows of an interaction, as prompts in front of every layer's words.

A prompt of a layer is a key and a value that its self-attention reads before those of the words (section 3.4). It is no
word: it has no position, no state of its own, and no next layer.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
from transformers.masking_utils import sdpa_mask

from ctrdist.errors import UserError
from ctrdist.language import source
from ctrdist.language.attention import attend
from ctrdist.language.model import POSITIONS_FROM_PADDING, LanguageModel

SELF_ATTENTION = {
    "bert": "attention.self",
    "roberta": "attention.self",
    "xlm-roberta": "attention.self",
    "gpt2": "attn",
    "opt": "self_attn",
    "qwen2": "self_attn",
    "llama": "self_attn",
    "bart": "self_attn",
}
"""The families that read prompts, each by the name of its layers' self-attention."""

_ATTENTION = "prompted"


@dataclass(frozen=True)
class PromptConfig:
    """The prompts that a language model reads.

    Args:
        count: of each layer (the paper's K).
        layers: `all`, or the `first` one only (of an encoder-decoder, the first of either).
        shift_positions: words stand `count` positions later, as in the authors' code, so that a text may have that many
            tokens less.
    """

    count: int = 5
    layers: Literal["all", "first"] = "all"
    shift_positions: bool = False

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(
                f"prompts.count: {self.count} is under 1; a language model without prompts is no ClickPrompt"
            )


class PromptedLanguageModel(nn.Module):
    """A language model each of whose layers reads K keys and values of its own in front of those of its words.

        state_t = sum_j a_tj v_j,  a_t = softmax_j(q_t . k_j / sqrt(d)),  j in K prompts, then the words that t sees

    ClickPrompt eq. 7, per head, with the prompts' hidden states taken as the keys and values that they would become.
    Every token sees every prompt. Keys of a rotary model (Qwen2) come without rotation, as at position 0.

    From then on the language model attends by a function of this module, which does what it did where no prompts are.

    Args:
        language_model: adapted (`LanguageModel.adapt`) or not.
        config: options.

    Raises:
        UserError: its family is none of `SELF_ATTENTION`, or drops the prompts nevertheless.
    """

    def __init__(self, language_model: LanguageModel, config: PromptConfig) -> None:
        super().__init__()
        base = language_model.base
        _check_family(language_model.tokenizer.name_or_path, base.config, config)
        base.set_attn_implementation(_ATTENTION)
        self.language_model, self.config = language_model, config
        name = SELF_ATTENTION[base.config.model_type]
        found = [(path, module) for path, module in base.named_modules() if path.endswith(f".{name}")]
        first = config.layers == "first"
        self.attentions = [module for path, module in found if not first or "0" in path.split(".")]
        self.own = self._moments()
        self._probe()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a row's prompts: [layers that read them, 2 (keys and values), K, width of a layer's keys]."""
        return len(self.attentions), 2, self.config.count, self.own.shape[-1]

    @property
    def longest(self) -> int:
        """The most tokens of a text, special tokens included."""
        shift = self.config.count if self.config.shift_positions else 0
        return self.language_model.tokenizer.model_max_length - shift

    def states(
        self, input_ids: Tensor, attention_mask: Tensor, prompts: Tensor, **inputs: Any
    ) -> tuple[Tensor, Tensor]:
        """What `LanguageModel.states` gives, with prompts; `token_logits` and `pool` are that model's.

        Args:
            input_ids: [B, T] int64; B may be 0.
            attention_mask: [B, T] int64, 1 = real token.
            prompts: [B, layers, 2, K, width] float, as `PromptWriter` writes them.
            inputs: as `LanguageModel.states` takes them.

        Returns:
            The last states, and those to pool, both [B, T, width of the language model].

        Raises:
            UserError: texts that are longer than `longest`.
        """
        attention = self.language_model.base.config._attn_implementation
        assert attention == _ATTENTION, f"the language model was set to {attention}, which reads no prompts"
        assert prompts.shape == (len(input_ids), *self.shape), (prompts.shape, self.shape)
        if self.config.shift_positions and len(input_ids):
            if input_ids.shape[1] > self.longest:
                raise UserError(
                    f"prompts.shift_positions: a text has {input_ids.shape[1]} tokens, and the language model has "
                    f"positions for {self.longest} after {self.config.count} prompts; cut the texts, or leave it out"
                )
            inputs["position_ids"] = self._shifted_positions(attention_mask)
        if not len(input_ids):  # the language model then reads one row of padding
            prompts = F.pad(prompts, (0, 0) * 4 + (0, 1))
        of_layer = dict(zip(self.attentions, prompts.unbind(1), strict=True))
        return self.language_model.states(input_ids, attention_mask, prompts=of_layer, **inputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, prompts: Tensor) -> Tensor:
        """What `states` takes -> the pooled vectors [B, width of the language model]."""
        states = self.states(input_ids, attention_mask, prompts)[1]
        return self.language_model.pool(states, attention_mask)

    @torch.no_grad()
    def attention_on_prompts(self, input_ids: Tensor, attention_mask: Tensor, prompts: Tensor) -> Tensor:
        """What `states` takes -> each token's attention on each prompt, [B, layers, heads, T, K] float32.

        The rest, up to 1, is on the words. Over their own sum they are table 7 of the paper.
        """
        weights: dict[nn.Module, Tensor] = {}

        def watch(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float):
            key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
            scores = (query @ key.transpose(2, 3)).float() * scaling
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            weights[module] = scores.softmax(-1)[..., : self.config.count]

        self.states(input_ids, attention_mask, prompts, watch=watch)
        return torch.stack([weights[module] for module in self.attentions], 1)

    def _shifted_positions(self, attention_mask: Tensor) -> Tensor:
        config = self.language_model.base.config
        first = config.pad_token_id + 1 if config.model_type in POSITIONS_FROM_PADDING else 0
        return first + self.config.count - 1 + attention_mask.cumsum(1)

    @torch.no_grad()
    def _moments(self) -> Tensor:
        """Mean and standard deviation of each layer's own keys and values, over words drawn at random.

        Returns:
            [layers, 2 (keys and values), 2 (mean and deviation), width of a layer's keys].
        """
        model, found = self.language_model, {}
        ids = self._some_words(8, min(16, self.longest))
        # Keys of a rotary model without their rotation; of a text's first token many models make something of its own.
        still = {"position_ids": torch.zeros_like(ids)} if hasattr(model.base, "rotary_emb") else {}

        def watch(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any):
            rows = torch.stack([key, value])[:, :, :, 1:].transpose(2, 3).flatten(1, 2).flatten(2)
            found[module] = torch.stack([rows.mean(1), rows.std(1)], 1).float()

        with _evaluating(model):
            model.states(ids, torch.ones_like(ids), watch=watch, **still)
        if not found.keys() >= set(self.attentions):
            raise self._dropped()
        return torch.stack([found[module] for module in self.attentions]).cpu()

    def _probe(self) -> None:
        """Raise a UserError unless the states depend on every layer's prompts, keys and values."""
        model = self.language_model
        ids = self._some_words(2, min(4, self.longest))
        mask, device = torch.ones_like(ids), ids.device
        with _evaluating(model), torch.enable_grad():
            drawn = torch.randn(len(ids), *self.shape, generator=_generator())
            mean, deviation = self.own.unsqueeze(3).unbind(2)
            prompts = (mean + deviation * drawn).to(device).requires_grad_()
            states = self.states(ids, mask, prompts)[0]
            weights = torch.randn(states.shape, generator=_generator()).to(states)
            gradient = torch.autograd.grad((weights * states).sum(), prompts, allow_unused=True)[0]
            without = model.states(ids, mask)[0]
        if gradient is None or not gradient.flatten(3).any(-1).all() or torch.equal(states, without):
            raise self._dropped()

    def _dropped(self) -> UserError:
        model = self.language_model
        return UserError(
            f"language model '{model.tokenizer.name_or_path}': this version of transformers drops the prompts of "
            f"{model.base.config.model_type}; use the one that pyproject.toml names, or another of {_known()}"
        )

    def _some_words(self, rows: int, length: int) -> Tensor:
        """Token ids [rows, length], the same at each call."""
        words = self.language_model.base.get_input_embeddings()
        ids = torch.randint(words.num_embeddings, (rows, length), generator=_generator())
        return ids.to(words.weight.device)


class PromptWriter(nn.Module):
    """The prompts of an interaction, of each layer by a network of its own.

        p_l = W'_l tanh(W_l h + b_l) + b'_l

    ClickPrompt eq. 6 with the two layers, tanh and the hidden units, as many as the language model is wide, of the
    authors' code; p_l are the layer's K keys and values.

    It starts from prompts like the layer's own keys and values: b' is drawn with their mean and deviation, and W' so
    that a representation of unit size moves them by about as much. Prompts that are much smaller or larger than what
    attention is used to would be read by no word, or by all of them instead of the text.

    Args:
        inputs: length H of the representation.
        reader: the language model that reads them.
    """

    def __init__(self, inputs: int, reader: PromptedLanguageModel) -> None:
        super().__init__()
        self.shape = reader.shape
        hidden = reader.language_model.base.config.hidden_size
        layer = lambda: nn.Sequential(
            nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, math.prod(self.shape[1:]))
        )
        self.layers = nn.ModuleList(layer() for _ in reader.own)
        for (first, _, last), own in zip(self.layers, reader.own, strict=True):
            mean, deviation = (part.unsqueeze(1).expand(self.shape[1:]).flatten() for part in own.unbind(1))
            nn.init.normal_(first.weight, std=inputs**-0.5)
            nn.init.zeros_(first.bias)
            with torch.no_grad():
                last.weight.normal_(std=hidden**-0.5).mul_(deviation.unsqueeze(1))
                last.bias.normal_().mul_(deviation).add_(mean)

    def forward(self, representation: Tensor) -> Tensor:
        """Representations [B, H] of a CTR model -> prompts [B, layers, 2 (keys and values), K, width of the keys]."""
        written = torch.stack([layer(representation) for layer in self.layers], 1)
        return written.unflatten(2, self.shape[1:])


def check_prompts(name: str, config: PromptConfig) -> None:
    """Raise the UserError of `PromptedLanguageModel` for a model whose family reads no such prompts; no weights are
    read."""
    folder = source.fetch(name)
    with source.quiet():
        _check_family(name, AutoConfig.from_pretrained(folder), config)


def _check_family(name: str, model: Any, config: PromptConfig) -> None:
    family = model.model_type
    if config.shift_positions and getattr(model, "is_encoder_decoder", False):
        raise UserError(f"prompts.shift_positions: not for {family}, which takes no positions")
    if family not in SELF_ATTENTION:
        raise UserError(
            f"language model '{name}': {family} reads no prompts; take one of {_known()}. {source.DEFAULT} is a bert"
        )


def _known() -> str:
    return ", ".join(SELF_ATTENTION)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    prompts: dict[nn.Module, Tensor] | None = None,
    watch: Callable[..., None] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface, with the prompts of `module` in front, if it has any.

    Prompts come as an argument of the call, not by a cache: so they shift no position, a layer may have none, and
    gradient checkpointing finds them when it computes a layer again.

    Args:
        module: the attention that calls.
        query: [B, heads, T, d].
        key: [B, heads or fewer, S, d].
        value: [B, heads or fewer, S, d].
        attention_mask: [B, 1, T, S], true where a token is seen; None = all are.
        prompts: of each attention that has some, [B, 2, K, width of its keys].
        watch: is shown (module, query, key, value, attention_mask, scaling), prompts included.
        options: as `attend` takes them.
    """
    if prompts and module in prompts:
        own = prompts[module].to(key.dtype).unflatten(-1, (key.shape[1], -1))
        keys, values = own.transpose(2, 3).unbind(1)
        key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (keys.shape[2], 0), value=True)
    if watch:
        watch(module, query, key, value, attention_mask, options["scaling"])
    return attend(module, query, key, value, attention_mask, **options)


def _mask(*args: Any, allow_is_causal_skip: bool = False, **options: Any) -> Tensor | None:
    """The mask of scaled dot-product attention. A causal one is always made: torch's own would cut off the prompts."""
    return sdpa_mask(*args, allow_is_causal_skip=False, **options)


AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, _mask)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
