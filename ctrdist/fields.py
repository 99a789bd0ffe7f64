"""What turns the values of a dataset's fields into rows of tables or numbers: one encoder a field, by its name."""

from pathlib import Path

import numpy as np

from ctrdist.numeric import Numeric
from ctrdist.schema import NUMERIC, Field
from ctrdist.serving import fields as serving
from ctrdist.vocabulary import Vocabulary

Encoder = Vocabulary | Numeric


def new_encoder(field: Field) -> Encoder:
    """The encoder of a field that has seen no value yet."""
    return Numeric(field.scale) if field.kind == NUMERIC else Vocabulary()


def save_encoders(encoders: dict[str, Encoder], folder: Path) -> None:
    """One sub-folder a field, by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, encoder in encoders.items():
        encoder.save(folder / name)


def load_encoders(folder: Path) -> dict[str, Encoder]:
    """What `save_encoders` wrote; vocabularies are memory-mapped."""
    return serving.load_encoders(folder, Vocabulary, Numeric)


def rows_with_new_ids(encoders: dict[str, Encoder], before: dict[str, Encoder]) -> dict[str, np.ndarray]:
    """By field, the rows whose ids are others than `before` (`Vocabulary.rows_with_new_ids`)."""
    return {
        name: encoder.rows_with_new_ids(before[name])
        for name, encoder in encoders.items()
        if isinstance(encoder, Vocabulary) and name in before
    }
