"""
The toy world: built-in scenes with texts and masks that need no download.
"""
