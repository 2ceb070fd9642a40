"""A classifier is a backbone and a head.

Shape suffixes: B batch, C channels, D features, K classes.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import nn

from bt_core.errors import ConfigError, first_line
from bt_core.models.backbones import Backbone, build_backbone
from bt_core.models.cnn import initialise
from bt_core.models.spec import HeadSpec, Init, ModelSpec
from bt_core.scans.preprocess import PreprocessSpec

_ACTIVATIONS: Final[dict[str, type[nn.Module]]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}

_FLIPS: Final[dict[str, tuple[tuple[int, ...], ...]]] = {
    "none": (),
    "horizontal": ((3,),),
    "both": ((3,), (2,), (2, 3)),
}


class Classifier(nn.Module):
    """Maps images_BCHW float32 to logits_BK.

    Args:
        backbone: a module with forward_features and forward_head(pre_logits=True).
        head: maps pooled features_BD to logits_BK.
        flatten: give the head the whole feature map instead of what the backbone pools.
        flips: axes of the image (2 down, 3 across) along which it is mirrored outside training;
            the logits are the mean over all views.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        flatten: bool = False,
        flips: Sequence[Sequence[int]] = (),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.flatten = flatten
        self.flips = flips

    def forward_features(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the backbone's last feature map (B, C, h, w) or tokens (B, T, C).

        Some backbones give their feature map channels last, (B, h, w, C).
        """
        features: torch.Tensor = self.backbone.forward_features(images_BCHW)  # type: ignore[operator]
        return features

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """Return pooled (or flattened) features_BD, what the head is given.

        Args:
            features: as `forward_features` returns them.
        """
        if self.flatten:
            return features.flatten(1)
        pooled_BD: torch.Tensor = self.backbone.forward_head(features, pre_logits=True)  # type: ignore[operator]
        return pooled_BD

    def forward_head(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits_BK of the backbone's features.

        Args:
            features: as `forward_features` returns them.
        """
        logits_BK: torch.Tensor = self.head(self.pool(features))
        return logits_BK

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Return logits_BK."""
        return self.forward_with_features(images_BCHW)[0]

    def forward_with_features(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits_BK, and the features_BD that the head was given of the plain view."""
        features_BD = self.pool(self.forward_features(images_BCHW))
        logits_BK: torch.Tensor = self.head(features_BD)
        if self.training or not self.flips:
            return logits_BK, features_BD
        mirrored = [torch.flip(images_BCHW, list(axes)) for axes in self.flips]
        views = [logits_BK, *(self.forward_head(self.forward_features(one)) for one in mirrored)]
        return torch.stack(views).mean(0), features_BD


def build_head(num_features: int, num_classes: int, spec: HeadSpec) -> nn.Sequential:
    """Return the layers from features_BD to logits_BK."""
    layers: list[nn.Module] = []
    for layer in spec.all_layers():
        if layer.dense is not None:
            layers.append(_linear(num_features, layer.dense, spec.init))
            num_features = layer.dense
        elif layer.activation is not None:
            layers.append(_ACTIVATIONS[layer.activation]())
        elif layer.dropout is not None:
            layers.append(nn.Dropout(layer.dropout))
        else:
            layers.append(nn.BatchNorm1d(num_features))
    return nn.Sequential(*layers, _linear(num_features, num_classes, spec.init))


def _linear(num_features: int, width: int, init: Init) -> nn.Linear:
    linear = nn.Linear(num_features, width)
    initialise(linear, init)
    return linear


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
        ConfigError: if the backbone does not exist, or cannot take images of this size.
        WeightsError: if the weights cannot be had.
    """
    if preprocess.channels != 3:
        arguments = {**model.backbone_args, "in_chans": preprocess.channels}
        model = model.model_copy(update={"backbone_args": arguments})
    backbone = build_backbone(model, preprocess.size_px)
    head = build_head(_num_head_inputs(backbone, model, preprocess), num_classes, model.head)
    resolved = preprocess
    if preprocess.normalize == "backbone":
        own = {"mean": preprocess.mean or backbone.mean, "std": preprocess.std or backbone.std}
        resolved = preprocess.model_copy(update=own)
    flatten, flips = model.head.pool == "flatten", _FLIPS[model.test_time_flips]
    classifier = Classifier(backbone.module, head, flatten, flips)
    return classifier.to(memory_format=torch.channels_last), backbone.spec, resolved


def rebuild_classifier(
    model: ModelSpec, preprocess: PreprocessSpec, num_classes: int
) -> Classifier:
    """Return the empty network of resolved specs, for weights that are loaded next."""
    bare = model.model_copy(update={"weights": "none"})
    return build_classifier(bare, preprocess, num_classes)[0].eval()


@torch.no_grad()
def _num_head_inputs(backbone: Backbone, model: ModelSpec, preprocess: PreprocessSpec) -> int:
    """Return the width of what the head is given, by running the backbone on a black image."""
    side = preprocess.size_px
    black = torch.zeros(1, preprocess.channels, side, side)
    was_training = backbone.module.training
    backbone.module.eval()  # or batch norm would take the image into its statistics
    try:
        features: torch.Tensor = backbone.module.forward_features(black)  # type: ignore[operator]
        if model.head.pool == "backbone":
            features = backbone.module.forward_head(features, pre_logits=True)  # type: ignore[operator]
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"model.backbone: {model.backbone} cannot take images of {side}x{side}: "
            f"{first_line(error)}; choose another preprocess.size_px"
        ) from error
    backbone.module.train(was_training)
    return features.flatten(1).shape[1]
