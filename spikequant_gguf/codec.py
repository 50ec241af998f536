"""The NumPy reference of the spike types: the normative definition of their arithmetic.

Arrays of blocks have the shape [rows, n_blocks] (weights, BLOCK_SPK4) or [tokens, n_blocks] (activations,
BLOCK_SPKA). This module gathers the parts: rotation, weights, activations, potentials and validation.
"""

from .activations import (
    SPIKE_STEPS,
    SpikeTrain,
    activation_values,
    activations_rotated,
    check_encoder,
    decode_activations,
    encode_activations,
    spike_train,
)
from .potentials import matmul, potentials, potentials_by_spikes, readout
from .rotation import rotate
from .validation import validate_activations, validate_weights
from .weights import (
    decode_weights,
    encode_weights,
    pack_weights,
    threshold_from_header,
    threshold_on_grid,
    threshold_to_header,
    weight_values,
    weights_rotated,
)

__all__ = [
    "SPIKE_STEPS",
    "SpikeTrain",
    "activation_values",
    "activations_rotated",
    "check_encoder",
    "decode_activations",
    "decode_weights",
    "encode_activations",
    "encode_weights",
    "matmul",
    "pack_weights",
    "potentials",
    "potentials_by_spikes",
    "readout",
    "rotate",
    "spike_train",
    "threshold_from_header",
    "threshold_on_grid",
    "threshold_to_header",
    "validate_activations",
    "validate_weights",
    "weight_values",
    "weights_rotated",
]
