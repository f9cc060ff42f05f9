"""How a weight is cut into blocks of rows, so that no weight has to be in memory whole."""

# float64 bytes of one block of W0, and the fewest rows in it: measured (benchmarks/README.md). In smaller blocks the
# calls cost as much as the numbers, larger ones leave the cache
BLOCK_BYTES = 8 << 20
LEAST_ROWS = 32


def block_rows(width: int) -> int:
    """How many rows of a weight with `width` columns make one block."""
    return max(LEAST_ROWS, BLOCK_BYTES // (8 * max(1, width)))
