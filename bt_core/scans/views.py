"""Views of a grey image that let a person look at it: threshold, dilation, key points, contrast.

They are for looking only; what a model is given is made by `preprocess`.
"""

from typing import Final

import cv2
import numpy as np

from bt_core.scans.preprocess import ClaheSpec

THRESHOLD: Final = 70
DILATION_PX: Final = 6
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
