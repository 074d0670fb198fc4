"""The chat page: `python -m demo MODEL`. It uses mmllm.inference and is started from a checkout."""
