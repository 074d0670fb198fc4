"""Questions about two scenes side by side."""

from __future__ import annotations

import random

from mmllm.scenes.captions import with_article
from mmllm.scenes.questions import QuestionTurn, about_all
from mmllm.scenes.world import Scene

TWO_PICTURES = "two_pictures"


def ask_about_two(first: Scene, second: Scene, rng: random.Random, num_turns: int) -> list[QuestionTurn]:
    """Turns about two scenes of objects: which picture has something, which has more objects, same or different."""
    answer = "same" if first == second else "different"
    same = QuestionTurn(TWO_PICTURES, "are the two pictures the same or different?", answer)
    turns: list[QuestionTurn] = []
    forms = ["which", "which", "more", "same"] * 2
    rng.shuffle(forms)
    for form in forms[: num_turns + 2]:
        if form == "same":
            turns.append(same)
        elif form == "more" and len(first.things) != len(second.things):
            answer = "picture 1" if len(first.things) > len(second.things) else "picture 2"
            turns.append(QuestionTurn(TWO_PICTURES, "which picture has more objects?", answer))
        elif form == "which" and first != second:
            has, lacks = (first, second) if (in_first := rng.random() < 0.5) else (second, first)
            name = rng.choice(("shape", "color"))
            values = {getattr(t, name) for t in has.things} - {getattr(t, name) for t in lacks.things}
            if values:
                value = rng.choice(sorted(values))
                noun = with_article(value) if name == "shape" else f"{with_article(value)} object"
                about = about_all([getattr(t, name) for t in (*first.things, *second.things)], value)
                answer = "picture 1" if in_first else "picture 2"
                turns.append(QuestionTurn(TWO_PICTURES, f"which picture has {noun}?", answer, about=about))
    unique = {turn.question: turn for turn in turns or [same]}  # equal scenes may allow no other question
    return list(unique.values())[:num_turns]
