"""What the HTTP API answers."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from bt_core.models.bundle import CascadeInfo, ReviewInfo


class Prediction(BaseModel):
    """The answer for one scan; the fields of a score row."""

    scan_id: str = Field(description="First 20 digits of the content's SHA-256.")
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


class Refusal(BaseModel):
    """What stands in place of an answer among others, for a file that got none."""

    scan_id: str = Field(description="First 20 digits of the content's SHA-256.")
    content_sha256: str
    status: Literal["rejected", "failed"] = Field(
        description="`rejected`: whole, but not a scan that may be classified; `failed`: could not "
        "be read."
    )
    reason: str = Field(description="Reason code.")
    detail: str = Field(description="The reason in words.")
    bundle_id: str
    preprocess_digest: str


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


EXAMPLE_PREDICTION: dict[str, Any] = {
    "results": [
        {
            "scan_id": "5f2b0c6d9e1a4b7c8d3e",
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
