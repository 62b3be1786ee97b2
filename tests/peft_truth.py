"""peft's answers to what test_peft.py asks; a program of its own, since torch may live in another environment.

    python peft_truth.py BASE GIVEN.npz ADAPTER OUT

OUT/given.npy: logits of GIVEN's ids with ADAPTER, and OUT/merged.npy: of the folder MERGED that GIVEN names, by
transformers alone. OUT/made: an adapter of peft's own, with random factors; OUT/made.npy: its logits.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(base, given, adapter, out):
    out, data = Path(out), np.load(given)
    ids = torch.from_numpy(data["ids"])[None]

    def load(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def write(name, model):
        with torch.no_grad():
            np.save(out / f"{name}.npy", model(input_ids=ids).logits[0].numpy())

    write("given", PeftModel.from_pretrained(load(base), adapter).eval())
    write("merged", load(str(data["merged"])))
    torch.manual_seed(0)
    targets = ["q_proj", "o_proj", "gate_proj", "down_proj"]
    made = get_peft_model(load(base), LoraConfig(r=6, lora_alpha=9, target_modules=targets, use_rslora=True))
    for name, p in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    write("made", made.eval())
    made.save_pretrained(out / "made")
    tokenizer = AutoTokenizer.from_pretrained(str(data["merged"]))
    texts = data["texts"].tolist()
    np.savez(out / "tokens.npz", *[np.array(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts])


if __name__ == "__main__":
    main(*sys.argv[1:])
