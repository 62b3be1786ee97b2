"""What an answer cost, for -v and --json."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smolrun import Chunk


def as_dict(chunks: Sequence[Chunk]) -> dict[str, Any]:
    """An answer as JSON can hold it."""
    last = chunks[-1]
    timings = last.timings
    rates = {name: getattr(timings, name) for name in ("cached_tokens", "prefill_rate", "decode_rate")}
    return {
        "text": "".join(chunk.text for chunk in chunks),
        "finish_reason": last.finish_reason,
        "seed": last.seed,
        "tokens": [
            {"id": chunk.id, "text": chunk.text, "logprob": chunk.logprob, "top": chunk.top}
            for chunk in chunks
            if chunk.id is not None
        ],
        "timings": {**dataclasses.asdict(timings), **rates} if timings is not None else None,
    }


def status_line(last: Chunk) -> str:
    """Speeds of an answer, from its last chunk."""
    timings = last.timings
    if timings is None:
        return f"[{last.finish_reason}]"
    first = "" if timings.first_token_seconds is None else f", first token {timings.first_token_seconds:.2f} s"
    guessed = ""
    if timings.guessed_tokens:
        guessed = f", {timings.accepted_tokens:,} of {timings.guessed_tokens:,} guesses right"
    return (
        f"[prompt {timings.prompt_tokens:,} tokens, {timings.cached_tokens:,} cached, {timings.prefill_rate:,.0f} tok/s"
        f"{first}; answer {timings.decode_rate:,.0f} tok/s{guessed}; {last.finish_reason}; seed {last.seed}]"
    )
