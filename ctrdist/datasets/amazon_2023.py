"""Amazon reviews up to 2023 (McAuley Lab), one category: its reviews and its metadata; an item is a parent_asin.

Protocol `cela` is CELA's for Amazon Sports: every review is a click, users and items have 5 reviews or more, each
click has one sampled negative, and histories hold 20. `elec` is ELEC's for All Beauty: a rating above 3 is a click.
`clickprompt` is ClickPrompt's for Amazon-Toys: users and items have 10 reviews or more; that a rating above 3 is a
click is our choice. All three are split 8:1:1 in order of time: so says ClickPrompt, the other two papers do not say.
"""

from pathlib import Path

from ctrdist.datasets import amazon
from ctrdist.datasets.protocol import Raw

PROTOCOLS = amazon.PROTOCOLS
RELEASE = amazon.Release(
    ending=".jsonl", reviews=("",), user="user_id", item="parent_asin", rating="rating", time="timestamp",
    ticks=1000, title="title", brand="store", categories="categories", description="description", features="features",
)  # fmt: skip


def read(source: Path) -> Raw:
    """`<Category>.jsonl` and `meta_<Category>.jsonl`; each plain or `.gz`. Milliseconds of times are cut off.

    See `amazon.read` for what is dropped and counted.

    Raises:
        UserError: a file is missing or there are several, or a line is malformed (named with its number).
    """
    return amazon.read(source, RELEASE)
