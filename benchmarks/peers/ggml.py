"""llama.cpp's quantisers, by the C functions that the wheel of xllamacpp exports.

The codes of types with 256-blocks need rows of a multiple of 256: shorter ones are padded with zeros, and the padding's
bits are not counted. llama.cpp itself takes a type of more bits for such rows. Types that weigh by importance are given
the mean square of each input, as its own `imatrix` does.
"""

from __future__ import annotations

import ctypes
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peers import FOLDER, Peer

TYPES = {
    "Q2_K": ("q2_K", 10),
    "Q3_K": ("q3_K", 11),
    "Q4_0": ("q4_0", 2),
    "Q4_K": ("q4_K", 12),
    "Q5_K": ("q5_K", 13),
    "Q6_K": ("q6_K", 14),
    "Q8_0": ("q8_0", 8),
    "IQ2_XXS": ("iq2_xxs", 16),
    "IQ2_XS": ("iq2_xs", 17),
    "IQ2_S": ("iq2_s", 22),
    "IQ3_XXS": ("iq3_xxs", 18),
    "IQ3_S": ("iq3_s", 21),
    "IQ4_NL": ("iq4_nl", 20),
    "IQ4_XS": ("iq4_xs", 23),
}
"""Name in llama.cpp -> name of its functions, and its number."""


@cache
def _library() -> Any:
    found = sorted(FOLDER.glob("xllamacpp/*.so"))
    library = ctypes.CDLL(str(found[0]))
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_blck_size.argtypes = [ctypes.c_int]
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *([ctypes.c_int64] * 3),
        ctypes.c_void_p,
    ]
    return library


def _bits(number: int, _columns: int) -> float:
    block = _library().ggml_blck_size(number)
    return 8 * _library().ggml_row_size(number, block) / block


def _round_trip(name: str, number: int, weight: Tensor, moments: Tensor) -> Tensor:
    library = _library()
    library.ggml_quantize_init(number)
    m, n = weight.shape
    block = library.ggml_blck_size(number)
    wide = -(-n // block) * block
    values = np.zeros((m, wide), np.float32)
    values[:, :n] = weight.cpu().numpy()
    importance = np.full(wide, 1e-6, np.float32)
    importance[:n] = moments.diagonal().cpu().numpy()
    codes = np.zeros(m * library.ggml_row_size(number, wide), np.uint8)
    library.ggml_quantize_chunk(number, values.ctypes.data, codes.ctypes.data, 0, m, wide, importance.ctypes.data)
    back = np.empty_like(values)
    read = getattr(library, f"dequantize_row_{name}")
    read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    read(codes.ctypes.data, back.ctypes.data, m * wide)
    return torch.from_numpy(back[:, :n].copy())


def peers() -> dict[str, Peer]:
    """Every type."""
    return {
        f"llama.cpp {label}": Peer(partial(_bits, number), partial(_round_trip, name, number))
        for label, (name, number) in TYPES.items()
    }
