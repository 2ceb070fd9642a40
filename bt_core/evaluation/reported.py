"""What five published classifiers report of themselves, on their own splits; ours stands beside it.

Their splits are crossed by copies, and some chose on training data: these figures cannot be
compared with ours as measures of one thing. Per cent, as reported.
"""

from typing import Final

REPORTED: Final[tuple[tuple[str, str, str, str], ...]] = (
    ("A NeuroScan", "four_class", "ResNet50, frozen", "precision 63.7, recall 59, F1 59.9"),
    ("A NeuroScan", "four_class", "DenseNet121, frozen", "F1 88.3"),
    ("A NeuroScan", "four_class", "Xception, frozen", "F1 89.2"),
    ("A NeuroScan", "four_class", "Xception, tuned on training data", "accuracy 96, F1 96.7"),
    ("B Explained MobileNetV2", "four_class", "CNN of three blocks", "accuracy about 65"),
    ("B Explained MobileNetV2", "four_class", "MobileNetV2, frozen",
     "accuracy about 60; AUC glioma 87, healthy 86, pituitary 86, meningioma 76"),
    ("C Healthy/Tumor", "binary", "CNN1", "accuracy 95"),
    ("C Healthy/Tumor", "binary", "CNN2", "accuracy 87"),
    ("C Healthy/Tumor", "binary", "ResNet50", "accuracy 92"),
    ("C Healthy/Tumor", "binary", "MobileNetV2", "accuracy 91"),
    ("C Healthy/Tumor", "binary", "DenseNet121", "accuracy 92"),
    ("D four-million-parameter CNN", "four_class", "CNN", "validation accuracy 95.2"),
    ("E three-backbone pipeline", "four_class", "MobileNetV2",
     "accuracy 81; recall of meningioma 53 to 56"),
    ("E three-backbone pipeline", "four_class", "ResNet50", "accuracy 82"),
    ("E three-backbone pipeline", "four_class", "EfficientNetB0", "accuracy 80"),
)  # fmt: skip
"""System, task, model, figures."""
