"""Models: find, describe, load, adapt, prove, export."""

import logging

# transformers imports torchao wherever it is installed, and that tells every user which kernels it was not built with.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
