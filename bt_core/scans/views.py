"""Views of a grey image that let a person look at it: threshold, dilation, key points, contrast.

They are for looking only; what a model is given is made by `preprocess`.
"""

from typing import Final

import cv2
import numpy as np

from bt_core.scans.preprocess import Box, ClaheSpec

THRESHOLD: Final = 70
DILATION_PX: Final = 6
SHOWN_PX: Final = 512
"""Longest side of a picture that a browser is given."""
_MAX_KEY_POINTS: Final = 200
_ORANGE_RGB: Final = (255, 140, 0)


def threshold(image_HW: np.ndarray) -> np.ndarray:
    """Return image_HW uint8, 255 where the image is brighter than `THRESHOLD`, else 0."""
    mask_HW: np.ndarray = cv2.threshold(image_HW, THRESHOLD, 255, cv2.THRESH_BINARY)[1]
    return mask_HW


def dilation(image_HW: np.ndarray) -> np.ndarray:
    """Return image_HW uint8, dilated once by a square of `DILATION_PX`."""
    kernel = np.ones((DILATION_PX, DILATION_PX), np.uint8)
    dilated_HW: np.ndarray = cv2.dilate(image_HW, kernel, iterations=1)
    return dilated_HW


def key_points(image_HW: np.ndarray) -> np.ndarray:
    """Return image_HW3 uint8 RGB with its strongest ORB key points drawn as circles, 200 at most.

    ORB: Rublee et al., ICCV 2011.
    """
    found = cv2.ORB.create(nfeatures=_MAX_KEY_POINTS).detect(image_HW, None)
    canvas = cv2.cvtColor(image_HW, cv2.COLOR_GRAY2RGB)
    drawn_HW3: np.ndarray = cv2.drawKeypoints(canvas, found, None, color=_ORANGE_RGB)
    return drawn_HW3


def clahe(image_HW: np.ndarray, spec: ClaheSpec) -> np.ndarray:
    """Return image_HW uint8 after contrast-limited adaptive histogram equalisation."""
    equalised_HW: np.ndarray = cv2.createCLAHE(spec.clip_limit, (spec.grid, spec.grid)).apply(
        image_HW
    )
    return equalised_HW


def equalised(image_HW: np.ndarray) -> np.ndarray:
    """Return image_HW uint8 with its histogram equalised over the whole image."""
    equal_HW: np.ndarray = cv2.equalizeHist(image_HW)
    return equal_HW


def reduced(image_HW: np.ndarray) -> np.ndarray:
    """Return an image whose longest side is `SHOWN_PX` at most, by averages over areas."""
    height, width = _reduced_shape(image_HW.shape)
    if (height, width) == image_HW.shape:
        return image_HW
    smaller: np.ndarray = cv2.resize(image_HW, (width, height), interpolation=cv2.INTER_AREA)
    return smaller


def onto_image(map_SS: np.ndarray, box: Box, shape: tuple[int, int]) -> np.ndarray:
    """Return a map over the output of `preprocess_pixels` as one over the `reduced` image.

    Args:
        map_SS: uint8.
        box: what `seen_box` says of the image.
        shape: height and width of the image.

    Returns:
        map_HW uint8, as large as the reduced image; 0 where the output shows nothing of it.
    """
    height, width = _reduced_shape(shape)
    left, top, box_width, box_height = box
    x_step = map_SS.shape[1] / box_width * shape[1] / width
    y_step = map_SS.shape[0] / box_height * shape[0] / height
    # cv2 counts from the centres of pixels. The rim of 1 keeps the outermost halves of them.
    x_first = (0.5 - left * width / shape[1]) * x_step + 0.5
    y_first = (0.5 - top * height / shape[0]) * y_step + 0.5
    drawn_HW: np.ndarray = cv2.warpAffine(
        np.pad(map_SS, 1, mode="edge"),
        np.array([[x_step, 0, x_first], [0, y_step, y_first]]),
        (width, height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
    )
    return drawn_HW


def png(image_HW: np.ndarray) -> bytes:
    """Return a grey image of uint8 as PNG."""
    encoded, content = cv2.imencode(".png", image_HW)
    assert encoded
    return content.tobytes()


def _reduced_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    scale = min(1.0, SHOWN_PX / max(shape))
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))
