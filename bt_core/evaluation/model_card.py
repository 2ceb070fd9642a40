"""The model card of a bundle, in Markdown with the front matter that model hubs read."""

from bt_core.models.bundle import BundleInfo

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
- Answers below a confidence of {min_confidence:.3f} are marked for review.
- Trained on the dataset with digest `{dataset_digest}`; software versions and the bundle's id are
  in `bundle.json`.

| on {num_scans} validation scans | |
|---|---|
| accuracy | {accuracy:.3f} |
| macro F1 | {macro_f1:.3f} |
| log loss | {log_loss:.3f} |
| answered without review | {answered:.3f} |

Calibration and the review rule were fitted on these same validation scans, so the figures are
optimistic. Use the report of `bt evaluate` on test scans instead. Neighbouring slices of one
patient may stand on both sides of the split where the scans carry no patient id.
"""


def model_card(info: BundleInfo) -> str:
    """Return the card."""
    members = "; ".join(
        f"{m.name} ({m.model.backbone}, {m.preprocess.size_px} px, initial weights "
        f"{info.provenance['members'][m.name]['initial_weights']})"
        for m in info.members
    )
    return _CARD.format(
        classes=", ".join(info.label_space.names),
        members=members,
        min_confidence=info.review.min_confidence,
        dataset_digest=info.provenance["dataset_digest"][:16],
        **{
            k: info.metrics[k]
            for k in ("num_scans", "accuracy", "macro_f1", "log_loss", "answered")
        },
    )
