"""Training of the demo model on a CPU: transformers' model class with faster arithmetic for whole documents.

A development tool: it needs the `train` extra (transformers), which the package at run time does not.
"""
