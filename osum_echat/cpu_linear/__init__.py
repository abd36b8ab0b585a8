"""Linear layers for inference on a CPU: weights in the memory order of its kernels (`packed`), or in 8 or 4 bits
(`groups`, `nbits`)."""

from osum_echat.cpu_linear.decoder import lighten
from osum_echat.cpu_linear.groups import Groups, group_size, quantize
from osum_echat.cpu_linear.nbits import QuantizedEmbedding, QuantizedLinear
from osum_echat.cpu_linear.packed import JointLinear, PackedLinear
from osum_echat.cpu_linear.replace import TOGETHER, pack_linears, pays

__all__ = [
    "TOGETHER",
    "Groups",
    "JointLinear",
    "PackedLinear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "group_size",
    "lighten",
    "pack_linears",
    "pays",
    "quantize",
]
