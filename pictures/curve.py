"""
The curve of a training run as a picture, drawn with Pillow alone.
"""
import math
from itertools import accumulate

from PIL import Image, ImageDraw


def draw_curve(rows, path, width=800, height=420):
    """The loss of every step (gray), its running mean (blue) and that of held-back records (red), on a log axis."""
    image = Image.new("RGB", (width, height), "white")
    draw, left, top, right, bottom = ImageDraw.Draw(image), 60, 30, width - 20, height - 40
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    held_back = [(row["step"], row["val"]) for row in rows if "val" in row]
    means = list(accumulate(losses, lambda mean, loss: mean + (loss - mean) * 0.05))
    shown = losses + [loss for _, loss in held_back]
    low, high = math.log(max(min(shown), 1e-6)), math.log(max(max(shown), 2e-6))
    x = lambda step: left + (right - left) * (step - steps[0]) / max(steps[-1] - steps[0], 1)
    y = lambda v: bottom - (bottom - top) * (math.log(max(v, 1e-6)) - low) / max(high - low, 1e-9)
    for value in (math.exp(low + (high - low) * k / 4) for k in range(5)):
        draw.line([(left, y(value)), (right, y(value))], fill=(225, 225, 225))
        draw.text((8, y(value) - 6), f"{value:.3f}", fill="black")
    draw.line([(x(i), y(v)) for i, v in zip(steps, losses)], fill=(190, 190, 190), width=1)
    draw.line([(x(i), y(v)) for i, v in zip(steps, means)], fill=(30, 90, 180), width=2)
    for step, loss in held_back:
        draw.ellipse([x(step) - 3, y(loss) - 3, x(step) + 3, y(loss) + 3], fill=(200, 40, 40))
    heading = f"loss per learned token, {steps[-1]} steps, last {means[-1]:.4f} (running mean)"
    heading += f"; held back {held_back[-1][1]:.4f} (red)" if held_back else ""
    draw.text((left, 8), heading, fill="black")
    draw.text((left, bottom + 8), str(steps[0]), fill="black")
    draw.text((right - 30, bottom + 8), str(steps[-1]), fill="black")
    image.save(path, "PNG")
