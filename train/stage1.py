"""Stage 1: the projector learns to show the LLM what the vision tower sees; tower and LLM stay as they are.

accelerate launch train/stage1.py configs/tiny/stage1.yaml [section.key=value ...]
"""

from mmllm.stages.run import main

if __name__ == "__main__":
    main("stage1")
