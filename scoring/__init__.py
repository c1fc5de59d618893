"""
From answers to numbers: the metrics, which rows of predictions get which, and the paper's benchmarks.
"""
