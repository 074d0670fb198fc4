"""How a stage is judged while it trains: its loss on data that it never learns, what it makes of the pictures, what is
left of its speech, the scores of tasks, and answers for people to read.

Losses are in nats per supervised token. `val_loss/SOURCE` stands beside `val_loss` where there are several sources.
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
from mmllm.inference.engine import Engine, Sampling
from mmllm.model.positions import position_limit
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.vlm import VisionLanguageModel
from mmllm.runs.alarms import TEXT_LOSS
from mmllm.runs.folder import RunFolder
from mmllm.training.data import spread
from mmllm.training.losses import supervised_counts

REHEARSED_QUESTIONS = 32  # of a task: a batch
_NO_FILE_NAME = re.compile(r"[^\w.-]")  # characters of an id that a file name better does without


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """A name for each data file: its own without suffix, with as many of its folders as tell it from the others."""
    parts = {path: PurePath(path).with_suffix("").parts for path in paths}
    names: dict[str, str] = {}
    for path, own in parts.items():
        others = [other for key, other in parts.items() if key != path]
        depth = next((d for d in range(1, len(own)) if all(other[-d:] != own[-d:] for other in others)), len(own))
        names[path] = "/".join(_NO_FILE_NAME.sub("_", part) for part in own[-depth:])
    if len(set(names.values())) < len(names):  # such as a.json and a.jsonl of one folder
        return {path: f"{name}-{number}" for number, (path, name) in enumerate(names.items(), start=1)}
    return names


class Validation:
    """The validation of stage 1 and stage 2. `notes` says what cannot be computed on this data, and why.

    `collate` makes a batch of examples, `module` its summed loss. `text` are conversations without pictures, none
    where the LLM is not trained.
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
        self.config, self.engine = config, Engine(model, processor, name=Path(config.out).name)
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
        """Of each example, in their order: its loss summed over supervised tokens, and their number."""
        losses, counts, size = [0.0] * len(examples), [0] * len(examples), self.config.compute.batch_size
        for start in range(0, len(examples), size):
            batch = self.collate(examples[start : start + size])
            places: dict[str, deque[int]] = defaultdict(deque)  # packing puts the examples of a batch in another order
            for place, example in enumerate(examples[start : start + size], start=start):
                places[example.id].append(place)
            found = self.module(batch, per_example=True).tolist()
            for name, loss, count in zip(batch.example_ids, found, supervised_counts(batch), strict=True):
                place = places[name].popleft()
                losses[place], counts[place] = loss, count
        return losses, counts

    def figures(self, step: int, *, writes: bool = True) -> dict[str, float]:
        """Every figure after `step` steps. Needs a model in eval mode, and no gradients.

        Answers go to `samples/`, where this process `writes`; others only take part in making them.
        """
        found = self._validation_losses()
        if self.text:
            losses, counts = self._losses(self.text)
            found[TEXT_LOSS] = sum(losses) / max(1, sum(counts))
        for task, name in self.task_names.items():
            scores = task_scores(self.engine, task, self.config.validation.task_questions)
            found |= {f"task/{name}/{measure}": value for measure, value in scores.items()}
        if self.examples:
            self._write_samples(step, writes=writes)
        return found

    def rehearse(self) -> None:
        """What needs most memory of `figures`: the longest batch, the longest prompt, and a batch of each task."""
        examples = [*self.examples, *self.exchanged.values(), *self.text]
        longest = sorted(examples, key=lambda one: -len(self.engine.renderer.render_example(one).input_ids))
        self._losses(longest[: self.config.compute.batch_size])
        if self.examples and self.config.validation.num_samples:
            self.engine.reply(_first_question(longest[0]), Sampling(max_new_tokens=2))
        for task in self.task_names:
            task_scores(self.engine, task, min(self.config.validation.task_questions, REHEARSED_QUESTIONS))

    def _validation_losses(self) -> dict[str, float]:
        """The loss, that of each source, and image reliance: the same batches are shown twice, so it costs one pass."""
        groups: dict[tuple[str, bool], list[int]] = defaultdict(list)
        for index, example in enumerate(self.examples):
            groups[example.source, index in self.exchanged].append(index)
        sums: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        own: list[float] = []
        others: list[float] = []
        counts: list[int] = []
        for (source, has_exchange), indices in groups.items():
            losses, numbers = self._losses([self.examples[index] for index in indices])
            sums[source] = (sums[source][0] + sum(losses), sums[source][1] + sum(numbers))
            if has_exchange:
                others += self._losses([self.exchanged[index] for index in indices])[0]
                own += losses
                counts += numbers
        if not sums:
            return {}
        total, count = (sum(column) for column in zip(*sums.values(), strict=True))
        found = {"val_loss": total / max(1, count)}
        found |= {f"val_loss/{name}": sums[path][0] / max(1, sums[path][1]) for path, name in self.names.items()}
        return found | (reliance_of(own, others, counts) if counts else {})

    def _write_samples(self, step: int, *, writes: bool) -> None:
        """`samples/step_N.md` for people and `step_N.json` for the report, with the pictures as the model saw them."""
        folder = RunFolder(Path(self.config.out)).samples
        folder.mkdir(parents=True, exist_ok=True)
        samples = [
            self._sample(example, folder, writes=writes)
            for example in spread(self.examples, self.config.validation.num_samples)
        ]
        if not writes:
            return
        lines = [f"# Answers after step {step}\n"]
        for one in samples:
            lines += [f"![what the model saw]({name})\n" for name in one["pictures"]]
            lines.append(f"- question: {one['question']}\n- answer: {one['answer']}\n- reference: {one['reference']}\n")
        (folder / f"step_{step:07d}.md").write_text("\n".join(lines))
        (folder / f"step_{step:07d}.json").write_text(json.dumps(samples, ensure_ascii=False, indent=1))

    def _sample(self, example: Example, folder: Path, *, writes: bool) -> Mapping[str, Any]:
        asked = _first_question(example)
        pictures = []
        for number, image in enumerate(asked.images):
            name = f"{_NO_FILE_NAME.sub('_', example.id)[-80:]}-{number}.png"
            if writes and not (folder / name).is_file():
                self.engine.preview(image).save(folder / name)
            pictures.append(name)
        return {
            "id": example.id,
            "pictures": pictures,
            "question": asked.messages[-1].text.strip(),
            "answer": self.engine.reply(asked).text,
            "reference": example.messages[_first_answer(example)].text,
        }


def _first_answer(example: Example) -> int:
    return next(index for index, message in enumerate(example.messages) if message.role == "assistant")


def _first_question(example: Example) -> Example:
    """The conversation up to its first answer, with the images that stand there."""
    messages = example.messages[: _first_answer(example)]
    num_images = sum(isinstance(part, ImageRef) for message in messages for part in message.parts)
    return Example(example.id, example.source, messages, example.images[:num_images])
