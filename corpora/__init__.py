"""
Published data sets -> our records: a reader for each layout, one table of all corpora, every prompt.
`python -m corpora --help` lists them.
"""
