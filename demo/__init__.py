"""The chat page: `mmllm demo MODEL`, or `python -m demo MODEL`. It talks to mmllm.inference."""
