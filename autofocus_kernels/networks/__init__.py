"""The networks of the paper: Basic, ASPP-c, ASPP-s and AFN-1 to AFN-6, and their published checkpoints."""

from .afn import AFN
from .models import NAMES, SegmentationNetwork, build
from .original import load_original_state_dict, original_state_dict

__all__ = ["AFN", "NAMES", "SegmentationNetwork", "build", "load_original_state_dict", "original_state_dict"]
