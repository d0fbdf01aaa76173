"""Weights as integers: learned step sizes, rounding without training, and the formats that they ship in."""

from grace.quant.grid import dequantize, quantize
from grace.quant.outliers import add_outliers
from grace.quant.step_size import LearnedStepSize, lsq_gradients
from grace.quant.student import StoredQuantization, read_quantization, save_quantization

__all__ = [
    "LearnedStepSize",
    "StoredQuantization",
    "add_outliers",
    "dequantize",
    "lsq_gradients",
    "quantize",
    "read_quantization",
    "save_quantization",
]
