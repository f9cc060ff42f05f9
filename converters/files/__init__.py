"""Bytes on disk: partial reads and writes of safetensors files, atomic output folders, JSON and hashes."""
