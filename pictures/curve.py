"""
The curve of a training run as a picture, drawn with Pillow alone.
"""
import math
from itertools import accumulate

from PIL import Image, ImageDraw


def draw_curve(losses, path, width=800, height=420):
    """The loss of every step (gray) and its running mean (blue), on a logarithmic axis, as a PNG."""
    image = Image.new("RGB", (width, height), "white")
    draw, left, top, right, bottom = ImageDraw.Draw(image), 60, 30, width - 20, height - 40
    means = list(accumulate(losses, lambda mean, loss: mean + (loss - mean) * 0.05))
    low, high = math.log(max(min(losses), 1e-6)), math.log(max(max(losses), 2e-6))
    x = lambda i: left + (right - left) * i / max(len(losses) - 1, 1)
    y = lambda v: bottom - (bottom - top) * (math.log(max(v, 1e-6)) - low) / max(high - low, 1e-9)
    for value in (math.exp(low + (high - low) * k / 4) for k in range(5)):
        draw.line([(left, y(value)), (right, y(value))], fill=(225, 225, 225))
        draw.text((8, y(value) - 6), f"{value:.3f}", fill="black")
    draw.line([(x(i), y(v)) for i, v in enumerate(losses)], fill=(190, 190, 190), width=1)
    draw.line([(x(i), y(v)) for i, v in enumerate(means)], fill=(30, 90, 180), width=2)
    heading = f"loss per learned token, {len(losses)} steps, last {means[-1]:.4f} (running mean)"
    draw.text((left, 8), heading, fill="black")
    draw.text((left, bottom + 8), "1", fill="black")
    draw.text((right - 30, bottom + 8), str(len(losses)), fill="black")
    image.save(path)
