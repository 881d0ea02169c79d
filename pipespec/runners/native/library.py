"""The compiled library's functions and structures, as Python sees them.

The structures are the twins of those at the head of `step.cpp`, field by field. Knows no checkpoint
and no request.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_double, c_int, c_int64, c_uint64, c_void_p
from typing import Final

OK: Final = 0  # what pipespec_forward returns; 1: logits that are not finite
NO_MEMORY: Final = 2


class Linear(Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("depth", c_int64),
        ("num_panels", c_int64),
    )


class Layer(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("attention_norm", "query_norm", "key_norm", "mlp_norm")),
        *((name, Linear) for name in ("qkv", "output", "gate_up", "down")),
        ("window", c_int64),
    )


class Shape(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("hidden", "inner", "num_layers", "num_heads")),
        *((name, c_int64) for name in ("num_kv_heads", "head_dim", "vocab_size")),
        *((name, c_int64) for name in ("num_cache_rows", "num_threads", "is_bfloat16")),
        ("norm_eps", c_double),
        *((name, c_void_p) for name in ("embedding", "cosines", "sines", "norm")),
        ("head", Linear),
        ("layers", POINTER(Layer)),
    )


class Feed(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("cache", "ids", "tail", "chain")),
        *((name, c_int64) for name in ("start", "num_own", "num_tail")),
        *((name, c_int64) for name in ("num_outputs", "num_ranked")),
        *((name, c_void_p) for name in ("logits", "ranked")),
        ("temperature", c_double),
        ("seed", c_uint64),
    )


class Burst(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("rounds", "descriptors")),
        *((name, c_int64) for name in ("num_more", "num_descriptors")),
    )


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Gives the functions of a library their types, and returns it."""
    library.pipespec_create.argtypes = [POINTER(Shape)]
    library.pipespec_create.restype = c_void_p
    library.pipespec_destroy.argtypes = [c_void_p]
    library.pipespec_destroy.restype = None
    library.pipespec_kernel.argtypes = [c_void_p]
    library.pipespec_kernel.restype = c_char_p
    library.pipespec_forward.argtypes = [c_void_p, POINTER(Feed)]
    library.pipespec_forward.restype = c_int
    library.pipespec_draw_on.argtypes = [c_void_p, POINTER(Feed), POINTER(Burst)]
    library.pipespec_draw_on.restype = c_int64
    library.pipespec_keep.argtypes = [c_void_p, c_void_p, c_int64, POINTER(ctypes.c_int32), c_int64]
    library.pipespec_keep.restype = None
    return library
