"""Losses beside the response: of hidden states and attention maps, and of relations.

Ordinary PyTorch, differentiable, without transformers: :mod:`~kdkernels.losses.features` compares a
layer of the student with one of the teacher, :mod:`~kdkernels.losses.relations` what holds between
examples or between tokens; :mod:`~kdkernels.losses.masking` is what both do with padding.
"""
