"""Asks SmolLM2 what people ask a chat model, and writes its answers: text that keeps it talking while it learns to see.

python configs/smollm2-135m/write_chat.py MODEL.gguf OUT_FOLDER

Every sixth conversation is kept apart, in chat_val.json: what the LLM forgets is measured on it.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

BATCH_SIZE = 16
MAX_NEW_TOKENS = 80
COUNTRIES = (
    "Italy", "Spain", "Japan", "Germany", "Egypt", "Canada", "Brazil", "India", "Kenya", "Norway", "Mexico", "Poland",
    "Greece", "Peru", "Chile",
)  # fmt: skip
TOPICS = (
    "gravity", "photosynthesis", "democracy", "a computer", "the internet", "evolution", "inflation", "a volcano",
    "the water cycle", "electricity", "a black hole", "the heart", "an atom", "climate change", "a neural network",
    "the moon", "friendship", "a poem", "bread", "a bicycle", "music", "a vaccine", "an earthquake", "recycling",
)  # fmt: skip
QUESTIONS = (
    "Hello!", "Hi, how are you?", "Who are you?", "What can you do?", "Good morning!", "Thank you.", "Goodbye.",
    "Tell me a joke.", "Tell me a short story about a dog.", "Write a haiku about autumn.", "What is 2 + 2?",
    "What is 12 times 3?", "How many days are in a week?", "What color is the sky?", "Name three fruits.",
    "Name three animals that can fly.", "What is the largest planet?", "Who wrote Romeo and Juliet?",
    "How do I boil an egg?", "How do I learn English?", "How can I sleep better?", "What is a healthy breakfast?",
    "Give me three tips for an interview.", "Write an email to my boss about a day off.",
    "What is the opposite of hot?", "Translate 'good day' into French.", "What is the boiling point of water?",
    "Why is the sky blue?", "Why do cats purr?", "What should I cook tonight?", "Recommend a book.",
    "Which city is called the Big Apple?", "Write a sentence with the word 'river'.",
    "What is the past tense of 'go'?", "Is a tomato a fruit?", "How many legs does a spider have?",
    "What do bees make?", "Who painted the Mona Lisa?", "What is the speed of light?",
    "What is the longest river in the world?", "When did the Second World War end?", "Write a birthday wish.",
    "What is the meaning of life?", "Can you help me with my homework?", "How do planes fly?", "What is Python?",
    "Write a Python function that adds two numbers.", "What are the seasons of the year?", "Describe a forest.",
    "Give me a name for a cat.", "What is the difference between a lake and a sea?", "How do I save money?",
)  # fmt: skip


def main(model_file: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_file.parent, gguf_file=model_file.name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_file.parent, gguf_file=model_file.name, dtype=torch.float32)
    questions = [*QUESTIONS, *(f"What is the capital of {country}?" for country in COUNTRIES)]
    questions += [f"{start} {topic}." for topic in TOPICS for start in ("Explain", "Write two sentences about")]
    rows = []
    for start in range(0, len(questions), BATCH_SIZE):
        asked = questions[start : start + BATCH_SIZE]
        # ChatML without a system prompt, as the configs beside this file have it
        prompts = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in asked]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        made = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, repetition_penalty=1.1)
        answers = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for question, answer in zip(asked, answers, strict=True):
            if whole := re.match(r"""(?s).*[.!?](?=\s|$|["'*)])""", answer):  # without a sentence that is cut off
                turns = [{"from": "human", "value": question}, {"from": "gpt", "value": whole[0].strip()}]
                rows.append({"id": f"chat-{len(rows):03d}", "conversations": turns})
        print(f"{start + len(asked)} of {len(questions)}", flush=True)
    kept_apart = rows[5::6]
    for name, chosen in (("chat", [row for row in rows if row not in kept_apart]), ("chat_val", kept_apart)):
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in chosen)
        (out / f"{name}.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
