"""`mmllm export hf`: what transformers alone makes of the folder is what the checkpoint says, or there is no folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from mmllm.batch import Example, message
from mmllm.cli import app
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling
from mmllm.interop.hf_llava import export_hf
from mmllm.interop.parity import check_answers, probes
from mmllm.interop.towers import CLIP_NAMES, SIGLIP_NAMES, ExportError, encoder_in_transformers, rename_weights
from mmllm.model.language import load_tokenizer
from mmllm.model.tower import TowerSpec
from mmllm.model.vision import build_tower
from tests.builders.llava_models import PICTURES, checkpoint
from tests.builders.llava_parts import LLMS, make_encoder, make_llm
from tests.builders.pairwise import covering_combinations
from tests.builders.tiny_backbones import make_backbone_parts
from tests.builders.tiny_runs import settings_of, train_in_process


@pytest.fixture(scope="session")
def parts(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`clip/`, `siglip/` and each of LLMS, small."""
    folder = tmp_path_factory.mktemp("llava_parts")
    tokenizer = load_tokenizer(str(tiny_parts / "language"))
    for kind in ("clip", "siglip"):
        make_encoder(kind, folder / kind)
    for kind in LLMS:
        make_llm(kind, folder / kind, tokenizer)
    return folder


def logits_in_transformers(folder: Path, text: str, pictures: list[Image.Image]) -> torch.Tensor:
    from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

    is_tiled = AutoConfig.from_pretrained(folder).model_type == "llava_next"
    model_class = LlavaNextForConditionalGeneration if is_tiled else LlavaForConditionalGeneration
    model = model_class.from_pretrained(folder, attn_implementation="eager").eval()
    inputs = AutoProcessor.from_pretrained(folder)(
        text=text, images=pictures or None, add_special_tokens=False, return_tensors="pt"
    )
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        return model(**inputs).logits


AXES = {"language": list(LLMS), "vision": ["clip", "siglip"], "projector": ["linear", "mlp"],
        "image mode": ["pad", "anyres"]}  # fmt: skip


@pytest.mark.parametrize("choices", covering_combinations(AXES), ids=lambda choices: "-".join(choices.values()))
def test_transformers_says_what_the_checkpoint_says(parts: Path, tmp_path: Path, choices: dict[str, str]) -> None:
    language, vision, projector, image_mode = (choices[axis] for axis in AXES)
    source = f"transformers:{parts / vision}"
    model = checkpoint(tmp_path / "model", source, {"kind": projector}, parts / language, image_mode=image_mode)
    verdict = export_hf(model, tmp_path / "out")
    assert verdict.max_logit_difference <= 1e-4
    engine = Engine.load(model, device="cpu")
    turns = (message("user", "<image>\nwhat is it?"), message("assistant", "a red"), message("user", "and <image>?", 1))
    example = Example("x", "", turns, tuple(PICTURES))
    rendered = [engine.renderer.render_example(example)]
    with torch.inference_mode():
        own = engine.model(**engine.inputs(rendered, PICTURES)).logits
    theirs = logits_in_transformers(tmp_path / "out", engine.renderer.text(example.messages), PICTURES)
    torch.testing.assert_close(theirs, own, atol=1e-4, rtol=0)
    assert own.std() > 0.1, "logits that are all alike would prove nothing"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    newline = {"image_newline"} if image_mode == "anyres" else set()
    assert {name.split(".")[0] for name in names} == {
        "vision_tower", "multi_modal_projector", "language_model", *newline,
    }  # fmt: skip
    assert any(name.startswith("vision_tower.vision_model.encoder.layers.0.") for name in names)
    assert ("language_model.lm_head.weight" in names) == (language != "gemma"), "a tied head is not stored twice"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["architectures"] == [LLMS[language]]


