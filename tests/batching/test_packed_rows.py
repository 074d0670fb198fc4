"""Packed rows: each LLM keeps examples apart or is not packed, and a step's loss is the same however it is divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmllm.batching.packed_rows import Packer, row_cost
from mmllm.batching.packing import packed_position_ids
from mmllm.config import ConfigError, DataConfig
from mmllm.model.capabilities import find_capabilities, why_not_packed
from mmllm.stages.conversation import ConversationStage
from tests.builders.tiny_backbones import BACKBONES, SEES_ITS_NEIGHBOURS, backbone
from tests.builders.tiny_runs import settings_of

LENGTHS = (11, 4, 1, 13)  # longer than the sliding windows of BACKBONES, and as short as can be
PADDING = 5


@torch.no_grad()
def logits(model: Any, embeds: Tensor, **given: Tensor) -> Tensor:
    with torch.compiler.set_stance("force_eager"):  # flex attention compiles for minutes
        found: Tensor = model(inputs_embeds=embeds, use_cache=False, **given).logits
        return found


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_examples_of_a_row_are_kept_apart_or_the_llm_is_found_out(kind: str, attention: str) -> None:
    model = backbone(kind, attention)
    if kind in SEES_ITS_NEIGHBOURS:
        assert why_not_packed(model) is not None
        return
    assert why_not_packed(model) is None
    width = sum(LENGTHS) + PADDING
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(2, width, 32, generator=generator)
    where = packed_position_ids([LENGTHS, LENGTHS[::-1]], width)
    together = logits(model, embeds, position_ids=where)
    for row, lengths in enumerate((LENGTHS, LENGTHS[::-1])):
        starts = [sum(lengths[:number]) for number in range(len(lengths))]
        for start, length in zip(starts, lengths, strict=True):
            span = slice(start, start + length)
            alone = logits(model, embeds[row : row + 1, span])[0]
            apart = (together[row, span] - alone).abs().max() / alone.abs().max()
            assert apart <= 1e-5
    for span in (slice(0, 11), slice(11, 15), slice(16, 29), slice(29, width)):  # each example, and the padding
        others = embeds.clone()
        others[0, span] = others[0, span].flip(1) * 2
        changed = (logits(model, others, position_ids=where) - together).abs().amax(2)
        outside = torch.ones(2, width, dtype=torch.bool)
        outside[0, span] = False
        assert changed[0, span].max() > 1e-2, "the change is one that can be seen"
        assert changed[outside].max() <= 1e-6 * together.abs().max()


def test_with_a_cache_packing_would_be_wrong_without_a_word() -> None:
    model = backbone("llama", "eager")
    embeds, where = torch.randn(1, 20, 32), packed_position_ids([[10, 10]], 20)
    with torch.no_grad():
        right = model(inputs_embeds=embeds, position_ids=where, use_cache=False).logits
        wrong = model(inputs_embeds=embeds, position_ids=where, use_cache=True).logits
    assert (right - wrong).abs().max() > 1e-2, "transformers has mended it; use_cache=False may go from losses.py"


@pytest.mark.parametrize("kind", SEES_ITS_NEIGHBOURS)
def test_an_llm_that_sees_its_neighbours_is_refused_or_not_packed(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = backbone(kind, "eager")
    data = {"train": [{"path": "x.json"}]}
    with pytest.raises(ConfigError, match=rf"data.packing: always, but {kind} does not keep examples of one row apart"):
        Packer(model, DataConfig(**data, packing="always"), find_capabilities(model))
    packer = Packer(model, DataConfig(**data), find_capabilities(model))
    assert packer.rows([100, 2, 2, 2, 2]) is None
    assert f"nothing is packed, {kind} does not keep examples of one row apart" in capsys.readouterr().out
    assert packer.split_step([0, 1, 2, 3], 2, lambda item: ((5, 90, 6, 80)[item], 1)) == [[1, 3], [0, 2]], "by length"


def test_a_router_whose_loss_is_one_of_whole_rows_is_not_packed() -> None:
    model = backbone("mixtral", "eager")
    assert why_not_packed(model) is None
    model.config.output_router_logits = True
    assert "router" in str(why_not_packed(model))


def test_attention_weighs_more_where_it_goes_through_memory() -> None:
    eager, sdpa, flex = (row_cost(backbone("llama", name)) for name in ("eager", "sdpa", "flex_attention"))
    assert flex.even_width is None
    assert 0 < (eager.even_width or 0) < (sdpa.even_width or 0)


# A step of the real stage


SETTINGS = ("data.group_by_length=false", "compute.batch_size=12", "optim.max_steps=1", "compute.precision=fp32")


class Division:
    """One step's summed loss and gradients, in fp64, when its examples are divided in some way."""

    def __init__(self, settings: Path, out: Path):
        self.stages = {
            packing: ConversationStage(settings_of(settings, out, *SETTINGS, f"data.packing={packing}"))
            for packing in ("never", "always", "auto")
        }
        for stage in self.stages.values():
            stage.model.double()

    def step(self, packing: str, accumulate: int, ranks: int = 1) -> tuple[float, dict[str, Tensor]]:
        stage = self.stages[packing]
        stage.model.zero_grad()
        order = stage.sampler(12)
        total, names = 0.0, []
        for rank in range(ranks):
            micro_batches = order.split_step(order.rank_items(0, rank, ranks), accumulate)
            assert len(micro_batches) == accumulate
            for indices in micro_batches:
                batch = stage.batch(indices)
                if batch.pixel_values is not None:
                    batch.pixel_values = batch.pixel_values.double()
                loss = stage.module(batch)
                loss.backward()
                total += float(loss.detach())
                names += stage.names(batch)
        assert sorted(names) == sorted(stage.examples[index].id for index in order.batch(0))  # type: ignore[attr-defined]
        return total, {
            name: p.grad.clone() for named in stage.parts.values() for name, p in named if p.grad is not None
        }


@pytest.fixture(scope="module")
def division(tiny_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Division:
    return Division(tiny_runs / "stage2.yaml", tmp_path_factory.mktemp("packed") / "out")


@pytest.mark.parametrize("packing", ["never", "always", "auto"])
@pytest.mark.parametrize(("accumulate", "ranks"), [(1, 1), (2, 1), (3, 1), (12, 1), (1, 2), (3, 2)])
def test_neither_packing_nor_micro_batches_nor_ranks_change_loss_or_gradients(
    packing: str, accumulate: int, ranks: int, division: Division
) -> None:
    expected, gradients = division.step("never", 1)
    found, others = division.step(packing, accumulate, ranks)
    assert found == pytest.approx(expected, rel=1e-6)
    assert gradients.keys() == others.keys()
    whole = torch.cat([value.flatten() for value in gradients.values()])
    other = torch.cat([others[name].flatten() for name in gradients])
    assert float((whole - other).norm() / whole.norm()) <= 2e-6
