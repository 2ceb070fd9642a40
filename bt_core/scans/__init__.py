"""A file becomes pixels: sources, formats, DICOM, preprocessing, synthetic scans."""
