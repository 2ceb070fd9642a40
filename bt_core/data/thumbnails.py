"""Where `scans.thumbnails` stood before."""

from bt_core.scans.thumbnails import SPECTRUM_LENGTH as SPECTRUM_LENGTH
from bt_core.scans.thumbnails import THUMBNAIL as THUMBNAIL