def test_a_native_model_has_no_place_in_llava(parts: Path, tmp_path: Path) -> None:
    source = f"transformers:{parts / 'clip'}"
    model = checkpoint(tmp_path / "model", source, {"kind": "mlp"}, parts / "llama", image_mode="native")
    with pytest.raises(
        ExportError, match=r"own aspect ratio \(image_mode: native\), which neither Llava nor LlavaNext"
    ):
        export_hf(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lora_run_is_exported_with_its_adapter(parts: Path, tiny_runs: Path, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", f"transformers:{parts / 'siglip'}", {"kind": "mlp"}, parts / "llama")
    rates = "optim.learning_rates={projector: 0.02, language: 0.01}"
    tree = settings_of(tiny_runs / "stage2.yaml", tmp_path, rates, "lora={rank: 2}").model_dump(mode="json")
    tree["model"] = {"checkpoint": str(model)}
    (tmp_path / "lora.yaml").write_text(json.dumps(tree))
    run = train_in_process(tmp_path / "lora.yaml", tmp_path / "run")
    assert export_hf(run, tmp_path / "out").max_logit_difference <= 1e-4
    base, adapted = (Engine.load(path, device="cpu") for path in (model, run))
    question = [base.renderer.render(probes()[1].messages)]
    with torch.inference_mode():
        one, other = (e.model(**e.inputs(question, probes()[1].images)).logits for e in (base, adapted))
    assert not torch.allclose(one, other, atol=1e-2), "the adapter says something"


def test_an_open_clip_tower_is_exported_too(tiny_parts: Path, parts: Path, tmp_path: Path) -> None:
    source = f"local-dir:{tiny_parts / 'vision'}"
    for layer in (-1, -2, [-1, -2]):
        model = checkpoint(tmp_path / f"m{layer}", source, {"kind": "mlp"}, parts / "llama", feature_layer=layer)
        assert export_hf(model, tmp_path / f"out{layer}").max_logit_difference <= 1e-4
        config = json.loads((tmp_path / f"out{layer}" / "config.json").read_text())
        assert config["vision_feature_layer"] == (layer if isinstance(layer, list) else -1)


def test_an_answer_that_the_model_would_not_give_is_told(tiny_checkpoint: Path) -> None:
    engine, asked = Engine.load(tiny_checkpoint, device="cpu"), [probes()[1]]
    prompts = engine.inputs([engine.renderer.render_example(one) for one in asked], list(asked[0].images))
    pad = engine.processor.tokenizer.pad_token_id
    written = engine.model.generate(**prompts, do_sample=False, max_new_tokens=6, pad_token_id=pad)
    answers = written[:, prompts["input_ids"].shape[1] :]
    with torch.inference_mode():
        check_answers(engine, prompts, answers, "one picture")
        others = engine.model(**prompts).logits[0, -1].topk(2).indices
        for token in (int(others[1]), 5):
            changed = answers.clone()
            changed[0, 0] = token
            with pytest.raises(
                ExportError, match=r"(?s)greedy answers to one picture differ: token 1 is .* allowed: 0.1"
            ):
                check_answers(engine, prompts, changed, "one picture")


def test_a_pipeline_of_transformers_answers_as_chat_does(parts: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    model = checkpoint(tmp_path / "model", f"transformers:{parts / 'clip'}", {"kind": "mlp"}, parts / "llama")
    export_hf(model, tmp_path / "out")
    chat = pipeline("image-text-to-text", str(tmp_path / "out"), device="cpu")
    content = [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "\nwhat is it?"}]
    told = chat(text=[{"role": "user", "content": content}], max_new_tokens=6, return_full_text=False)
    example = Example("x", "", (message("user", "<image>\nwhat is it?"),), (PICTURES[0],))
    reply = Engine.load(model, device="cpu").reply(example, Sampling(max_new_tokens=6))
    assert told[0]["generated_text"].strip() == reply.text.strip()


ENCODERS_OF_OPEN_CLIP = {
    "clip": ({"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}, True, CLIP_NAMES),
    "siglip": ({"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none",
                "image_size": 32}, False, SIGLIP_NAMES),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENCODERS_OF_OPEN_CLIP)
@pytest.mark.parametrize("layer", [-1, -2])
def test_open_clip_and_transformers_see_the_same_patches_with_the_same_weights(kind: str, layer: int) -> None:
    import transformers

    vision_cfg, quick_gelu, names = ENCODERS_OF_OPEN_CLIP[kind]
    config = {"embed_dim": 16, "vision_cfg": vision_cfg, "quick_gelu": quick_gelu}
    torch.manual_seed(0)
    tower: Any = build_tower(TowerSpec(config, layer, 32, (0.5,) * 3, (0.5,) * 3, "bicubic", kind)).eval()
    found = encoder_in_transformers(tower)
    model_class = transformers.CLIPVisionModel if kind == "clip" else transformers.SiglipVisionModel
    encoder = model_class(model_class.config_class(**{k: v for k, v in found.config.items() if k != "model_type"}))
    encoder.load_state_dict(found.weights)
    pixels = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        states = encoder.eval()(pixels, output_hidden_states=True).hidden_states[-1]
        patches = tower(pixels)
        torch.testing.assert_close(states[:, int(found.has_cls) :], patches, atol=1e-5, rtol=0)
        # and back: other weights of transformers' encoder, under open_clip's names
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        tower.encoder.load_state_dict(_back(encoder.state_dict(), tower.encoder.state_dict(), names))
        states = encoder(pixels, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(states[:, int(found.has_cls) :], tower(pixels), atol=1e-5, rtol=0)


def _back(weights: dict[str, torch.Tensor], like: dict[str, torch.Tensor], names: Any) -> dict[str, torch.Tensor]:
    """transformers' weights under open_clip's names, found by renaming a numbered copy of open_clip's."""
    out = {}
    for name, value in like.items():
        new = rename_weights({name: torch.zeros_like(value)}, names)
        out[name] = torch.cat([weights[part] for part in new]).view_as(value)
    return out


REFUSED = {
    "projector: Llava's is two linear layers with GELU between them, this one is downsample": {
        "projector": {"kind": "downsample", "options": {"factor": 2}}},
    "this one is mlp of depth 3": {"projector": {"kind": "mlp", "options": {"depth": 3}}},
    "vision tower: patches:8 is not an encoder of transformers' CLIP or SigLIP": {
        "vision": "patches:8", "image_size_px": 32},
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_counterpart_is_refused_by_part_and_nothing_is_left(
    parts: Path, tmp_path: Path, reason: str
) -> None:
    given = {"vision": f"transformers:{parts / 'clip'}", "projector": {"kind": "linear"}, **REFUSED[reason]}
    model = checkpoint(tmp_path / "model", language=parts / "llama", **given)
    with pytest.raises(ExportError) as caught:
        export_hf(model, tmp_path / "out")
    assert reason in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_resnet_is_refused() -> None:
    config = {"embed_dim": 16, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64}}
    tower = build_tower(TowerSpec(config, -1, 64, (0.5,) * 3, (0.5,) * 3, "bicubic", "RN"))
    with pytest.raises(ExportError, match="vision tower: RN is a ModifiedResNet, and transformers' Llava takes CLIP"):
        encoder_in_transformers(tower)


REFUSED_LLMS = {
    "gemma2": r"LLM: Gemma2ForCausalLM caps its logits \(final_logit_softcapping\), which Llava does not",
    "opt": "LLM: opt does not run inside transformers' Llava",
    "gpt_neox": "LLM: Llava's classic names do not cover the weights of GPTNeoXForCausalLM",
    "mamba": "LLM: Llava's classic names do not cover the weights of MambaForCausalLM",
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED_LLMS)
def test_an_llm_that_llava_cannot_hold_is_refused(kind: str, tiny_parts: Path, tmp_path: Path) -> None:
    config = make_backbone_parts(tmp_path / "parts", kind, tiny_parts)
    assert config.language
    encoder = make_encoder("clip", tmp_path / "clip")
    source = Path(config.language.source)
    model = checkpoint(tmp_path / "model", f"transformers:{encoder}", {"kind": "mlp"}, source)
    with pytest.raises(ExportError, match=REFUSED_LLMS[kind]):
        export_hf(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_says_something_else_is_not_left_behind(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmllm.interop import hf_llava

    model = checkpoint(tmp_path / "model", f"transformers:{parts / 'clip'}", {"kind": "mlp"}, parts / "llama")
    honest = hf_llava.projector_in_llava

    def wrong(projector: Any) -> Any:
        weights, _ = honest(projector)
        return weights, "relu"

    monkeypatch.setattr(hf_llava, "projector_in_llava", wrong)
    with pytest.raises(ExportError, match=r"logits of two pictures differ by .* between this model and transformers'"):
        export_hf(model, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_the_command_says_what_was_compared_and_takes_no_taken_folder(parts: Path, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", f"transformers:{parts / 'siglip'}", {"kind": "linear"}, parts / "qwen2")
    done = CliRunner().invoke(app, ["export", "hf", str(model), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "gives the same tokens, pixels and answers for 3 conversations; logits differ by at most" in done.output
    assert "the same greedy answers" in (tmp_path / "out" / "README.md").read_text()
    again = CliRunner().invoke(app, ["export", "hf", str(model), str(tmp_path / "out")])
    assert again.exit_code != 0
    assert "exists already; give a new folder" in again.output
