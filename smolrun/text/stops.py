"""Stop strings in a stream: found wherever the borders between tokens lie."""

from collections.abc import Sequence


class StopFinder:
    """Passes text through until a stop string is complete; holds back an end that may be the beginning of one.

    Of several stop strings the one that is complete first counts, of those the longest: what a reader would find who
    sees the text letter by letter, whatever pieces it comes in.

    >>> finder = StopFinder(["END"])
    >>> [finder.push(piece) for piece in ["one E", "NE", "ND", " two"]], finder.found
    (['one ', 'EN', '', ''], True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain now. The stop string and what follows it never come out."""
        if self.found or not self._stops:
            return "" if self.found else text
        text = self._held + text
        matches = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            self.found, self._held = True, ""
            return text[: min(matches)[1]]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back and became no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
