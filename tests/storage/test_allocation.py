"""What a file may make torch allocate is bounded before it is allocated."""

import pytest
import torch
from torch import nn

import normfix
from normfix.errors import NormfixError
from normfix.storage.opening.allocation import Bounded, bounded_by


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(10**6, 10**6),
        lambda: torch.zeros(10**5, 10**5),
        lambda: torch.rand(10**10),
        lambda: torch.arange(10**10),
        lambda: torch.full((10**5, 10**5), 0.5),
        lambda: [nn.Conv2d(64, 64, 3) for _ in range(10**9)],
        lambda: [torch.empty(()) for _ in range(10**9)],
    ],
)
def test_what_is_out_of_proportion_is_refused(make):
    """Large layers, tables of any kind and endless small ones are NF121."""
    with Bounded(1000, "config.json"), pytest.raises(NormfixError, match=r"NF121 config.json"):
        make()


def test_a_network_in_proportion_to_its_weights_is_built():
    """Negative control: the same layer is built, initialised, where weights of its size lie beside it."""
    with Bounded(4 * 8192**2, "w.pt"):
        assert nn.Linear(8192, 8192).weight.std() > 0
    with pytest.raises(NormfixError), Bounded(0, "w.pt"):
        nn.Linear(16384, 8192)


def test_the_size_of_a_folder_counts_what_it_holds(tmp_path):
    """Files in a folder and in the folders in it raise the bound; a dangling link does not matter."""
    (tmp_path / "models").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    with (tmp_path / "models" / "w.pt").open("wb") as file:
        file.truncate(1 << 30)
    with bounded_by(tmp_path):
        torch.empty(1 << 30)


def test_the_caller_may_build_what_a_file_may_not(tmp_path):
    """A factory that the caller names is not bounded by the file."""
    torch.save({"weight": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(NormfixError, match="NF105"):
        normfix.load(
            tmp_path / "w.pt", arch="torch.nn:Linear", args={"in_features": 10**4, "out_features": 7500}
        )
