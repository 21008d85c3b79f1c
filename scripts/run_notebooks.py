"""Run the notebooks from top to bottom in place, and store their figures with few colours, as small files.

pip install -e ".[demo]" monai pytest nbconvert ipykernel ipywidgets
python scripts/run_notebooks.py
"""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parents[1] / "notebooks"
COLOURS = 128


def main() -> None:
    paths = [FOLDER / name for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb"))
    options = ["--to", "notebook", "--execute", "--inplace", "--ExecutePreprocessor.record_timing=False"]
    subprocess.run([sys.executable, "-m", "nbconvert", *options, *paths], check=True)
    for path in paths:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            for output in cell.get("outputs", ()):
                if "image/png" in output.get("data", {}):
                    output["data"]["image/png"] = smaller(output["data"]["image/png"])
        text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size} bytes")


def smaller(png: str) -> str:
    """Return a picture with a palette instead of full colour, base64 in and out."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    few = picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    few.save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


if __name__ == "__main__":
    main()
