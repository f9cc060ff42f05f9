"""The state folder as one file: exporting, importing and checking it."""
