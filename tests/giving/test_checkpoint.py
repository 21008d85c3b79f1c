"""A file of weights comes back under its name: the weights swapped where they stand, all else as it was."""

import pytest
import switchable
import torch
from cyclegan import define_G
from nnunet import scrambled
from safetensors.torch import load_file, save_file

import normfix
from normfix.giving.refusals import NotGiven

IMAGE = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
OTHER = torch.rand(1, 1, 96, 64, generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries' own


@pytest.fixture(scope="module")
def done():
    """Return one conversion, of weights that its factory does not give."""
    torch.manual_seed(0)
    return normfix.convert(scrambled(switchable.generator()), IMAGE)


def state_of(done) -> dict:
    """Return the weights that it was converted from, under a factory's names."""
    own = switchable.generator().state_dict()
    return {name: tensor for name, tensor in done.model.state_dict().items() if name in own}


def same(network, done, image=OTHER) -> bool:
    """Tell whether a network gives the converted one's output."""
    with torch.no_grad():
        wanted = done.model(image)
        return bool((network.eval()(image) - wanted).abs().max() < 1e-4 * wanted.std())


@pytest.mark.slow
def test_a_cyclegan_generator_comes_back_for_norm_batch(tmp_path):
    """Its file loads strictly where --norm batch builds no biases: they moved into the means."""
    args = {"input_nc": 1, "output_nc": 1, "ngf": 4, "norm": "instance"}
    torch.manual_seed(0)
    path = tmp_path / "latest_net_G.pth"
    torch.save(scrambled(define_G(**args)).state_dict(), path)
    named = {"arch": "cyclegan:define_G", "args": args}
    done = normfix.convert(normfix.load(path, **named), IMAGE)
    record = normfix.give_back(done, tmp_path / "back", "cyclegan:define_G", args, original=path)
    generator = define_G(**{**args, "norm": "batch"})
    state = torch.load(tmp_path / "back" / "latest_net_G.pth", weights_only=True)
    generator.load_state_dict(state, strict=True)
    assert same(generator, done)
    removed = [change.name for change in record.changes if change.kind == "removed"]
    assert "model.1.bias" in removed
    assert "--norm batch" in (tmp_path / "back" / "README.md").read_text()


@pytest.mark.slow
def test_a_lightning_checkpoint_comes_back_for_its_module(tmp_path):
    """The module's own loader builds it from switched hyperparameters; what is not the network's stays."""
    pytest.importorskip("lightning")
    from lightning_module import Switchable

    torch.manual_seed(0)
    module = scrambled(Switchable())
    content = {
        "pytorch-lightning_version": "2.5.0",
        "epoch": 3,
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
    }
    path = tmp_path / "last.ckpt"
    torch.save(content, path)
    done = normfix.convert(normfix.load(path, arch="switchable:generator"), IMAGE)
    args = {"channels": 4, "norm": "instance"}
    record = normfix.give_back(done, tmp_path / "back", "switchable:generator", args, original=path)
    back = Switchable.load_from_checkpoint(tmp_path / "back" / "last.ckpt", map_location="cpu")
    assert (back.hparams.norm, back.hparams.lr) == ("batch", 0.1)
    assert torch.equal(back.loss.weight, module.loss.weight)
    assert same(back, done)
    assert '+ last.ckpt: hyper_parameters.norm = "batch"' in "\n".join(c.line for c in record.changes)


def test_of_several_weights_those_that_were_converted_are_swapped(tmp_path, done):
    """A checkpoint with a moving average keeps the other set as it was."""
    converted = state_of(done)
    other = {name: tensor + 1 for name, tensor in converted.items()}
    path = tmp_path / "run.pt"
    prefixed = {f"module.{name}": tensor for name, tensor in converted.items()}
    torch.save({"model": other, "ema": {"state": prefixed}, "epoch": 3}, path)
    normfix.give_back(done, tmp_path / "back", "switchable:generator", {}, original=path)
    content = torch.load(tmp_path / "back" / "run.pt", weights_only=True)
    assert all(torch.equal(content["model"][name], tensor) for name, tensor in other.items())
    assert content["epoch"] == 3
    network = switchable.generator(norm="batch")
    network.load_state_dict(
        {name.removeprefix("module."): tensor for name, tensor in content["ema"]["state"].items()}
    )
    assert same(network, done)


def test_which_weights_to_swap_is_not_guessed(tmp_path, done):
    """Two sets that fit and are not those converted are NF553, and nothing is written."""
    other = {name: tensor + 1 for name, tensor in state_of(done).items()}
    path = tmp_path / "run.pt"
    torch.save({"model": other, "ema": {name: tensor + 1 for name, tensor in other.items()}}, path)
    with pytest.raises(NotGiven, match=r"NF553.*2 sets of weights fit"):
        normfix.give_back(done, tmp_path / "back", "switchable:generator", {}, original=path)
    assert not (tmp_path / "back").exists()


def test_safetensors_stay_safetensors(tmp_path, done):
    """The file keeps its format."""
    path = tmp_path / "model.safetensors"
    save_file(state_of(done), path)
    normfix.give_back(done, tmp_path / "back", "switchable:generator", {}, original=path)
    network = switchable.generator(norm="batch")
    network.load_state_dict(load_file(tmp_path / "back" / "model.safetensors"), strict=True)
    assert same(network, done)


def test_a_weight_that_was_changed_in_the_file_is_caught(tmp_path, done, monkeypatch):
    """Negative control: what is read back is the file itself."""
    from normfix.giving.formats import checkpoint

    def spoiled(gift, spot):
        content = swapped(gift, spot)
        content["0.weight"] = content["0.weight"] + 0.1
        return content

    swapped = checkpoint.swapped
    monkeypatch.setattr(checkpoint, "swapped", spoiled)
    path = tmp_path / "model.pth"
    torch.save(state_of(done), path)
    with pytest.raises(normfix.NormfixError, match="NF554"):
        normfix.give_back(done, tmp_path / "back", "switchable:generator", {}, original=path)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("nested", [False, True])
def test_an_original_with_other_weights_is_said_to_be(tmp_path, done, nested):
    """It may have been trained further, or be another network's: what its file gets never stood in it."""
    path = tmp_path / "net.pth"
    for factor, told in ((1.0, []), (1.5, ["weights"])):
        state = {name: factor * tensor for name, tensor in state_of(done).items()}
        torch.save(
            {"epoch": 3, "state_dict": {f"net.{k}": v for k, v in state.items()}} if nested else state, path
        )
        record = normfix.give_back(
            done, tmp_path / f"back-{factor}", "switchable:generator", {}, original=path
        )
        assert [change.name for change in record.changes if change.kind == "replaced"] == told


@pytest.mark.parametrize(
    "key", ["generator.v2", ".", "a..b", " "], ids=["dot within", "dot alone", "two dots", "space"]
)
def test_weights_may_stand_under_a_key_with_dots(tmp_path, done, key):
    """The keys to them are keys, not a name that is cut at its dots."""
    path = tmp_path / "w.pth"
    torch.save({key: state_of(done), "epoch": 3}, path)
    normfix.give_back(done, tmp_path / "back", "switchable:generator", {}, original=path)
    content = torch.load(tmp_path / "back" / "w.pth", weights_only=True)
    assert set(content) == {key, "epoch"}
    generator = switchable.generator(norm="batch")
    generator.load_state_dict(content[key], strict=True)
    assert same(generator, done)


def test_two_sets_of_one_name_are_two(tmp_path, done):
    """A key with a dot and a nested key: which is meant is asked, where the later one was taken without a word."""
    path, other = tmp_path / "w.pth", {name: 2 * tensor for name, tensor in state_of(done).items()}
    torch.save({"a.b": state_of(done), "a": {"b": other}}, path)
    with pytest.raises(normfix.NormfixError, match="NF119"):
        normfix.load(path, arch="switchable:generator")
    model = normfix.load(path, arch="switchable:generator", weights="a.b")
    assert torch.equal(next(model.parameters()), next(iter(state_of(done).values())))
