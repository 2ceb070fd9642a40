"""A bundle: an ensemble as a folder of safetensors and JSON, each file with its digest. No pickle.

::

    bundle.json                      BundleInfo; its bundle_id covers all that decides an answer
    members/<name>/config.json       the resolved ModelSpec and PreprocessSpec
    members/<name>/model.safetensors
    members/<name>/openvino*.{xml,bin}  the member as a graph, where bt optimise chose OpenVINO
    training_index.safetensors       which pixels were trained on
    training_copies.safetensors      what tells copies of them (`models.training_index`), if known
    far.safetensors                  what tells scans unlike them (`ensemble.far`), if known
    MODEL_CARD.md                    for people; gets the test figures when it is evaluated
"""

from typing import Any, Final, Literal

import numpy as np
import safetensors.numpy
import safetensors.torch
from pydantic import Field
from safetensors import SafetensorError

from bt_core import storage
from bt_core.config import StrictModel, parse
from bt_core.errors import BundleError, ConfigError
from bt_core.labels import LabelSpace
from bt_core.models.classifier import Classifier, rebuild_classifier
from bt_core.models.spec import ModelSpec
from bt_core.scans.preprocess import PreprocessSpec

FORMAT_VERSION = 2
INDEX_FILE = "training_index.safetensors"
COPIES_FILE = "training_copies.safetensors"
FAR_FILE = "far.safetensors"
EXPORTS: Final = ("openvino.xml", "openvino.bin")
"""Names of a member's exported graph and weights, for fp32 and bf16."""
INT8_EXPORTS: Final = ("openvino_int8.xml", "openvino_int8.bin")
"""Those of the one in int8."""


class RuntimeInfo(StrictModel):
    """How a member is run."""

    kind: Literal["torch", "compiled", "openvino"] = "torch"
    precision: Literal["fp32", "bf16", "int8"] = "fp32"
    batch_size: int = Field(4, ge=1)
    """Scans of each forward pass on a CPU."""
    max_change: float = Field(1.0, ge=0, le=1)
    """By how much probabilities may differ from the reference's. A host where those of the golden
    picture differ by more runs the reference."""
    exact_below: float = Field(0.0, ge=0, le=1)
    """Confidence, by softmax of the logits as they are, below which a scan is answered once more in
    float32, and that answer counts."""

    @property
    def exports(self) -> tuple[str, ...]:
        """Names of the exported files that it needs."""
        if self.kind != "openvino":
            return ()
        if self.precision != "int8":
            return EXPORTS
        return INT8_EXPORTS + (EXPORTS if self.exact_below else ())


class MemberInfo(StrictModel):
    """One classifier of the ensemble."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    model: ModelSpec
    preprocess: PreprocessSpec
    golden_digest: str
    """SHA-256 of the preprocessed golden image; a host that computes another one may not score."""
    weight: float = Field(ge=0, le=1)
    """Share in the averaged probabilities; the weights of all members sum to 1."""
    temperature: float = Field(gt=0)
    """Divides this member's logits before the softmax."""
    golden_probs: tuple[tuple[float, ...], ...] = ()
    """The reference's probabilities of the golden picture in four positions, where it was built. A
    host on which they come out otherwise may not score."""
    runtime: RuntimeInfo = RuntimeInfo()


class ReviewInfo(StrictModel):
    """When an answer goes to a person. Fitted on validation scans."""

    min_confidence: float = Field(ge=0, le=1)
    """Calibrated confidence below which a scan is deferred."""
    target_accuracy: float
    """Accuracy on the answered validation scans that `min_confidence` was chosen for."""
    conformal_level: float
    """Share of the scans of each class whose prediction set holds it."""
    conformal_min_probs: dict[str, float]
    """Probability of each class from which it is in the prediction set."""
    max_missed_tumor_rate: float
    """Share of tumours that `healthy_above` lets pass, at most."""
    healthy_above: float = Field(ge=0, le=1)
    """Probability of no tumour above which a scan may be called free of one."""


class SubsetInfo(StrictModel):
    """The calibration of some of the members, for when the others cannot answer."""

    members: tuple[str, ...]
    temperature: float = Field(gt=0)
    """As in `BundleInfo`, of these members alone; their weights are scaled to sum to 1."""
    review: ReviewInfo


class CascadeInfo(StrictModel):
    """When the first member, the cheapest one, answers alone. Fitted on validation scans."""

    min_confidence: dict[str, float]
    """By the class that it answers: its own calibrated confidence from which its answer stands,
    if it needs no review."""
    max_disagreement: float
    """Share of answers of new families that differ from the ensemble's, in expectation, at most."""
    agreement: float
    """Share of the validation scans with the ensemble's class and need for review."""
    agreement_by_family: float
    """The same, families counted once."""
    answered_alone: float
    """Share of them that the first member answered."""
    num_scans: int
    num_families: int


class DriftInfo(StrictModel):
    """How the validation scans are distributed, by quantity.

    These are `confidence`, the calibrated one of the answer, and `intensity`, the mean grey of the
    thumbnail (0 to 255).
    """

    edges: dict[str, tuple[float, ...]]
    """Inner edges of the bins; a value on an edge is in the bin below it."""
    shares: dict[str, tuple[float, ...]]
    """Of the validation scans in each bin."""


