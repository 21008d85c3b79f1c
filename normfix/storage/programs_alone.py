"""Run a .pt2 file without normfix and compare its outputs with stored ones: a script for a fresh process.

Arguments: the file, a safetensors file with `N.input` and `N.output.K`, the number of threads, and the packages
that must not be importable.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    path, stored, threads, *absent = sys.argv[1:]
    sys.path.pop(0)  # the folder of this script
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]

    import torch
    from safetensors.torch import load_file
    from torch.utils._pytree import tree_leaves

    torch.set_num_threads(int(threads))
    torch.backends.cudnn.allow_tf32 = False
    exported = torch.export.load(path)
    program, tensors = exported.module(), load_file(stored)
    images = [n for n in exported.graph.nodes if n.op == "placeholder" and "val" in n.meta]
    device = images[-1].meta["val"].device  # the state comes before what is given
    for name in sorted(n for n in tensors if n.endswith(".input")):
        number = name.partition(".")[0]
        with torch.no_grad():
            outputs = tree_leaves(program(tensors[name].to(device)))
        for key, expected in tensors.items():
            first, _, position = key.partition(".output.")
            if first == number and position and not torch.equal(outputs[int(position)].cpu(), expected):
                sys.exit(f"output {position} differs on an input of shape {tuple(tensors[name].shape)}")
