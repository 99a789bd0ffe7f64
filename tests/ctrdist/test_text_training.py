"""What DAP and ROMA are made of, outside the job."""

import numpy as np
import pytest
import torch

from ctrdist.errors import UserError
from ctrdist.items import Ragged
from ctrdist.language.tokenizer import StoredTokens
from ctrdist.tasks.align import AlignConfig
from ctrdist.tasks.click import ClickConfig, ClickModel, table_sizes
from ctrdist.text_training import alignment_targets, split_items, text_batches, text_loop


def test_targets_are_embeddings_at_unit_mean_square(small_read):
    schema, vocabularies, catalog = small_read
    model = ClickModel(schema, table_sizes(vocabularies, schema), ClickConfig(backbone="dnn", dim=4))
    found = alignment_targets(model, schema, catalog, block=5)  # several blocks
    assert found.shape == (catalog.size, 12) and found.dtype == torch.float32
    assert found[1:].unflatten(1, (3, 4)).square().mean((0, 2)).tolist() == pytest.approx([1.0] * 3)
    genres = catalog.fields["genres"]
    for row in range(1, catalog.size):
        for number, name in enumerate(("item_id", "genres", "studio")):
            own = np.atleast_1d(catalog.fields[name][row]) if name != "genres" else None
            if own is None:
                own = genres.values[genres.offsets[row] : genres.offsets[row + 1]]
            vector = model.tables[name].weight[torch.from_numpy(own.astype(np.int64))]
            vector = vector.mean(0) if len(own) else torch.zeros(4)
            part = found[row, 4 * number : 4 * number + 4]
            assert torch.allclose(part * vector.norm(), vector * part.norm(), atol=1e-6)


def test_batches_of_an_epoch_are_all_items_once():
    rows = np.arange(10, 45)
    lengths = rows % 7
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = StoredTokens(rows, Ragged(np.repeat(rows, lengths).astype(np.int32), offsets), 0)
    batches = list(text_batches(tokens, rows, 8, seed=1, epochs=2))
    assert [len(batch) for batch in batches] == [8, 8, 8, 8, 3] * 2 and [b.epoch for b in batches] == [0] * 5 + [1] * 5
    for epoch in (batches[:5], batches[5:]):
        assert sorted(torch.cat([batch.items for batch in epoch]).tolist()) == rows.tolist()
    for batch in batches:
        for item, ids in zip(batch.items.tolist(), batch.input_ids.tolist(), strict=True):
            assert [token for token in ids if token] == [item] * (item % 7)
    assert batches[0].items.tolist() != batches[5].items.tolist()
    assert [b.items.tolist() for b in text_batches(tokens, rows, 8, 1, 2, step=7)] == [
        batch.items.tolist() for batch in batches[7:]
    ]


def test_held_out_items_and_steps():
    items = np.arange(2, 1002)
    config = AlignConfig(valid_share=0.3, patience=1, batch_size=100)
    trained, held = split_items(items, config, 3, "roma")
    assert sorted([*trained, *held]) == items.tolist() and 250 < len(held) < 350
    loop = text_loop(config, 701, 2, "float32", 3)
    assert (loop.steps_per_epoch, loop.epochs, loop.patience, loop.schedule) == (8, 2, 1, "linear")
    with pytest.raises(UserError, match="roma: valid_share 0.3: 0 of 0 items"):
        split_items(items[:0], config, 3, "roma")
