"""Interaction-level alignment, CTRL's first stage: a language model reads the text of every interaction.

CTRL: Connect Collaborative and Language Model for CTR Prediction (Li et al., 2023).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from benchmarks.cells.log import Log, raw_fields
from ctrdist.batch import Batch
from ctrdist.encode import ITEM
from ctrdist.interaction_text import TextConfig, compose
from ctrdist.items import Ragged, by_catalog_row, read_items
from ctrdist.language.model import LanguageModel
from ctrdist.language.parts import in_parts
from ctrdist.language.tokens import TokenBatch, pad
from ctrdist.losses import symmetric_info_nce
from ctrdist.optim import split_decay
from ctrdist.schema import HISTORY, MULTI, Field
from ctrdist.tasks import Task
from ctrdist.tasks.align import AlignConfig
from ctrdist.tasks.click import ClickModel
from ctrdist.texts import join_texts


@dataclass
class InteractionBatch:
    """B interactions, as the CTR model and as the language model read them.

    Args:
        rows: of the log.
        texts: their tokens; `items` numbers the interactions of the batch.
    """

    rows: Batch
    texts: TokenBatch

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device | str) -> "InteractionBatch":
        """The same batch on a device."""
        return InteractionBatch(self.rows.to(device), self.texts.to(device))


class InteractionAlignment(Task):
    """Each interaction's text should find the CTR model's representation of it among those of the batch, and back.

        L = L_text,table + L_table,text,  sim = cosine of linear projections to one width

    Both models are trained, with all that is in them, and so are the projections.

    Args:
        language_model: pools a text to its width.
        model: a CTR model without text.
        config: ROMA's learning rates, weight decay and batch size.
        temperature: divides the similarities.
        width: of the space in which they meet.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        model: ClickModel,
        config: AlignConfig,
        temperature: float = 0.1,
        width: int = 128,
    ) -> None:
        super().__init__()
        self.language_model, self.model, self.config, self.temperature = language_model, model, config, temperature
        self.from_text = nn.Linear(language_model.width, width)
        self.from_table = nn.Linear(model.backbone.width, width)

    def forward(self, batch: InteractionBatch) -> dict[str, Tensor]:
        parts, vectors = zip(*in_parts(self._encode, batch.texts, self.config.chunk), strict=True)
        order = torch.cat([part.items for part in parts])
        representation, _, _ = self.model.backbone.represent(self.model.inputs(batch.rows))
        table = self.from_table(representation)[order]
        return {"loss": symmetric_info_nce(torch.cat(vectors), table, self.temperature, similarity="cosine")}

    def parameter_groups(self) -> list[dict[str, Any]]:
        config = self.config
        heads = [*self.from_text.parameters(), *self.from_table.parameters()]
        texts = self.language_model.parameter_groups(config.lr, config.weight_decay)
        return texts + self.model.parameter_groups() + split_decay(heads, config.head_lr, config.head_weight_decay)

    def _encode(self, part: TokenBatch) -> Tensor:
        return self.from_text(self.language_model(part.input_ids, part.attention_mask))


def interaction_texts(log: Log, data: str, rows: pa.Table) -> list[str]:
    """The text of each interaction: its users' and context fields, the names of what the user clicked on before, and
    all that is said of the item.

    Args:
        data: the prepared log, for the items' names: the first part of their text.
        rows: encoded rows of `log`, with the raw values of their fields.
    """
    config, fields, said = TextConfig(), log.schema.row_fields, raw_fields(rows, log.schema)
    if log.schema.history_length:
        items = read_items(data, log.schema)
        names = by_catalog_row(join_texts(items, log.schema.text[:1]), items, log.catalog.ids)
        before = names.take(rows[HISTORY].combine_chunks().flatten())  # "" of padding, which is left out
        said = said.append_column(HISTORY, pa.FixedSizeListArray.from_arrays(before, log.schema.history_length))
        fields += (Field(HISTORY, MULTI),)
    free = log.texts.take(rows[ITEM].combine_chunks())
    return compose([join_texts(said, config.parts(fields))], free, config).to_pylist()


def interaction_batches(
    log: Log, rows: pa.Table, tokens: Ragged, padding: int, size: int
) -> Iterator[InteractionBatch]:
    """Rows and their tokens in batches, in their order."""
    for number, batch in enumerate(log.batches(rows, size)):
        start = number * size
        own = tokens.take(np.arange(start, start + len(batch)))
        yield InteractionBatch(batch, pad(own, np.arange(len(batch)), padding))
