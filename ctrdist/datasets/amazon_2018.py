"""Amazon reviews up to 2018 (Ni et al., 2019), one category: its reviews, all or the 5-core, and its metadata.

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
    ending=".json", reviews=("", "_5"), user="reviewerID", item="asin", rating="overall", time="unixReviewTime",
    ticks=1, title="title", brand="brand", categories="category", description="description", features="feature",
)  # fmt: skip


def read(source: Path) -> Raw:
    """`<Category>.json` or `<Category>_5.json`, and `meta_<Category>.json`; each plain or `.gz`.

    The time of a review is its day. See `amazon.read` for what is dropped and counted.

    Raises:
        UserError: a file is missing or there are several, or a line is malformed (named with its number).
    """
    return amazon.read(source, RELEASE)
