"""`rlhf rm` as a script: `python scripts/train_rm.py --config configs/rm.yaml key=value ...`."""

from __future__ import annotations

import sys

from rlhf.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "rm")
    main()
