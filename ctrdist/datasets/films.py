"""What the film datasets have in common: titles with years, and genres in one value."""

import pyarrow as pa
import pyarrow.compute as pc

NO_GENRES = "(no genres listed)"


def title_and_year(names: pa.Array) -> tuple[pa.Array, pa.Array]:
    """`Toy Story (1995)` -> `Toy Story`, `1995`. A span of years gives its first; a name without any, a null year."""
    parts = pc.extract_regex(names, r"^\s*(?P<title>.*\S)\s*\((?P<year>\d{4})(?:[-–]\d{0,4})?\)\s*$")
    return pc.coalesce(pc.struct_field(parts, "title"), pc.utf8_trim_whitespace(names)), pc.struct_field(parts, "year")


def genre_lists(genres: pa.Array) -> pa.Array:
    """`Comedy|Drama` -> [Comedy, Drama]; an empty list where there are none."""
    none = pc.is_in(genres, pa.array(["", NO_GENRES]))
    return pc.if_else(none, pa.scalar([], pa.list_(pa.string())), pc.split_pattern(genres, "|"))
