"""ONNX models of adapted classifiers. The only package that imports onnx and ONNX Runtime (extra `onnx`).

A base is traced once, into a graph whose weights are inputs (`template.py`, `template_cache.py`). Each form of output
binds them in its own way: `merged.py` (also with weights that tasks share), `swappable.py` (low-rank inputs, an
`.onnx_adapter` for each task), `self_merging.py` (θ and f in the graph). `parity.py` holds what was written against
the merged torch model.
"""
