"""The model card of a bundle, in Markdown with the front matter that model hubs read."""

from collections.abc import Mapping
from typing import Any

from bt_core.evaluation.evaluated import EvaluatedScans
from bt_core.evaluation.intervals import interval_text
from bt_core.models.bundle import COPIES_FILE, BundleInfo, ReviewInfo
from bt_core.scans.members import ATTRIBUTES

_CARD = """\
---
license: other
pipeline_tag: image-classification
tags: [brain-mri, medical-imaging, ray]
---
# Brain-MRI classifier

**Not a medical device.** For research; nothing it says supports a diagnosis. Out of scope: any use
on patients, other organs, other modalities, whole volumes.

- Input: one grey MRI slice. Output: calibrated probabilities of {classes}.
- Members: {members}
- {review}
- {cascade}
- {runtimes}
- Conformal prediction sets were set to hold each class in {level:.0%} of its scans of new families.
  {healthy}
  Both were set on validation scans that also chose the epoch.
- Trained on the dataset with digest `{dataset_digest}`. The recipe of each member with its seed,
  software versions and the bundle's id are in `bundle.json`. The licence of the weights is that of
  the initial weights and of the training scans: whoever shares them states it here.

{figures}
Limits: neighbouring slices of one patient may stand on both sides of the split where the scans
carry no patient id, so figures are upper bounds. Pictures that show no head are refused by their
pixels, and others unlike the training scans are marked for review; a scan of another modality may
pass. {pictures}
{groups} Heat maps show what moved an answer, not where a tumour is.
"""

_VALIDATION = """\
| on {num_scans} validation scans | |
|---|---|
| accuracy | {accuracy:.3f} |
| macro F1 | {macro_f1:.3f} |
| log loss | {log_loss:.3f} |
| answered without review | {answered:.3f} |

Calibration and the review rule were fitted on these same validation scans, so the figures are
optimistic. `bt evaluate` on test scans writes a card with those instead.
"""

_TESTED = (
    ("accuracy", "accuracy"),
    ("balanced_accuracy", "balanced accuracy"),
    ("macro_f1", "macro F1"),
    ("macro_auc", "macro AUC, one class against the rest"),
    ("log_loss", "log loss"),
    ("brier", "Brier score"),
    ("missed_tumor_rate", "missed tumours"),
    ("false_alarm_rate", "false alarms"),
)


def model_card(
    info: BundleInfo,
    figures: Mapping[str, Any] | None = None,
    tested: EvaluatedScans | None = None,
) -> str:
    """Return the card.

    Args:
        info: the bundle's facts.
        figures: of metrics.json; None gives those of validation.
        tested: what the figures are of.
    """
    members = "; ".join(
        f"{m.name} ({m.model.backbone}, {m.preprocess.size_px} px, initial weights "
        f"{info.provenance['members'][m.name]['initial_weights']})"
        for m in info.members
    )
    return _CARD.format(
        classes=", ".join(info.label_space.names),
        members=members,
        review=review_sentence(info.review),
        cascade=cascade_sentence(info),
        runtimes=runtimes_sentence(info),
        pictures=_pictures(info),
        level=info.review.conformal_level,
        healthy=healthy_sentence(info.review),
        dataset_digest=info.provenance["dataset_digest"][:16],
        groups=_groups(figures),
        figures=_VALIDATION.format(**info.metrics)
        if figures is None or tested is None
        else _tested(figures, tested),
    )


def review_sentence(review: ReviewInfo) -> str:
    """Return which answers are marked for review."""
    if review.min_confidence >= 1:
        return "Every answer is marked for review: no confidence was right often enough."
    return (
        f"Answers below a confidence of {review.min_confidence:.3f}, those with several classes in "
        "the prediction set, and those that do not exclude a tumour are marked for review."
    )


def cascade_sentence(info: BundleInfo) -> str:
    """Return when the first member answers alone."""
    cascade = info.cascade
    if cascade is None:
        return (
            "All members answer every scan."
            if len(info.members) == 1
            else "All members answer every scan: no confidence of the first was found safe."
        )
    return (
        f"{info.members[0].name} answers {cascade.answered_alone:.1%} of {cascade.num_scans} "
        f"validation scans alone; {cascade.agreement:.2%} of all answers are the ensemble's "
        f"({cascade.agreement_by_family:.2%} one per family; at least "
        f"{1 - cascade.max_disagreement:.1%} of new families' are to be, in expectation). Its own "
        "review rule, fitted as the ensemble's is, holds for these."
    )


def runtimes_sentence(info: BundleInfo) -> str:
    """Return how the members run, and how far that is from the reference."""
    measured = info.provenance.get("runtimes")
    if measured is None:
        return "All members run as eager PyTorch in float32, the reference."
    rates = []
    for name, chosen in measured["chosen"].items():
        of = {row["name"]: row for row in measured["members"][name]}
        faster = of[chosen]["images_per_second"] / of["torch fp32"]["images_per_second"]
        rates.append(f"{name} as {chosen} ({faster:.1f} times the reference's rate)")
    return (
        f"On a CPU like {measured['cpu']} members run: {'; '.join(rates)}. Of the ensemble's "
        f"labels on {measured['num_scans']} validation scans "
        f"{measured['ensemble']['label_flips']:.2%} differ from eager PyTorch's in float32, the "
        f"reference, and probabilities by at most {measured['ensemble']['max_change']:.4f}. "
        "A host that cannot run a member so runs the reference."
    )


def healthy_sentence(review: ReviewInfo) -> str:
    """Return above which probability a scan may be called free of a tumour."""
    missed = f"{review.max_missed_tumor_rate:.1%}"
    if review.healthy_above >= 1:
        return f"Too few scans to call any free of a tumour and miss at most {missed} of them."
    return (
        f"Of tumours of new families at most {missed} are to lie above {review.healthy_above:.3f} "
        "for none."
    )


def _pictures(info: BundleInfo) -> str:
    """Return what of the training scans' pixels the bundle holds."""
    if COPIES_FILE not in info.files and info.files:
        return "No picture of a training scan is in the bundle."
    return (
        "To tell copies of training scans the bundle holds a blurred picture of each, of some"
        "\n40 px (`bt ensemble --no-copies` leaves them out)."
    )


def _groups(figures: Mapping[str, Any] | None) -> str:
    """Return what is known of differences between sites and the like, as sentences."""
    slices = figures["slices"]["slices"] if figures else []
    known = [name for name in ATTRIBUTES if name in {one["column"] for one in slices}]
    if not known:
        return (
            "Nothing is known about differences between sites, scanners or groups of people, which"
            "\nthe sources do not name."
        )
    return (
        f"Figures by {', '.join(known)} are in the report. Nothing is known about differences"
        "\nbetween groups of people."
    )


def _tested(figures: Mapping[str, Any], tested: EvaluatedScans) -> str:
    clean = figures["clean"]
    whence = "another source" if tested.split_by == "external" else "the test split"
    unseen = (
        "none with a copy in training"
        if tested.copies_found
        else ("none trained on; copies were not looked for")
    )
    lines = [
        f"| on {clean['num_scans']} scans of {clean['num_families']} families of {whence} "
        f"(`{tested.digest[:16]}`), {unseen} | by scan | one per family |",
        "|---|---|---|",
    ]
    for key, title in _TESTED:
        cells = (interval_text(clean[unit][key]) for unit in ("by_scan", "by_family"))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines.append("\nIn brackets 95 % intervals, by draws of whole families.\n")
    if not tested.is_whole:
        lines.append("The source was cut short: scans are missing that nobody can count.\n")
    return "\n".join(lines)
