"""The call of pooled embeddings: tensors checked, arguments in place."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks import dtype_name, matrix_rows, require_shape, require_type, require_vector
from kernels.embedding_bag.variants import name
from kernels.errors import KernelError
from kernels.spec import Launch


def launch(table: Tensor, ids: Tensor, offsets: Tensor, out: Tensor, *, checked: bool = False) -> Launch:
    """What to launch for out [B, D], the sums of table rows ids[offsets[b] : offsets[b+1]] (int64).

    Checking offsets and ids reads them: a caller that vouches for them passes checked=True.
    """
    dtype = dtype_name("table", table)
    rows = {"table_row": matrix_rows("table", table), "out_row": matrix_rows("out", out)}
    require_type("out", out, table.dtype)
    for n, t in (("ids", ids), ("offsets", offsets)):
        require_vector(n, t, torch.int64, t.numel())
    bags = len(offsets) - 1
    if bags < 1:
        raise KernelError("an empty batch: no bag to pool", got=f"{len(offsets)} offsets")
    require_shape("out", out, (bags, table.shape[1]))
    if not checked:
        first, last = int(offsets[0]), int(offsets[-1])
        if first < 0 or last > len(ids) or bool((offsets.diff() < 0).any()):
            raise KernelError(
                "offsets do not rise, or reach beyond the ids", got=offsets.tolist()[:16], expected=f"0..{len(ids)}"
            )
        used = ids[first:last]
        if len(used) and (int(used.min()) < 0 or int(used.max()) >= len(table)):
            got = (int(used.min()), int(used.max()))
            raise KernelError("ids: there is no such row", got=got, expected=f"0..{len(table) - 1}")
    values = {"table": table, "ids": ids, "offsets": offsets, "out": out, "num_bags": bags, **rows}
    return Launch(name(dtype, table.shape[1]), values, {"num_bags": bags})
