"""Model folders: where they are and what can be known of a model without loading it.

`locate` turns the path of a models config into a folder, `shape` reads that folder's small files.
Neither imports torch or transformers.
"""

from pipespec.checkpoint.locate import locate, locate_cached, locate_tokenizer, shipped_models
from pipespec.checkpoint.shape import DTYPE_BYTES, CheckpointShape, eos_token_ids

__all__ = [
    "DTYPE_BYTES",
    "CheckpointShape",
    "eos_token_ids",
    "locate",
    "locate_cached",
    "locate_tokenizer",
    "shipped_models",
]
