"""Backbones by name: any timm model, or one of our own networks. The only user of timm.

timm is imported when a backbone is built: it takes five seconds, which most commands save.

A backbone has no classifier; its contract is timm's: forward_features and
forward_head(pre_logits=True).
"""

import json
import os
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from bt_core.errors import ConfigError, WeightsError
from bt_core.models.cnn import NETWORKS
from bt_core.models.spec import ModelSpec

Triple = tuple[float, float, float]
_HALF: Final[Triple] = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Backbone:
    """A backbone with what its own configuration says about it.

    Attributes:
        module: the network without a classifier.
        spec: the model spec with the constructor arguments that the weights came with.
        mean: per channel, of inputs in [0, 1].
        std: per channel, of inputs in [0, 1].
    """

    module: nn.Module
    spec: ModelSpec
    mean: Triple
    std: Triple


def input_size_px(spec: ModelSpec) -> int | None:
    """Return the side of the images that a timm backbone was made for; None for own networks.

    Raises:
        ConfigError: if no such backbone exists; names similar ones.
        WeightsError: if a local folder is not one of timm's.
    """
    if spec.backbone in NETWORKS:
        return None
    timm = timm_with(spec.backbone)
    if spec.weights_source == "local-dir":
        config = read_config(spec)
        size = config.get("pretrained_cfg", config).get("input_size")
        if size:
            return int(size[-1])
    return int(timm.get_pretrained_cfg(spec.backbone).input_size[-1])


def build_backbone(spec: ModelSpec, size_px: int) -> Backbone:
    """Build a backbone with its initial weights.

    Args:
        spec: backbone and weights.
        size_px: side of its input; networks that are bound to one size are built for this one.

    Raises:
        ConfigError: if no such backbone exists; names similar ones.
        WeightsError: if the weights cannot be had from the stated source; names the other two.
    """
    if spec.backbone in NETWORKS:
        if spec.weights_source != "none":
            raise WeightsError(
                f"{spec.backbone} is trained from scratch, without {spec.weights_source} weights; "
                "pass --set model.weights=none"
            )
        try:
            return Backbone(NETWORKS[spec.backbone](**spec.backbone_args), spec, _HALF, _HALF)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model.backbone_args: {spec.backbone}: {error}") from error
    timm = timm_with(spec.backbone)
    own = timm.get_pretrained_cfg(spec.backbone)
    if own.fixed_input_size and own.input_size[-1] != size_px:
        arguments = {"img_size": size_px, **spec.backbone_args}
        spec = spec.model_copy(update={"backbone_args": arguments})
    if spec.weights_source == "local-dir":
        return _from_local_dir(spec)
    return _from_timm(spec, spec.backbone, pretrained=spec.weights_source == "hub")


def timm_with(name: str) -> Any:
    """Return the module timm.

    Raises:
        ConfigError: if it has no such backbone; names similar ones.
    """
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0][:6]}*")[:5]
        raise ConfigError(
            f"model.backbone: no backbone {name!r} in timm {timm.__version__} or in "
            f"{sorted(NETWORKS)}; near: {', '.join(near) or 'none'}"
        )
    return timm


def read_config(spec: ModelSpec) -> dict[str, Any]:
    """Return the `config.json` of a local folder of weights.

    Raises:
        WeightsError: if there is none, or its architecture is not the spec's (one that is empty
            takes any).
    """
    path = spec.weights.partition(":")[2]
    try:
        with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
            config: dict[str, Any] = json.load(file)
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"model.weights: {path} is not a timm folder (config.json and model.safetensors): "
            f"{type(error).__name__}; check the path, or use hub or none"
        ) from error
    architecture = str(config.get("architecture", ""))
    if spec.backbone and architecture.split(".")[0] != spec.backbone.split(".")[0]:
        raise WeightsError(
            f"model.weights: {path} holds {architecture!r}, but the recipe's backbone is "
            f"{spec.backbone!r}; point to matching weights, or use hub or none"
        )
    return config


def _from_local_dir(spec: ModelSpec) -> Backbone:
    arguments = {**read_config(spec).get("model_args", {}), **spec.backbone_args}
    arguments.pop("num_classes", None)  # of the classifier that the weights came with
    spec = spec.model_copy(update={"backbone_args": arguments})
    return _from_timm(spec, spec.weights, pretrained=True)


def _from_timm(spec: ModelSpec, name: str, pretrained: bool) -> Backbone:
    import timm

    arguments: dict[str, Any] = {**spec.backbone_args, "num_classes": 0}
    try:
        module = timm.create_model(name, pretrained=pretrained, **arguments)
    except Exception as error:  # the hub client raises many types; a wrong argument is a TypeError
        if not pretrained:
            raise ConfigError(f"model.backbone_args: {spec.backbone}: {error}") from error
        raise WeightsError(
            f"model.weights: cannot load {spec.weights} weights of {spec.backbone} "
            f"({type(error).__name__}); sites without internet use local-dir:PATH, and none trains "
            "from scratch (or hub, with internet)"
        ) from error
    config = module.pretrained_cfg
    return Backbone(module, spec, _triple(config["mean"]), _triple(config["std"]))


def _triple(values: Any) -> Triple:
    first, second, third = (float(v) for v in values)
    return first, second, third


def parameter_groups(backbone: nn.Module) -> list[list[str]]:
    """Return the names of a backbone's parameters in groups (blocks), from shallow to deep.

    Of timm's models these are the groups that the model itself states, of other networks the
    top-level children in order. One without a weight matrix, a norm, joins the one before.
    """
    matcher: Any = getattr(backbone, "group_matcher", None)
    if matcher is not None:
        from timm.models import group_parameters

        by_depth = group_parameters(backbone, matcher(coarse=False))
        stated = [by_depth[depth] for depth in sorted(by_depth)]
    else:
        prefix, node = "", backbone
        while len(children := list(node.named_children())) == 1:
            prefix, node = f"{prefix}{children[0][0]}.", children[0][1]
        stated = [
            [f"{prefix}{child}.{name}" for name, _ in module.named_parameters()]
            for child, module in children
        ]
    matrices = {name for name, parameter in backbone.named_parameters() if parameter.ndim > 1}
    groups: list[list[str]] = []
    for names in filter(None, stated):
        if groups and not matrices.intersection(names):
            groups[-1] += names
        else:
            groups.append(names)
    return groups
