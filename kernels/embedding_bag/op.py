"""The call of pooled embeddings: tensors checked, arguments in place."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks import dtype_name, matrix_rows, require_shape, require_type
from kernels.embedding_bag.variants import name
from kernels.errors import KernelError
from kernels.spec import Launch


def launch(table: Tensor, ids: Tensor, offsets: Tensor, out: Tensor) -> Launch:
    """What to launch for out [B, D], the sums of table rows ids[offsets[b] : offsets[b+1]] (int64).

    Ids beyond the table are the caller's error: they are not read back to be checked.
    """
    dtype = dtype_name("table", table)
    rows = {"table_row": matrix_rows("table", table), "out_row": matrix_rows("out", out)}
    require_type("out", out, table.dtype)
    for n, t in (("ids", ids), ("offsets", offsets)):
        require_type(n, t, torch.int64)
        require_shape(n, t, (t.numel(),))
    bags = len(offsets) - 1
    if bags < 1:
        raise KernelError("an empty batch: no bag to pool", got=f"{len(offsets)} offsets")
    require_shape("out", out, (bags, table.shape[1]))
    values = {"table": table, "ids": ids, "offsets": offsets, "out": out, "num_bags": bags, **rows}
    return Launch(name(dtype, table.shape[1]), values, {"num_bags": bags})
