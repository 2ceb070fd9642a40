"""What a stage trains: which parameters, by which optimizer, at which rate."""

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from bt_core.errors import ConfigError
from bt_core.models.backbones import parameter_groups
from bt_core.models.classifier import Classifier
from bt_core.training.spec import TrainSpec


def select_trainable(model: Classifier, trainable: str) -> None:
    """Let the head and a part of the backbone have gradients, and nothing else.

    Args:
        model: the classifier.
        trainable: `head`, `all`, `layers:N` or `blocks:N`. Layers are those with a weight matrix
            or kernel; norms and biases go with the layer before them.

    Raises:
        ConfigError: if the backbone has fewer layers or blocks.
    """
    chosen = set(_chosen(model.backbone, trainable))
    for name, parameter in model.backbone.named_parameters():
        parameter.requires_grad_(name in chosen)


def check_stages(model: Classifier, train: TrainSpec) -> None:
    """Raise ConfigError if a stage asks for more layers or blocks than the backbone has."""
    for stage in train.plan():
        _chosen(model.backbone, stage.trainable)


def has_idle_weights(model: Classifier, image_shape: tuple[int, int, int]) -> bool:
    """Return whether some weights that have gradients take no part in the logits.

    A head that flattens, for one, goes round what the backbone has behind its feature map.

    Args:
        model: the classifier, anywhere.
        image_shape: channels, height and width of its input.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    model.eval()  # or batch norm would take the image into its statistics
    logits_1K = model(torch.zeros(1, *image_shape, device=trained[0].device))
    model.train(was_training)
    gradients = torch.autograd.grad(logits_1K.sum(), trained, allow_unused=True)
    return any(gradient is None for gradient in gradients)


def train_mode(wrapped: nn.Module, model: Classifier) -> None:
    """Switch to training, but for frozen parts: their norms use the statistics that they have."""
    wrapped.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def build_optimizer(model: nn.Module, train: TrainSpec) -> torch.optim.Optimizer:
    """Return the recipe's optimizer of what has gradients; biases and norms are not decayed."""
    scale_of = _layer_scales(model, train.layer_decay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = train.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((scale_of.get(name, 1.0), decay), []).append(parameter)
    settings = [
        {"params": parameters, "lr": train.learning_rate * scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]
    if train.optimizer == "sgd":
        return torch.optim.SGD(settings, lr=train.learning_rate, momentum=0.9, nesterov=True)
    kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
    return kind(settings, lr=train.learning_rate)


def build_schedule(
    optimizer: torch.optim.Optimizer, train: TrainSpec, total_steps: int
) -> LRScheduler:
    """Return the learning-rate schedule, stepped once per step of the optimizer.

    `plateau` is stepped once per epoch instead, with the validation score.
    """
    if train.schedule == "one_cycle":
        peaks = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, max_lr=peaks, total_steps=total_steps)
    if train.schedule == "plateau":
        return ReduceLROnPlateau(
            optimizer,
            mode="max",
            factor=train.plateau_factor,
            patience=train.plateau_patience,
            threshold=0.0,
            threshold_mode="abs",
        )
    rising = math.ceil(train.warmup * total_steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        if train.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total_steps - rising)))

    return LambdaLR(optimizer, factor)


def build_average(model: Classifier, decay: float) -> AveragedModel:
    """Return a copy of the model that `update_parameters` moves towards it, buffers as well.

    The decay begins lower, at (1 + n) / (10 + n) after n steps, so that a short training does not
    end with an average of its first weights.
    """

    def average(
        averages: tuple[torch.Tensor, ...] | list[torch.Tensor],
        values: tuple[torch.Tensor, ...] | list[torch.Tensor],
        num_averaged: torch.Tensor | int,
    ) -> None:
        share = 1 - torch.clamp(
            (1 + num_averaged) / (10 + torch.as_tensor(num_averaged)), max=decay
        )
        for averaged, value in zip(averages, values, strict=True):
            if averaged.is_floating_point():
                averaged.lerp_(value, share.to(averaged.dtype))
            else:  # the number of batches that a norm has seen
                averaged.copy_(value)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


def _chosen(backbone: nn.Module, trainable: str) -> list[str]:
    """Return the names of the backbone's parameters that are trained."""
    if trainable in ("all", "head"):
        return [name for name, _ in backbone.named_parameters()] if trainable == "all" else []
    groups = parameter_groups(backbone)
    kind, _, number = trainable.partition(":")
    if kind == "layers":
        sizes = {name: parameter.ndim for name, parameter in backbone.named_parameters()}
        layers: list[list[str]] = []
        for name in (name for group in groups for name in group):
            if sizes[name] > 1 and name.endswith("weight"):
                layers.append([])
            if layers:
                layers[-1].append(name)
        groups = layers
    if int(number) > len(groups):
        raise ConfigError(
            f"train: trainable {trainable}: this backbone has {len(groups)} {kind}; use "
            f"{kind}:1 to {kind}:{len(groups)}, or all"
        )
    return [name for group in groups[-int(number) :] for name in group]


def _layer_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Return the factor of the rate of each parameter whose factor is not 1."""
    if layer_decay == 1 or not isinstance(model, Classifier):
        return {}
    groups = parameter_groups(model.backbone)
    return {
        f"backbone.{name}": layer_decay**distance
        for distance, group in enumerate(reversed(groups), 1)
        for name in group
    }
