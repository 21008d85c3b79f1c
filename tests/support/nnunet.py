"""Model folders as nnU-Net writes them."""

import json

import pytest
import torch
from torch import nn

RESAMPLING = {
    f"resampling_fn_{what}{kwargs}": value
    for what, is_seg in (("data", False), ("probabilities", False), ("seg", True))
    for kwargs, value in (
        ("", "resample_data_or_seg_to_shape"),
        ("_kwargs", {"is_seg": is_seg, "order": 1, "order_z": 0, "force_separate_z": None}),
    )
}

PLANS = {
    "dataset_name": "Dataset001_Cells",
    "plans_name": "nnUNetPlans",
    "image_reader_writer": "NaturalImage2DIO",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {"0": {}},
    "configurations": {
        "2d": {
            "data_identifier": "nnUNetPlans_2d",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": [32, 32],
            "normalization_schemes": ["ZScoreNormalization"],
            "use_mask_for_norm": [False],
            "spacing": [1.0, 1.0],
            "batch_dice": False,
            **RESAMPLING,
            "architecture": {
                "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                "arch_kwargs": {
                    "n_stages": 3,
                    "features_per_stage": [4, 8, 8],
                    "conv_op": "torch.nn.modules.conv.Conv2d",
                    "kernel_sizes": [[3, 3], [3, 3], [3, 3]],
                    "strides": [[1, 1], [2, 2], [2, 2]],
                    "n_conv_per_stage": [2, 2, 2],
                    "n_conv_per_stage_decoder": [2, 2],
                    "conv_bias": True,
                    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
                    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                    "dropout_op": None,
                    "dropout_op_kwargs": None,
                    "nonlin": "torch.nn.LeakyReLU",
                    "nonlin_kwargs": {"inplace": True},
                },
                "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
            },
        },
        "2d_bs8": {"inherits_from": "2d", "batch_size": 8},
    },
}


DATASET = {
    "channel_names": {"0": "fluorescence"},
    "labels": {"background": 0, "cell": 1, "ignore": 2},
    "numTraining": 2,
    "file_ending": ".tif",
}


OLD = {
    "UNet_class_name": "PlainConvUNet",
    "UNet_base_num_features": 4,
    "unet_max_num_features": 8,
    "n_conv_per_stage_encoder": [2, 2, 2],
    "n_conv_per_stage_decoder": [2, 2],
    "num_pool_per_axis": [2, 2],
    "pool_op_kernel_sizes": [[1, 1], [2, 2], [2, 2]],
    "conv_kernel_sizes": [[3, 3], [3, 3], [3, 3]],
}
"""How plans from before nnU-Net 2.4 describe the same network."""


def scrambled(model: nn.Module, seed: int = 7) -> nn.Module:
    """Give a network other weights than its factory gives, buffers included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator) - 0.5, alpha=0.01)
    return model.eval()


def nnunet_folder(tmp_path, folds=(0,), *, old=False, **changes):
    """Write a model folder as nnU-Net does (its save_checkpoint's keys), with its plans changed.

    Returns the network of the last fold; each fold has weights of its own.
    """
    plans = json.loads(json.dumps(PLANS))
    plans["configurations"]["2d"]["architecture"].update(changes)
    if old:
        del plans["configurations"]["2d"]["architecture"]
        plans["configurations"]["2d"].update(OLD)
    for fold in folds:
        model = _fold(tmp_path / f"fold_{fold}", fold, plans)
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    (tmp_path / "dataset.json").write_text(json.dumps(DATASET))
    return model


def _fold(folder, fold, plans):
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    settings = dict(PLANS["configurations"]["2d"]["architecture"]["arch_kwargs"])
    settings |= {"conv_op": nn.Conv2d, "norm_op": nn.InstanceNorm2d, "nonlin": nn.LeakyReLU}
    torch.manual_seed(0)
    model = scrambled(
        unet.PlainConvUNet(1, num_classes=2, deep_supervision=False, **settings),
        7 + (9 if fold == "all" else fold),
    )
    checkpoint = {
        "network_weights": model.state_dict(),
        "optimizer_state": torch.optim.SGD(model.parameters(), lr=0.1).state_dict(),
        "grad_scaler_state": None,
        "logging": {"train_losses": [0.5]},
        "_best_ema": 0.5,
        "current_epoch": 1,
        "init_args": {"plans": plans, "configuration": "2d", "fold": fold, "dataset_json": DATASET},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1),
    }
    folder.mkdir()
    torch.save(checkpoint, folder / "checkpoint_final.pth")
    return model
