"""What ClickPrompt's stages are made of, in any process: their tasks, and how these are written and read again."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ctrdist.batch import Batch
from ctrdist.config import from_dict, to_dict
from ctrdist.export import load_click_model, save_click_model
from ctrdist.items import Ragged
from ctrdist.language.assemble import SPECIAL, RowTokens
from ctrdist.language.model import LanguageModel, load_tokenizer
from ctrdist.language.prompts import PromptConfig, PromptedLanguageModel
from ctrdist.language.tokenizer import TextTokenizer
from ctrdist.language.tokens import pad
from ctrdist.precision import computing_in
from ctrdist.row_texts import RowTextConfig
from ctrdist.schema import Schema
from ctrdist.tasks.click import ClickConfig, ClickModel
from ctrdist.tasks.prompted import PromptedConfig, PromptedTask, PromptPretrainConfig, PromptPretraining
from ctrdist.tasks.prompted_click import PromptedClick, PromptFinetuneConfig
from ctrdist.text_training import LanguageModelConfig

LM, WEIGHTS, DESCRIPTION = "lm", "prompted.safetensors", "prompted.json"


def rates(ctr: ClickConfig, config: PromptedConfig) -> ClickConfig:
    """A CTR model's options with the learning rates that it has beside a language model. Pre-training hides no id: only
    words are masked (section 3.3); nor do its rows decay, of which clicks alone train the first-order weights."""
    ctr = replace(ctr, lr=config.lr or ctr.lr, table_lr=config.table_lr or ctr.table_lr)
    return replace(ctr, unknown_share=0.0, table_decay=0.0) if isinstance(config, PromptPretrainConfig) else ctr


def row_tokenizer(lm: str, config: RowTextConfig, prompts: PromptConfig) -> TextTokenizer:
    """The tokenizer of rows that a language model, by name or folder, reads with prompts."""
    tokenizer, room = load_tokenizer(lm), config.max_length
    if prompts.shift_positions:  # the language model then has so many positions less for words
        room = min(room, tokenizer.model_max_length - prompts.count)
    return TextTokenizer.of(tokenizer, room)


def pretraining_task(
    click: ClickModel, lm: LanguageModelConfig, prompts: PromptConfig, config: PromptPretrainConfig, seed: int
) -> PromptPretraining:
    """PA-MLM of a new CTR model and a language model, which is loaded; what is new is drawn by `seed`.

    Raises:
        UserError: the language model is none, or its family reads no prompts.
    """
    torch.manual_seed(seed)
    return PromptPretraining(click, _reader(lm, lm.name, prompts, config, head=True), config, lm.precision, seed)


def finetuning_task(
    click: ClickModel,
    lm: LanguageModelConfig,
    prompts: PromptConfig,
    config: PromptFinetuneConfig,
    start: Path | None,
    seed: int,
) -> PromptedClick:
    """Fine-tuning with the language model; what is new is drawn by `seed`.

    Args:
        start: folder that `save_prompted` wrote after pre-training or an earlier fine-tuning; None takes the language
            model as it comes, and a new prompt writer.
    """
    torch.manual_seed(seed)
    name = start / LM if start else lm.name
    task = PromptedClick(click, _reader(lm, str(name), prompts, config, head=False), config, lm.precision)
    if start:
        _load_own(task, start)
    return task


def save_prompted(task: PromptedTask, folder: Path) -> None:
    """Write the CTR model, the language model in folder `LM`, and what stands between them.

    Every worker calls it if tables are spread over them. After pre-training the tables' optimizer starts anew.
    """
    fine_tuned = isinstance(task, PromptedClick)
    save_click_model(task.click, folder, optimizer_state=fine_tuned)
    if task.group.rank:
        return
    task.reader.language_model.save(folder / LM)
    save_file(_own(task), folder / WEIGHTS)
    described = {
        "prompts": to_dict(task.reader.config),
        "finetune": to_dict(task.config) if fine_tuned else None,
        "precision": task.precision,
    }
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=1))


def load_scorer(folder: Path, schema: Schema) -> ClickModel | PromptedClick:
    """What scores rows: a click model or, where there is one, a click model with its language model."""
    if not (folder / DESCRIPTION).exists():
        return load_click_model(folder, schema)
    task = load_prompted(folder, schema)
    assert isinstance(task, PromptedClick), f"{folder}: pre-trained only"
    return task


def load_prompted(folder: Path, schema: Schema) -> PromptedTask:
    """What `save_prompted` wrote, to be read from: after fine-tuning it can predict, else it has no head."""
    about = json.loads((folder / DESCRIPTION).read_text())
    prompts = from_dict(PromptConfig(), about["prompts"], str(folder / DESCRIPTION))
    precision = about.get("precision", "float32")  # folders of old have none, and were scored so
    parts = load_click_model(folder, schema), PromptedLanguageModel(LanguageModel.load(str(folder / LM)), prompts)
    if about["finetune"]:
        config = from_dict(PromptFinetuneConfig(), about["finetune"], str(folder / DESCRIPTION))
        task: PromptedTask = PromptedClick(*parts, config, precision)
    else:
        task = PromptedTask(*parts, PromptPretrainConfig(), precision)
    _load_own(task, folder)
    return task.eval()


@torch.no_grad()
def attention_by_field(
    task: PromptedTask, batch: Batch, said: RowTokens, names: Sequence[str]
) -> dict[str, list[float]]:
    """How the attention of a field's words, all of them masked, is shared out among the K prompts, at the last layer
    that has some: by field, the mean over heads, words and rows, divided by its sum (table 7). A decoder's words are
    not masked.

    Args:
        batch: with tokens.
        said: of the same rows, which field each token is of.
        names: of the fields.
    """
    tokens, mask_id = batch.tokens, task.reader.language_model.tokenizer.mask_token_id
    fields = Ragged(said.fields.astype(np.int32), said.tokens.offsets)
    of = pad(fields, tokens.items.tolist(), SPECIAL).input_ids.to(tokens.items.device)
    representation, found = task.click.represent(batch)[0], {}
    for number, name in enumerate(names):
        own = of == number
        if own.any():
            ids = tokens.input_ids if mask_id is None else tokens.input_ids.masked_fill(own, mask_id)
            with computing_in(task.precision, ids.device):
                prompts = task.prompts(representation, tokens)
                weights = task.reader.attention_on_prompts(ids, tokens.attention_mask, prompts)[:, -1]
            shares = weights.mean(1)[own].double().mean(0)
            found[name] = (shares / shares.sum()).tolist()
    return found


def _reader(
    lm: LanguageModelConfig, name: str, prompts: PromptConfig, config: PromptedConfig, head: bool
) -> PromptedLanguageModel:
    if not config.lm_lr:  # frozen: no adapters either
        lm = replace(lm, lora=replace(lm.lora, use="never"))
    return PromptedLanguageModel(lm.prepare(LanguageModel.load(name, lm.pooling, head)), prompts)


def _own(task: PromptedTask) -> dict[str, torch.Tensor]:
    parts = {name: value for name, value in task.state_dict().items() if not name.startswith(("click.", "reader."))}
    return {name: value.contiguous() for name, value in parts.items()}


def _load_own(task: PromptedTask, folder: Path) -> None:
    """The writer, and the layers that combine the logits where the folder has them."""
    saved, own = load_file(folder / WEIGHTS), _own(task)
    task.load_state_dict({name: value for name, value in saved.items() if name in own}, strict=False)
