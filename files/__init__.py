"""
How files are read and written, by every module: text.py (JSON, paths, write-then-rename), weights.py (tensors), peft.py
(LoRA). So a mistake has one wording. A missing file is a FileNotFoundError, all else that is wrong a ValueError.
"""
