"""Warm-up of the embedded default's eyes: a small CLIP, contrastively, on drawn scenes and their captions.

accelerate launch train/warmup_vision.py configs/tiny/warmup_vision.yaml [section.key=value ...]
"""

from mmllm.stages.run import main

if __name__ == "__main__":
    main("warmup_vision")
