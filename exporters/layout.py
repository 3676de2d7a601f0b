"""The layout of a sparse weight, in the file and in the kernel alike: a matrix [N, K] as four flat arrays.

Rows are cut into panels, columns into blocks of at most 256, so that a column fits a byte. Panel by panel, block by
block, all rows of the panel follow each other, those with the most kept columns first (ties: the upper row). G = 4
stores groups of four rows that keep the same columns: what the kernel loads for a column then serves four rows.

    values   float32 or float16 [nonzeros]   G per kept column, one for each row of the group
    indices  uint8  [nonzeros / G]           the kept columns inside their block, ascending in a row
    rows     uint8  [C * N / G]              per block: the row (the group) inside its panel
    counts   uint16 [C * N / G]              per block: how many columns that row keeps

with C blocks. Only numpy is imported here.
"""

from __future__ import annotations

import numpy as np

from vlprune.errors import RequestError


GROUPS = (1, 4)  # rows that can share their columns
PANEL = 128  # rows
WIDE, NARROW = 192, 128  # columns of a block, of very sparse layers and of others
VERY_SPARSE = 0.85
FILL = 1.15  # groups of four may store so many times the nonzeros

Arrays = dict[str, np.ndarray]


def choose(weight: np.ndarray) -> dict[str, int]:
    """Choose the sizes that suit a weight.

    Args:
        weight: [N, K].

    Returns:
        dict[str, int]: block_columns, panel_rows, group_rows, as `encode` takes them.
    """
    outputs, inputs = weight.shape
    kept = weight != 0
    nonzeros = int(np.count_nonzero(kept))
    block = WIDE if nonzeros <= (1 - VERY_SPARSE) * weight.size else NARROW
    group = 1
    if outputs % 4 == 0 and nonzeros:
        stored = 4 * int(np.count_nonzero(kept.reshape(outputs // 4, 4, inputs).any(1)))
        group = 4 if stored <= FILL * nonzeros else 1
    return {"block_columns": min(block, inputs), "panel_rows": PANEL, "group_rows": group}


def encode(
    weight: np.ndarray,
    *,
    block_columns: int,
    panel_rows: int = PANEL,
    group_rows: int = 1,
    dtype: type[np.floating] = np.float32,
) -> Arrays:
    """Lay out a weight; what is not zero is kept, NaN too.

    Args:
        weight: float32 [N, K].
        block_columns: 1 to 256.
        panel_rows: 1 to 256, a multiple of `group_rows`.
        group_rows: 1 or 4; divides N.
        dtype: of the values, float32 or float16; float16 rounds to nearest.

    Returns:
        Arrays: values, indices, rows, counts.

    Raises:
        RequestError: a size is out of range, or a finite weight is beyond float16.
    """
    if weight.ndim != 2:
        raise RequestError(f"a weight of shape {list(weight.shape)} is no matrix")
    outputs, inputs = weight.shape
    _check_sizes(inputs, outputs, block_columns, panel_rows, group_rows)
    grouped = weight.reshape(outputs // group_rows, group_rows, inputs)
    kept = (grouped != 0).any(1)  # [N / G, K]
    counts = np.add.reduceat(kept, np.arange(0, inputs, block_columns), axis=1, dtype=np.int64)  # [N / G, C]
    panel, place = np.divmod(np.arange(len(counts)), panel_rows // group_rows)
    group, block = np.indices(counts.shape).reshape(2, -1)
    order = np.lexsort((place[group], -counts.ravel(), block, panel[group]))

    at, column = np.nonzero(kept)  # row after row, so that the columns of one row and block stand together
    values = grouped[at, :, column]  # [nonzeros / G, G]
    if dtype == np.float16 and beyond_half(values):
        raise RequestError("a weight is beyond the range of float16: store the values as fp32")
    ends = np.cumsum(counts.ravel())
    sizes = counts.ravel()[order]
    shift = (ends - counts.ravel())[order] - (np.cumsum(sizes) - sizes)
    take = np.repeat(shift, sizes) + np.arange(len(column))
    return {
        "values": values[take].astype(dtype).ravel(),
        "indices": (column % block_columns)[take].astype(np.uint8),
        "rows": place[group[order]].astype(np.uint8),
        "counts": sizes.astype(np.uint16),
    }


def decode(
    values: np.ndarray,
    indices: np.ndarray,
    rows: np.ndarray,
    counts: np.ndarray,
    *,
    in_features: int,
    out_features: int,
    block_columns: int,
    panel_rows: int,
    group_rows: int,
) -> np.ndarray:
    """Rebuild the weight.

    Args:
        values: see the module.
        indices: see the module.
        rows: see the module.
        counts: see the module.
        in_features: K.
        out_features: N.
        block_columns: as encoded.
        panel_rows: as encoded.
        group_rows: as encoded.

    Returns:
        np.ndarray: float32 [N, K].

    Raises:
        RequestError: the arrays do not hold together.
    """
    _check_sizes(in_features, out_features, block_columns, panel_rows, group_rows)
    _check_types(values=values, indices=indices, rows=rows, counts=counts)
    groups, blocks = out_features // group_rows, -(-in_features // block_columns)
    if not len(rows) == len(counts) == groups * blocks:
        raise _broken(f"{len(rows)} rows and {len(counts)} counts instead of {groups * blocks} each")
    per_panel = panel_rows // group_rows
    starts = np.arange(0, groups, per_panel)
    in_panel = np.minimum(per_panel, groups - starts)  # the last panel may be smaller
    panel = np.repeat(np.arange(len(starts)), in_panel * blocks)
    block = (np.arange(len(rows)) - starts[panel] * blocks) // in_panel[panel]
    if (rows >= in_panel[panel]).any():
        raise _broken("a row is outside its panel")
    group = starts[panel] + rows
    if (np.bincount(group * blocks + block, minlength=len(rows)) != 1).any():
        raise _broken("a row is twice in a block")
    width = np.minimum(block_columns, in_features - block * block_columns)
    sizes = counts.astype(np.int64)
    if (sizes > width).any():
        raise _broken("a count is larger than its block")
    if sizes.sum() != len(indices) or len(values) != group_rows * len(indices):
        raise _broken(f"counts of {sizes.sum()}, {len(indices)} indices and {len(values)} values do not fit")
    if (indices >= np.repeat(width, sizes)).any():
        raise _broken("an index is outside its block")
    entry = np.repeat(np.arange(len(rows)), sizes)
    if ((np.diff(indices.astype(np.int64)) <= 0) & (np.diff(entry) == 0)).any():
        raise _broken("the indices of a row do not ascend")
    weight = np.zeros((groups, group_rows, in_features), np.float32)
    weight[group[entry], :, block[entry] * block_columns + indices] = values.reshape(-1, group_rows)
    return weight.reshape(out_features, in_features)


def beyond_half(values: np.ndarray) -> bool:
    """Tell whether a finite value becomes infinite as float16.

    Args:
        values: float32.

    Returns:
        bool: one does.
    """
    with np.errstate(over="ignore"):
        return bool((np.isinf(values.astype(np.float16)) & np.isfinite(values)).any())


def _check_sizes(inputs: int, outputs: int, block: int, panel: int, group: int) -> None:
    if inputs < 1 or outputs < 1:
        raise RequestError(f"a sparse layer of {inputs} inputs and {outputs} outputs: both must be 1 or more")
    if group not in GROUPS or outputs % group:
        raise RequestError(f"group_rows {group} does not fit {outputs} rows: 1, or 4 where it divides them")
    if not 1 <= block <= 256:
        raise RequestError(f"block_columns {block} is not in 1 to 256")
    if not 1 <= panel <= 256 or panel % group:
        raise RequestError(f"panel_rows {panel} is not in 1 to 256, or no multiple of group_rows {group}")


def _check_types(**arrays: np.ndarray) -> None:
    allowed: dict[str, tuple[type, ...]] = {
        "values": (np.float32, np.float16),
        "indices": (np.uint8,),
        "rows": (np.uint8,),
        "counts": (np.uint16,),
    }
    for name, array in arrays.items():
        if array.ndim != 1 or array.dtype not in allowed[name]:
            wanted = " or ".join(np.dtype(kind).name for kind in allowed[name])
            raise _broken(f"{name} is {array.dtype} {list(array.shape)}, not a vector of {wanted}")


def _broken(what: str) -> RequestError:
    return RequestError(f"a sparse weight is broken: {what}; pack the graph again")
