"""
What the commands of data.py (check, show) and aquila.py (--preset, --export) run.
"""
