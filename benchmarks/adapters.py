"""The peers of benchmarks/peers.py, each behind the same four requests, and how each takes a model over.

Runs inside a peer's own environment (`python adapters.py NAME`), so at the top only what all of them have is imported.
A request is a method:

    convert(source, target, precision)       the peer's own file or folder from ours; once, cached by the caller
    open(path, context, threads, ...)        -> {"vocab_size": n}
    logits(ids, one_by_one)                  float32 (len(ids), vocab_size) from an empty cache; the last row always
                                             comes from one pass over all ids, which is what prefill times
    prefill(ids, depth), decode(ids, depth)  -> {"seconds": s} behind `depth` ids already in the cache

Timed is what a user of that runtime would wait for: the model's passes, and the logits of the last id in memory. Text,
sampling and conversion are not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolrun.peer import serve

Floats = NDArray[np.float32]


class Adapter:
    """What all share: the cache is known by its ids, and decode is one pass after the other."""

    vocab_size: int

    def __init__(self) -> None:
        self.cached: list[int] = []  # the ids in the cache

    def forget(self) -> None:
        """The cache may hold anything: fill it anew."""
        self.cached = []

    def rewind(self, n: int) -> int:
        """Keep the first n ids of the cache, or fewer. Returns how many."""
        raise NotImplementedError

    def step(self, ids: Sequence[int]) -> Any:
        """One pass over ids behind the cache; afterwards the last one's logits are in memory."""
        raise NotImplementedError

    def last(self, result: Any) -> Floats:
        """(vocab_size,): the logits that step() made."""
        raise NotImplementedError

    def append(self, ids: Sequence[int]) -> Any:
        """step(), remembered."""
        result = self.step(ids)
        self.cached += ids
        return result

    def fill(self, ids: Sequence[int]) -> None:
        """The cache holds exactly ids; a common prefix is kept."""
        common = 0
        while common < min(len(ids), len(self.cached)) and ids[common] == self.cached[common]:
            common += 1
        kept = self.rewind(common)
        self.cached = list(ids[:kept])
        if kept < len(ids):
            self.append(ids[kept:])

    def logits(self, ids: Sequence[int], one_by_one: bool = False) -> Floats:
        self.fill(())
        rows = [np.array(self.last(self.append([i]))) for i in ids]
        self.fill(())
        rows[-1] = np.array(self.last(self.append(ids)))
        return np.stack(rows).astype(np.float32)

    def prefill(self, ids: Sequence[int], depth: Sequence[int]) -> dict[str, Any]:
        return self.timed([ids], depth)

    def decode(self, ids: Sequence[int], depth: Sequence[int]) -> dict[str, Any]:
        return self.timed([[i] for i in ids], depth)

    def timed(self, passes: Sequence[Sequence[int]], depth: Sequence[int]) -> dict[str, Any]:
        self.fill(depth)
        begin = time.perf_counter()
        for ids in passes:
            self.append(ids)
        return {"seconds": time.perf_counter() - begin}


class Smolrun(Adapter):
    """Ourselves, from a child like everybody else; the tier is SMOLRUN_TIER of its environment."""

    def open(self, path: str, context: int, threads: int, kv: str, precision: str) -> dict[str, Any]:
        from smolrun.files.checkpoint import open_checkpoint
        from smolrun.model.llama import Llama

        with open_checkpoint(path) as checkpoint:
            self.model = Llama(checkpoint, context=context, threads=threads, kv=kv, precision=precision)
        self.vocab_size = self.model.config.vocab_size
        return {"vocab_size": self.vocab_size, "tier": self.model.tier.name}

    def logits(self, ids: Sequence[int], one_by_one: bool = False) -> Floats:
        from smolrun.verify import logits_in_cuts

        return logits_in_cuts(self.model, ids, [1 if one_by_one else self.model.chunk])

    def prefill(self, ids: Sequence[int], depth: Sequence[int]) -> dict[str, Any]:
        from smolrun.bench import seconds

        return {"seconds": seconds(self.model, ids, depth, one_by_one=False)}

    def decode(self, ids: Sequence[int], depth: Sequence[int]) -> dict[str, Any]:
        from smolrun.bench import seconds

        return {"seconds": seconds(self.model, ids, depth, one_by_one=True)}


