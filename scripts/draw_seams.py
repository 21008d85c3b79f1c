"""Draw docs/seams.png, the README's picture: a place where tiles cut through a nucleus, before and after.

python scripts/draw_seams.py
"""

import io
from pathlib import Path

from PIL import Image

import normfix
from normfix.demo.network import nuclei_unet
from normfix.demo.show import TILE, demo_image, predictions
from normfix.reporting.pictures import closeups

WIDTH = 1100
OUT = Path(__file__).parents[1] / "docs" / "seams.png"

if __name__ == "__main__":
    image, pixels = demo_image()
    network = nuclei_unet()
    maps = predictions(network, normfix.convert(network, image, tile=TILE), image)
    drawn = Image.open(io.BytesIO(closeups(pixels, maps.whole, maps.tiled, maps.repaired, TILE, count=1)))
    height = round(drawn.height * WIDTH / drawn.width)
    drawn.convert("RGB").resize((WIDTH, height), Image.Resampling.LANCZOS).save(OUT, optimize=True)
