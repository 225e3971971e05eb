"""The report: one self-contained page of a run or several, and its charts.

Knows the files of a run's folder; knows no run in progress.
"""
