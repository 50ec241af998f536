"""Layers of a model on other machines, by llama.cpp's own RPC backend.

Each machine runs the server of the patched build, `ggml-rpc-server -H HOST -p PORT`, in a network that is
trusted: the protocol knows no passwords. Then

    from spikequant_gguf.rpc import add_servers

    add_servers(["192.0.2.7:50052", "192.0.2.8:50052"])
    model = llama_cpp.Llama("model-SPK4.gguf", n_gpu_layers=-1, tensor_split=[1, 1])
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from ctypes import c_char_p, c_void_p

from .errors import InputError, RuntimeMissingError, SpikeQuantError
from .ggml_patch.package import library_file
from .native import bind
from .runtime import import_llama_cpp, require_runtime

__all__ = ["add_servers"]

_FUNCTIONS = {
    "ggml_backend_reg_by_name": (c_void_p, (c_char_p,)),
    "ggml_backend_register": (None, (c_void_p,)),
}
_BASE_FUNCTIONS = {
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_reg_dev_count": (ctypes.c_size_t, (c_void_p,)),
}


def add_servers(endpoints: Sequence[str]) -> None:
    """Makes the devices of RPC servers known to llama.cpp in this process; models loaded later can use them.

    Args:
        endpoints: ``host:port`` of each server.

    Raises:
        InputError: an endpoint is malformed, or nothing answers there.
        RuntimeMissingError: there is no patched runtime, or it has no RPC backend.
    """
    for endpoint in endpoints:
        if not re.fullmatch(r".+:\d{1,5}", endpoint):
            raise InputError(
                f"'{endpoint}' is no address of a server", "give host:port, as in 192.0.2.7:50052"
            )
    import_llama_cpp()
    folder = require_runtime().library_dir
    registry = ctypes.CDLL(str(folder / library_file("ggml")))
    base = ctypes.CDLL(str(folder / library_file("ggml-base")))
    bind(registry, _FUNCTIONS)
    bind(base, _BASE_FUNCTIONS)
    backend = registry.ggml_backend_reg_by_name(b"RPC")
    if not backend:
        raise RuntimeMissingError("this runtime has no RPC backend", "run `spikequant build`")
    address = base.ggml_backend_reg_get_proc_address(backend, b"ggml_backend_rpc_add_server")
    if not address:
        raise SpikeQuantError("the RPC backend takes no servers", "run `spikequant build --force`")
    add_server = ctypes.CFUNCTYPE(c_void_p, c_char_p)(address)
    for endpoint in endpoints:
        server = add_server(endpoint.encode())
        if not server or base.ggml_backend_reg_dev_count(server) == 0:
            raise InputError(f"no RPC server answers at {endpoint}", "start ggml-rpc-server there")
        registry.ggml_backend_register(server)
