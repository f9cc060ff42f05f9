"""Bytes on disk: safetensors files read and written in part, folders that appear whole, JSON, hashes."""
