"""Benchmarks of the operators and of the layers above them, against what people use today.

``python3 dev.py bench`` or ``python -m temporal_layers.kernels.benchmarks`` measures, on a GPU or on a CPU, and writes
JSON, a Markdown table and a plot. A result is checked against a float64 oracle before it is timed: what is wrong gets
no time. docs/kernels.md says how to read the columns.

This package lies beside the kernels but imports whatever it measures them against (the layers, diffusers, xformers),
so it stands at the right end of the import arrows: nothing may import it.
"""
