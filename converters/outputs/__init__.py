"""What is written: one file or folder per format, found in `table.py`."""
