"""Linear layers for inference on a CPU: weights in the memory order of its kernels, for decoding and token2wav."""

from osum_echat.cpu_linear.packed import JointLinear, PackedLinear
from osum_echat.cpu_linear.replace import pack_linears, pays

__all__ = ["JointLinear", "PackedLinear", "pack_linears", "pays"]
