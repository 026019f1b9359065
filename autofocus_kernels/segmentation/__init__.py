"""Segmentation of whole volumes with the paper's networks: ``python -m autofocus_kernels.segmentation``.

Nothing else in the package imports this folder, which needs the extra ``autofocus-kernels[segmentation]``.
"""
