"""Linear layers and token tables whose weights stay in 8 or 4 bits (`groups`), for inference on a CPU.

The product is onnxruntime's `MatMulNBits`: it rounds the inputs to 8 bits too, a scale for each group of a row, so a
row's result does not depend on the rows beside it. Its kernels (AVX2, AVX-VNNI, AVX-512, ARM) read the weights at the
memory's speed with one row. PyTorch's own int8 product (fbgemm) is twice as fast with many rows, but has one scale for
all inputs of a row: on SmolLM2-135M that costs 0.9 % of the loss with 8 bits and 3.3 % with the 7 that AVX2 needs,
against less than 0.1 % here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from osum_echat.cpu_linear.groups import Groups
from osum_echat.device import onnx as onnx_runtime


class QuantizedLinear(nn.Module):
    """`nn.Linear` with its weight in groups. Not trainable, and not part of a state dict. Takes and returns any
    floating type.

    Raises:
        RuntimeError: where onnxruntime has no such operator (see `device.onnx.has_nbits`).
    """

    def __init__(self, weight: Groups, bias_O: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits, self.group = weight.bits, weight.size
        self._bias = None if bias_O is None else bias_O.detach().float()
        self._session = onnx_runtime.nbits_session(weight.codes_NGB, weight.scales_NG, weight.bits)
        self._binding = self._session.io_binding()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).to(torch.float32).contiguous()
        out = torch.empty(len(rows), self.out_features)
        if len(rows):
            onnx_runtime.run_product(self._session, self._binding, rows, out)
        if self._bias is not None:
            out += self._bias
        return out.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, group={self.group}"


class QuantizedEmbedding(nn.Module):
    """`nn.Embedding` with its table in groups; gives float32."""

    def __init__(self, table: Groups) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.shape
        self._table = table

    @property
    def weight(self) -> Tensor:
        """The whole table in float32, made when asked for."""
        return self._table.expand()

    def forward(self, ids: Tensor) -> Tensor:
        return self._table.rows(ids)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self._table.bits}"
