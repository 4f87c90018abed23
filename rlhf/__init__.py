"""Train a language model from human preferences: fine-tuning, reward models, DPO, PPO and their evaluation."""

import logging

__version__ = "0.1.0"

# transformers imports bitsandbytes where it is installed, which then warns of a kernel that it misses and that only its
# layout for inference uses; we forbid that layout (`models/quantized.py`). Importing this package changes nothing else.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
