"""Variants: names, versions, records on disk, and weights in host memory."""
