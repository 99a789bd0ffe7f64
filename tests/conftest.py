"""Fixtures for all tests."""

import fcntl
import gc
import json
import multiprocessing
import os
import runpy
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from tests.servers import postgres, processes, s3  # noqa: F401  fixtures for all tests

# What the user's shell says of servers, clusters and proxies is not for tests.
for name in list(os.environ):
    told = name.startswith(("MLFLOW_", "RAY_", "AWS_")) or name.lower().endswith("_proxy")
    if told or name in ("FORCE_COLOR", "COLUMNS"):
        del os.environ[name]
# Ray ends processes when the machine, whoever uses it, is short of memory; no test is about that.
os.environ["RAY_memory_monitor_refresh_ms"] = "0"

torch.set_num_threads(1)

# The same examples each time, however slow the machine.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True)
hypothesis.settings.load_profile("project")

ROOT = Path(__file__).parents[1]
WORDS = "red blue old new long short funny sad film book story of the a and with war love dog cat house sea".split()

_STARTED = multiprocessing.get_context("forkserver")
_STARTED.set_forkserver_preload(["pytest", "torch", "ctrdist.tasks.click", "ctrdist.tasks.align", "ctrdist.loop"])
"""Forks worker processes off one that has imported what takes long to import."""


def _worker(file: str, name: str, arguments: str, store: str, rank: int, size: int, out: Path) -> None:
    """A process of the `workers` fixture: writes to `out` what the function returns, or why it failed."""
    import torch.distributed as dist

    from ctrdist.group import DistributedGroup

    torch.set_num_threads(1)
    try:
        function = runpy.run_path(file)[name]
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        torch.save(function(DistributedGroup(), *json.loads(arguments)), out)
        gc.collect()  # DDP's reducer must not be the last to hold the group: it would wait with Python's lock
        dist.destroy_process_group()
    except BaseException:
        out.with_suffix(".error").write_text(traceback.format_exc())
        os._exit(1)


SLOW = ("jobs", "raycluster")
"""Folders of tests that use Ray."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The folders that take longest come first; with `-n 2 --dist loadfile` each process has one Ray for its files."""
    items.sort(key=lambda item: [f"tests/{folder}/" in item.nodeid for folder in SLOW], reverse=True)


