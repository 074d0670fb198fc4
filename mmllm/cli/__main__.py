"""`python -m mmllm.cli`, for where the console script is not on the PATH."""

from mmllm.cli import main

if __name__ == "__main__":
    main()
