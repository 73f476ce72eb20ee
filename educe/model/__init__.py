"""Models: find, describe, load, adapt, prove, export."""

import logging

# transformers and peft import these wherever they are installed, and they tell every user which kernels they were not built with.
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
    logging.getLogger(_name).setLevel(logging.ERROR)
