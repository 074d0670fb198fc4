"""A conversation that grows turn by turn, and the example of its next question, written as in the training data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mmllm.batch import PICTURE_LABEL, Example, ImageSource, Message, Part, message, picture_marks
from mmllm.errors import MmllmError


def user_message(text: str, num_pictures: int, first_image: int = 0, *, label: str = PICTURE_LABEL) -> Message:
    """One question: its pictures, each on a line of its own, then its text.

    The text is taken literally: an `<image>` that a user types never becomes a picture. `label` precedes each of
    several pictures; a model's processor has the one that the model was trained with.
    """
    parts: list[Part] = list(message("user", picture_marks(num_pictures, label), first_image).parts)
    if parts and isinstance(parts[-1], str):
        text = parts.pop() + text  # type: ignore[operator]
    return Message("user", (*parts, text))


@dataclass(frozen=True)
class Turn:
    """A question with its pictures, and the answer to it."""

    question: str
    pictures: tuple[ImageSource, ...]
    answer: str


@dataclass
class Conversation:
    """The turns so far. `ask` makes an example of the next question; `add` makes it a turn, once it is answered.

    Example:
        import mmllm

        model = mmllm.load("runs/tiny/stage2")
        talk, picture = mmllm.Conversation(label=model.picture_label), "data/scenes/val/images/000003.png"
        reply = model.reply(talk.ask("How many objects are there?", [picture]))
        talk.add("How many objects are there?", [picture], reply.text)
        print(model.reply(talk.ask("What color is the first one?")).text)
    """

    turns: list[Turn] = field(default_factory=list)
    label: str = PICTURE_LABEL  # precedes each of several pictures

    def ask(self, question: str, pictures: Sequence[ImageSource] = ()) -> Example:
        """All turns, followed by this question. Raises MmllmError for a question without text."""
        if not question.strip():
            raise MmllmError("the question is empty; give it a text")
        messages: list[Message] = []
        images: list[ImageSource] = []
        for turn in self.turns:
            messages.append(user_message(turn.question, len(turn.pictures), len(images), label=self.label))
            messages.append(Message("assistant", (turn.answer,)))
            images += turn.pictures
        messages.append(user_message(question.strip(), len(pictures), len(images), label=self.label))
        return Example("question", "chat", tuple(messages), (*images, *pictures))

    def add(self, question: str, pictures: Sequence[ImageSource], answer: str) -> None:
        """Makes a turn of a question, its pictures and its answer."""
        self.turns.append(Turn(question.strip(), tuple(pictures), answer))

    def take_back(self) -> Turn | None:
        """Removes the last turn and returns it."""
        return self.turns.pop() if self.turns else None

    def clear(self) -> None:
        """Removes all turns."""
        self.turns.clear()
