"""A checkpoint of real classes and random weights: small, quick, and never at a loss for words, for it knows no end."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mmllm.batch import IMAGE_TOKEN
from mmllm.model.checkpoint import save_checkpoint
from mmllm.model.processor import VisionLanguageProcessor, image_processor
from mmllm.model.vision import TowerSpec, VisionTower
from mmllm.model.vlm import VisionLanguageConfig, VisionLanguageModel
from mmllm.scenes.tell import tell
from mmllm.scenes.world import sample_scene
from projector import build_projector

VISION_CFG = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 2, "head_width": 8, "mlp_ratio": 2.0}


def _tokenizer() -> PreTrainedTokenizerFast:
    rng = random.Random(0)
    texts = [tell(sample_scene(rng, "val"), rng) for _ in range(200)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", IMAGE_TOKEN]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def save_untrained(folder: Path, *, hidden_size: int = 32, num_layers: int = 2) -> Path:
    """Writes the checkpoint. Its scores of end and special tokens are always 0 and others are random around it, so a
    greedy reply goes on until it is stopped or cut off."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    spec = TowerSpec(
        model_cfg={"embed_dim": 16, "vision_cfg": VISION_CFG},
        layer=-1,
        image_size_px=VISION_CFG["image_size"],
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bicubic",
        source="random",
    )
    tower = VisionTower(spec)
    language_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            max_position_embeddings=4096,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        language_model.lm_head.weight[tokenizer.all_special_ids] = 0
    projector = build_projector("mlp", vision_dim=tower.width, llm_dim=hidden_size)
    config = VisionLanguageConfig(
        vision=spec.to_json(),
        projector={"kind": "mlp", "options": {}},
        text_config=language_model.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        num_image_tokens=tower.num_patches,
    )
    processor = VisionLanguageProcessor(
        image_processor(spec, "pad"), tokenizer, template="vicuna_v1", num_image_tokens=tower.num_patches
    )
    model = VisionLanguageModel.assemble(config, tower, projector, language_model)
    save_checkpoint(folder, model, processor, card="A model of random weights, for tests.\n")
    return folder
