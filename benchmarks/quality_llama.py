"""llama.cpp's types for benchmarks/quality.py: a GGUF file in float32, quantised by llama_model_quantize with an importance matrix.

    PEER/bin/python benchmarks/quality_llama.py model-f32.gguf importance.npz OUT Q2_K.pure Q2_K.mix …

Run as a program (with the interpreter that has `llama-cpp-python` and `numpy`) it writes OUT/NAME.gguf for each name: `pure`
gives every matrix the type itself, `mix` what llama.cpp makes of that file type. The importance matrix is what llama.cpp's
tool `imatrix` computes: for each column the mean square of a matrix's inputs, each expert's over its own tokens; here of the
same calibration text and with the head's inputs for the tied embedding, which the tool would leave out.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np

FILE_TYPES = {
    "Q2_K": "Q2_K",
    "IQ2_S": "IQ2_M",  # whose main type is IQ2_S; that of the file type IQ2_S is IQ2_XS
    "Q3_K": "Q3_K_M",
    "IQ3_S": "IQ3_S",
    "Q4_K": "Q4_K_M",
    "IQ4_XS": "IQ4_XS",
    "Q5_K": "Q5_K_M",
    "Q6_K": "Q6_K",
    "Q8_0": "Q8_0",
}
"""Type of a matrix → the file type that has it as its main type."""
PARTS = {"attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output"}
PARTS |= {"attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm", "attn_norm": "attn_norm", "mlp_norm": "ffn_norm"}
PARTS |= {"router": "ffn_gate_inp"} | {f"experts.{p}": f"ffn_{p}_exps" for p in ("gate", "up", "down")}


ARCHITECTURES = {"qwen3_moe": "qwen3moe", "olmoe": "olmoe", "mixtral": "llama"}


def gguf_name(name: str) -> str:
    """GGUF's name of a canonical one."""
    if name.startswith("layers."):
        _, layer, part = name.split(".", 2)
        return f"blk.{layer}.{PARTS[part]}.weight"
    return {"embed": "token_embd.weight", "final_norm": "output_norm.weight", "head": "output.weight"}[name]


def write(path: Path, weights: dict[str, Any], shape: Any) -> None:
    """The model in float32, without a tokenizer, which llama_model_quantize does not ask for. `shape` is a d2moe ModelShape."""
    import gguf
    from peer_models import add_shape  # the file beside this one

    writer = gguf.GGUFWriter(path, ARCHITECTURES[shape.model_type])
    add_shape(writer, shape, shape.rope.theta, int(gguf.LlamaFileType.ALL_F32))
    for name, tensor in weights.items():
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(tensor.numpy(), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path: Path) -> dict[str, tuple[np.ndarray, int]]:
    """Of each tensor of a file, by GGUF's name, its float32 values, rows first, and its bytes."""
    import gguf

    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = (values.reshape(tuple(int(n) for n in tensor.shape[::-1])), int(tensor.n_bytes))
    return found


def main(source: str, importance: str, out: str, *names: str) -> None:
    """Quantise; the last line of a failure says which file could not be made."""
    from llama_cpp import llama_cpp as c

    data = {k: np.ascontiguousarray(v, np.float32) for k, v in np.load(importance).items()}
    entries = (c.llama_model_imatrix_data * (len(data) + 1))()
    for entry, (name, values) in zip(entries, data.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    for name in names:
        kind, how = name.split(".")
        params = c.llama_model_quantize_default_params()
        params.ftype = getattr(c, f"LLAMA_FTYPE_MOSTLY_{FILE_TYPES[kind]}")
        params.pure, params.nthread = how == "pure", 1
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
        if c.llama_model_quantize(source.encode(), f"{out}/{name}.gguf".encode(), ctypes.byref(params)):
            sys.exit(f"llama_model_quantize could not make {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
