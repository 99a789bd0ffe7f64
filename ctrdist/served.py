"""Writes the artifact that is served (`ctrdist.serving.model`) of a trained click model."""

import hashlib
import json
import logging
import os
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from ctrdist.batch import Lookup
from ctrdist.embedding import CHUNK
from ctrdist.export import export_dense
from ctrdist.fields import Encoder
from ctrdist.items import Catalog
from ctrdist.schema import Schema
from ctrdist.serving.graphs import BUILT_FOR, COMPILED, EXPORTED, is_compiled, machine
from ctrdist.serving.model import CATALOG, DESCRIPTION, FORMAT, ITEMS, REQUEST, ROWS, TABLES, USERS, VOCABULARY
from ctrdist.serving.ragged import Column, save_column, take
from ctrdist.serving.vocabulary import Ids
from ctrdist.tasks.click import ClickModel

COMPILER = {"freezing": True, "cpp.dynamic_threads": True, "compile_threads": 1}
"""Of Inductor: weights are constants, laid out as the processor wants them; the number of threads is the server's; and
no processes of its own stay behind."""
log = logging.getLogger(__name__)


def write_served(
    folder: Path,
    model: ClickModel,
    schema: Schema,
    encoders: dict[str, Encoder],
    catalog: Catalog,
    text_table: np.ndarray | None = None,
    users: dict[str, Column] | None = None,
    compiled: bool = True,
) -> None:
    """Write a model with all that it needs to score raw ids to a new folder.

    Args:
        model: in evaluation mode; its tables are whole.
        text_table: [catalog rows, text width], for a model with text.
        users: latest value of each user's fields, encoded, by field and the user's row (`ctrdist.users`).
        compiled: compile the graph of a request for processors like this one; nothing is, without a C++ compiler.
    """
    assert not model.training and not model.vector_dim, "a network that reads what a language model made of a row"
    for name in ("", CATALOG, VOCABULARY, TABLES, USERS):
        (folder / name).mkdir()
    _without_growth(catalog.ids).save(folder / CATALOG)
    for field in schema.row_fields:
        encoder = encoders[field.name]
        (_without_growth(encoder) if isinstance(encoder, Ids) else encoder).save(folder / VOCABULARY / field.name)
        _save_table(folder / TABLES / f"{field.name}.npy", model, field.name)
    _save_items(folder / ITEMS, model, catalog, text_table)
    for name, column in (users or {}).items():
        save_column(folder / USERS, name, column)
    request = export_dense(model, schema.history_length, one_user=True)
    if compiled and compiler():
        compile_graph(request, folder, REQUEST)
    for name, program in ((ROWS, export_dense(model, schema.history_length)), (REQUEST, request)):
        program.example_inputs = None  # they would be pickled
        torch.export.save(program, folder / EXPORTED.format(name))
    about = {"format": FORMAT, "fields": [asdict(field) for field in schema.row_fields], "users": sorted(users or {})}
    about |= {"history_length": schema.history_length, "identity": _digest(folder)}
    (folder / DESCRIPTION).write_text(json.dumps(about, indent=1))


def compiler() -> str | None:
    """The C++ compiler that compiled graphs are made by; None without one, or where processors cannot be told apart."""
    return shutil.which(os.environ.get("CXX", "g++")) if machine()["instructions"] else None


def compile_graph(program: torch.export.ExportedProgram, folder: Path, name: str) -> None:
    """Compile an exported graph (AOTInductor) to `<name>.compiled.pt2`, and say for which machines.

    Where the compiler fails, a warning says so, and there is none: a release does without.
    """
    path = folder / COMPILED.format(name)
    try:
        with warnings.catch_warnings():  # of PyTorch's own code about PyTorch's own types
            warnings.simplefilter("ignore", FutureWarning)
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=COMPILER)
    except Exception as error:  # a compiler without headers, a graph that Inductor cannot lower: all are its own
        path.unlink(missing_ok=True)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        log.warning("the release is not compiled, and served at about half the speed: %s", reason)
    else:
        (folder / BUILT_FOR).write_text(json.dumps(machine()))


def _without_growth(ids: Ids) -> Ids:
    return Ids(ids.keys, ids.rows)


@torch.no_grad()
def _save_table(path: Path, model: ClickModel, name: str) -> None:
    """A field's vectors as the network takes them, [rows, columns]."""
    table = model.tables[name]
    out = np.lib.format.open_memmap(path, "w+", np.float32, (table.rows, model.columns))
    for rows in torch.arange(table.rows).split(CHUNK):
        out[rows.numpy()] = model.project(name, table.fetch(rows)).numpy()
    out.flush()


@torch.no_grad()
def _save_items(path: Path, model: ClickModel, catalog: Catalog, text_table: np.ndarray | None) -> None:
    """The item side of every catalog row, [catalog rows, item fields, columns]."""
    shape = (catalog.size, len(model.item_names) + (model.text_dim > 0), model.columns)
    out = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    for start in range(0, catalog.size, CHUNK):
        rows = np.arange(start, min(start + CHUNK, catalog.size))
        fields = {name: Lookup.of(take(catalog.fields[name], rows)) for name in model.item_names}
        text = torch.from_numpy(text_table[rows].astype(np.float32)) if model.text_dim else None
        out[rows] = model.item_side(fields, text).numpy()
    out.flush()


def _digest(folder: Path) -> str:
    """Sixteen hex digits that change with anything that scores depend on, which compiled graphs are not."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not is_compiled(path)):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
