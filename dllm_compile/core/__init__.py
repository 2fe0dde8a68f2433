"""Graphs of ``torch.fx``: where batch and tokens sit in every value, and how a part is written for fewer rows."""
