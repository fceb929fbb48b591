"""ours and pytorch-fid"""
from pathlib import Path
from unittest import mock

import torch

import data


def calibrated_weights(path, images, seed=0):
    """Write random weights for pytorch-fid's Inception to `path`, their batch norm calibrated on images.

    Uncalibrated, the features of a random network of this depth vanish, and any two folders are 1e-14 apart.
    In training mode with momentum 1 each batch norm takes the statistics of what arrives there, layer by layer.
    images: (N, 3, H, W) float in [0, 1].
    """
    torchvision = data.import_torchvision()
    from pytorch_fid import inception

    torch.manual_seed(seed)
    state = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):
        net = inception.fid_inception_v3().train()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        net(2 * torch.nn.functional.interpolate(images, size=(299, 299), mode="bilinear") - 1)
    torch.save(net.state_dict(), Path(path))
