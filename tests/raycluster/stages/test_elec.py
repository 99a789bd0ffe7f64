"""The pair of an earlier day goes on, and rows are represented as the trainer would read them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ctrdist.backbones import BackboneConfigs
from ctrdist.backbones.dcnv2 import Config as DCNv2Config
from ctrdist.fields import save_encoders
from ctrdist.language.encode import EncodeConfig
from ctrdist.log import find_faults, list_days, list_row_groups, read_row_group
from ctrdist.storage import State
from ctrdist.tasks.click import ClickConfig
from ctrdist.tasks.distill import DistillConfig
from ctrdist.tasks.m_llm import MLLMConfig, ModifiedLanguageModel
from ctrdist.text_table import create_text_table, seal_text_table
from jobs.elec_daily import ElecOptions
from raycluster.ingest import LogReader
from raycluster.stages.elec import GAIN, PART, _pair, represent_rows, save_pair

CTR = ClickConfig(backbone="dcnv2", dim=4, networks=BackboneConfigs(dcnv2=DCNv2Config(hidden=(8,))))


@pytest.fixture
def reader(small_log: Path, small_read, tmp_path: Path) -> LogReader:
    schema, vocabularies, catalog = small_read
    state = State(tmp_path)
    with state.create("read") as folder:
        schema.save(folder / "schema.yaml")
        save_encoders(vocabularies, folder / "vocabulary")
        catalog.save(folder / "catalog")
    return LogReader(str(small_log), state.uri, "read")


@pytest.mark.parametrize("share", [False, True])
def test_a_pair_goes_on_where_it_was(reader: LogReader, share: bool):
    config, state = DistillConfig(share_embeddings=share), State(reader.state)
    made = _pair(reader, CTR, config, 5, None, seed=1)
    with torch.no_grad():
        made.gain.join.weight += 0.5
    for table in made.vanilla.tables.values():
        table.weight += 0.25
    with state.create("pair", facts={"read": "read"}) as folder:
        save_pair(made, folder)
    again = _pair(reader, replace(CTR, lr=0.5), config, 5, state.find("pair"), seed=2)
    assert again.vanilla.config.lr == 0.5 and (again.gain.tables is None) == share
    for own, its in ((made.vanilla, again.vanilla), (made.whole_gain(), again.whole_gain())):
        assert all(torch.equal(value, its.state_dict()[key]) for key, value in own.state_dict().items())
    files = {str(path.relative_to(state.local("pair"))) for path in state.local("pair").rglob("*.*")}
    names = {"model.json", "model.safetensors"}
    assert files == names | {f"{GAIN}/{name}" for name in names}


def test_bad_rows_are_represented_by_zeros_and_good_ones_in_parts(reader: LogReader, small_read, monkeypatch):
    schema, _, catalog = small_read
    state, draws = State(reader.state), np.random.default_rng(0)
    with state.create("table") as folder:
        table = create_text_table(folder, catalog.size, 6, "float32")
        table[2:] = draws.normal(size=(catalog.size - 2, 6))
        seal_text_table(folder, table, np.arange(catalog.size, dtype=np.uint64), "model", catalog.ids.fingerprint())
    model = ModifiedLanguageModel(6, True, MLLMConfig(hidden=(8, 4))).eval()
    files = list_days(reader.data)
    groups = list_row_groups(reader.data, files, tuple(files), schema)
    whole = [represent_rows(reader, "table", model, group) for group in groups]
    monkeypatch.setattr("raycluster.stages.elec.PART", 3)
    zeros = 0
    for group, (vectors, probabilities) in zip(groups, whole, strict=True):
        good = find_faults(read_row_group(reader.data, group, schema), group.day, catalog) == 0
        assert vectors.shape == (group.rows, 4) and (probabilities[good] > 0).all()
        assert not vectors[~good].any() and not probabilities[~good].any()
        zeros += (~good).sum()
        again = represent_rows(reader, "table", model, group)
        np.testing.assert_allclose(again[0], vectors, atol=1e-6)
    assert zeros == 5 and PART > max(group.rows for group in groups)


def test_what_a_representation_means_changes_with_what_is_read(tiny_lm, lm_family):
    options = ElecOptions()
    options = replace(options, lm=replace(options.lm, name=str(tiny_lm)))
    same = replace(options, ctr=CTR, encode=replace(options.encode, encoders=3), m_llm=replace(options.m_llm, lr=0.1))
    assert same.representation() == options.representation()
    for other in (
        replace(options, text_granularity="interaction"),
        replace(options, text=replace(options.text, item_text="first")),
        replace(options, encode=EncodeConfig(max_length=7)),
        replace(options, m_llm=MLLMConfig(hidden=(512, 64))),
        replace(options, lm=replace(options.lm, name=str(lm_family("bert")))),
        replace(options, distill=DistillConfig(without_text=True)),
    ):
        assert other.representation() != options.representation()
