"""Does a runtime work? Run in a fresh process after every build; prints what it measured as JSON.

    python -m spikequant_gguf.ggml_patch.selftest [--unpatched]

The expected result of a product is computed here from decoded weights and decoded spikes in double precision,
so the check depends neither on the kernels nor on the NumPy reference.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np

from spikequant_gguf.errors import RuntimeMissingError, SpikeQuantError
from spikequant_gguf.format import TYPE_SPK4, blocks_from_bytes
from spikequant_gguf.runtime import find_runtime, import_llama_cpp, native

_TOLERANCE = 1e-5  # of the largest output: roundings of the readout and of decoding
_TOKENS, _INPUTS, _OUTPUTS = 5, 576, 192


def check_patched() -> dict:
    """Quantize, decode and multiply a small matrix on every path; all paths must agree to the bit."""
    from spikequant_gguf.ggml_api import buffer_types, mul_mat

    llama_cpp = import_llama_cpp()
    library = native()
    random = np.random.default_rng(1)
    weights = random.standard_normal((_OUTPUTS, _INPUTS), np.float32)
    x = random.standard_normal((_TOKENS, _INPUTS), np.float32)
    packed = library.quantize(TYPE_SPK4, weights)
    if not library.validate(TYPE_SPK4, packed):
        raise RuntimeMissingError("quantized weights are invalid")
    decoded = library.dequantize(TYPE_SPK4, packed, _INPUTS)
    weight_error = float(np.linalg.norm(decoded - weights) / np.linalg.norm(weights))
    if not weight_error < 0.2:
        raise RuntimeMissingError(f"decoded weights differ from the original by {weight_error:.1%}")

    spikes = library.encode_activations(x)
    expected = library.decode_activations(spikes).astype(np.float64) @ decoded.T.astype(np.float64)
    results = {"dot": library.vec_dot(blocks_from_bytes(packed), spikes)}
    for buffer in ("CPU", "CPU_SPIKE"):
        if buffer in buffer_types():
            results[buffer] = mul_mat(TYPE_SPK4, packed, x, buffer=buffer, threads=2)
    product_error = float(np.abs(results["dot"] - expected).max() / np.abs(expected).max())
    if not product_error < _TOLERANCE:
        raise RuntimeMissingError(f"a product differs from its expected value by {product_error:.1e}")
    for path, result in results.items():
        if not np.array_equal(result, results["dot"]):
            raise RuntimeMissingError(f"the product through {path} differs from the dot product")
    return {
        "llama_cpp": llama_cpp.__version__,
        "abi": library.abi,
        "patch_id": library.patch_id,
        "kernel": library.kernel,
        "paths": list(results),
        "weight_error": round(weight_error, 4),
        "product_error": product_error,
        "system": llama_cpp.llama_print_system_info().decode().strip(),
    }


def check_unpatched() -> dict:
    """The stock library loads, and it is stock."""
    info = find_runtime()
    if info.patched or info.abi is not None:
        raise RuntimeMissingError("the unpatched build carries the patch")
    import llama_cpp

    return {
        "llama_cpp": llama_cpp.__version__,
        "system": llama_cpp.llama_print_system_info().decode().strip(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m spikequant_gguf.ggml_patch.selftest", description=__doc__
    )
    parser.add_argument("--unpatched", action="store_true", help="expect the stock library")
    options = parser.parse_args(arguments)
    try:
        facts = check_unpatched() if options.unpatched else check_patched()
    except (SpikeQuantError, ImportError, OSError, AttributeError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
