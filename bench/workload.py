"""The models, pictures and conversations on which trainers are measured, seeded, in one folder.

vision/ language/    random weights: open_clip's CLIP, transformers' Llama with the embedded tokenizer
checkpoint/          both with a fresh projector, from which `mmllm train` starts
llava/               the same weights as transformers' Llava, written by `mmllm export hf`; added is the encoder's last
                     layer, which is not read but which published Llava checkpoints have
MIX.json, NN.jpg     conversations in LLaVA's format, and their pictures
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCAB_SIZE = 16384  # the tokenizer uses few of these ids; the head and its logits have all
SIDE_PX, PATCH_PX = 112, 8  # 196 image tokens: a third of LLaVA-1.5's 576, as LENGTH_SCALE is of its text
LENGTH_SCALE = 1 / 3
NUM_PICTURES = 48
PICTURE_WIDTH_PX = 640  # as in COCO, from which most of LLaVA's pictures are
WORDS = ("red", "circle", "above", "small", "square", "left", "of", "the", "large", "blue", "ring", "below", "green")


@dataclass(frozen=True)
class Size:
    """Shapes of LLM and tower, and the amount of training in one measurement."""

    width: int
    layers: int
    heads: int
    tower_width: int
    tower_layers: int
    batch_size: int
    steps: int  # one pass over the data
    side_px: int = SIDE_PX
    patch_px: int = PATCH_PX
    vocab_size: int = VOCAB_SIZE
    length_scale: float = LENGTH_SCALE
    rate: float = 3e-4  # learning rate; at higher ones the order of examples changes the curve more
    is_small: bool = True  # all contenders fit into memory together
    kv_heads: int | None = None  # heads of keys and values; None: as many as `heads`

    @property
    def llm(self) -> dict[str, Any]:
        return {
            "hidden_size": self.width, "intermediate_size": round(self.width * 8 / 3 / 64) * 64,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "tie_word_embeddings": True,
            "num_key_value_heads": self.kv_heads or self.heads,
            "max_position_embeddings": 4096, "vocab_size": self.vocab_size,
        }  # fmt: skip

    @property
    def clip(self) -> dict[str, Any]:
        vision = {"layers": self.tower_layers, "width": self.tower_width, "head_width": 64,
                  "patch_size": self.patch_px, "image_size": self.side_px}  # fmt: skip
        text = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}
        return {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}


SIZES = {
    "tiny": Size(width=256, layers=4, heads=4, tower_width=256, tower_layers=6, batch_size=16, steps=12),
    "large": Size(width=768, layers=12, heads=12, tower_width=512, tower_layers=8, batch_size=8, steps=6,
                  rate=3e-5, is_small=False),
    "7b": Size(width=4096, layers=32, heads=32, tower_width=1024, tower_layers=24, batch_size=16, steps=24,
               side_px=336, patch_px=14, vocab_size=32064, length_scale=1, rate=2e-5, is_small=False),
    # SmolLM2-135M with CLIP-L: https://huggingface.co/HuggingFaceTB/SmolLM2-135M/blob/main/config.json
    "smollm": Size(width=576, layers=30, heads=9, kv_heads=3, tower_width=1024, tower_layers=24, batch_size=16,
                   steps=12, side_px=336, patch_px=14, vocab_size=49152, length_scale=1, rate=2e-5, is_small=False),
}  # fmt: skip
QUICK = Size(width=128, layers=2, heads=2, tower_width=128, tower_layers=3, batch_size=4, steps=6, side_px=64)

# The sources of LLaVA-1.5's 665k rows: rows in thousands (https://arxiv.org/abs/2310.03744, table 7), then ranges of
# turns, of tokens of a question, and of tokens of an answer. The numbers of rows are published; the ranges are our
# estimates from the kinds of question.
SOURCES = (
    (58, (3, 5), (8, 16), (15, 60)),  # LLaVA-Instruct, conversation
    (23, (1, 1), (8, 14), (80, 150)),  # detail
    (77, (1, 1), (12, 30), (80, 180)),  # complex reasoning
    (244, (1, 10), (8, 16), (1, 4)),  # VQAv2, GQA, OKVQA, OCRVQA: short answers, all questions of a picture together
    (50, (1, 1), (40, 70), (1, 1)),  # A-OKVQA: a letter
    (22, (1, 1), (15, 30), (10, 18)),  # TextCaps
    (116, (3, 10), (12, 36), (6, 26)),  # RefCOCO, Visual Genome: boxes as text
)
TEXT_ALONE = ((2, 4), (20, 100), (100, 380))  # ShareGPT, cut to 2048 tokens
TEXT_SHARE = 1 / 6  # of rows; it is 1/16 in LLaVA-1.5's own

# (mix of conversations, trained parts, whether our trainer finds the tower's features cached on disk)
STAGES = {
    "stage2": ("instructions", ["projector", "language"], False),
    "stage1": ("captions", ["projector"], False),
    "stage1 cached": ("captions", ["projector"], True),
}


def write_workload(folder: Path, size: Size) -> None:
    """Writes everything but the feature cache. Takes some seconds, mostly for imports."""
    import torch

    torch.manual_seed(0)
    write_parts(folder, size, num_rows=size.batch_size * size.steps)
    write_language(folder / "language", size)
    write_checkpoint(folder)
    _write_llava(folder, size)


def write_parts(folder: Path, size: Size, *, num_rows: int) -> None:
    """Writes the tower, the pictures, and `num_rows` conversations of each mix; no LLM, and no model that has one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "size.json").write_text(json.dumps({"image_tokens": (size.side_px // size.patch_px) ** 2}))
    write_clip(folder / "vision", size)
    _write_pictures(folder)
    for mix in {mix for mix, _, _ in STAGES.values()}:
        rows = list(write_rows(mix, num_rows, scale=size.length_scale))
        (folder / f"{mix}.json").write_text(json.dumps(rows))


def write_clip(folder: Path, size: Size) -> None:
    """Writes a folder that open_clip's `local-dir:` reads."""
    from open_clip import model
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    preprocess = {"size": size.side_px, "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3,
                  "interpolation": "bicubic", "resize_mode": "squash"}  # fmt: skip
    config = {"model_cfg": size.clip, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.CLIP(**size.clip).state_dict(), str(folder / "open_clip_model.safetensors"))


def write_language_config(folder: Path, size: Size) -> Any:
    """Writes the LLM's config and tokenizer without weights; returns the config."""
    from transformers import AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained("weights/tiny-language")
    ids = {"bos_token_id": None, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(**size.llm, **ids, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return config


def write_language(folder: Path, size: Size) -> None:
    """Writes an LLM with random weights, as AutoModelForCausalLM reads it."""
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(write_language_config(folder, size)).save_pretrained(folder)


def write_checkpoint(folder: Path) -> None:
    """Writes `checkpoint/`, made of this folder's parts, with golden answers."""
    from mmllm.checkpoint.folder import save_checkpoint
    from mmllm.checkpoint.golden import make_golden
    from mmllm.config import ModelConfig
    from mmllm.model.build import build_model

    values = {
        "vision": {"source": f"local-dir:{folder / 'vision'}", "feature_layer": -2, "image_mode": "stretch"},
        "projector": {"kind": "mlp"},
        "language": {"source": str(folder / "language")},
        "template": "tokenizer",
    }
    model, processor, origin = build_model(ModelConfig.model_validate(values))
    model.eval()
    files = make_golden(model, processor)
    save_checkpoint(folder / "checkpoint", model, processor, card="Random weights.\n", files=files, origin=origin)


def _write_llava(folder: Path, size: Size) -> None:
    """Writes `llava/`, with the encoder's last layer, and a template that marks the assistant's words."""
    from safetensors.torch import load_file, save_file

    from mmllm.interop.hf_llava import export_hf

    out = folder / "llava"
    export_hf(folder / "checkpoint", out)
    config = json.loads((out / "config.json").read_text())
    num_layers = config["vision_config"]["num_hidden_layers"]
    for path in out.glob("*.safetensors"):
        weights = load_file(path)
        marks = f".encoder.layers.{num_layers - 1}.", f".encoder.layers.{num_layers}."
        weights |= {name.replace(*marks): value.clone() for name, value in weights.items() if marks[0] in name}
        save_file(weights, path, metadata={"format": "pt"})
    config["vision_config"]["num_hidden_layers"] = size.tower_layers
    config["vision_feature_layer"] = -2
    (out / "config.json").write_text(json.dumps(config))
    template = out / "chat_template.jinja"
    head, separator, tail = template.read_text().partition("{{ open[m.role] }}{{ content }}{{ close[m.role] }}")
    assert separator, "the exported template has changed"
    marked = (
        "{{ open[m.role] }}{% if m.role == 'assistant' %}{% generation %}{{ content }}{{ close[m.role] }}"
        "{% endgeneration %}{% else %}{{ content }}{{ close[m.role] }}{% endif %}"
    )
    template.write_text(head + marked + tail)


def _write_pictures(folder: Path) -> None:
    from mmllm.scenes.draw import draw
    from mmllm.scenes.world import sample_scene

    rng = random.Random(0)
    for number in range(NUM_PICTURES):
        picture = draw(sample_scene(rng, "train"), rng)
        height = round(PICTURE_WIDTH_PX * picture.height / picture.width)
        picture.resize((PICTURE_WIDTH_PX, height)).save(folder / f"{number}.jpg", quality=90)


def write_rows(mix: str, count: int, *, scale: float = LENGTH_SCALE) -> Iterator[dict[str, Any]]:
    """Conversations in LLaVA's format: one-turn `captions`, or a mix of SOURCES. A word is one token.

    `scale` multiplies the lengths of texts.
    """
    rng = random.Random(mix)

    def words(lengths: tuple[int, int]) -> str:
        return " ".join(rng.choices(WORDS, k=max(1, round(scale * rng.uniform(*lengths)))))

    def turns(number: int, question: tuple[int, int], answer: tuple[int, int]) -> list[dict[str, str]]:
        spoken = [(words(question), words(answer)) for _ in range(number)]
        return [
            {"from": who, "value": text} for pair in spoken for who, text in zip(("human", "gpt"), pair, strict=True)
        ]

    for number in range(count):
        is_text = mix != "captions" and rng.random() < TEXT_SHARE
        if mix == "captions":
            spoken = turns(1, (9, 9), (24, 42))
        elif is_text:
            spoken = turns(rng.randint(*TEXT_ALONE[0]), *TEXT_ALONE[1:])
        else:
            (_, num_turns, question, answer) = rng.choices(SOURCES, weights=[source[0] for source in SOURCES])[0]
            spoken = turns(rng.randint(*num_turns), question, answer)
        row: dict[str, Any] = {"id": str(number), "conversations": spoken}
        if not is_text:
            row["image"] = f"{number % NUM_PICTURES}.jpg"
            spoken[0]["value"] = f"<image>\n{spoken[0]['value']}"
        yield row


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row's conversation in the form that transformers' processors take: each content is a list of parts."""
    roles = {"human": "user", "gpt": "assistant"}
    messages = []
    for turn in row["conversations"]:
        head, tag, text = turn["value"].rpartition("<image>")
        parts = [{"type": "image", "text": None}] if tag else []
        parts.append({"type": "text", "text": text})
        assert not head, "pictures come before the text"
        messages.append({"role": roles[turn["from"]], "content": parts})
    return messages


class Rows(list[dict[str, Any]]):
    """Rows whose pictures are decoded when a row is read, as `datasets` does."""

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image

        row = super().__getitem__(index)
        return {**row, "images": [Image.open(path) for path in row["images"]]}
