"""Seventeen points that a reviewer asks of an evaluation, each answered or said to be missing.

They gather CLAIM 2024, TRIPOD+AI (BMJ 2024;385:e078378), STARD-AI and Metrics Reloaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bt_core.evaluation.evaluated import EvaluatedScans
from bt_core.evaluation.intervals import interval_text
from bt_core.evaluation.model_card import cascade_sentence, healthy_sentence, review_sentence
from bt_core.evaluation.predictions import SLICE_COLUMNS
from bt_core.models.bundle import BundleInfo
from bt_core.scans.members import ATTRIBUTES


@dataclass(frozen=True)
class Point:
    """One point.

    Attributes:
        title: what is asked.
        answer: what is known, in words.
        missing: what is not, and why; empty if nothing.
    """

    title: str
    answer: str
    missing: str = ""


def checklist(
    figures: Mapping[str, Any], bundle: BundleInfo, tested: EvaluatedScans
) -> list[Point]:
    """Return the seventeen points, in order.

    Args:
        figures: of metrics.json, with clean ones.
        bundle: what was evaluated.
        tested: on what.
    """
    external = tested.split_by == "external"
    return [
        *_data_points(figures, bundle, tested),
        *_figure_points(figures, bundle),
        *_use_points(figures, external),
    ]


def _data_points(
    figures: Mapping[str, Any], bundle: BundleInfo, tested: EvaluatedScans
) -> list[Point]:
    clean, flow = figures["clean"], figures["flow"]
    counts = ", ".join(f"{_words(n)} {c}" for n, c in figures["all"]["counts"].items())
    left_out = ", ".join(f"{n} {_words(why)}" for why, n in tested.num_left_out.items()) or "none"
    outcomes = ", ".join(f"{_words(status)} {n}" for status, n in flow["by_status"].items())
    return [
        Point(
            "Intended use, users, out of scope, status",
            "Research only, not a medical device; one grey brain-MRI slice at a time. Out of "
            "scope: any use on patients, other organs and modalities, whole volumes.",
            "a contact and a licence of the weights, because the person who shares the bundle "
            "states them",
        ),
        Point(
            "Data: source, version, counts, partitions",
            f"{flow['num_scans']} test scans ({counts}), digest {tested.digest[:16]}; trained on "
            f"the dataset {str(bundle.provenance.get('dataset_digest', ''))[:16]}.",
            "dates and demographics, which are never read; sites, scanners and sequences, unless "
            "a list as source states them",
        ),
        Point(
            "Reference standard",
            "The class folder or list of the source. Pictures under several classes are left out.",
            "who labelled and how far they agree, because the sources do not say",
        ),
        Point(
            "Leakage control",
            f"{_apart(tested)} {figures['num_seen_in_training']} test scans stand "
            f"with a scan that was trained on; the headline is on the other {clean['num_scans']}.",
            "neighbouring slices of patients that the source does not name"
            + ("" if tested.copies_found else "; other copies of training scans: --trained-on"),
        ),
        Point(
            "Preprocessing, model, training, seeds, software",
            f"{_trained(bundle)}. Seeds, package versions and processors are in bundle.json.",
            "the tuning that led to the recipe, because a bundle does not know of it",
        ),
        Point(
            "Flow of scans",
            f"{flow['num_scans']} tested: {outcomes}. Left out before: {left_out}."
            + _worst_case(flow),
            "a worst case with what was left out before" if tested.num_left_out else "",
        ),
    ]


def _worst_case(flow: Mapping[str, Any]) -> str:
    """Return what the unanswered scans could change, as a sentence; empty where there are none."""
    worst = flow["worst_case"]
    if not worst["num_unanswered"]:
        return ""
    return (
        f" Were the {worst['num_unanswered']} without an answer wrong, the headline would be "
        f"{worst['accuracy']:.3f}."
    )


def _words(code: str) -> str:
    return code.replace("_", " ")


def _apart(tested: EvaluatedScans) -> str:
    """Return how the tested scans are kept apart from those trained on, as a sentence."""
    if tested.split_by == "family":
        return (
            "Copies under flips, rotations, re-encoding and resizing, and a named patient's scans, "
            "are on one side of the split."
        )
    if tested.split_by == "given":
        return "The split of the source is kept, and every figure is given twice."
    known = (
        "copies of training scans under flips, rotations, re-encoding and resizing"
        if tested.copies_found
        else "scans with the pixels of a training scan"
    )
    return f"Another source or dataset than the one trained with; {known} are known."


def _trained(bundle: BundleInfo) -> str:
    """Return what each member is and began with."""
    members = bundle.provenance.get("members", {})
    return "; ".join(
        f"{m.name}: {m.model.backbone} at {m.preprocess.size_px} px from "
        f"{members.get(m.name, {}).get('initial_weights', 'unknown weights')}, recipe "
        f"{members.get(m.name, {}).get('recipe', 'unknown')}"
        for m in bundle.members
    )


def _cascade_words(tested: Mapping[str, Any] | None, bundle: BundleInfo) -> str:
    """Return when the first member answers alone, and what that did to the tested scans."""
    fitted = cascade_sentence(bundle)
    if tested is None:
        return fitted
    return (
        f"These figures are the whole ensemble's. {fitted} Of the tested scans it would answer "
        f"{tested['answered_alone']:.1%} alone, and {tested['agreement']:.2%} of answers would be "
        f"the ensemble's; {tested['missed']} tumours would be called free of one without review, "
        f"and {tested['missed_by_ensemble']} are by the ensemble."
    )


def _figure_points(figures: Mapping[str, Any], bundle: BundleInfo) -> list[Point]:
    clean = figures["clean"]
    by_scan, sets = clean["by_scan"], clean["prediction_sets"]

    def shown(name: str) -> str:
        return interval_text(by_scan[name])

    return [
        Point(
            "Confusion matrix and figures per class, with intervals by patient or family",
            f"Balanced accuracy {shown('balanced_accuracy')}, macro AUC {shown('macro_auc')}, "
            f"Matthews' coefficient {shown('mcc')}; families are drawn 2,000 times."
            + (" Predictive values at the stated prevalence." if figures["prevalence"] else ""),
            ""
            if figures["prevalence"]
            else "predictive values at a prevalence, because none was stated; pass --prevalence",
        ),
        Point(
            "Calibration",
            f"Log loss {shown('log_loss')}, Brier score {shown('brier')}, expected calibration "
            f"error {interval_text(clean['calibration']['ece'])}, and "
            f"{interval_text(clean['calibration_before']['ece'])} before temperatures, which were "
            "fitted on validation scans; slope "
            f"{interval_text(clean['calibration']['slope'])} and intercept "
            f"{interval_text(clean['calibration']['intercept'])} of a tumour's log odds.",
        ),
        Point(
            "Decision curves",
            f"For {', '.join(_words(n) for n in clean['decision_curves'])}, against "
            "treating all and none, with bands by family.",
        ),
        Point(
            "Risk distributions and operating points",
            "A histogram of confidence for right and wrong answers. Thresholds were chosen on "
            "validation scans and are in the bundle. "
            f"{review_sentence(bundle.review)} {healthy_sentence(bundle.review)} "
            f"{_cascade_words(figures.get('cascade'), bundle)}",
        ),
        Point(
            "Uncertainty",
            f"Conformal sets hold the true class in {interval_text(sets['coverage']['by_family'])} "
            f"by family, with {sets['mean_size']:.2f} classes on mean, and are counted for each "
            "class; a curve of risk over coverage.",
        ),
    ]


def _use_points(figures: Mapping[str, Any], external: bool) -> list[Point]:
    worst, robust = figures["slices"]["worst"], figures.get("robustness")
    sliced = {one["column"] for one in figures["slices"]["slices"]}
    unknown = [name for name in ATTRIBUTES if name not in sliced]
    maps = figures.get("explanations")
    deep = "it was not measured; leave out --no-depth"
    return [
        Point(
            "Subgroups",
            f"Columns of the catalog, corrected for their number. Lowest accuracy: "
            f"{SLICE_COLUMNS[worst['column']]} {worst['value']}, "
            f"{worst['accuracy']['value']:.3f}"
            f"{', below the others beyond chance' if worst['below_others'] else ''}."
            if worst
            else "",
            "age, sex and tumour size, which are never read"
            + (f"; {', '.join(unknown)}, unless a list as source gives several" if unknown else ""),
        ),
        Point(
            "External test, robustness, other inputs",
            ("This is one: another source or dataset than the one trained with. " * external)
            + (
                "Curves under noise, blur, bias field, contrast, rotation, crop, JPEG and "
                "resolution."
                if robust
                else ""
            ),
            ("" if robust else f"robustness: {deep}; ")
            + ("" if external else "an external test: give --data a labelled archive; ")
            + "scans that are no brain MRI",
        ),
        _comparison(figures, deep),
        Point(
            "Failure analysis",
            "The surest wrong answers of each class, with maps." if maps else "",
            "" if maps else f"pictures of failures: {deep}",
        ),
        Point(
            "Explanations, checked",
            f"Heat maps; sanity check {'passed' if maps['passes'] else 'NOT passed'}. They show "
            "what moved the answer, not where a tumour is."
            if maps
            else "",
            "" if maps else f"heat maps: {deep}",
        ),
        Point(
            "Fairness, privacy, limits, updates",
            "No header value of a scan leaves it but technical ones; patients only as keyed "
            "hashes. The model card has the limits; bundle.json the digests.",
            "a fairness statement, because the sources name no groups of people; a plan for "
            "updates, because the person who uses the model makes it",
        ),
    ]


def _comparison(figures: Mapping[str, Any], deep: str) -> Point:
    """Return the point on baselines; `deep` says how to get what was not measured."""
    answers, missing = [], []
    if figures["members"]:
        answers.append("Members against their ensemble by exchanging answers on whole families.")
    else:
        missing.append("one model only; bt compare holds several side by side")
    probed = figures.get("shortcuts")
    if probed and probed["features"]:
        blind = [f for f in probed["features"].values() if f["blind"]]
        best = max(blind, key=lambda f: float(f["balanced_accuracy"]))
        thumbnail = probed["features"]["thumbnail"]["balanced_accuracy"]
        own = interval_text(figures["clean"]["by_scan"]["balanced_accuracy"])
        answers.append(
            f"Balanced accuracy {own}; a regression on thumbnails has {thumbnail:.3f}, one on "
            f"{best['title']}, which cannot see where a tumour is, {best['balanced_accuracy']:.3f}."
        )
    elif probed:
        missing.append(probed["verdict"]["sentence"].rstrip("."))
    else:
        missing.append(f"regressions on simple features: {deep}")
    return Point("Comparison", " ".join(answers), "; ".join(missing))
