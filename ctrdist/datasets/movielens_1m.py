"""MovieLens 1M: a million film ratings by 6,040 users with age, occupation and zip code (GroupLens, 2003).

Protocol `clickprompt` is ClickPrompt's: ratings of 3 are left out, higher ones are clicks, 8:1:1 in order of time, no
histories. `cela` takes CELA's rule for a later MovieLens: a rating of 3 or more is a click, histories of 20; that paper
is silent on its split, here it is 8:1:1 in order of time.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ctrdist.datasets.files import integers, read_columns, refuse, refuse_repeated, with_unlisted
from ctrdist.datasets.films import genre_lists, title_and_year
from ctrdist.datasets.protocol import RATING, Protocol, Raw
from ctrdist.schema import ITEM_ID, TIMESTAMP, USER_ID, Field

PROTOCOLS = {
    "default": Protocol(positive=4),
    "clickprompt": Protocol(drop=(3,), positive=4, split="time", history_length=0),
    "cela": Protocol(positive=3, split="time", history_length=20),
}
ENCODING = "latin-1"
WORDS = {
    "gender": {"M": "male", "F": "female"},
    "age": {
        "1": "Under 18", "18": "18-24", "25": "25-34", "35": "35-44", "45": "45-49", "50": "50-55", "56": "56+",
    },
    "occupation": dict(
        zip(
            map(str, range(21)),
            (
                "other or not specified", "academic/educator", "artist", "clerical/admin", "college/grad student",
                "customer service", "doctor/health care", "executive/managerial", "farmer", "homemaker",
                "K-12 student", "lawyer", "programmer", "retired", "sales/marketing", "scientist", "self-employed",
                "technician/engineer", "tradesman/craftsman", "unemployed", "writer",
            ),
            strict=True,
        )
    ),
}  # fmt: skip
"""What the codes of `users.dat` stand for; the fields hold the words, for they become text in prompts."""


def read(source: Path) -> Raw:
    """`ratings.dat`, `users.dat` and `movies.dat`, columns joined by `::`, in Latin-1.

    All protocols have ClickPrompt's eight fields: user_id, gender, age, occupation, zip; item_id, title (without the
    year), genre (the first of a film's). The `year` and the full list `genres` are columns of the text only.

    Raises:
        UserError: a file is missing, or has a malformed line, an unknown code or a repeated id.
    """
    items, users = _read_items(source / "movies.dat"), _read_users(source / "users.dat")
    path = source / "ratings.dat"
    user, item, rating, time = read_columns(path, "UserID::MovieID::Rating::Timestamp", encoding=ENCODING).values()
    rating, time = integers(path, "Rating", rating), integers(path, "Timestamp", time)
    refuse(path, pc.invert(pc.is_in(rating, pa.array(range(1, 6)))), rating, "the rating", "ratings go from 1 to 5")
    items, unlisted = with_unlisted(items, item)
    at = pc.index_in(user, users[USER_ID].combine_chunks())
    of_user = users.drop_columns([USER_ID]).take(at)
    log = {USER_ID: user, ITEM_ID: item, RATING: rating, TIMESTAMP: time}
    return Raw(
        log=pa.table(log | dict(zip(of_user.column_names, of_user.columns, strict=True))),
        items=items,
        user=(
            Field(USER_ID, min_count=2),
            Field("gender"),
            Field("age"),
            Field("occupation"),
            Field("zip", min_count=2),
        ),
        item=(Field(ITEM_ID, min_count=2), Field("title", min_count=2), Field("genre")),
        text=("{title}", "({year}).", "{genres}.", "{text}"),
        counts={"items without metadata": unlisted, "users without metadata": len(user.filter(at.is_null()).unique())},
    )


def _read_users(path: Path) -> pa.Table:
    """user_id, gender, age, occupation, zip, in words."""
    user, *codes, place = read_columns(path, "UserID::Gender::Age::Occupation::Zip-code", encoding=ENCODING).values()
    refuse_repeated(path, user, what="the user")
    columns = {USER_ID: user}
    for column, (name, words) in zip(codes, WORDS.items(), strict=True):
        at = pc.index_in(column, pa.array(words))
        refuse(path, at.is_null(), column, f"the {name}", f"expected one of {', '.join(words)}")
        columns[name] = pa.array(words.values()).take(at)
    return pa.table(columns | {"zip": place})


def _read_items(path: Path) -> pa.Table:
    """item_id, title, year, genre (the first one, null if there is none), genres."""
    form = "MovieID::Title (year)::Genres"
    item, name, genres = read_columns(path, form, encoding=ENCODING, may_be_empty=("Genres",)).values()
    refuse_repeated(path, item)
    (title, year), first = (
        title_and_year(name),
        pc.struct_field(pc.extract_regex(genres, r"^(?P<first>[^|]+)"), "first"),
    )
    return pa.table({ITEM_ID: item, "title": title, "year": year, "genre": first, "genres": genre_lists(genres)})
