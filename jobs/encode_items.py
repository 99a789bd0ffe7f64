"""Items' texts through a language model into a text table: of a prepared log, or of any Parquet files.

    python jobs/encode_items.py --data DATA --out TABLE
    python jobs/encode_items.py --items 'catalog/*.parquet' --id-column sku --text '{title}. {description}' --out TABLE

The table is a memory-mapped array with a row for each item, `TABLE/text_table.<id>/text_table.npy`; rows are numbered
by the vocabulary beside it and never move. Run again, it encodes what is new or changed, and copies the rest; a run
that was cut off goes on where it was.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from pyarrow import fs
from rich.console import Console
from rich.table import Table

from ctrdist.errors import UserError
from ctrdist.items import ItemTexts, build_catalog, grow_catalog_ids, read_item_files
from ctrdist.language.encode import EncodeConfig, Source
from ctrdist.language.model import check_model
from ctrdist.report import duration
from ctrdist.schema import ITEM_ID, USER_ID, Field, Schema
from ctrdist.storage import Manifest, State, fingerprint, list_parquet
from ctrdist.vocabulary import Vocabulary
from raycluster import cli, cluster, planning
from raycluster.day import Progress, say
from raycluster.encoder import encode_items

ITEMS, TABLE = "items", "text_table"


@dataclass(frozen=True)
class EncodeOptions:
    """What to encode, and how.

    Args:
        out: folder or URI of the table; made if it is not there.
        data: a prepared log, a folder or URI: its items, with the text that its schema says.
        items: in place of a log, a folder of Parquet files or a glob pattern of them.
        id_column: of these files, the column with the items' ids.
        text: of these files, what an item's text is made of: templates such as '{title}. {description}', each of which
            is left out where one of its columns is empty.
        lm: a Hugging Face name or a local folder.
        pooling: of the language model; `auto` takes its own.
        encode: how to encode.
        plan: how the cluster's resources are shared out, and what to wait for on one that grows by itself.
        config: YAML file of options; `encode.yaml` in the working folder is read if it is there.
    """

    out: str = ""
    data: str = ""
    items: str = ""
    id_column: str = ITEM_ID
    text: tuple[str, ...] = ()
    lm: str = "sentence-transformers/all-MiniLM-L6-v2"
    pooling: str = "auto"
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    plan: planning.PlanConfig = field(default_factory=planning.PlanConfig)
    config: str | None = None

    def check(self) -> None:
        """Raise a UserError for what can be known to be wrong before anything is read."""
        if not self.out:
            raise UserError("--out is missing; name a folder for the table")
        if bool(self.data) == bool(self.items):
            raise UserError("give either --data, a prepared log, or --items, Parquet files")
        if self.items and not self.text:
            raise UserError("--items needs --text: what an item's text is made of, such as '{title}. {description}'")
        for name in ("out", "data", "items"):
            cluster.check_path(f"--{name}", getattr(self, name) or "/")
        check_model(self.lm, False)


def run(options: EncodeOptions) -> None:
    """From the items to the table, and a summary."""
    options.check()
    cluster.connect()
    state, lm = State(cluster.absolute(options.out)), options.lm
    model = Source(cluster.absolute(lm) if Path(lm).is_dir() else lm, pooling=options.pooling)
    items = write_items(state, options)
    inputs, before = fingerprint(items.identity, model.fingerprint(options.encode)), state.find(TABLE)
    if before is not None and before.inputs == inputs:
        say("the table is of these texts and this language model already; nothing to do")
        return show(state, before)
    earlier = [before] if before else []
    plan = planning.make_plan(encoders=options.encode.encoders, gpu_share=options.encode.gpu_share, config=options.plan)
    say(f"plan       {plan.lines()[1]}")
    show(state, encode_items(
        state, TABLE, model, ITEMS, options.encode, plan, inputs, previous=earlier,
        progress=Progress("encode", "texts").items,
    ))  # fmt: skip


def write_items(state: State, options: EncodeOptions) -> Manifest:
    """The output with the items' texts and their rows; those of an earlier run do not move."""
    schema, files, paths, where = find_items(options)
    if not schema.text:
        raise UserError(f"{options.data}/schema.yaml: no 'text': it says what an item's text is made of")
    facts = [[info.path, info.size, info.mtime_ns or 0] for info in files.get_file_info(paths)]
    inputs, before = fingerprint(facts, schema.text, options.id_column), state.find(ITEMS)
    if before is None or before.inputs != inputs:
        schema = replace(schema, item=(Field(ITEM_ID),))
        table = read_item_files(files, paths, schema, where, options.id_column)
        known = Vocabulary.load(state.local(ITEMS) / "catalog" / "ids") if before else Vocabulary()
        ids = grow_catalog_ids(table, known)
        with state.create(ITEMS, inputs, {"items": table.num_rows}) as folder:
            build_catalog(table, ids, schema, {ITEM_ID: Vocabulary()}).save(folder / "catalog")
            ItemTexts.write(folder / "texts.arrow", table, ids, schema)
    return state.find(ITEMS)


def find_items(options: EncodeOptions) -> tuple[Schema, fs.FileSystem, list[str], str]:
    """What the texts are made of, and the Parquet files: a filesystem, paths in it, and what to call them."""
    if options.data:
        schema, where = Schema.load(f"{options.data}/schema.yaml"), f"{options.data}/items"
    else:
        schema, where = Schema(user=(Field(USER_ID),), item=(Field(ITEM_ID),), text=options.text), options.items
    files, _, paths = list_parquet(where)
    if not paths:
        raise UserError(f"{where}: no Parquet files there; give a folder, or a pattern in quotes")
    return schema, files, paths, where


def show(state: State, table: Manifest) -> None:
    """Print what the table is, and what it took."""
    facts, summary = table.facts, Table(title=f"{state.local(table.name)}", show_header=False)
    summary.add_column(style="bold")
    summary.add_column(justify="right")
    for name, value in (
        ("items", f"{facts['items']:,}"),
        ("of these encoded", f"{facts['encoded']:,}"),
        ("copied from the table before", f"{facts['copied']:,}"),
        ("numbers a vector", f"{facts['dim']:,}"),
        ("computed on", facts["device"] or "-"),
        ("time", duration(facts["encode_seconds"])),
        ("encoded items/s, the start included", f"{facts['encoded'] / facts['encode_seconds']:,.1f}"),
    ):
        summary.add_row(name, value)
    Console().print(summary)


if __name__ == "__main__":
    cli.main(lambda: run(cli.parse(EncodeOptions(), __doc__, file="encode.yaml")))
