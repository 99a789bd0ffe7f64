"""The job that encodes any items, whole, on a tiny language model."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrdist.language.encode import EncodeConfig, Encoder, Source
from ctrdist.storage import State
from ctrdist.text_table import load_text_table
from ctrdist.vocabulary import Vocabulary
from jobs import encode_items as JOB
from raycluster import cli

ROOT = Path(__file__).parents[2]
GOODS = {"k2": ("red dog", "a sad film"), "k1": ("the sea", None), "k9": ("old cat", "new story")}


@pytest.fixture
def options(tiny_lm, tmp_path) -> JOB.EncodeOptions:
    write(tmp_path, GOODS)
    config = EncodeConfig(max_length=16, precision="float32", table="float32")
    return JOB.EncodeOptions(
        out=str(tmp_path / "out"), items=str(tmp_path / "goods" / "*.parquet"), id_column="sku",
        text=("{title}.", "{about}"), lm=str(tiny_lm), pooling="mean", encode=config,
    )  # fmt: skip


def write(folder: Path, goods: dict) -> None:
    (folder / "goods").mkdir(exist_ok=True)
    for number, (sku, (title, about)) in enumerate(goods.items()):
        row = {"sku": [sku], "title": [title], "about": pa.array([about], pa.string()), "price": [1.0]}
        pq.write_table(pa.table(row), folder / "goods" / f"{number}.parquet")


def vectors(options: JOB.EncodeOptions) -> dict[str, list[float]]:
    """The table's vector of each item."""
    state = State(options.out)
    ids = Vocabulary.load(state.local("items") / "catalog" / "ids")
    table = load_text_table(state.local("text_table"), rows=ids.size, catalog=ids.fingerprint())
    assert not table[:2].any()
    return {key.decode(): table[row].tolist() for key, row in zip(ids.keys, ids.rows, strict=True)}


def test_any_parquet_files_grow_a_table_whose_rows_stay(ray_cluster, options, tmp_path, capsys):
    JOB.run(options)
    source = Source(options.lm, pooling="mean")
    plain = Encoder(source.load(), options.encode)
    texts = {"k1": "the sea.", "k2": "red dog. a sad film", "k9": "old cat. new story"}
    found = vectors(options)
    for key, text in texts.items():
        np.testing.assert_allclose(found[key], plain.encode(source.tokenizer(16)([text]))[0], atol=2e-6)
    said = capsys.readouterr().out
    assert "of these encoded" in said and "text_table." in said
    JOB.run(options)
    assert "nothing to do" in capsys.readouterr().out
    write(tmp_path, GOODS | {"k0": ("a war", "about love")})
    JOB.run(options)
    facts = State(options.out).find("text_table").facts
    assert (facts["encoded"], facts["copied"]) == (1, 3)
    grown = vectors(options)
    assert {key: grown[key] for key in texts} == found and list(grown) == ["k0", "k1", "k2", "k9"]
    ids = Vocabulary.load(State(options.out).local("items") / "catalog" / "ids")
    assert ids.lookup(pa.array(["k1", "k2", "k9", "k0"])).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--out is missing"),
        (["--out", "o"], "give either --data, a prepared log, or --items, Parquet files"),
        (["--out", "o", "--items", "x"], "--items needs --text"),
        (["--out", "o", "--data", "nowhere"], "nowhere/schema.yaml"),
        (["--out", "o", "--items", "no/*.parquet", "--text", "{title}"], "no/*.parquet: no Parquet files there"),
        (["--out", "o", "--data", "d", "--lm", "/no/model"], "/no/model"),
        (["--out", "o", "--data", "d", "--encode.max-length", "0"], "encode.max_length: 0"),
    ],
)
def test_what_a_user_gets_wrong(ray_cluster, tiny_lm, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ctr.yaml").write_text("state: of another job\n")
    arguments = arguments if "--lm" in arguments else ["--lm", str(tiny_lm), *arguments]
    with pytest.raises(SystemExit) as stop:
        cli.main(lambda: JOB.run(cli.parse(JOB.EncodeOptions(), "", arguments, file="encode.yaml")))
    assert stop.value.code == 1 and said in capsys.readouterr().err


def test_help_has_every_option():
    shown = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "encode_items.py"), "--help"], capture_output=True, text=True
    )
    assert shown.returncode == 0
    for option in ("--out", "--items", "--id-column", "--text", "--encode.gpu-share", "--encode.table", "--lm"):
        assert option in shown.stdout