class BundleInfo(StrictModel):
    """Content of `bundle.json`."""

    format_version: int = FORMAT_VERSION
    bundle_id: str = ""
    """First 16 digits of the digest of everything else in this file, and so of the whole bundle."""
    label_space: LabelSpace
    members: tuple[MemberInfo, ...] = Field(min_length=1)
    temperature: float = Field(gt=0)
    """Applied to the logarithm of the averaged probabilities."""
    review: ReviewInfo
    quorum: int | None = Field(None, ge=1)
    """How many members must answer at least; None asks for all."""
    subsets: tuple[SubsetInfo, ...] = ()
    """Calibrations of every subset that the quorum allows, and of the first member."""
    cascade: CascadeInfo | None = None
    drift: DriftInfo | None = None
    metrics: dict[str, Any]
    """Figures on the validation scans that calibration and review were fitted on."""
    provenance: dict[str, Any]
    files: dict[str, str] = Field(default_factory=dict)
    """Path inside the bundle to SHA-256: of every file but this one and the model card, which
    decides no answer and is written anew when the bundle is evaluated."""

    @property
    def least_members(self) -> int:
        """How many members must answer at least."""
        return len(self.members) if self.quorum is None else self.quorum

    def digest(self) -> str:
        """Return what `bundle_id` must be."""
        return _digest(self.model_dump(mode="json"))


class Bundle:
    """A bundle on disk, verified when opened.

    Members whose files are missing or damaged are left out, as far as the quorum allows it.

    Raises:
        BundleError: if a file that all need, or those of too many members, are missing or differ
            from their digests, or the format is unknown.
    """

    def __init__(self, location: str) -> None:
        self.location = storage.absolute(location)
        self.info = self._read_info()
        self.unusable: dict[str, str] = {}
        """Members that cannot answer, with the reason."""
        for path, digest in self.info.files.items():
            try:
                self._check(path, digest)
            except BundleError as error:
                self.leave_out(path.split("/")[1] if path.startswith("members/") else "", error)

    def leave_out(self, member: str, error: BundleError) -> None:
        """Go on without a member.

        Raises:
            BundleError: the given one, if too few would be left.
        """
        self.unusable.setdefault(member, str(error))
        if not member or len(self.usable()) < self.info.least_members:
            raise error

    def usable(self) -> tuple[MemberInfo, ...]:
        """Return the members that can answer, in the bundle's order."""
        return tuple(m for m in self.info.members if m.name not in self.unusable)

    def _check(self, path: str, digest: str) -> None:
        if storage.sha256(self.read(path)) != digest:
            raise BundleError(
                f"{self.location}: {path} differs from its digest in bundle.json; it was changed "
                "or damaged: copy it again, or build it again with bt ensemble"
            )

    def load_member(self, member: MemberInfo) -> Classifier:
        """Return one member's classifier in evaluation mode, on the CPU.

        Raises:
            BundleError: if the weights do not fit the stated architecture.
        """
        path = f"members/{member.name}/model.safetensors"
        classifier = rebuild_classifier(
            member.model, member.preprocess, self.info.label_space.num_classes
        )
        try:
            classifier.load_state_dict(safetensors.torch.load(self.read(path)))
        except (SafetensorError, RuntimeError) as error:
            raise BundleError(
                f"{self.location}: {path} does not fit its config: {error}"
            ) from error
        return classifier.eval()

    def training_index(self) -> frozenset[int]:
        """Return the index keys (see `index_key`) of all scans that were trained on."""
        keys = safetensors.numpy.load(self.read(INDEX_FILE))["keys"]
        return frozenset(keys.tolist())

    def arrays(self, path: str) -> dict[str, np.ndarray] | None:
        """Return the arrays of a file; None if the bundle was made without it."""
        if path not in self.info.files:
            return None
        found: dict[str, np.ndarray] = safetensors.numpy.load(self.read(path))
        return found

    def read(self, path: str) -> bytes:
        """Return the content of one of the bundle's files.

        Raises:
            BundleError: if it is missing.
        """
        try:
            return storage.read_bytes(storage.join(self.location, path))
        except FileNotFoundError as error:
            raise BundleError(
                f"{self.location}: {path} is missing; copy the whole folder, or build it again "
                "with bt ensemble"
            ) from error

    def _read_info(self) -> BundleInfo:
        where = storage.join(self.location, "bundle.json")
        if not storage.is_dir(self.location):
            raise BundleError(f"{self.location} is not a bundle folder; make one with bt ensemble")
        try:
            content = storage.loads_json(self.read("bundle.json"))
            version = content.get("format_version")
            if version == FORMAT_VERSION:
                info = parse(BundleInfo, content, where)
        except (ValueError, AttributeError, ConfigError) as error:
            raise BundleError(f"{where} cannot be understood: {error}") from error
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{where} has format {version}; this version reads {FORMAT_VERSION}: make it again "
                "with bt ensemble, or use the version of bt that it names"
            )
        # Of the file as it is: settings that came later have their defaults in `info`.
        if _digest(content) != info.bundle_id:
            raise BundleError(f"{where} was changed: its content does not give {info.bundle_id}")
        return info


def _digest(content: dict[str, Any]) -> str:
    return storage.digest_of({k: v for k, v in content.items() if k != "bundle_id"})[:16]


def index_key(pixel_sha256: str) -> int:
    """Return a pixel digest's first 60 bits, the scan's key in the training index."""
    return int(pixel_sha256[:15], 16)
