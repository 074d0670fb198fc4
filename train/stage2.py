"""Stage 2: projector and LLM, whole or through LoRA, learn to follow instructions about pictures.

accelerate launch train/stage2.py configs/tiny/stage2.yaml [section.key=value ...]
"""

from mmllm.stages.run import main

if __name__ == "__main__":
    main("stage2")
