"""Requests are one user's, with distinct candidates; all answer them in turns, each by the model that its name says."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from benchmarks import serve
from benchmarks.cells.latency import answer_in_turns, draw_requests, summary, time_requests
from benchmarks.cells.options import LogOptions
from ctrdist.backbones import BackboneConfigs
from ctrdist.backbones.dcnv2 import Config as DCNv2Config
from ctrdist.batch import collate
from ctrdist.datasets.synthetic import SyntheticConfig, prepare
from ctrdist.export import load_click_model
from ctrdist.interaction_text import TextConfig
from ctrdist.language.encode import EncodeConfig
from ctrdist.language.tokens import TokenBatch
from ctrdist.prompted import load_prompted
from ctrdist.tasks.click import ClickConfig
from ctrdist.tasks.m_llm import MLLMConfig, ModifiedLanguageModel


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, tiny_lm: Path) -> serve.Options:
    data = tmp_path_factory.mktemp("serve") / "data"
    prepare(SyntheticConfig(users=60, items=40, days=6, rows_per_day=200), str(data))
    return serve.Options(
        log=LogOptions(data, date="2024-01-04", train_days=4, test_days=2), rounds=2, requests=3, candidates=16,
        lm_candidates=5, threads=1, lm=str(tiny_lm), m_llm=MLLMConfig(hidden=(8, 6)),
        ctr=ClickConfig(backbone="dcnv2", dim=4, networks=BackboneConfigs(dcnv2=DCNv2Config(hidden=(8,)))),
        encode=EncodeConfig(max_length=16, precision="float32", table="float32"), text=TextConfig(item_text="first"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(options: serve.Options, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("models")
    log = options.log.open(folder, raw=True)
    serve.write_models(log, options, folder)
    return serve.Server(log.schema, log.catalog, str(options.log.data), folder, options), log


def test_a_request_is_one_user_and_distinct_candidates(server):
    _, log = server
    requests = list(draw_requests(log, 16, 3, 4))
    for request in requests:
        items = request["item"].to_pylist()
        assert len(items) == len(set(items)) == 16 and set(items) <= set(log.catalog.items.tolist())
        assert len(set(request["raw.user_id"].to_pylist())) == len(set(map(str, request["history"].to_pylist()))) == 1
    assert all(one.equals(again) for one, again in zip(requests, draw_requests(log, 16, 3, 4), strict=True))
    assert requests[0]["item"] != requests[1]["item"]
    assert next(draw_requests(log, 1000, 0, 1)).num_rows == 40


def test_all_answer_the_same_requests_and_begin_in_turn():
    asked, rounds = [], [[pa.table({"n": [number]})] * 2 for number in range(3)]

    def clock(name: str):
        def answer(requests: list[pa.Table]) -> list[float]:
            asked.append((name, requests[0]["n"][0].as_py()))
            return [float(len(asked))] * len(requests)

        return answer

    found = answer_in_turns({"b": clock("b"), "a": clock("a")}, rounds)
    assert asked == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert list(found) == ["b", "a"] and found["a"].tolist() == [[1, 1], [4, 4], [5, 5]]
    ticks = iter([1.0, 1.002, 2.0, 2.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.cells.latency.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
        assert time_requests(lambda _: None, [rounds[2][0], rounds[0][0]]) == pytest.approx([2.0, 0.0])
    told = summary(np.arange(101.0))
    assert told == pytest.approx({"p50_ms": 50, "p99_ms": 99, "mean_ms": 50, "sd_ms": np.sqrt((101**2 - 1) / 12)})


@torch.inference_mode()
def test_each_model_is_what_its_name_says(server, tiny_lm: Path):
    served, log = server
    request = next(draw_requests(log, 5, 1, 1))
    batch, folder = collate(request, log.schema, log.catalog), served.folder
    with torch.inference_mode(False):  # a prompted language model is put to the test, with gradients, when it is loaded
        ready = {name: served.ready(name) for name in serve.MODELS}
        together = load_prompted(folder / "clickprompt_lm", log.schema)
    answers = {name: score(request) for name, score in ready.items()}
    assert all(len(set(scores.tolist())) == 5 for scores in answers.values())
    assert torch.equal(answers["backbone"], answers["vanilla"]), "as they are drawn, and trained without distillation"
    for name in serve.NETWORKS:
        torch.testing.assert_close(answers[f"ours_{name}"], answers[name], atol=1e-6, rtol=0)
    sizes = [(folder / name / "model.safetensors").stat().st_size for name in ("backbone", "vanilla", "gain", "cela")]
    assert sizes[0] == sizes[1] < min(sizes[2:])
    assert torch.equal(answers["vanilla"], load_click_model(folder / "vanilla", log.schema).predict(batch))
    # The language model by hand: the whole sentence of each candidate, alone.
    items = pq.read_table(Path(served.data) / "items").to_pylist()
    said = dict(zip(log.catalog.ids.lookup(pa.array([item["item_id"] for item in items])), items, strict=True))
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_lm), AutoModel.from_pretrained(tiny_lm).eval()
    states, prompted = [], []
    for number, row in enumerate(request.to_pylist()):
        item = said[row["item"]]
        parts = [f"{field.name} is {row[f'raw.{field.name}']}." for field in log.schema.row_fields]
        parts += [f"{field.name} is {item[field.name]}." for field in log.schema.item]
        text = " ".join([f"{item['title']}.", item["text"], *parts])
        tokens = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
        states.append(model(**tokens).last_hidden_state.mean(1))
        words, candidate = tokens["input_ids"], collate(request.slice(number, 1), log.schema, log.catalog)
        alone = TokenBatch(torch.tensor([row["item"]]), words, torch.ones_like(words))
        prompted.append(together.predict(replace(candidate, tokens=alone)))
    m_llm, gain = ModifiedLanguageModel.load(folder), load_click_model(folder / "gain", log.schema)
    layers = m_llm.adapted(torch.cat(states))
    torch.testing.assert_close(answers["m_llm"], torch.sigmoid(m_llm.logits(layers)))
    torch.testing.assert_close(answers["clickprompt_lm"], torch.cat(prompted))
    torch.testing.assert_close(answers["gain_lm"], gain.predict(replace(batch, vector=layers)))
    vectors = np.load(folder / serve.VECTORS)[request["item"].to_numpy()].astype(np.float32)
    torch.testing.assert_close(answers["gain"], gain.predict(replace(batch, vector=torch.from_numpy(vectors))))


def test_a_whole_run(options: serve.Options, capsys):
    serve.main(replace(options, models=("gain_lm",)))
    told = capsys.readouterr().out
    found = json.loads(told.rstrip().splitlines()[-1])
    (row,) = found["rows"]
    assert (row["model"], row["candidates"], row["requests"]) == ("gain_lm", 5, 6) and "gain_lm *" in told
    assert 0 < row["p50_ms"] <= row["p99_ms"] and row["round_sd_ms"] > 0
    with pytest.raises(SystemExit, match="unknown nothing"):
        serve.main(replace(options, models=("nothing",)))


def test_models_are_compared_by_the_time_a_candidate():
    rows = [serve.row("vanilla", np.array([[1.0, 2.0], [3.0, 4.0]]), 100), serve.row("m_llm", np.full((2, 2), 5.0), 10)]
    assert rows[0]["p50_ms"] == 2.5 and rows[0]["us_a_candidate"] == 25 and rows[0]["requests"] == 4
    assert rows[0]["round_sd_ms"] == pytest.approx(np.std([1.5, 3.5], ddof=1)) and rows[1]["round_sd_ms"] == 0
    expected = {"m_llm_over_vanilla_p50": 20, "m_llm_over_vanilla_p99": 0.5 / (np.percentile([1, 2, 3, 4], 99) / 100)}
    assert serve.ratios(rows) == pytest.approx(expected)


def test_what_is_served_is_compared_with_the_same_network_and_with_the_id_model():
    times = {"backbone": 8.0, "cela": 10.0, "ours_backbone": 2.0, "ours_cela": 3.0}
    found = serve.ratios([serve.row(name, np.full((2, 2), ms), 100) for name, ms in times.items()])
    assert {name.removesuffix("_p50"): ratio for name, ratio in found.items() if name.endswith("_p50")} == {
        "cela_over_backbone": 1.25, "ours_backbone_over_backbone": 0.25, "ours_cela_over_backbone": 0.375,
        "ours_cela_over_cela": 0.3, "ours_cela_over_ours_backbone": 1.5,
    }  # fmt: skip
    assert serve.row("backbone", np.full((2, 2), 8.0), 100)["requests_s"] == 125
