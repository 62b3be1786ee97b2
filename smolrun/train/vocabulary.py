"""A byte-level BPE of one's own, as SmolLM2's is made: every digit alone, GPT-2's words, the same 17 specials first."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from smolrun.errors import OptionError
from smolrun.files.checkpoint import END_OF_TEXT
from smolrun.files.whole import whole

SPECIALS = (  # ids 0 to 16
    END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>",
    "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>",
    "<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>",
)  # fmt: skip
LEAST = len(SPECIALS) + 256  # every byte has a token: no text is unknown


def train_vocabulary(texts: Iterable[str], vocab_size: int, folder: Path) -> int:
    """Write tokenizer.json and tokenizer_config.json, as a base model has them, into a folder.

    Returns:
        The number of tokens: fewer than `vocab_size` where the texts have no more words to make tokens of.

    Raises:
        OptionError: a vocabulary too small for the bytes alone.
    """
    if not LEAST <= vocab_size <= 1 << 20:
        raise OptionError(f"vocab_size = {vocab_size:,}: {LEAST} (specials and bytes) to 1,048,576 expected")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(special, normalized=False) for special in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False, **names}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("tokenizer_config.json", json.dumps(config, indent=2)), ("tokenizer.json", bpe.to_str(True))):
        with whole(folder / name) as file:
            file.write(text.encode())
    return int(bpe.get_vocab_size())
