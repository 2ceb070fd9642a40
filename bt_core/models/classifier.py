"""A classifier is a backbone and a head.

Shape suffixes: B batch, C channels, D features, K classes.
"""

import torch
from torch import nn

from bt_core.models.backbones import build_backbone
from bt_core.models.spec import HeadSpec, ModelSpec
from bt_core.scans.preprocess import PreprocessSpec


class Classifier(nn.Module):
    """Maps images_BCHW float32 to logits_BK.

    Args:
        backbone: a module with forward_features and forward_head(pre_logits=True).
        head: maps pooled features_BD to logits_BK.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward_features(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the backbone's last feature map or tokens."""
        features: torch.Tensor = self.backbone.forward_features(images_BCHW)  # type: ignore[operator]
        return features

    def forward_head(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits_BK of the backbone's features."""
        pooled_BD = self.backbone.forward_head(features, pre_logits=True)  # type: ignore[operator]
        logits_BK: torch.Tensor = self.head(pooled_BD)
        return logits_BK

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Return logits_BK."""
        return self.forward_head(self.forward_features(images_BCHW))


def build_head(num_features: int, num_classes: int, spec: HeadSpec) -> nn.Sequential:
    """Return the layers from pooled features_BD to logits_BK."""
    layers: list[nn.Module] = []
    for width in spec.hidden:
        layers += [nn.Linear(num_features, width), nn.ReLU(), nn.Dropout(spec.dropout)]
        num_features = width
    if not spec.hidden:
        layers.append(nn.Dropout(spec.dropout))
    return nn.Sequential(*layers, nn.Linear(num_features, num_classes))


def build_classifier(
    model: ModelSpec, preprocess: PreprocessSpec, num_classes: int
) -> tuple[Classifier, ModelSpec, PreprocessSpec]:
    """Build a classifier and resolve what its weights decide.

    Args:
        model: backbone, initial weights and head.
        preprocess: `mean` and `std` that are None become the backbone's own, unless `normalize`
            is another one.
        num_classes: K.

    Returns:
        The classifier, the model spec with the weights' constructor arguments, and the
        preprocessing spec with its normalisation filled in.

    Raises:
        ConfigError: if the backbone does not exist.
        WeightsError: if the weights cannot be had.
    """
    if preprocess.channels != 3:
        arguments = {**model.backbone_args, "in_chans": preprocess.channels}
        model = model.model_copy(update={"backbone_args": arguments})
    backbone = build_backbone(model)
    head = build_head(backbone.num_features, num_classes, model.head)
    resolved = preprocess
    if preprocess.normalize == "backbone":
        own = {"mean": preprocess.mean or backbone.mean, "std": preprocess.std or backbone.std}
        resolved = preprocess.model_copy(update=own)
    classifier = Classifier(backbone.module, head)
    return classifier.to(memory_format=torch.channels_last), backbone.spec, resolved


def rebuild_classifier(model: ModelSpec, num_classes: int) -> Classifier:
    """Return the empty network of a resolved spec, for weights that are loaded next."""
    bare = model.model_copy(update={"weights": "none"})
    return build_classifier(bare, PreprocessSpec(), num_classes)[0].eval()
