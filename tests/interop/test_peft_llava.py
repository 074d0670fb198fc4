"""Adapters of peft on transformers' Llava come in as peft says them, by names of old releases and of new ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mmllm.model.language import load_tokenizer
from tests.builders.llava_models import imported, llava, logits, logits_there, refused
from tests.builders.llava_parts import make_encoder, make_llm

OLD_NAMES = (  # as transformers before 4.52 called the modules
    ("base_model.model.model.language_model.", "base_model.model.language_model.model."),
    ("base_model.model.model.multi_modal_projector.", "base_model.model.multi_modal_projector."),
    ("base_model.model.model.vision_tower.", "base_model.model.vision_tower.vision_model."),
)


@pytest.fixture(scope="module")
def tuned(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with `base` and `adapter`, on LLM and tower, and the projector trained whole; and peft's own model."""
    folder = tmp_path_factory.mktemp("peft")
    tokenizer = load_tokenizer(str(tiny_parts / "language"))
    make_encoder("clip", folder / "clip")
    make_llm("llama", folder / "llama", tokenizer)
    base = llava(folder, folder / "base", "clip", "llama", tokenizer)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["multi_modal_projector"])
    model = peft.get_peft_model(
        transformers.LlavaForConditionalGeneration.from_pretrained(folder / "base", dtype=base.dtype), settings
    )
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2 if "lora_" in name else 0.3)
    model.save_pretrained(folder / "adapter")
    return folder, model.eval()


def name_the_base(adapter: Path, base: str) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))


@pytest.mark.parametrize("names", ["new", "old"])
@pytest.mark.parametrize("base", ["as its config says", "with --base"])
def test_an_adapter_on_llava_says_here_what_peft_says(
    names: str, base: str, tuned: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, model = tuned
    adapter = Path(shutil.copytree(folder / "adapter", tmp_path / "adapter"))
    if names == "old":
        weights = load_file(adapter / "adapter_model.safetensors")
        for new, old in OLD_NAMES:
            weights = {name.replace(new, old): value for name, value in weights.items()}
        save_file(weights, adapter / "adapter_model.safetensors")
        settings = json.loads((adapter / "adapter_config.json").read_text())
        settings["target_modules"] = r"language_model\.model\.layers\.\d+\.(self_attn|mlp)\..*|vision_tower.*q_proj"
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
    name_the_base(adapter, str(folder / "base") if base == "as its config says" else "somebody/llava")
    options = {} if base == "as its config says" else {"base": str(folder / "base")}
    verdict = imported(adapter, tmp_path / "out", **options)
    assert verdict is not None
    assert verdict.max_logit_difference <= 1e-4
    own = logits(tmp_path / "out")
    torch.testing.assert_close(own, logits_there(model, folder / "base", tmp_path / "out"), atol=1e-4, rtol=0)
    with model.disable_adapter():
        plain = logits_there(model, folder / "base", tmp_path / "out")
    assert (own - plain).abs().max() > 0.1


def test_what_an_adapter_lacks_is_said_before_weights_are_read(tuned: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = tuned
    adapter = Path(shutil.copytree(folder / "adapter", tmp_path / "adapter"))
    name_the_base(adapter, "somebody/llava")
    assert "an adapter of somebody/llava, which is not a folder here; give the" in refused(adapter, tmp_path / "out")
    text = refused(adapter, tmp_path / "out", base=str(folder / "llama"))
    assert "which is of type 'llama' and not transformers' Llava" in text
    (adapter / "adapter_model.safetensors").unlink()
    text = refused(adapter, tmp_path / "out", base=str(folder / "base"))
    assert "has neither adapter_model.safetensors nor adapter_model.bin" in text
