"""What the HTTP API answers."""

from datetime import datetime
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from bt_core.models.bundle import CascadeInfo, ReviewInfo

_PICTURE: Final = (
    "The slice as it was decoded, its longest side 512 px at most, as grey PNG in base64; if it "
    "was asked for."
)


class Prediction(BaseModel):
    """The answer for one scan; the fields of a score row."""

    content_sha256: str
    status: Literal["scored", "deferred"] = Field(
        description="`deferred` means: a person should look, for the stated reason."
    )
    reason: str = Field(description="Reason code, empty for `scored`.")
    predicted_label: str
    confidence: float = Field(ge=0, le=1, description="Calibrated probability of the label.")
    probabilities: dict[str, float]
    entropy: float = Field(ge=0, description="Of the probabilities, in nats.")
    frame_index: int = Field(description="The slice that was classified, from 0.")
    num_frames: int = Field(description="Slices of the scan; one of several is always `deferred`.")
    prediction_set: list[str] = Field(
        description="Classes that hold the truth at the bundle's conformal level."
    )
    members_used: list[str] = Field(description="Not all, where the first alone is as safe.")
    runtimes: list[str] = Field(description="What each of these ran as.")
    seen_in_training: bool = Field(description="It, or a copy of it, trained or chose the members.")
    nearest_family: str | None = Field(description="Family of training scans that it copies.")
    nearest_correlation: float | None = Field(description="With the most alike training scan.")
    distance: float | None = Field(
        description="From the training scans; about 1 for scans like them."
    )
    bundle_id: str
    preprocess_digest: str
    picture: str | None = Field(None, description=_PICTURE)


class Explanation(Prediction):
    """A prediction with what moved it: a heat map shows that, not where a tumour is."""

    picture: str = Field(description=_PICTURE)
    heat: str = Field(
        description="Of the size of `picture`, as PNG in base64: 255 is the hottest place."
    )
    method: str = Field(description="`grad_cam`, `attention_rollout`, or both of several members.")
    heat_members: list[str] = Field(description="Members whose maps this one is the mean of.")
    members: dict[str, dict[str, float]] = Field(
        description="Class probabilities of each member by itself."
    )
    figures: dict[str, float | None] = Field(
        description="What the map is worth, each in [0, 1], agreement in [-1, 1]; null where it "
        "cannot be told. `outside_head`: share of the heat outside the head. `mirror_agreement`: "
        "with the map of the mirrored scan. `deletion` and `insertion`: how soon the class's "
        "probability goes and comes with the hottest places first; small and large for a good map. "
        "`randomised_similarity`: with the map of shuffled weights; small for a good map."
    )


class Refusal(BaseModel):
    """What stands in place of an answer among others, for a file that got none."""

    content_sha256: str
    status: Literal["rejected", "failed"] = Field(
        description="`rejected`: whole, but not a scan that may be classified; `failed`: could not "
        "be read."
    )
    reason: str = Field(description="Reason code.")
    detail: str = Field(description="The reason in words.")
    bundle_id: str
    preprocess_digest: str
    picture: str | None = Field(None, description=_PICTURE)


class Predictions(BaseModel):
    """Results in the order of the files."""

    results: list[Prediction | Refusal]


class ModelDescription(BaseModel):
    """The bundle that answers."""

    bundle_id: str
    task: str
    labels: list[str]
    members: list[dict[str, Any]]
    review: ReviewInfo
    cascade: CascadeInfo | None = Field(description="When the first member may answer alone.")
    validation_metrics: dict[str, Any]
    provenance: dict[str, Any]
    notice: str = "For research. Not a medical device."


class Problem(BaseModel):
    """RFC 9457 problem details; `code` is a reason code of this project."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    error: str = Field(description="The detail again, for Open Inference Protocol clients.")


class ScoringRequest(BaseModel):
    """What to score, and where to write it."""

    model_config = ConfigDict(extra="forbid")

    source: str = Field(
        min_length=1,
        max_length=2048,
        description="Folder, archive or scan, as an absolute path or URI that the operator allows.",
        examples=["/data/incoming/2026-11.zip"],
    )
    output: str = Field(
        min_length=1,
        max_length=2048,
        description="Folder to write, as an absolute path or URI that the operator allows.",
        examples=["/data/scores/2026-11"],
    )
    cascade: bool = Field(
        True, description="Let the first member answer alone where the bundle says it is safe."
    )
    dicom: Literal["sr", "sc"] | None = Field(
        None,
        description="Also write a structured report, or a picture, for each DICOM scan; these name "
        "the patient.",
    )
    overwrite: bool = Field(False, description="Replace scores that lie in the output folder.")


class ScoringSummary(BaseModel):
    """Counts of a finished job; each scan has one status."""

    n_in: int = Field(description="Scans of the source.")
    scored: int
    deferred: int
    rejected: int
    failed: int
    reasons: dict[str, int] = Field(description="How many scans had each reason code.")
    is_whole: bool = Field(description="The source was not cut short.")
    bundle_id: str
    attempts: int = Field(description="Jobs that it took, with those that were stopped before.")
    scans_per_second: float


class ScoringJob(ScoringRequest):
    """A scoring job; its locations are written as the client sent them."""

    id: str
    state: Literal["queued", "running", "succeeded", "incomplete", "failed", "cancelled"]
    message: str = Field(description="The state in words.")
    created_at: datetime
    ended_at: datetime | None = None
    summary: ScoringSummary | None = Field(
        None, description="When it has finished, and its output has not been replaced since."
    )


class ScoringJobs(BaseModel):
    """Jobs of the one who asks, the newest first."""

    jobs: list[ScoringJob]


EXAMPLE_PREDICTION: dict[str, Any] = {
    "results": [
        {
            "content_sha256": "5f2b0c6d9e1a4b7c8d3e" + "0" * 44,
            "status": "scored",
            "reason": "",
            "predicted_label": "meningioma",
            "confidence": 0.97,
            "probabilities": {
                "glioma": 0.02,
                "meningioma": 0.97,
                "no_tumor": 0.005,
                "pituitary": 0.005,
            },
            "entropy": 0.16,
            "frame_index": 0,
            "num_frames": 1,
            "prediction_set": ["meningioma"],
            "members_used": ["mobilenetv2"],
            "runtimes": ["openvino fp32"],
            "seen_in_training": False,
            "nearest_family": None,
            "nearest_correlation": 0.71,
            "distance": 0.98,
            "bundle_id": "0123456789abcdef",
            "preprocess_digest": "0" * 64,
        }
    ]
}

EXAMPLE_EXPLANATION: dict[str, Any] = {
    **EXAMPLE_PREDICTION["results"][0],
    "picture": "iVBORw0KGgo=",
    "heat": "iVBORw0KGgo=",
    "method": "grad_cam",
    "heat_members": ["mobilenetv2"],
    "members": {"mobilenetv2": EXAMPLE_PREDICTION["results"][0]["probabilities"]},
    "figures": {
        "outside_head": 0.03,
        "mirror_agreement": 0.9,
        "deletion": 0.4,
        "insertion": 0.8,
        "randomised_similarity": 0.1,
    },
}
