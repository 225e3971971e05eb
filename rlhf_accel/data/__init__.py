"""Inputs of a run: prompts, feedback, the tokenizer, embedded data, pretrained folders.

Knows rows and texts; knows no model that computes, no reward and no run.
"""