class OpenVino(Adapter):
    """OpenVINO: the graph that openvino-genai builds from the F16 GGUF, its weights compressed by NNCF; or, for "q4_0"
    and "q8_0", built from that GGUF file itself.

    The classifier gets the last position alone, as openvino-genai's own pipeline does. All else is as it chooses: on
    CPUs with AVX512-BF16 it computes what is not weights in bf16, and its KV cache is u8.
    """

    def convert(self, source: str, target: str, precision: str) -> None:
        import openvino
        import openvino_genai

        here = Path(target)
        here.mkdir()
        gguf = here / "model.gguf"  # the graph is saved beside the file
        gguf.symlink_to(Path(source).resolve())
        openvino_genai.LLMPipeline(str(gguf), "CPU", enable_save_ov_model=True)
        gguf.unlink()
        if precision.startswith("int"):
            import nncf

            model = openvino.Core().read_model(here / "openvino_model.xml")
            if precision == "int8":
                mode: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT8_ASYM}
            else:
                mode = {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": 32, "ratio": 1.0}
            model = nncf.compress_weights(model, **mode)
            openvino.save_model(model, here / "compressed.xml")

    def open(self, path: str, context: int, threads: int) -> dict[str, Any]:
        import openvino
        from openvino import opset13

        core = openvino.Core()
        compressed = Path(path, "compressed.xml")
        model = core.read_model(compressed if compressed.exists() else Path(path, "openvino_model.xml"))
        classifier = model.output("logits").node.input_value(0).node
        last = opset13.slice(classifier.input_value(0), [-1], [2**31 - 1], [1], [1])
        classifier.input(0).replace_source_output(last.output(0))
        model.validate_nodes_and_infer_types()
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self.request = core.compile_model(model, "CPU", options).create_infer_request()
        self.saved: tuple[list[int], list[Any]] = ([], [])
        self.vocab_size = int(model.output("logits").partial_shape[2].get_length())
        return {"vocab_size": self.vocab_size}

    def rewind(self, n: int) -> int:
        import openvino

        ids, states = self.saved
        if n and n == len(ids) and self.cached[:n] == ids:
            for variable, state in zip(self.request.query_state(), states, strict=True):
                variable.state = openvino.Tensor(state)
            return n
        self.request.reset_state()
        return 0

    def fill(self, ids: Sequence[int]) -> None:
        super().fill(ids)
        if len(ids) > 512 and self.saved[0] != list(ids):  # the state cannot be cut, so that of a depth is kept
            self.saved = (list(ids), [np.array(v.state.data) for v in self.request.query_state()])

    def step(self, ids: Sequence[int]) -> Any:
        start, n = len(self.cached), len(ids)
        self.request.infer(
            {
                "input_ids": np.array([ids], np.int64),
                "attention_mask": np.ones((1, start + n), np.int64),
                "position_ids": np.arange(start, start + n, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            },
            share_inputs=True,
        )
        return self.request.get_output_tensor(0).data

    def last(self, result: Any) -> Floats:
        return result[0, -1]


class Ctranslate2(Adapter):
    """CTranslate2: its own Hugging Face converter. A generator has no cache to append to: a call computes its prompt
    and then samples greedily, ids of its own choice; a depth is a static prompt, whose state it caches.
    """

    def convert(self, source: str, target: str, precision: str) -> None:
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(source, low_cpu_mem_usage=True).convert(target, quantization=precision)

    def open(self, path: str, context: int, threads: int, precision: str) -> dict[str, Any]:
        import ctranslate2

        self.generator = ctranslate2.Generator(path, compute_type=precision, intra_threads=threads)
        self.vocabulary = json.loads(Path(path, "vocabulary.json").read_text(encoding="utf-8"))
        self.vocab_size = len(self.vocabulary)
        return {"vocab_size": self.vocab_size}

    def logits(self, ids: Sequence[int], one_by_one: bool = False) -> Floats:
        import ctranslate2

        batch = ctranslate2.StorageView.from_array(np.array([ids], np.int32))
        lengths = ctranslate2.StorageView.from_array(np.array([len(ids)], np.int32))
        return np.array(self.generator.forward_batch(batch, lengths))[0]

    def generate(self, ids: Sequence[int], depth: Sequence[int], n: int) -> list[float]:
        """Times, from the call on, at which each of n ids was there."""
        times: list[float] = []
        words = [self.vocabulary[i] for i in ids]

        def arrived(_: Any) -> bool:
            times.append(time.perf_counter() - begin)
            return False

        begin = time.perf_counter()
        self.generator.generate_batch(
            [words],
            static_prompt=[self.vocabulary[i] for i in depth] or None,
            max_length=n,
            min_length=n,
            include_prompt_in_result=False,
            callback=arrived,
        )
        return times

    def prefill(self, ids: Sequence[int], depth: Sequence[int]) -> dict[str, Any]:
        return {"seconds": self.generate(ids, depth, 1)[0]}

    def decode(self, ids: Sequence[int], depth: Sequence[int]) -> dict[str, Any]:
        times = self.generate(ids[:1], depth, len(ids) + 1)
        return {"seconds": times[-1] - times[0]}


class OnnxGenai(Adapter):
    """onnxruntime-genai: its own model builder, int4 blocks of 32, int8 activations, classifier for the last position
    alone.
    """

    def convert(self, source: str, target: str, precision: str) -> None:
        options = ["int4_accuracy_level=4", "int4_block_size=32", "prune_lm_head=true", "hf_token=false"]
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", target]
        command += ["-p", precision, "-e", "cpu", "-c", f"{target}-cache", "--extra_options", *options]
        subprocess.run(command, check=True, stdout=sys.stderr)

    def open(self, path: str, context: int, threads: int) -> dict[str, Any]:
        import onnxruntime_genai

        config = onnxruntime_genai.Config(path)
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.model = onnxruntime_genai.Model(config)
        params = onnxruntime_genai.GeneratorParams(self.model)
        params.set_search_options(max_length=context, batch_size=1)
        self.generator = onnxruntime_genai.Generator(self.model, params)
        self.vocab_size = json.loads(Path(path, "genai_config.json").read_text())["model"]["vocab_size"]
        return {"vocab_size": self.vocab_size}

    def rewind(self, n: int) -> int:
        self.generator.rewind_to(n)
        return n

    def step(self, ids: Sequence[int]) -> Any:
        self.generator.append_tokens(np.array([ids], np.int32))

    def last(self, result: Any) -> Floats:
        return self.generator.get_logits().reshape(-1, self.vocab_size)[-1]


class Torch(Adapter):
    """PyTorch: transformers' LlamaForCausalLM in eager mode, its attention through scaled_dot_product_attention."""

    def convert(self, source: str, target: str, precision: str) -> None:
        Path(target).symlink_to(Path(source).resolve())

    def open(self, path: str, context: int, threads: int, precision: str) -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").eval()
        self.new_cache = lambda: DynamicCache(config=self.model.config)
        self.cache = self.new_cache()
        self.vocab_size = self.model.config.vocab_size
        return {"vocab_size": self.vocab_size}

    def rewind(self, n: int) -> int:
        if not n:
            self.cache = self.new_cache()
        elif n < (length := self.cache.get_seq_length()):
            self.cache.crop(n - length)  # negative: so many fewer
        return n

    def step(self, ids: Sequence[int]) -> Any:
        import torch

        return self.model(torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits

    def last(self, result: Any) -> Floats:
        return result[0, -1].float().numpy()


ADAPTERS = {
    "smolrun": Smolrun,
    "openvino": OpenVino,
    "ctranslate2": Ctranslate2,
    "onnxruntime-genai": OnnxGenai,
    "torch": Torch,
}

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model is never looked up
    serve(ADAPTERS[sys.argv[1]]())
