"""What a calibration hands to the converter: a quantizer, changes to tensors, and settings of the encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from spikequant_gguf.activations import check_encoder
from spikequant_gguf.format import DEFAULT_SALIENCE, DEFAULT_SILENCE

from .plan import ConversionPlan
from .progress import Progress
from .source import Source

__all__ = [
    "Calibrate",
    "EncoderSettings",
    "Recipe",
    "Scaling",
    "TensorQuantizer",
    "TensorStatistics",
    "Transform",
]


@dataclass(frozen=True)
class TensorStatistics:
    """Sums over quantized weights; those of the slices of a tensor add up.

    Attributes:
        weights: number of weights.
        salient_weights: salient ones among them.
        squared_error: sum of (stored - wanted)^2.
        squared_norm: sum of wanted^2.
        calibrated_weights: weights that were chosen with the help of real inputs.
        inputs, salient_inputs: input values of the layer in a sample of the calibration text, and salient
            ones among them; 0 without calibration.
    """

    weights: int = 0
    salient_weights: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    calibrated_weights: int = 0
    inputs: int = 0
    salient_inputs: int = 0

    def __add__(self, other: TensorStatistics) -> TensorStatistics:
        return TensorStatistics(
            self.weights + other.weights,
            self.salient_weights + other.salient_weights,
            self.squared_error + other.squared_error,
            self.squared_norm + other.squared_norm,
            self.calibrated_weights + other.calibrated_weights,
            self.inputs + other.inputs,
            self.salient_inputs + other.salient_inputs,
        )

    @property
    def salient_weight_share(self) -> float:
        """Salient weights among all, 0 to 1."""
        return self.salient_weights / self.weights if self.weights else 0.0

    @property
    def salient_input_share(self) -> float:
        """Salient values among the inputs, 0 to 1; 0 without calibration."""
        return self.salient_inputs / self.inputs if self.inputs else 0.0

    @property
    def relative_error(self) -> float:
        """Norm of the error over the norm of the weights; 0 for a tensor of zeros that is stored as zeros."""
        if self.squared_error == 0.0:
            return 0.0
        return float(np.sqrt(self.squared_error / max(self.squared_norm, np.finfo(np.float64).tiny)))


class TensorQuantizer(Protocol):
    """Quantizes the matrices of linear layers to SPK4.

    The result must depend on the arguments alone, not on the number of threads or the order of calls.

    Attributes:
        whole_matrices: True if quantize() needs all rows of a matrix at once; else it gets slices of them.
    """

    whole_matrices: bool

    def quantize(
        self, name: str, weights: NDArray[np.float32], matrix: int = 0
    ) -> tuple[NDArray[np.void], TensorStatistics]:
        """Quantizes rows of one matrix. Called from one thread, slice after slice.

        Args:
            name: of the tensor.
            weights: float32[rows, n_in], finite, after the recipe's transform.
            matrix: index of the expert that the rows belong to; 0 if the tensor is one matrix.

        Returns:
            BLOCK_SPK4[rows, n_in / 64] and its statistics; measure() in quantize.py makes them.

        Raises:
            InputError: rows that cannot be stored; the converter adds the name.
        """


class Transform(Protocol):
    """Changes a tensor when it is read, as smoothing does that is folded into norm gains and weights."""

    def __call__(self, rows: NDArray[np.float32], first_row: int) -> NDArray[np.float32]:
        """float32[n, n_in] in and out; first_row counts over all matrices of the tensor. A vector is one row.

        Each row must get the same result however the tensor is cut into pieces; `rows` must stay unchanged.
        """


@dataclass(frozen=True)
class Scaling:
    """A Transform: multiplies the columns of a tensor by `inputs` and its rows by `outputs`.

    Attributes:
        inputs: float32[n_in], or None.
        outputs: float32[rows of all matrices], or None.
    """

    inputs: NDArray[np.float32] | None = None
    outputs: NDArray[np.float32] | None = None

    def __call__(self, rows: NDArray[np.float32], first_row: int) -> NDArray[np.float32]:
        if self.inputs is not None:
            rows = rows * self.inputs.astype(np.float32, copy=False)
        if self.outputs is not None:
            part = self.outputs[first_row : first_row + len(rows)].astype(np.float32, copy=False)
            rows = rows * part[:, None]
        return rows


@dataclass(frozen=True)
class EncoderSettings:
    """How the input of one layer is turned into spikes.

    Attributes:
        salience: salience threshold, between 0 and 7.5; None for the model's default.
        silence: silence threshold in steps, 0 to 4; None for the model's default.

    Raises:
        InputError: a value is outside its range.
    """

    salience: float | None = None
    silence: float | None = None

    def __post_init__(self) -> None:
        check_encoder(
            DEFAULT_SALIENCE if self.salience is None else self.salience,
            DEFAULT_SILENCE if self.silence is None else self.silence,
        )


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized. The default is quantization without calibration.

    Attributes:
        calibration: the text that was used, as the metadata and every result name it.
        quantizer: for linear layers; None for the reference quantizer.
        transforms: changes to tensors, by name. Only the tensors named here are changed.
        encoder: settings of layers that differ from the model's, by the name of their weight tensor.
        options: of the command line that led to this recipe, for the metadata; of paths the last component.
        salient_input_share: of the inputs of calibrated layers, each input counted once; None if unknown.
        finished: called when the output is complete.
    """

    calibration: str = "none"
    quantizer: TensorQuantizer | None = None
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    encoder: Mapping[str, EncoderSettings] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    salient_input_share: float | None = None
    finished: Callable[[], None] = lambda: None


Calibrate = Callable[[Source, ConversionPlan, Progress], Recipe]
"""Makes a recipe for an open, planned model. Source.checkpoint is its Hugging Face folder, if it has one."""
