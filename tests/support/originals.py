"""Folders as other libraries write them, with small networks of other weights than their classes give."""

import json

import pytest
import torch
from nnunet import scrambled

INFERENCE = {
    "imports": ["$import glob"],
    "dataset_dir": "images",
    "output_dir": "predictions",
    "window": [96, 64],
    "datalist": "$sorted(glob.glob(@dataset_dir + '/*.nii.gz'))",
    "channels": 1,
    "network_def": {
        "_target_": "UNet",
        "spatial_dims": 2,
        "in_channels": 1,
        "out_channels": "@channels",
        "channels": [4, 8],
        "strides": [2],
        "norm": "instance",
    },
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", "keys": "image"},
            {"_target_": "EnsureChannelFirstd", "keys": "image", "channel_dim": "no_channel"},
        ],
    },
    "dataset": {
        "_target_": "Dataset",
        "data": "$[{'image': i} for i in @datalist]",
        "transform": "@preprocessing",
    },
    "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
    "inferer": {"_target_": "SlidingWindowInferer", "roi_size": "@window", "overlap": 0},
    "postprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "separate_folder": False}
        ],
    },
    "handlers": [
        {
            "_target_": "CheckpointLoader",
            "load_path": "$@bundle_root + '/models/model.pt'",
            "load_dict": {"model": "@network_def"},
            "strict": True,
        }
    ],
    "evaluator": {
        "_target_": "SupervisedEvaluator",
        "device": "$torch.device('cpu')",
        "val_data_loader": "@dataloader",
        "network": "@network_def",
        "inferer": "@inferer",
        "postprocessing": "@postprocessing",
        "val_handlers": "@handlers",
    },
    "initialize": [],
    "run": ["$@evaluator.run()"],
}


def bundle(folder, **changes):
    """Write a MONAI bundle, its network's definition changed, or another; return its network."""
    nets = pytest.importorskip("monai.networks.nets")
    config = {**INFERENCE, "imports": ["$import glob", "$import torch"]}
    of_all = {"spatial_dims": 2, "in_channels": 1, "out_channels": "@channels"}
    config["network_def"] = {**(of_all if "_target_" in changes else config["network_def"]), **changes}
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "docs").mkdir()
    (folder / "docs" / "README.md").write_text("of the bundle")
    (folder / "configs" / "metadata.json").write_text("{}")
    (folder / "configs" / "inference.json").write_text(json.dumps(config, indent=4) + "\n")
    train = {"network": config["network_def"] | {"out_channels": 1}, "lr": "$2 * 1e-4"}
    (folder / "configs" / "train.json").write_text(json.dumps(train, indent=2) + "\n")
    args = {k: v for k, v in config["network_def"].items() if k != "_target_"} | {"out_channels": 1}
    torch.manual_seed(0)
    network = scrambled(getattr(nets, config["network_def"]["_target_"])(**args))
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    (folder / "models" / "model.ts").write_bytes(b"a program of the original network")
    return network


RUN = """# trained in 2021
model:
  name: UNet2D
  in_channels: 1
  out_channels: 1
  layer_order: {order}  # norm, convolution, activation
  f_maps: [4, 8]
  num_groups: 2
  final_sigmoid: true
trainer:
  layer_order: none of the model
"""


def unet3d_run(folder, order="gcr"):
    """Write a run of pytorch-3dunet; return its network."""
    pytest.importorskip("h5py")
    pytest.importorskip("skimage")
    yaml = pytest.importorskip("yaml")
    models = pytest.importorskip("pytorch3dunet.unet3d.model")
    folder.mkdir(parents=True)
    text = RUN.format(order=order)
    (folder / "config.yml").write_text(text)
    torch.manual_seed(0)
    network = scrambled(models.get_model(yaml.safe_load(text)["model"]))
    content = {"model_state_dict": network.state_dict(), "num_epochs": 3, "best_eval_score": 0.5}
    torch.save(content, folder / "best_checkpoint.pytorch")
    torch.save(content, folder / "last_checkpoint.pytorch")
    return network


def torch_em_run(folder, network):
    """Write best.pt and latest.pt as torch-em's DefaultTrainer.save_checkpoint does."""
    folder.mkdir()
    content = {
        "iteration": 4,
        "epoch": 2,
        "best_epoch": 2,
        "best_metric": 0.5,
        "current_metric": 0.5,
        "model_state": network.state_dict(),
        "optimizer_state": torch.optim.Adam(network.parameters()).state_dict(),
        "init": {"model_class": "torch_em.model.unet.UNet2d", "model_kwargs": {"in_channels": 1}},
        "train_time": 1.0,
        "timestamp": "27-11-2026",
    }
    for name in ("best.pt", "latest.pt"):
        torch.save(content, folder / name)
