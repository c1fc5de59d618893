"""
What is no test and no run needs: benchmarks, runs with real weights and at full size, looks inside a model, and what
made the files that are shipped (golden files, tiny weights). Each is a command: python -m checks.bench sfi
"""
