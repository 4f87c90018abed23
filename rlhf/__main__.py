"""`python -m rlhf`, where the command itself is not on the path."""

from rlhf.cli import main

if __name__ == "__main__":
    main()
