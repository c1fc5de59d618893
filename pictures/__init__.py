"""
Pixels in and out: image and mask files as arrays; pictures of predictions and of the loss.
"""
