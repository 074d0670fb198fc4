"""Small real parts with random weights: an open_clip folder, a Llama with its tokenizer, and a checkpoint of both.

What such a model says means nothing; that it says it is what the tests need.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmllm.batch import IMAGE_TOKEN
from mmllm.checkpoint.folder import save_checkpoint
from mmllm.checkpoint.golden import make_golden
from mmllm.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from mmllm.model.build import build_model
from mmllm.scenes.conversations import about_one, text_example
from mmllm.scenes.world import sample_scene
from mmllm.warmup.vocabulary import build_tokenizer

SIDE_PX = 32
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": SIDE_PX},
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 64,
        "width": 16,
        "heads": 2,
        "layers": 1,
        "hf_tokenizer_name": ".",
    },
}
PREPROCESS = {"size": SIDE_PX, "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
VOCAB_SIZE = 400
MAX_LENGTH_TOKENS = 2048


def make_clip(folder: Path) -> None:
    """A folder that open_clip's `local-dir:` reads."""
    from open_clip import model
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = {"model_cfg": CLIP, "preprocess_cfg": {**PREPROCESS, "resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.CLIP(**CLIP).state_dict(), str(folder / "open_clip_model.safetensors"))


def make_language(folder: Path) -> None:
    """A folder that AutoModelForCausalLM and AutoTokenizer read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rng = random.Random(0)
    talks = [text_example(about_one(sample_scene(rng, "train"), rng, 4), rng, str(number)) for number in range(60)]
    tokenizer = build_tokenizer([turn.text for talk in talks for turn in talk.messages], VOCAB_SIZE)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH_TOKENS, tie_word_embeddings=False, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)]] = 0
    model.save_pretrained(folder)


def model_config(parts: Path, **vision: Any) -> ModelConfig:
    """The settings of a model out of these parts; `vision` goes before what stands here."""
    return ModelConfig(
        vision=VisionConfig(
            **{"source": f"local-dir:{parts / 'vision'}", "feature_layer": -1, "image_mode": "stretch", **vision}
        ),
        projector=ProjectorConfig(kind="downsample", options={"factor": 2}),
        language=LanguageConfig(source=str(parts / "language"), attention="eager"),
        template="tokenizer",
    )


def red_picture(path: Path, width: int, height: int) -> Path:
    Image.new("RGB", (width, height), "red").save(path)
    return path


def make_parts(folder: Path) -> Path:
    """`vision/` and `language/` in this folder."""
    torch.manual_seed(0)
    make_clip(folder / "vision")
    make_language(folder / "language")
    return folder


def make_checkpoint(folder: Path, parts: Path, **vision: Any) -> Path:
    """A checkpoint as a stage saves one."""
    torch.manual_seed(0)
    model, processor, origin = build_model(model_config(parts, **vision))
    model.eval()
    files = make_golden(model, processor)
    card = "A model of random weights, for tests.\n"
    save_checkpoint(folder, model, processor, card=card, files=files, origin=origin)
    return folder
