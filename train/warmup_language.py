"""Warm-up of the embedded default's language: a small causal LM, on descriptions and questions, text only.

accelerate launch train/warmup_language.py configs/tiny/warmup_language.yaml [section.key=value ...]
"""

from mmllm.stages.run import main

if __name__ == "__main__":
    main("warmup_language")
