"""When to say how far a long piece of work is: often at first, and so seldom later that a night fits on a screen."""

import time


class Pace:
    """Tells when the next line is due: ten seconds after the start, then each time half of what has passed later.

    Args:
        least: seconds between two lines at least.
        most: and at most.
    """

    def __init__(self, least: float = 10.0, most: float = 600.0) -> None:
        self.least, self.most = least, most
        self.began = self.said = time.time()

    def due(self, now: float) -> bool:
        """Whether a line is due at `now`, in seconds as of `time.time`; if so, it counts as said."""
        wait = min(max(self.least, (self.said - self.began) / 2), self.most)
        if now - self.said < wait:
            return False
        self.said = now
        return True
