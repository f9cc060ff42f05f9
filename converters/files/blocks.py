"""The size of the row blocks in which weights are processed, so that no weight has to fit in memory as a whole."""

# float64 bytes of one block of W0, and its minimum number of rows, as measured (benchmarks/README.md). In smaller
# blocks the calls cost as much as the arithmetic; larger ones do not fit in the cache
BLOCK_BYTES = 8 << 20
LEAST_ROWS = 32


def block_rows(width: int) -> int:
    """Number of rows per block for a weight with `width` columns."""
    return max(LEAST_ROWS, BLOCK_BYTES // (8 * max(1, width)))
