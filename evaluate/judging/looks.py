"""What preference training is known to change in images: colours, contrast, variety.

Pure functions of pixels and embeddings.
"""

import numpy as np
from jaxtyping import Float, UInt8

LUMA = np.array([0.2126, 0.7152, 0.0722])
"""Weights of red, green and blue in the luma of ITU-R BT.709."""


def saturation(pixels: UInt8[np.ndarray, "height width 3"]) -> float:
    """Mean over pixels of HSV's saturation, (max - min) / max of red, green, blue; in [0, 1].

    Black has none.
    """
    greatest = pixels.max(2).astype(np.float64)
    span = greatest - pixels.min(2)
    return float(np.divide(span, greatest, out=np.zeros_like(span), where=greatest > 0).mean())


def contrast(pixels: UInt8[np.ndarray, "height width 3"]) -> float:
    """Root mean square contrast: the standard deviation of luma over pixels; in [0, 0.5].

    Luma is in [0, 1], of the stored (gamma-encoded) values.
    """
    return float((pixels @ LUMA / 255).std())


def pairwise_distance(embeddings: Float[np.ndarray, "image dim"]) -> float:
    """Mean cosine distance, 1 - cos, of all pairs of images; in [0, 2], 0 for equal images.

    Embeddings have length 1. NaN for a single image.
    """
    number = len(embeddings)
    if number < 2:
        return float("nan")
    cosines = embeddings.astype(np.float64) @ embeddings.T.astype(np.float64)
    return float(1 - (cosines.sum() - np.trace(cosines)) / (number * (number - 1)))
