"""torch-em's checkpoints come back with `norm` among what its trainer remembers."""

import pytest
import torch
from nnunet import scrambled
from originals import torch_em_run

import normfix

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries' own


def returned(tmp_path, kind, image, **args):
    """Convert a network of torch-em's from its trainer's folder and give it back; return all of it."""
    models = pytest.importorskip("torch_em.model", reason="torch-em is not installed")
    torch.manual_seed(0)
    network = scrambled(getattr(models, kind)(**args))
    torch_em_run(tmp_path / "run", network)
    source = f"torch_em.model:{kind}"
    loaded = normfix.load(tmp_path / "run" / "best.pt", arch=source, args=args)
    done = normfix.convert(loaded, image)
    record = normfix.give_back(done, tmp_path / "back", source, args, original=tmp_path / "run")
    return network, done, record


SMALL = {"in_channels": 1, "out_channels": 1, "initial_features": 4}


@pytest.mark.parametrize(
    ("kind", "args", "size"),
    [
        ("UNet2d", {"depth": 2}, (64, 64)),
        ("UNet2d", {"depth": 2, "norm": "GroupNorm"}, (64, 64)),
        ("UNet3d", {"depth": 1}, (16, 16, 16)),
        ("AnisotropicUNet", {"scale_factors": [[1, 2, 2]]}, (8, 32, 32)),
    ],
)
def test_a_network_of_torch_em_comes_back(tmp_path, kind, args, size):
    """Its norm is switched though its class names no such argument, and the trainer's file remembers that."""
    image = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(0))
    _, done, record = returned(tmp_path, kind, image, **SMALL, **args)
    content = torch.load(tmp_path / "back" / "best.pt", weights_only=True)
    assert content["init"]["model_kwargs"]["norm"] == "BatchNorm"
    assert content["iteration"] == 4
    assert not (tmp_path / "back" / "latest.pt").exists()
    assert record.format == "torch-em checkpoint"
    import torch_em.model
    from torch_em.util import load_model

    built = getattr(torch_em.model, kind)(**{**SMALL, **args, "norm": "BatchNorm"})
    back = load_model(str(tmp_path / "back"), model=built, device="cpu").eval()
    with torch.no_grad():
        wanted = done.model(image)
        assert (back(image) - wanted).abs().max() < 1e-4 * wanted.std()


def test_predict_with_halo(tmp_path):
    """torch-em's own tiles: before, seams; after, with the halo of the README, the whole image's away from its border.

    With its default `preprocess` each block is standardized by itself, and seams stay: the README says so.
    """
    prediction = pytest.importorskip("torch_em.util.prediction", reason="torch-em is not installed")
    image = torch.rand(1, 1, 192, 64, generator=torch.Generator().manual_seed(0))
    # darker on one side, so that blocks have statistics of their own
    image = image * torch.linspace(0.2, 2, 192).view(1, 1, 192, 1)
    network, _, record = returned(tmp_path, "UNet2d", image, **SMALL, depth=2)
    from torch_em.model import UNet2d
    from torch_em.util import load_model

    halo = tuple(max(pair) for pair in record.verdict.halo_rounded)
    assert f"`halo={halo}`" in (tmp_path / "back" / "README.md").read_text()
    back = load_model(str(tmp_path / "back"), model=UNet2d(**SMALL, depth=2, norm="BatchNorm"), device="cpu")
    with torch.no_grad():
        wanted = network(image)[0].numpy()

    def apart(model, **options):
        result = prediction.predict_with_halo(
            image[0, 0].numpy(), model.eval(), ["cpu"], (64, 32), halo, disable_tqdm=True, **options
        )
        inside = (slice(None), *(slice(side, -side) for side in halo))
        return float(abs(result - wanted)[inside].max() / wanted.std())

    assert apart(network, preprocess=None) > 0.1
    assert apart(back, preprocess=None) < 1e-4
    assert apart(back) > 0.1
