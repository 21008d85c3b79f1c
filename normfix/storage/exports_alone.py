"""Run a .onnx or .ts file without normfix and say how far it is from stored outputs: a script for a fresh process.

Arguments: the file, an .npz file of cases, the number of threads, and the packages that must not be importable. Of a
case there are `N.input`, `N.output`, `N.may_fail` (it need not run) and `N.tiles` (tiles, 3, space, 2): per axis what
is read, kept and written. It prints JSON: for each case the largest absolute difference from the output, and of
stitched tiles from the whole.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    path, stored, threads, *absent = sys.argv[1:]
    sys.path.pop(0)  # the folder of this script
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]

    import json
    from typing import Any

    import numpy as np

    if path.endswith(".onnx"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(threads)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        entry = session.get_inputs()[0].name

        def run(image: np.ndarray) -> np.ndarray:
            """Run the file in onnxruntime."""
            return np.asarray(session.run(None, {entry: np.ascontiguousarray(image)})[0])

    else:
        import torch

        torch.set_num_threads(int(threads))
        network = torch.jit.load(path)  # type: ignore[no-untyped-call]

        def run(image: np.ndarray) -> np.ndarray:
            """Run the file in TorchScript."""
            with torch.no_grad():
                return np.asarray(network(torch.from_numpy(np.ascontiguousarray(image))).numpy())

    def furthest(a: np.ndarray, b: np.ndarray) -> float:
        """Return the largest absolute difference; infinite where it is none or shapes differ."""
        if a.shape != b.shape:
            return float("inf")
        largest = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
        return largest if largest == largest else float("inf")

    def at(spans: np.ndarray) -> Any:
        """Return the index of spans, one per axis of space."""
        return (..., *(slice(int(a), int(b)) for a, b in spans))

    cases, differences = np.load(stored), []
    for number in range(sum(name.endswith(".input") for name in cases.files)):
        image, expected = cases[f"{number}.input"], cases[f"{number}.output"]
        try:
            whole = run(image)
        except Exception:
            if not cases[f"{number}.may_fail"]:
                raise
            differences.append([float("inf"), 0.0])
            continue
        parts = np.full_like(whole, np.nan)
        for read, keep, write in cases[f"{number}.tiles"]:
            parts[at(write)] = run(image[at(read)])[at(keep)]
        tiled = len(cases[f"{number}.tiles"])
        differences.append([furthest(whole, expected), furthest(parts, whole) if tiled else 0.0])
    json.dump(differences, sys.stdout)
