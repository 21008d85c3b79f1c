"""The main path on a stand-in for an accelerator: a script that prints what went wrong in each step, as JSON."""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import torch
from cuda_networks import uneven
from stand_in_device import DEVICE, Away, Elsewhere, moved_
from streamed_networks import Shallow

import normfix


def network():
    torch.manual_seed(0)
    return moved_(Shallow(4).eval())


def main():
    torch.set_num_threads(1)
    torch.__future__.set_swap_module_params_on_conversion(True)  # a wrapper's data cannot change its dtype
    found = {}

    @contextlib.contextmanager
    def step(name):
        found[name] = ""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
            found[name] = f"{type(error).__name__}: {error}"[:600]

    with Elsewhere():
        image = Away(uneven(64, 96))
        with step("scan"):
            assert normfix.plan(normfix.scan(network(), image)).converted
        with step("convert"):
            done = normfix.convert(network(), image)
            assert done.proof.passed
        model = done.model
        with step("calibrate whole"):
            assert normfix.calibrate(model, image).summary.engine == "passes"
        for engine in ("tiles",):
            with step(f"predict in {engine}"):
                parts = normfix.predict(model, image, tile=32, engine=engine)
                assert parts.device == DEVICE
                with torch.no_grad():
                    assert float((parts - model(image)).abs().max()) < 1e-4
        with step("check"):
            assert normfix.check(model, image, tile=32).passed
        with step("diagnose"):
            assert normfix.diagnose(network(), image, tile=32).record.culprits
        with step("save and load"), tempfile.TemporaryDirectory() as folder:
            normfix.save(done, Path(folder) / "net.pt2")
            assert normfix.check(normfix.load(Path(folder) / "net.pt2"), uneven(64, 96), tile=32).passed
        with step("planted: a buffer stays behind"):
            mixed = network()
            norm = next(m for m in model.modules() if hasattr(m, "running_mean"))
            mixed.register_buffer("shift", torch.zeros(1, 1, 1, 1))
            mixed.register_forward_pre_hook(lambda module, args: (args[0] + module.shift,))
            assert norm is not None
            normfix.scan(mixed, image)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
