"""The loss: cross-entropy with class weights, label smoothing, focus and soft targets.

Shape suffixes: B batch, K classes.
"""

import torch
from torch import nn

from bt_core.training.spec import TrainSpec


class ClassificationLoss(nn.Module):
    """Weighted mean over the batch of `-sum_k t_k w_k (1 - p_k)^gamma log p_k`.

    With targets of 0 and 1, gamma 0 and no smoothing this is `nn.CrossEntropyLoss`; with gamma it
    is the focal loss (arXiv 1708.02002, equation 5). A scan weighs `sum_k t_k w_k` in the mean.

    Args:
        weight_K: weight of each class; None weighs all alike.
        label_smoothing: share of each target that is spread over all classes.
        focal_gamma: exponent; 0 is cross-entropy.
    """

    weight_K: torch.Tensor

    def __init__(
        self, weight_K: torch.Tensor | None, label_smoothing: float, focal_gamma: float
    ) -> None:
        super().__init__()
        self.register_buffer("weight_K", torch.ones(1) if weight_K is None else weight_K)
        self._smoothing, self._gamma = label_smoothing, focal_gamma

    def forward(self, logits_BK: torch.Tensor, targets_BK: torch.Tensor) -> torch.Tensor:
        """Return the loss, a scalar, of float32 logits against shares of classes that sum to 1."""
        num_classes = logits_BK.shape[1]
        smooth_BK = targets_BK * (1 - self._smoothing) + self._smoothing / num_classes
        weights_BK = smooth_BK * self.weight_K
        log_probs_BK = logits_BK.log_softmax(1)
        losses_BK = -weights_BK * log_probs_BK
        if self._gamma:
            losses_BK = losses_BK * (1 - log_probs_BK.exp()).clamp(min=1e-6) ** self._gamma
        return losses_BK.sum() / weights_BK.sum()


def build_loss(train: TrainSpec, class_counts: list[int]) -> ClassificationLoss:
    """Return the recipe's loss for K numbers of training scans per class."""
    weight_K = None
    if train.class_weights:
        counts = torch.tensor(class_counts, dtype=torch.float32)
        share = counts.sum() / ((counts > 0).sum() * counts.clamp(min=1))
        # A class without scans weighs nothing, or label smoothing would pull every answer to it.
        weight_K = torch.where(counts > 0, share, 0.0)
    return ClassificationLoss(weight_K, train.label_smoothing, train.focal_gamma)
