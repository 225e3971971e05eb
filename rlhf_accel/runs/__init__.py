"""What a run leaves behind: checkpoints, exports, metrics, model cards, the report, the hub.

Knows files, models and their names; knows no step and no sampling.
"""
