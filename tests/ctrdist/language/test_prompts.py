import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, DistilBertConfig
from transformers.models.bert.modeling_bert import BertSelfAttention

from ctrdist.errors import UserError
from ctrdist.language import source
from ctrdist.language.lora import LoraConfig
from ctrdist.language.model import LanguageModel
from ctrdist.language.prompts import PromptConfig, PromptedLanguageModel, PromptWriter, check_prompts
from ctrdist.language.tokens import TokenBatch, tokenize

FAMILIES = ["bert", "minilm", "roberta", "xlm-roberta", "gpt2", "opt", "opt-projected", "qwen2", "llama", "bart"]
TEXTS = ["red dog and the sea", "war", "a long sad film about love"]


@pytest.fixture(params=FAMILIES)
def folder(request, lm_family) -> Path:
    return lm_family(request.param)


def load(folder: Path, *options, **more) -> PromptedLanguageModel:
    """In float64, without dropout."""
    return PromptedLanguageModel(
        LanguageModel.load(str(folder), head=True).double().eval(), PromptConfig(*options, **more)
    )


def tokens(reader: PromptedLanguageModel) -> TokenBatch:
    return tokenize(reader.language_model.tokenizer, TEXTS, range(len(TEXTS)), max_length=16)


def draw(reader: PromptedLanguageModel, rows: int = len(TEXTS), scale: float = 1.0) -> Tensor:
    drawn = torch.randn(rows, *reader.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (scale * drawn).requires_grad_()


# Equation 7 by hand: of one text without padding, each layer reads the keys and values of its prompts and its words.


class ByHand:
    """A language model's states of one text, from its weights; keeps the attention on prompts in `seen`."""

    def __init__(self, base: torch.nn.Module, prompts: Tensor, first_position: int = 0) -> None:
        self.base, self.config, self.first, self.seen = base, base.config, first_position, []
        self.prompts = list(prompts)  # of the layers in the order in which they come, [2, K, width] each

    def states(self, ids: Tensor) -> Tensor:
        """Ids [n] -> [n, width]."""
        return getattr(self, self.config.model_type.replace("-", "_"))(ids, torch.arange(len(ids)) + self.first)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool, prompted: bool = True) -> Tensor:
        count = 0
        if prompted and self.prompts:
            own = self.prompts.pop(0)
            if own is not None:
                count = own.shape[1]
                k, v = torch.cat([own[0], k]), torch.cat([own[1], v])
        width, queries_a_key = q.shape[1] // heads, q.shape[1] // k.shape[1]
        sees = torch.ones(len(q), len(k))
        sees = sees.tril(count) if causal else sees
        out, seen = [], []
        for head in range(heads):
            own = slice(head // queries_a_key * width, (head // queries_a_key + 1) * width)
            scores = q[:, head * width : (head + 1) * width] @ k[:, own].T / math.sqrt(width)
            weights = scores.exp() * sees
            weights = weights / weights.sum(1, keepdim=True)
            out.append(weights @ v[:, own])
            seen.append(weights[:, :count])
        if count:
            self.seen.append(torch.stack(seen))
        return torch.cat(out, 1)

    def bert(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.base.embeddings(ids[None], position_ids=positions[None])[0]
        for layer in self.base.encoder.layer:
            own = layer.attention.self
            read = self.attend(own.query(x), own.key(x), own.value(x), self.config.num_attention_heads, False)
            x = layer.attention.output(read, x)
            x = layer.output(layer.intermediate(x), x)
        return x

    def roberta(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.bert(ids, positions + self.config.pad_token_id + 1)

    xlm_roberta = roberta

    def gpt2(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.base.wte(ids) + self.base.wpe(positions)
        for layer in self.base.h:
            q, k, v = layer.attn.c_attn(layer.ln_1(x)).chunk(3, 1)
            x = x + layer.attn.c_proj(self.attend(q, k, v, self.config.n_head, True))
            x = x + layer.mlp(layer.ln_2(x))
        return self.base.ln_f(x)

    def opt(self, ids: Tensor, positions: Tensor) -> Tensor:
        stack, before = self.base.decoder, self.config.do_layer_norm_before
        same = torch.nn.Identity()
        x = (stack.project_in or same)(stack.embed_tokens(ids)) + stack.embed_positions.weight[positions + 2]
        for layer in stack.layers:
            own, norms = layer.self_attn, (layer.self_attn_layer_norm, layer.final_layer_norm)
            h = norms[0](x) if before else x
            read = self.attend(own.q_proj(h), own.k_proj(h), own.v_proj(h), self.config.num_attention_heads, True)
            x = x + own.out_proj(read)
            x = x if before else norms[0](x)
            x = x + layer.fc2(layer.fc1(norms[1](x) if before else x).relu())
            x = x if before else norms[1](x)
        return (stack.project_out or same)((stack.final_layer_norm or same)(x))

    def qwen2(self, ids: Tensor, positions: Tensor) -> Tensor:
        x, heads = self.base.embed_tokens(ids), self.config.num_attention_heads
        for layer in self.base.layers:
            own, h = layer.self_attn, layer.input_layernorm(x)
            q, k = (self.rotate(part(h), own.head_dim, positions) for part in (own.q_proj, own.k_proj))
            x = x + own.o_proj(self.attend(q, k, own.v_proj(h), heads, True))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.base.norm(x)

    llama = qwen2

    def rotate(self, x: Tensor, width: int, positions: Tensor) -> Tensor:
        first, second = x.unflatten(1, (-1, width)).chunk(2, 2)
        rates = self.config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2) / width)
        angle = (positions[:, None] * rates)[:, None]
        turned = [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
        return torch.cat(turned, 2).flatten(1)

    def bart(self, ids: Tensor, positions: Tensor) -> Tensor:
        encoded = self.bart_stack(self.base.encoder, ids, positions, None)
        shifted = torch.cat([torch.tensor([self.config.decoder_start_token_id]), ids[:-1]])
        return self.bart_stack(self.base.decoder, shifted, positions, encoded)

    def bart_stack(self, stack: torch.nn.Module, ids: Tensor, positions: Tensor, encoded: Tensor | None) -> Tensor:
        x = stack.layernorm_embedding(stack.embed_tokens(ids) + stack.embed_positions.weight[positions + 2])
        for layer in stack.layers:
            own, decodes = layer.self_attn, encoded is not None
            read = self.attend(own.q_proj(x), own.k_proj(x), own.v_proj(x), own.num_heads, decodes)
            x = layer.self_attn_layer_norm(x + own.out_proj(read))
            if decodes:
                own = layer.encoder_attn
                k, v = own.k_proj(encoded), own.v_proj(encoded)
                read = self.attend(own.q_proj(x), k, v, own.num_heads, False, prompted=False)
                x = layer.encoder_attn_layer_norm(x + own.out_proj(read))
            x = layer.final_layer_norm(x + layer.fc2(torch.nn.functional.gelu(layer.fc1(x))))
        return x


def by_hand(reader: PromptedLanguageModel, ids: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """States [n, width] of one text, and attention on prompts [layers, heads, n, K]."""
    base, of_layers = reader.language_model.base, list(prompts)
    if reader.config.layers == "first":
        stacks = [base.encoder.layers, base.decoder.layers] if base.config.model_type == "bart" else [range(3)]
        of_layers = [
            own for own, stack in zip(prompts, stacks, strict=True) for own in [own] + [None] * (len(stack) - 1)
        ]
    hand = ByHand(base, of_layers, reader.config.count if reader.config.shift_positions else 0)
    return hand.states(ids), torch.stack(hand.seen)


@pytest.mark.parametrize("options", [{}, {"layers": "first"}, {"shift_positions": True}], ids=["all", "first", "shift"])
def test_states_gradients_and_attention_are_equation_7s(folder, options):
    if folder.name == "bart" and "shift_positions" in options:
        with pytest.raises(UserError, match="prompts.shift_positions: not for bart"):
            load(folder, 4, **options)
        return
    reader = load(folder, 4, **options)
    layers = {"bart": 4}.get(folder.name, 3)
    if options.get("layers") == "first":
        layers = {"bart": 2}.get(folder.name, 1)
    assert reader.shape == (layers, 2, 4, 8 if folder.name in ("qwen2", "llama") else 16)
    batch, prompts = tokens(reader), draw(reader)
    states, pooled = reader.states(batch.input_ids, batch.attention_mask, prompts)
    attention = reader.attention_on_prompts(batch.input_ids, batch.attention_mask, prompts)
    wanted = 0
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(2), dtype=states.dtype)
    for row, n in enumerate(batch.lengths):
        expected, seen = by_hand(reader, batch.input_ids[row, :n], prompts[row])
        torch.testing.assert_close(states[row, :n], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(attention[row, :, :, :n].double(), seen.detach(), rtol=0, atol=1e-5)
        wanted = wanted + (weights[row, :n] * expected).sum()
    real = batch.attention_mask.unsqueeze(2)
    found, expected = (torch.autograd.grad(sum_, prompts)[0] for sum_ in ((weights * states * real).sum(), wanted))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.flatten(3).any(-1).all()  # of each text, layer, keys and values
    vectors = reader(batch.input_ids, batch.attention_mask, prompts)
    assert torch.equal(vectors, reader.language_model.pool(pooled, batch.attention_mask))


def test_each_texts_prompts_and_each_layers_matter_to_it_alone(folder):
    reader = load(folder)
    batch, prompts = tokens(reader), draw(reader).detach()
    before = reader.states(batch.input_ids, batch.attention_mask, prompts)[0]
    for layer in range(reader.shape[0]):
        for part in range(2):
            other = prompts.clone()
            other[1, layer, part] += 1
            changed = (reader.states(batch.input_ids, batch.attention_mask, other)[0] - before).abs().amax((1, 2))
            assert changed[1] > 1e-6 and not changed[[0, 2]].any()


@pytest.mark.parametrize("family", ["bert", "roberta", "qwen2"])
@pytest.mark.parametrize("shift", [False, True])
def test_prompts_that_no_word_reads_leave_the_model_as_it_was(lm_family, family, shift):
    reader = load(lm_family(family), 5, shift_positions=shift)
    model = reader.language_model
    base = model.base
    for module in reader.attentions:  # each head's last channel becomes one that no word's key has and each query wants
        q, k = (module.query, module.key) if hasattr(module, "query") else (module.q_proj, module.k_proj)
        with torch.no_grad():
            for part in (q, k):
                for channel in (3, 7):  # two, for they turn together in a rotary model
                    part.weight.unflatten(0, (-1, 8))[:, channel] = 0
                    part.bias.unflatten(0, (-1, 8))[:, channel] = 0
            q.bias.unflatten(0, (-1, 8))[:, 3] = 1
    prompts = draw(reader).detach()
    prompts[:, :, 0].unflatten(-1, (-1, 8))[..., 3] = -1e6
    batch = tokens(reader)
    head = AutoModelForCausalLM if family == "qwen2" else AutoModelForMaskedLM
    plain = head.from_config(copy.deepcopy(base.config), attn_implementation="eager").double().eval()
    plain.load_state_dict(model.model.state_dict())
    found = model.token_logits(reader.states(batch.input_ids, batch.attention_mask, prompts)[0])
    for row, n in enumerate(batch.lengths):
        positions = torch.arange(n) + (5 if shift else 0) + (2 if family == "roberta" else 0)
        with torch.no_grad():
            expected = plain(batch.input_ids[row : row + 1, :n], position_ids=positions[None]).logits[0]
        torch.testing.assert_close(found[row, :n], expected, rtol=0, atol=1e-5)
    attention = reader.attention_on_prompts(batch.input_ids, batch.attention_mask, prompts)
    assert attention.shape == (3, 3, 2, batch.input_ids.shape[1], 5) and not attention.any()


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2"])
def test_a_decoders_texts_may_be_padded_on_the_left(lm_family, family):
    reader = load(lm_family(family))
    batch, prompts = tokens(reader), draw(reader)
    length = batch.input_ids.shape[1]
    for row, n in enumerate(batch.lengths):
        ids, mask = torch.ones(1, length, dtype=torch.int64), torch.zeros(1, length, dtype=torch.int64)
        ids[0, -n:], mask[0, -n:] = batch.input_ids[row, :n], 1
        states = reader.states(ids, mask, prompts[row : row + 1])[0]
        hand = ByHand(reader.language_model.base, prompts[row], 0 if family == "opt" else length - n)
        torch.testing.assert_close(states[0, -n:], hand.states(batch.input_ids[row, :n]), rtol=0, atol=1e-5)


def test_gradient_checkpointing_keeps_the_prompts(folder):
    gradients = []
    for checkpointing in (False, True):
        reader = load(folder).train()
        if checkpointing:
            reader.language_model.checkpoint_layers()
        batch, prompts = tokens(reader), draw(reader)
        torch.manual_seed(0)  # of dropout
        reader(batch.input_ids, batch.attention_mask, prompts).square().sum().backward()
        gradients.append(prompts.grad)
    assert gradients[0].flatten(3).any(-1).all()
    torch.testing.assert_close(*gradients)


def test_bfloat16_is_close(folder):
    reader = load(folder).float()
    writer = PromptWriter(6, reader)
    batch, representation = tokens(reader), torch.randn(3, 6)
    wide = reader(batch.input_ids, batch.attention_mask, writer(representation))
    with torch.autocast("cpu", torch.bfloat16):
        narrow = reader(batch.input_ids, batch.attention_mask, writer(representation))
    assert torch.cosine_similarity(wide, narrow.float()).min() > 0.99


def test_an_empty_share_of_a_batch_gives_gradients_of_zero(folder):
    for shift in (False, True):
        if folder.name == "bart" and shift:
            continue
        reader = load(folder, shift_positions=shift)
        writer = PromptWriter(6, reader).double()
        batch, representation = tokens(reader), torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
        states, pooled = reader.states(batch.input_ids[:0], batch.attention_mask[:0], writer(representation))
        assert states.shape == (0, batch.input_ids.shape[1], reader.language_model.width)
        (states.sum() + pooled.sum()).backward()
        assert all(p.grad is not None and not p.grad.any() for p in writer.parameters())
        trained = [p for group in reader.language_model.parameter_groups(1e-3, 0) for p in group["params"]]
        assert all(p.grad is not None and not p.grad.any() for p in trained if p.grad is not None)


def test_adapters_are_trained_beside_prompts(lm_family):
    model = LanguageModel.load(str(lm_family("gpt2")), head=True)
    model.adapt(LoraConfig())
    reader = PromptedLanguageModel(model, PromptConfig())
    batch, prompts = tokens(reader), draw(reader)
    reader(batch.input_ids, batch.attention_mask, prompts).square().sum().backward()
    assert prompts.grad.any() and all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)


def test_a_copy_reads_its_prompts(folder):
    reader = load(folder)
    other = copy.deepcopy(reader)
    assert not set(map(id, reader.attentions)) & set(map(id, other.attentions))
    batch, prompts = tokens(reader), draw(reader)
    first, second = (one(batch.input_ids, batch.attention_mask, prompts) for one in (reader, other))
    assert torch.equal(first, second)


def test_without_prompts_and_when_saved_it_is_the_plain_model(folder, tmp_path):
    plain = LanguageModel.load(str(folder), head=True).eval()
    model = LanguageModel.load(str(folder), head=True).train()
    reader = PromptedLanguageModel(model, PromptConfig())
    assert model.training and reader.language_model is model
    model.eval()
    batch = tokens(reader)
    inputs = batch.input_ids, batch.attention_mask
    torch.testing.assert_close(model(*inputs), plain(*inputs))
    model.save(tmp_path)
    again = LanguageModel.load(str(tmp_path), head=True).eval()
    assert again.base.config._attn_implementation == plain.base.config._attn_implementation
    assert torch.equal(again(*inputs), plain(*inputs))


@pytest.mark.parametrize("family", ["deberta-v2", "modernbert"])
def test_other_families_are_refused(lm_family, family):
    with pytest.raises(UserError, match=f"{family} reads no prompts; take one of bert, roberta, .*, bart"):
        PromptedLanguageModel(LanguageModel.load(str(lm_family(family))), PromptConfig())


def test_a_configuration_tells_whether_prompts_are_read(folder, tmp_path):
    check_prompts(str(folder), PromptConfig())
    DistilBertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="distilbert reads no prompts"):
        check_prompts(str(tmp_path), PromptConfig())


@pytest.mark.parametrize("drops", [("prompts",), ("prompts", "watch")])
@pytest.mark.parametrize("layers", [(2,), (0, 1, 2)])
def test_a_family_that_drops_prompts_is_refused(lm_family, monkeypatch, drops, layers):
    own = BertSelfAttention.forward

    def forward(self, *args, **options):
        if self.layer_idx in layers:
            options = {name: value for name, value in options.items() if name not in drops}
        return own(self, *args, **options)

    monkeypatch.setattr(BertSelfAttention, "forward", forward)
    with pytest.raises(UserError, match="this version of transformers drops the prompts of bert"):
        load(lm_family("bert"))


def test_a_text_that_shifts_out_of_the_positions_is_refused(lm_family):
    reader = load(lm_family("bert"), 5, shift_positions=True)
    assert reader.longest == 19 and load(lm_family("bert"), 5).longest == 24
    ids = torch.ones(1, 20, dtype=torch.int64)
    reader.states(ids[:, :19], ids[:, :19], draw(reader, 1))
    with pytest.raises(UserError, match="20 tokens, and the language model has positions for 19 after 5 prompts"):
        reader.states(ids, ids, draw(reader, 1))
    with pytest.raises(UserError, match="prompts.count: 0 is under 1"):
        PromptConfig(0)


def test_a_writer_is_one_network_a_layer(lm_family):
    for layers, family in (("all", "qwen2"), ("first", "bert")):
        reader = load(lm_family(family), 2, layers)
        writer = PromptWriter(6, reader).double()
        representation = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
        prompts = writer(representation)
        assert prompts.shape == (5, *reader.shape) and len(writer.layers) == reader.shape[0]
        for layer, (first, _, last) in enumerate(writer.layers):
            assert first.weight.shape == (16, 6)
            hidden = torch.tanh(representation @ first.weight.T + first.bias)
            expected = (hidden @ last.weight.T + last.bias).reshape(5, *reader.shape[1:])
            torch.testing.assert_close(prompts[:, layer], expected)
        batch = tokens(reader)
        reader(batch.input_ids, batch.attention_mask, prompts[:3]).square().sum().backward()
        assert representation.grad[:3].any(1).all() and not representation.grad[3:].any()


def test_a_writer_starts_from_prompts_like_the_layers_own_keys_and_values():
    model = LanguageModel.load(source.DEFAULT).eval()
    reader = PromptedLanguageModel(model, PromptConfig(count=8))
    assert reader.shape == (6, 2, 8, 384)
    torch.manual_seed(0)
    with torch.no_grad():
        prompts = PromptWriter(32, reader)(torch.randn(64, 32))
    batch = tokenize(model.tokenizer, TEXTS * 4, range(12), max_length=16)
    with torch.no_grad():
        states = model.base(batch.input_ids, batch.attention_mask, output_hidden_states=True).hidden_states
    real = batch.attention_mask == 1
    for layer, module in enumerate(reader.attentions):
        for part, project in enumerate((module.key, module.value)):
            own = project(states[layer][real])
            written = prompts[:, layer, part].flatten(0, 1)
            # on random words and on these sentences they are not quite the same
            assert 0.5 < written.std(0).mean() / own.std(0).mean() < 2.5
            away = (written.mean(0) - own.mean(0)).abs().mean()
            assert away < own.std(0).mean()
