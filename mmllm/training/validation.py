"""Validation while a stage trains: loss on held-out data, image reliance, text loss, task scores, and sample answers.

Losses are in nats per supervised token. With several sources, `val_loss/SOURCE` is logged beside `val_loss`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from torch import nn

from mmllm.batch import Batch, Example, ImageRef
from mmllm.config import StageConfig
from mmllm.evaluation.reliance import exchange_pictures, reliance_of
from mmllm.evaluation.validation_tasks import task_scores
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling
from mmllm.model.positions import position_limit
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.vlm import VisionLanguageModel
from mmllm.runs.alarms import TEXT_LOSS
from mmllm.runs.folder import RunFolder
from mmllm.training.data import evenly_spaced
from mmllm.training.losses import supervised_counts

REHEARSED_QUESTIONS = 32  # per task: one batch
_UNSAFE_CHARACTER = re.compile(r"[^\w.-]")  # of an id, in a file name


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """A short name for each data file: its stem, with as many parent folders as tell it apart from the others."""
    parts = {path: PurePath(path).with_suffix("").parts for path in paths}
    names: dict[str, str] = {}
    for path, path_parts in parts.items():
        others = [other for key, other in parts.items() if key != path]
        depths = range(1, len(path_parts))
        depth = next((d for d in depths if all(other[-d:] != path_parts[-d:] for other in others)), len(path_parts))
        names[path] = "/".join(_UNSAFE_CHARACTER.sub("_", part) for part in path_parts[-depth:])
    if len(set(names.values())) < len(names):  # such as a.json and a.jsonl in one folder
        return {path: f"{name}-{number}" for number, (path, name) in enumerate(names.items(), start=1)}
    return names


class Validation:
    """The validation of stage 1 and stage 2. `notes` says what cannot be computed on this data, and why.

    `collate` makes a batch from examples, `module` returns its summed loss. `text` holds text-only conversations; it is
    empty if the LLM is not trained.
    """

    def __init__(
        self,
        config: StageConfig,
        model: VisionLanguageModel,
        processor: VisionLanguageProcessor,
        *,
        examples: Sequence[Example],
        text: Sequence[Example],
        collate: Callable[[Sequence[Example]], Batch],
        module: nn.Module,
    ):
        # static: in this thread, in its autocast, and at the same steps on all ranks, which may share the weights
        self.config, self.engine = config, Engine(model, processor, name=Path(config.out).name, batching="static")
        self.max_positions = position_limit(model.language_model)
        self.examples, self.text = examples, text
        self.collate, self.module = collate, module
        paths = list(dict.fromkeys(example.source for example in examples))
        self.names = short_names(paths) if len(paths) > 1 else {}
        self.task_names = short_names(config.validation.tasks)
        self.exchanged = exchange_pictures(examples, config.seed, self._fits)
        self.notes = self._notes()

    def _fits(self, example: Example) -> bool:
        length = len(self.engine.renderer.render_example(example).input_ids)
        return length <= min(self.config.data.max_length_tokens, self.max_positions or length)

    def _notes(self) -> list[str]:
        notes = []
        if self.examples and not self.exchanged:
            notes.append("image reliance is not computed: data.val has no two examples whose pictures can be exchanged")
        if "language" in self.config.train and not self.text:
            notes.append(
                "what the LLM forgets is not measured: data.val has no conversation without a picture; name some in "
                "validation.text_probe"
            )
        return notes

    def _losses(self, examples: Sequence[Example]) -> tuple[list[float], list[int]]:
        """The summed loss and the number of supervised tokens of each example, in the order of the examples."""
        losses, counts, size = [0.0] * len(examples), [0] * len(examples), self.config.compute.batch_size
        for start in range(0, len(examples), size):
            batch = self.collate(examples[start : start + size])
            indices: dict[str, deque[int]] = defaultdict(deque)  # by id: packing reorders the examples of a batch
            for index, example in enumerate(examples[start : start + size], start=start):
                indices[example.id].append(index)
            batch_losses = self.module(batch, per_example=True).tolist()
            for name, loss, count in zip(batch.example_ids, batch_losses, supervised_counts(batch), strict=True):
                index = indices[name].popleft()
                losses[index], counts[index] = loss, count
        return losses, counts

    def metrics(self, step: int, *, writes: bool = True) -> dict[str, float]:
        """Every metric after `step` steps, by name. The model must be in eval mode, with gradients off.

        Sample answers are written to `samples/` if this process `writes`; other processes only help to generate them.
        """
        metrics = self._validation_losses()
        if self.text:
            losses, counts = self._losses(self.text)
            metrics[TEXT_LOSS] = sum(losses) / max(1, sum(counts))
        for task, name in self.task_names.items():
            scores = task_scores(self.engine, task, self.config.validation.task_questions)
            metrics |= {f"task/{name}/{measure}": value for measure, value in scores.items()}
        if self.examples:
            self._write_samples(step, writes=writes)
        return metrics

    def rehearse(self) -> None:
        """Runs what needs most memory in `metrics`: the longest batch, the longest prompt, and a batch of each task."""
        examples = [*self.examples, *self.exchanged.values(), *self.text]
        longest = sorted(examples, key=lambda example: -len(self.engine.renderer.render_example(example).input_ids))
        self._losses(longest[: self.config.compute.batch_size])
        if self.examples and self.config.validation.num_samples:
            self.engine.reply(_first_question(longest[0]), Sampling(max_new_tokens=2))
        for task in self.task_names:
            task_scores(self.engine, task, min(self.config.validation.task_questions, REHEARSED_QUESTIONS))

    def _validation_losses(self) -> dict[str, float]:
        """The loss, that of each source, and image reliance, which runs examples again with exchanged pictures."""
        groups: dict[tuple[str, bool], list[int]] = defaultdict(list)
        for index, example in enumerate(self.examples):
            groups[example.source, index in self.exchanged].append(index)
        sums: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        right_losses: list[float] = []
        other_losses: list[float] = []
        num_tokens: list[int] = []
        for (source, has_exchange), indices in groups.items():
            losses, counts = self._losses([self.examples[index] for index in indices])
            sums[source] = (sums[source][0] + sum(losses), sums[source][1] + sum(counts))
            if has_exchange:
                other_losses += self._losses([self.exchanged[index] for index in indices])[0]
                right_losses += losses
                num_tokens += counts
        if not sums:
            return {}
        total, count = (sum(column) for column in zip(*sums.values(), strict=True))
        metrics = {"val_loss": total / max(1, count)}
        metrics |= {f"val_loss/{name}": sums[path][0] / max(1, sums[path][1]) for path, name in self.names.items()}
        return metrics | (reliance_of(right_losses, other_losses, num_tokens) if num_tokens else {})

    def _write_samples(self, step: int, *, writes: bool) -> None:
        """Writes `samples/step_N.md` and, for the report, `step_N.json`, with the pictures as the model saw them."""
        folder = RunFolder(Path(self.config.out)).samples
        folder.mkdir(parents=True, exist_ok=True)
        samples = [
            self._sample(example, folder, writes=writes)
            for example in evenly_spaced(self.examples, self.config.validation.num_samples)
        ]
        if not writes:
            return
        lines = [f"# Answers after step {step}\n"]
        for sample in samples:
            lines += [f"![what the model saw]({name})\n" for name in sample["pictures"]]
            lines.append(
                f"- question: {sample['question']}\n- answer: {sample['answer']}\n- reference: {sample['reference']}\n"
            )
        (folder / f"step_{step:07d}.md").write_text("\n".join(lines))
        (folder / f"step_{step:07d}.json").write_text(json.dumps(samples, ensure_ascii=False, indent=1))

    def _sample(self, example: Example, folder: Path, *, writes: bool) -> Mapping[str, Any]:
        question = _first_question(example)
        pictures = []
        for number, image in enumerate(question.images):
            name = f"{_UNSAFE_CHARACTER.sub('_', example.id)[-80:]}-{number}.png"
            if writes and not (folder / name).is_file():
                self.engine.preview(image).save(folder / name)
            pictures.append(name)
        return {
            "id": example.id,
            "pictures": pictures,
            "question": question.messages[-1].text.strip(),
            "answer": self.engine.reply(question).text,
            "reference": example.messages[_first_answer(example)].text,
        }


def _first_answer(example: Example) -> int:
    """The index of the first message of the assistant."""
    return next(index for index, message in enumerate(example.messages) if message.role == "assistant")


def _first_question(example: Example) -> Example:
    """The conversation before its first answer, with the images of these messages."""
    messages = example.messages[: _first_answer(example)]
    num_images = sum(isinstance(part, ImageRef) for message in messages for part in message.parts)
    return Example(example.id, example.source, messages, example.images[:num_images])
