"""The one exception for what a user can put right."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input, option or environment.

    The message names the file, column or option, the value found, and the way out. Jobs print it without a
    stack trace and exit with status 1; any other exception is a bug of ours and keeps its trace.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """`known` as a phrase for an error message, the name most like `name` first: "did you mean 'x'? (known: ...)"."""
    known = sorted(known)
    guess = difflib.get_close_matches(name, known, n=1)
    listing = f"known: {', '.join(known)}"
    return f"did you mean '{guess[0]}'? ({listing})" if guess else listing