@pytest.fixture(scope="session", autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Releases are not compiled, which would take some ten seconds each; who tests that compiles by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctrdist.served.compiler", lambda: None)
        yield


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random BERT, 16 wide, with a word list of its own and no masked-word head; needs no download."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("tiny_lm")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "##s", *WORDS]
    tokenizer = BertTokenizer(vocab={token: row for row, token in enumerate(tokens)}, model_max_length=32)
    config = BertConfig(
        vocab_size=len(tokens), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


MARKS = {  # of each kind of tokenizer: padding, unknown, start, end and mask, in the order of their ids
    "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    "gpt2": ["<|endoftext|>"],
    "opt": ["<s>", "<pad>", "</s>", "<unk>"],
}


def build_tokenizer(kind: str):
    """A byte-level BPE tokenizer over `WORDS` with the special tokens of a kind of language model, as transformers'."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    marks, bytes_ = MARKS[kind], pre_tokenizers.ByteLevel(add_prefix_space=False)
    built = Tokenizer(models.BPE())
    built.pre_tokenizer, built.decoder = bytes_, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=marks, initial_alphabet=bytes_.alphabet(), show_progress=False
    )
    built.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    around = {"bert": "[CLS] $A [SEP]", "roberta": "<s> $A </s>", "opt": "</s> $A"}.get(kind)
    if around:
        used = [(mark, marks.index(mark)) for mark in marks if mark in around.split()]
        built.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)
    names = {
        "bert": ["pad", "unk", "cls", "sep", "mask"],
        "roberta": ["bos", "pad", "eos", "unk", "mask"],
        "gpt2": ["eos"],
        "opt": ["bos", "pad", "eos", "unk"],
    }[kind]
    special = {f"{name}_token": mark for name, mark in zip(names, marks, strict=True)}
    return PreTrainedTokenizerFast(tokenizer_object=built, **special)


@pytest.fixture(scope="session")
def lm_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`lm_family(name)`: folder of a small random model of a family, 16 wide, 3 layers, 24 tokens, with its head."""
    import transformers as hf

    made: dict[str, Path] = {}
    wide = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "initializer_range": 0.2}
    wide |= {"max_position_embeddings": 24, "vocab_size": 330}
    encoder, opt = wide | {"intermediate_size": 32}, wide | {"ffn_dim": 32, "pad_token_id": 1, "init_std": 0.2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    families = {
        "bert": ("bert", hf.BertForMaskedLM, hf.BertConfig(**encoder)),
        "minilm": ("bert", hf.BertForMaskedLM, hf.BertConfig(**encoder)),
        "roberta": ("roberta", hf.RobertaForMaskedLM, hf.RobertaConfig(
            **encoder | {"max_position_embeddings": 26}, pad_token_id=1, type_vocab_size=1)),
        "xlm-roberta": ("roberta", hf.XLMRobertaForMaskedLM, hf.XLMRobertaConfig(
            **encoder | {"max_position_embeddings": 26}, pad_token_id=1, type_vocab_size=1)),
        "deberta-v2": ("bert", hf.DebertaV2ForMaskedLM, hf.DebertaV2Config(
            **encoder, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
            position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True, type_vocab_size=0)),
        "modernbert": ("bert", hf.ModernBertForMaskedLM, hf.ModernBertConfig(
            **encoder, global_attn_every_n_layers=2, local_attention=4, classifier_pooling="mean", pad_token_id=0,
            cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3)),
        "gpt2": ("gpt2", hf.GPT2LMHeadModel, hf.GPT2Config(
            n_embd=16, n_layer=3, n_head=2, n_positions=24, vocab_size=330, initializer_range=0.2, **ends)),
        "opt": ("opt", hf.OPTForCausalLM, hf.OPTConfig(**opt, word_embed_proj_dim=16)),
        "opt-projected": ("opt", hf.OPTForCausalLM, hf.OPTConfig(
            **opt, word_embed_proj_dim=8, do_layer_norm_before=False)),
        "bart": ("roberta", hf.BartForConditionalGeneration, hf.BartConfig(
            d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=24, vocab_size=330, init_std=0.2)),
        "qwen2": ("gpt2", hf.Qwen2ForCausalLM, hf.Qwen2Config(
            **encoder, num_key_value_heads=1, tie_word_embeddings=False, **ends)),
        "llama": ("gpt2", hf.LlamaForCausalLM, hf.LlamaConfig(
            **encoder, num_key_value_heads=1, tie_word_embeddings=False, **ends)),
    }  # fmt: skip

    def make(name: str) -> Path:
        if name not in made:
            tokenizer, model, config = families[name]
            made[name] = tmp_path_factory.mktemp(name, numbered=False)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model(config).save_pretrained(made[name])
            build_tokenizer(tokenizer).save_pretrained(made[name])
            if name == "minilm":
                (made[name] / "1_Pooling").mkdir()
                (made[name] / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
        return made[name]

    return make


@pytest.fixture
def workers(tmp_path: Path) -> Callable[..., list[Any]]:
    """`workers(size, function, *arguments)`: call a module-level `function(group, *arguments)` of the test's file in
    gloo processes; returns what each returned (tensors in dicts and lists). Arguments go through JSON."""

    def call(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        file, outs = function.__code__.co_filename, [folder / f"worker{rank}.pt" for rank in range(size)]
        task = (file, function.__name__, json.dumps(arguments), str(folder / "store"))
        started = [_STARTED.Process(target=_worker, args=(*task, rank, size, out)) for rank, out in enumerate(outs)]
        for worker in started:
            worker.start()
        end = time.monotonic() + 600
        try:
            for worker in started:
                worker.join(end - time.monotonic())
        finally:
            for worker in started:
                worker.kill()
        for worker, out in zip(started, outs, strict=True):
            error = out.with_suffix(".error")
            assert worker.exitcode == 0, error.read_text() if error.exists() else f"exit code {worker.exitcode}"
        return [torch.load(out, weights_only=True) for out in outs]

    return call


@pytest.fixture
def two_workers(workers: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """`workers` of two."""
    return partial(workers, 2)


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One small Ray of two CPUs, started once for all tests that need it."""
    import ray

    from raycluster import cluster

    with (tmp_path_factory.getbasetemp().parent / "ray.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Ray gives itself 30 seconds, which two at once on slow cores may not make
        for tries_left in (2, 1, 0):
            try:
                ray.init(
                    num_cpus=2,
                    address="local",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    object_store_memory=500_000_000,
                    _memory=4 * 2**30,  # as Ray counts it: not what this machine happens to have free
                )
                break
            except Exception:  # Ray's is a bare one
                ray.shutdown()
                if not tries_left:
                    raise
    cluster.connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def small_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a prepared log by hand: 4 days with a gap, 44 rows in 6 row groups, 5 of them bad on 2024-01-04."""
    import datetime as dt
    import random

    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, draw = tmp_path_factory.mktemp("small_log"), random.Random(7)
    (folder / "schema.yaml").write_text("""
user: {user_id: categorical}
item: {item_id: {kind: categorical, min_count: 3}, genres: multi, studio: {kind: categorical}}
context: {hour: categorical, tags: multi}
history_length: 3
text: ["{title}.", "Genres: {genres}."]
""")
    names = [f"i{n:02d}" for n in range(10)] + ["ïtem-é", "i"]
    genres = [draw.choice([None, [], ["drama"], ["war", None], ["war", "drama", "été"]]) for _ in names]
    items = pa.table({
        "item_id": names,
        "title": [f"Title {name}" for name in names],
        "genres": pa.array(genres, pa.list_(pa.string())),
        "studio": pa.array([draw.choice([None, "A", "B"]) for _ in names]),
        "unused": list(range(len(names))),
    })  # fmt: skip
    (folder / "items").mkdir()
    pq.write_table(items.slice(0, 5), folder / "items" / "part-0.parquet")
    pq.write_table(items.slice(5), folder / "items" / "part-1.parquet")

    clicked = names[:9]  # the last three stand in no row, only in histories
    for day, files in (("2024-01-01", (8, 4)), ("2024-01-02", (10,)), ("2024-01-04", (12,)), ("2024-01-05", (10,))):
        midnight = int(dt.datetime.fromisoformat(f"{day}T00:00:00+00:00").timestamp())
        for number, count in enumerate(files):
            rows = {
                "user_id": [f"u{draw.randrange(6)}" for _ in range(count)],
                "item_id": [draw.choice(clicked) for _ in range(count)],
                "label": [float(draw.random() < 0.4) for _ in range(count)],
                "timestamp": [midnight + draw.randrange(86400) for _ in range(count)],
                "hour": [draw.choice([None, *range(24)]) for _ in range(count)],
                "tags": [
                    draw.choice([None, [draw.choice(["x", "y", None]) for _ in range(draw.randrange(4))]])
                    for _ in range(count)
                ],
                "history": [
                    draw.choice([None, [draw.choice([*names, "ghost"]) for _ in range(draw.randrange(6))]])
                    for _ in range(count)
                ],
            }
            if day == "2024-01-04":
                rows["user_id"][1] = None
                rows["item_id"][2], rows["item_id"][8] = "ghost", None
                rows["label"][7], rows["timestamp"][9] = 0.5, midnight + 86400
            types = {"hour": pa.int64(), "tags": pa.list_(pa.string()), "history": pa.list_(pa.string())}
            table = pa.table({name: pa.array(values, types.get(name)) for name, values in rows.items()})
            path = folder / "interactions" / f"dt={day}" / f"part-{number}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path, row_group_size=6 if day == "2024-01-04" else 100)
    return folder


@pytest.fixture(scope="session")
def small_read(small_log: Path):
    """(schema, vocabularies, catalog) of `small_log`, its first three days counted as training days."""
    from ctrdist.items import build_catalog, grow_catalog_ids, grow_item_vocabularies, read_items
    from ctrdist.log import list_days, list_row_groups
    from ctrdist.scan import Scan, grow_encoders, item_counts, scan_row_group
    from ctrdist.schema import Schema
    from ctrdist.vocabulary import Vocabulary

    data = str(small_log)
    schema, files = Schema.load(small_log / "schema.yaml"), list_days(data)
    items = read_items(data, schema)
    ids = grow_catalog_ids(items, Vocabulary())
    blank = {field.name: Vocabulary() for field in schema.item + schema.row_fields}
    first, scan, days = build_catalog(items, ids, schema, blank), Scan(), tuple(files)[:3]
    with tempfile.TemporaryDirectory() as quarantine:
        for group in list_row_groups(data, files, days, schema):
            scan.add(scan_row_group(data, group, schema, first, Path(quarantine)))
    blank = grow_encoders(blank, scan, schema)
    counts = item_counts(scan.items, days, ids.size)
    vocabularies = grow_item_vocabularies(items, ids.lookup(items["item_id"]), counts, schema, blank)
    return schema, vocabularies, build_catalog(items, ids, schema, vocabularies)


@pytest.fixture(scope="session")
def small_artifact(small_read, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a served artifact of `small_log`: a random network without text."""
    from ctrdist.served import write_served
    from ctrdist.tasks.click import ClickConfig, ClickModel, table_sizes

    schema, encoders, catalog = small_read
    model = ClickModel(schema, table_sizes(encoders, schema), ClickConfig(backbone="dcnv2", dim=4), seed=1).eval()
    with torch.no_grad():
        for table in model.tables.values():
            table.weight *= 100
    folder = tmp_path_factory.mktemp("artifact") / "serving"
    write_served(folder, model, schema, encoders, catalog)
    return folder
