"""Policy, value model, reference, LoRA and classifiers, and the probes that look at them.

Knows transformers and peft; knows no tokenizer, no rank and no file of a run.
"""
