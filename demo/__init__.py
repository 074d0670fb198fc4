"""The chat page: `python -m demo MODEL`. It talks to mmllm.inference and runs from the checkout."""
