"""`mmllm import`: models of others say here what they say there, or are refused with what is missing."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import processors
from typer.testing import CliRunner

from mmllm.chat.renderer import ChatError
from mmllm.checkpoint.folder import load_checkpoint, stored_dtypes
from mmllm.checkpoint.golden import Check, verify_golden
from mmllm.cli import app
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling
from mmllm.interop.hf_llava import export_hf
from mmllm.model.language import load_tokenizer
from tests.builders.llava_models import (
    ASKED,
    LISTS,
    PINPOINTS,
    checkpoint,
    imported,
    llava,
    logits,
    logits_there,
    refused,
)
from tests.builders.llava_parts import ENCODER, LLMS, make_encoder, make_llm
from tests.builders.pairwise import covering_combinations


@pytest.fixture(scope="session")
def tokenizer(tiny_parts: Path) -> Any:
    return load_tokenizer(str(tiny_parts / "language"))


@pytest.fixture(scope="session")
def parts(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("import_parts")
    make_encoder("clip", folder / "clip")
    make_encoder("siglip", folder / "siglip")
    for kind in LLMS:
        make_llm(kind, folder / kind, tokenizer)
    return folder


def verify(folder: Path) -> list[Check]:
    return verify_golden(*load_checkpoint(folder)[:2], folder)


AXES = {"language": list(LLMS), "vision": ["clip", "siglip"], "kind": ["Llava", "LlavaNext"]}


@pytest.mark.parametrize("choices", covering_combinations(AXES), ids=lambda choices: "-".join(choices.values()))
def test_a_llava_of_transformers_says_the_same_here(
    parts: Path, tokenizer: Any, tmp_path: Path, choices: dict[str, str]
) -> None:
    vision, language, kind = (choices[axis] for axis in ("vision", "language", "kind"))
    model = llava(parts, tmp_path / "theirs", vision, language, tokenizer, kind=kind)
    verdict = imported(tmp_path / "theirs", tmp_path / "out")
    assert verdict is not None
    assert verdict.max_logit_difference <= 1e-4
    own = logits(tmp_path / "out")
    torch.testing.assert_close(own, logits_there(model, tmp_path / "theirs", tmp_path / "out"), atol=1e-4, rtol=0)
    assert own.std() > 0.1
    assert [check.holds for check in verify(tmp_path / "out")] == [True, True, True], "golden answers of its own"
    assert len(Engine.load(tmp_path / "out", device="cpu").model.vision_tower.blocks()) == 2, "layer -2 of three"


@pytest.mark.parametrize(
    ("projector", "image_mode"), [("linear", "pad"), ("mlp", "crop"), ("linear", "stretch"), ("mlp", "anyres")]
)
def test_what_was_exported_comes_back_as_it_was(parts: Path, tmp_path: Path, projector: str, image_mode: str) -> None:
    source = f"transformers:{parts / 'siglip'}"
    model = checkpoint(tmp_path / "model", source, {"kind": projector}, parts / "qwen2", image_mode=image_mode)
    export_hf(model, tmp_path / "hf")
    imported(tmp_path / "hf", tmp_path / "back")
    torch.testing.assert_close(logits(tmp_path / "back"), logits(model), atol=1e-5, rtol=0)
    assert Engine.load(tmp_path / "back", device="cpu").model.config.projector["kind"] == projector
    one, other = (Engine.load(path, device="cpu") for path in (model, tmp_path / "back"))
    assert one.renderer.text(ASKED.messages) == other.renderer.text(ASKED.messages)
    greedy = Sampling(max_new_tokens=6)
    assert one.reply(ASKED, greedy).text == other.reply(ASKED, greedy).text


def original(parts: Path, folder: Path, tokenizer: Any, model: Any, **fields: Any) -> Path:
    """The same model as LLaVA's own code would have saved it."""
    folder.mkdir()
    weights = {}
    for name, value in model.state_dict().items():
        if name.startswith("model.language_model."):
            weights["model." + name.removeprefix("model.language_model.")] = value
        elif name.startswith("lm_head.") or name == "model.image_newline":
            weights[name] = value
        elif name.startswith("model.multi_modal_projector."):
            part = name.removeprefix("model.multi_modal_projector.linear_")
            weights[f"model.mm_projector.{0 if part[0] == '1' else 2}.{part[2:]}"] = value
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    config = model.config.text_config.to_dict()
    config |= {
        "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": str(parts / "clip"),
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_hidden_size": ENCODER["hidden_size"], "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
        "image_aspect_ratio": "square", **fields,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def theirs(parts: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("theirs") / "llava"
    return folder, llava(parts, folder, "clip", "llama", tokenizer)


def test_a_folder_of_llavas_own_code_says_what_transformers_says(
    parts: Path, tokenizer: Any, theirs: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, model = theirs
    source = original(parts, tmp_path / "own", tokenizer, model)
    assert imported(source, tmp_path / "out", template="vicuna_v1") is None
    there = logits_there(model, folder, tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), there, atol=1e-4, rtol=0)
    assert Engine.load(tmp_path / "out", device="cpu").processor.template == "vicuna_v1"
    weights = load_file(source / "model.safetensors")
    names = sorted(weights)
    (source / "model.safetensors").unlink()
    shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, own in shards.items():
        torch.save({name: weights[name] for name in own}, source / file)
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    imported(source, tmp_path / "sharded", template="vicuna_v1")
    assert torch.equal(logits(tmp_path / "sharded"), logits(tmp_path / "out"))
    (source / "pytorch_model-2.bin").unlink()
    text = refused(source, tmp_path / "half", template="vicuna_v1")
    assert "is half downloaded: it lacks pytorch_model-2.bin, 1 of the 2 files that" in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_folder_of_llavas_own_code_stays_in_the_precision_it_is_stored_in(
    dtype: torch.dtype, parts: Path, tokenizer: Any, theirs: tuple[Path, Any], tmp_path: Path
) -> None:
    source = original(parts, tmp_path / "own", tokenizer, theirs[1])
    weights = {name: value.to(dtype) for name, value in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors")
    imported(source, tmp_path / "out", template="vicuna_v1")
    expected = {"vision": torch.float32, "projector": dtype, "language": dtype}  # the tower is another folder's
    assert stored_dtypes(tmp_path / "out") == expected
    written = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(written[f"language_{name.replace('model.', 'model.model.', 1)}"], weights[name])


def test_tiles_of_llavas_own_code_say_what_transformers_says(parts: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = llava(parts, tmp_path / "theirs", "clip", "llama", tokenizer, kind="LlavaNext")
    sizes = [[width, height] for height, width in PINPOINTS]
    tiled = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    source = original(parts, tmp_path / "own", tokenizer, model, **tiled, image_grid_pinpoints=str(sizes))
    imported(source, tmp_path / "out", template="vicuna_v1")
    there = logits_there(model, tmp_path / "theirs", tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), there, atol=1e-4, rtol=0)
    weights = load_file(source / "model.safetensors")
    del weights["model.image_newline"]
    save_file(weights, source / "model.safetensors")
    assert "cuts pictures into tiles but lacks the weight image_newline" in refused(
        source, tmp_path / "without", template="vicuna_v1"
    )


def test_sizes_of_tiles_that_do_not_fit_are_refused(parts: Path, tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    llava(parts, folder, "clip", "llama", tokenizer, kind="LlavaNext")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_grid_pinpoints": [[32, 64]]}))
    assert "its model cuts pictures to sizes of [[32, 64]], its image processor of [[32, 64], [64, 32]" in refused(
        folder, tmp_path / "out"
    )
    transform = json.loads((folder / "processor_config.json").read_text())
    transform["image_processor"]["image_grid_pinpoints"] = [[32, 65]]
    (folder / "processor_config.json").write_text(json.dumps(transform))
    (folder / "config.json").write_text(json.dumps({**config, "image_grid_pinpoints": [[32, 65]]}))
    assert "resizes pictures to [32, 65] pixels, which views of 32 do not fill" in refused(folder, tmp_path / "out")


def test_a_lone_projector_and_a_lora_need_their_llm_and_then_say_the_same(
    parts: Path, tokenizer: Any, theirs: tuple[Path, Any], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    folder, model = theirs
    source = original(parts, tmp_path / "own", tokenizer, model)
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    projector = {name: value for name, value in weights.items() if "mm_projector" in name}
    torch.save(projector, source / "mm_projector.bin")
    text = refused(source, tmp_path / "out", template="vicuna_v1")
    assert "holds no LLM, only mm_projector.bin; give the LLM it was trained on with --base" in text
    imported(source, tmp_path / "out", template="vicuna_v1", base=str(parts / "llama"))
    there = logits_there(model, folder, tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), there, atol=1e-4, rtol=0)

    (source / "mm_projector.bin").unlink()
    torch.save({f"base_model.model.{name}": v for name, v in projector.items()}, source / "non_lora_trainables.bin")
    llm = transformers.AutoModelForCausalLM.from_pretrained(parts / "llama")
    lora = get_peft_model(llm, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    lora.save_pretrained(source)
    imported(source, tmp_path / "lora", template="vicuna_v1", base=str(parts / "llama"))
    model.model.language_model.load_state_dict(lora.merge_and_unload().model.state_dict())
    there = logits_there(model, folder, tmp_path / "lora")
    own = logits(tmp_path / "lora")
    torch.testing.assert_close(own, there, atol=1e-4, rtol=0)
    assert not torch.allclose(own, logits(tmp_path / "out"), atol=1e-2), "the adapter says something"


def test_a_pair_of_encoder_and_llm_becomes_a_checkpoint_to_train(parts: Path, tmp_path: Path) -> None:
    vision = f"transformers:{parts / 'siglip'}"
    done = CliRunner().invoke(app, ["import", str(parts / "mistral"), str(tmp_path / "out"), "--vision", vision])
    assert done.exit_code == 0, done.output
    assert [check.holds for check in verify(tmp_path / "out")] == [True, True, True]
    assert Engine.load(tmp_path / "out", device="cpu").reply(ASKED, Sampling(max_new_tokens=2)).num_image_tokens == 32


class _Code:
    def __reduce__(self) -> Any:
        return (print, ("this code ran",))


def test_a_pickle_with_code_is_refused_and_not_run(
    parts: Path, tokenizer: Any, theirs: tuple[Path, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = original(parts, tmp_path / "own", tokenizer, theirs[1])
    (source / "model.safetensors").unlink()
    torch.save({"model.mm_projector.0.weight": _Code()}, source / "pytorch_model.bin")
    text = refused(source, tmp_path / "out", template="vicuna_v1")
    assert "is a pickle that holds code, or is damaged, and was not run" in text
    assert "this code ran" not in capfd.readouterr().out


CHANGED = {
    "mm_use_im_start_end: True": {"mm_use_im_start_end": True},
    "image_aspect_ratio: 'anyres_max_9'": {"image_aspect_ratio": "anyres_max_9"},
    "mm_patch_merge_type: 'flat'": {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "flat"},
    "has image_grid_pinpoints 'all', which is not a list": {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": "all",
    },
    "mm_vision_select_feature: 'cls_patch'": {"mm_vision_select_feature": "cls_patch"},
    "names the vision tower '/nowhere'": {"mm_vision_tower": "/nowhere"},
    "mm_projector_type 'resampler' cannot be imported": {"mm_projector_type": "resampler"},
    "its projector does not fit tower and LLM": {"mm_projector_type": "mlp3x_gelu"},
    "allowed types of LLaVA's own code: llava, llava_llama": {"model_type": "llava_mpt"},
    "lacks 9 weights of its LLM, such as": {"num_hidden_layers": 3},
    "has weights that its LLM has no place for": {"num_hidden_layers": 1},
}


@pytest.mark.parametrize("reason", CHANGED)
def test_what_cannot_be_brought_over_exactly_is_refused_by_name(
    parts: Path, tokenizer: Any, theirs: tuple[Path, Any], tmp_path: Path, reason: str
) -> None:
    source = original(parts, tmp_path / "own", tokenizer, theirs[1], **CHANGED[reason])
    assert reason in refused(source, tmp_path / "out", template="vicuna_v1")


def test_other_folders_are_refused_with_what_is_allowed(
    parts: Path, tokenizer: Any, theirs: tuple[Path, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert "is of type 'llama' and not a LLaVA" in refused(parts / "llama", out)
    assert "SOURCE: no-one/nothing is no folder here and not in the hub's cache" in refused("no-one/nothing", out)
    assert "has no config.json, which says what the model is" in refused(tmp_path, out)
    source = original(parts, tmp_path / "own", tokenizer, theirs[1])
    assert "its files hold no chat template. Name the template" in refused(source, out)
    half = Path(shutil.copytree(theirs[0], tmp_path / "half"))
    weights = load_file(half / "model.safetensors")
    lost = next(name for name in weights if "multi_modal_projector" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, half / "model.safetensors", {"format": "pt"})
    assert "lacks 1 weights, such as model.multi_modal_projector." in refused(half, out)
    (half / "model.safetensors").unlink()
    assert "cannot be loaded" in refused(half, out)
    config = json.loads((half / "config.json").read_text())
    for change, reason in (
        ({"vision_feature_select_strategy": "full"}, "reads 'full' features of a clip_vision_model"),
        ({"image_token_index": 3}, "marks pictures with token 3"),
    ):
        shutil.copy(theirs[0] / "model.safetensors", half / "model.safetensors")
        (half / "config.json").write_text(json.dumps({**config, **change}))
        assert reason in refused(half, out)


def test_a_chat_template_that_ends_no_answer_is_asked_and_not_trained(
    parts: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """As llava-1.5-7b-hf has it: answers end with the end token that no template writes."""
    plain = copy.deepcopy(tokenizer)
    plain.backend_tokenizer.post_processor = processors.Sequence([])  # as it is, it ends every text itself
    llava(parts, tmp_path / "theirs", "clip", "llama", plain)
    template = LISTS.replace("<|end|>", " ")
    (tmp_path / "theirs" / "chat_template.jinja").write_text(template)
    verdict = imported(tmp_path / "theirs", tmp_path / "out")
    assert verdict is not None
    assert verdict.max_logit_difference <= 1e-4
    assert verdict.prompts == "4 prompts of its own processor match ours, token by token"
    engine = Engine.load(tmp_path / "out", device="cpu")
    assert engine.picture_label == ""
    assert engine.renderer.end_token_id == tokenizer.eos_token_id
    with pytest.raises(ChatError, match="training could not teach where an answer ends"):
        engine.renderer.require_end()


def test_prompts_that_the_folders_own_processor_would_not_give_are_said(
    parts: Path, tokenizer: Any, tmp_path: Path
) -> None:
    llava(parts, tmp_path / "theirs", "clip", "llama", tokenizer)
    verdict = imported(tmp_path / "theirs", tmp_path / "out", template="vicuna_v1")
    assert verdict is not None
    assert verdict.max_logit_difference <= 1e-4
    assert verdict.prompts.startswith(
        "4 of 4 prompts of its own processor differ from ours: of one picture, the text from token 0 on is"
    )
