"""What is wrong with a caption, by rules that a person can follow: each flag is one rule with an explanation."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from mmllm.errors import MmllmError

FLAGS = {
    "empty": "without words",
    "cut": "cut off at --max-new-tokens",
    "repetition": "the same words again and again",
    "refusal": "says that it cannot or will not answer",
    "echo": "repeats the prompt",
    "think": "holds the marks of a chain of thought",
    "script": "written in other letters than wanted",
}
RETRIED = tuple(flag for flag in FLAGS if flag != "cut")  # for a cut caption, only more tokens help

# Letters that one language mixes.
_SCRIPTS = {
    "latin": {"LATIN"}, "cyrillic": {"CYRILLIC"}, "greek": {"GREEK"}, "arabic": {"ARABIC"}, "hebrew": {"HEBREW"},
    "devanagari": {"DEVANAGARI"}, "thai": {"THAI"}, "han": {"CJK"}, "japanese": {"CJK", "HIRAGANA", "KATAKANA"},
    "hangul": {"HANGUL", "CJK"},
}  # fmt: skip
SCRIPTS = ("auto", "any", *_SCRIPTS)
MAX_OTHER_LETTERS = 1 / 3  # of a caption: names and loan words may have letters of another script

MAX_REPEATED_WORDS = 30  # of a sentence that is looked for again right after itself
MIN_REPEATS = 3  # a phrase that follows itself this often is a loop
MIN_LOOP_WORDS = 8  # "very, very, very old" is none
_LETTER_LOOP = re.compile(r"([^\W\d_]\S{0,11}?)\1{9,}")  # ten times the same letters, as in `ahahahah...`
_REFUSAL = re.compile(
    r"^\W*(i'?m sorry|i am sorry|sorry,|i apologi[sz]e|i can ?not|i can'?t|i('?m| am) (unable|not able)"
    r"|i do not have the ability|i don'?t have the ability|unfortunately, i)|\bas an ai\b|\bas a language model\b"
)
_THINK = re.compile(r"</?(think|thinking|thought|reasoning|scratchpad)>|<\|(channel|thought)\|>|\[/?THINK\]", re.I)
MIN_ECHO_WORDS = 3  # of a prompt; a shorter one may stand in a caption by chance


def check_script(name: str) -> None:
    """Raises MmllmError for a script that is not known."""
    if name not in SCRIPTS:
        raise MmllmError(f"--script {name} is not known; allowed: {', '.join(SCRIPTS)}")


def flags_of(caption: str, prompt: str, *, is_cut: bool, script: str = "auto") -> list[str]:
    """The flags of a caption in the order of FLAGS. `script` `auto` is that of the prompt, `any` is not checked."""
    words = _words(caption)
    rules = {
        "empty": not words,
        "cut": is_cut,
        "repetition": _has_loop(words) or _LETTER_LOOP.search(caption) is not None,
        "refusal": _REFUSAL.search(caption.lower().replace("’", "'")) is not None,
        "echo": _is_echo(words, _words(prompt)),
        "think": _THINK.search(caption) is not None,
        "script": _is_in_other_script(caption, prompt, script),
    }
    return [flag for flag in FLAGS if rules[flag]]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _has_loop(words: Sequence[str]) -> bool:
    """Whether a phrase of up to MAX_REPEATED_WORDS follows itself at least MIN_REPEATS - 1 times."""
    for length in range(1, min(MAX_REPEATED_WORDS, len(words) // MIN_REPEATS) + 1):
        needed = max((MIN_REPEATS - 1) * length, MIN_LOOP_WORDS - length)
        run = 0
        for before, word in zip(words, words[length:], strict=False):
            run = run + 1 if word == before else 0
            if run >= needed:
                return True
    return False


def _is_echo(words: Sequence[str], prompt: Sequence[str]) -> bool:
    if len(prompt) < MIN_ECHO_WORDS:
        return False
    return f" {' '.join(prompt)} " in f" {' '.join(words)} "


def _script_of(letter: str) -> str:
    return unicodedata.name(letter, "").split(" ")[0]


def _is_in_other_script(caption: str, prompt: str, script: str) -> bool:
    if script == "any":
        return False
    wanted = _SCRIPTS[script] if script != "auto" else {_script_of(letter) for letter in prompt if letter.isalpha()}
    if "HIRAGANA" in wanted or "KATAKANA" in wanted:
        wanted = wanted | _SCRIPTS["japanese"]
    letters = Counter(_script_of(letter) for letter in caption if letter.isalpha())
    num_other = sum(count for name, count in letters.items() if name not in wanted)
    return bool(wanted) and num_other > MAX_OTHER_LETTERS * sum(letters.values())
