"""The leaderboard of a sweep: trials with ranks, ties and reasons, as table, page and recipe."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import yaml
from scipy.special import softmax

from bt_core.data.explore import ALPHA
from bt_core.training.engine import SCORE
from bt_core.training.noise import Counts, count, family_accuracy, ranks
from bt_core.training.sweep import MODES, SweepSpec
from bt_core.training.trial import TrialRecord

Row = dict[str, Any]
_FIGURES: Final = (SCORE, "val_accuracy", "val_macro_f1", "val_log_loss")
_BY_FAMILY: Final = ("family_accuracy", "family_accuracy_low", "family_accuracy_high")
TOGETHER: Final = ("seeds_together", "seeds_together_low", "seeds_together_high")
_ORDER: Final = {"finished": 0, "stopped": 1, "running": 2, "failed": 3}


def leaderboard(
    records: Sequence[TrialRecord],
    predictions: dict[str, pa.Table],
    group_of: dict[str, str],
    spec: SweepSpec,
) -> list[Row]:
    """Return one row for each trial, the best first.

    Finished trials have a rank, and `tied` says that the leader is not better beyond the noise
    (see `noise`). Behind them come those that were stopped, by how far they got, then those that
    failed.

    Args:
        records: of all trials.
        predictions: trial id to validation predictions, of the finished trials.
        group_of: scan id to the group (family of copies, or patient) that counts once.
        spec: the sweep.
    """
    sign = 1 if MODES[spec.metric] == "max" else -1
    rows = [_row(record, spec) for record in records]
    finished = [record for record in records if record.status == "finished"]
    if finished:
        scores_MJ = np.array([[one.kept()[spec.metric] for one in r.fits] for r in finished])
        counts = _counts([predictions[record.trial_id] for record in finished], group_of)
        found, p_values = ranks(counts, scores_MJ, spec.metric, spec.folds, sign > 0)
        by_id = {row["trial_id"]: row for row in rows}
        judged = zip(finished, found, p_values, scores_MJ, counts, strict=True)
        for record, rank, p, scores, own in judged:
            spread = float(scores.std(ddof=1)) if len(scores) > 1 else None
            by_id[record.trial_id].update(
                rank=rank, tied=p >= ALPHA, p_against_leader=p, spread=spread
            )
            by_id[record.trial_id] |= zip(_BY_FAMILY, family_accuracy(own), strict=True)
            if len(spec.seeds) > 1:
                [joint] = _counts([_seeds_together(predictions[record.trial_id])], group_of)
                by_id[record.trial_id] |= zip(TOGETHER, family_accuracy(joint), strict=True)

    def place_of(row: Row) -> tuple[Any, ...]:
        score = row["score"]
        trained = row["num_fits"] if row["status"] == "stopped" else 0
        return _ORDER[row["status"]], -trained, -sign * score if score is not None else np.inf

    return sorted(rows, key=place_of)


def _counts(tables: Sequence[pa.Table], group_of: dict[str, str]) -> list[Counts]:
    """Add up each model's predictions by group; all models have predicted the same scans."""
    validated = {group_of[i] for i in tables[0]["scan_id"].to_pylist()}
    place = {group: i for i, group in enumerate(sorted(validated))}
    found = []
    for table in tables:
        family_N = np.array([place[group_of[i]] for i in table["scan_id"].to_pylist()])
        logits_NK = np.array(table["logits"].to_pylist())
        found.append(count(table["label"].to_numpy(), logits_NK, family_N, len(place)))
    return found


def _seeds_together(table: pa.Table) -> pa.Table:
    """Return one row for each scan: what an ensemble of the seeds, of equal weights, answers."""
    ids, place_N = np.unique(np.array(table["scan_id"].to_pylist()), return_inverse=True)
    probs_NK = softmax(np.array(table["logits"].to_pylist(), dtype=np.float64), axis=1)
    sum_UK = np.zeros((len(ids), probs_NK.shape[1]))
    np.add.at(sum_UK, place_N, probs_NK)
    label_U = np.zeros(len(ids), dtype=int)
    label_U[place_N] = table["label"].to_numpy()
    logits = np.log(np.maximum(sum_UK, 1e-300)).tolist()
    return pa.table({"scan_id": ids.tolist(), "label": label_U, "logits": logits})


def _row(record: TrialRecord, spec: SweepSpec) -> Row:
    row: Row = {
        "rank": None,
        "tied": None,
        "trial_id": record.trial_id,
        "recipe": record.recipe.get("name", ""),
        "score": record.mean(spec.metric),
        "spread": None,
        "p_against_leader": None,
        **{name: record.mean(name) for name in _FIGURES},
        **dict.fromkeys((*_BY_FAMILY, *(TOGETHER if len(spec.seeds) > 1 else ()))),
        "keep": str(record.recipe.get("train", {}).get("keep", "best")),
        "status": record.status,
        "reason": record.reason,
        "initial_weights": str(record.recipe.get("model", {}).get("weights", "")).split(":")[0],
        "num_fits": sum(bool(one.epochs) for one in record.fits),
        "num_epochs": record.num_epochs,
        "seconds": record.seconds,
        "notes": "; ".join(record.notes),
    }
    return row | {key: _plain(record.point.get(key)) for key in spec.space}


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else str(value)


def to_table(rows: Sequence[Row], space: Sequence[str]) -> pa.Table:
    """Return the leaderboard for Parquet; a searched key of mixed types becomes text."""
    columns: dict[str, Any] = {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        if name in space and len({type(v) for v in values if v is not None}) > 1:
            numbers = all(type(v) in (int, float) for v in values if v is not None)
            convert = float if numbers else str
            values = [None if v is None else convert(v) for v in values]
        columns[name] = values
    return pa.table(columns)


def text_table(rows: Sequence[Row], spec: SweepSpec) -> str:
    """Return the leaderboard as lines for a terminal; `=` marks models tied with the leader."""
    head = ["rank", "trial", "recipe", *spec.space, spec.metric, "spread", "one per family"]
    several = len(spec.seeds) > 1
    head += [*(["seeds together"] if several else []), "epochs", "outcome"]
    body = [
        [
            f"{'=' if row['tied'] and not alone(rows) else ''}{row['rank'] or '-'}",
            row["trial_id"],
            row["recipe"],
            *(short(row[key]) for key in spec.space),
            short(row["score"], 4),
            short(row["spread"], 4),
            by_family(row),
            *([by_family(row, TOGETHER)] if several else []),
            str(row["num_epochs"]),
            "; ".join(part for part in (row["status"], row["reason"], row["notes"]) if part),
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
             for line in [head, *body]]  # fmt: skip
    return "\n".join([*lines, "", noise_note(rows, spec)])


def alone(rows: Sequence[Row]) -> bool:
    """Return whether no model is tied with the leader."""
    return sum(bool(row["tied"]) for row in rows) < 2


def noise_note(rows: Sequence[Row], spec: SweepSpec) -> str:
    """Return in words what the ranks rest on."""
    tied = sum(bool(row["tied"]) for row in rows)
    if not tied:
        return "no trial was finished"
    if sum(row["rank"] is not None for row in rows) < 2:
        return "one model was finished, so there is nothing to compare it with"
    first = (
        f"{tied} models are tied (=): none differs from the first by more than the noise"
        if tied > 1
        else "the first differs from every other finished model by more than the noise"
    )
    noise = f"of scans (by family) and of training ({spec.folds} folds x {len(spec.seeds)} seeds)"
    if len(spec.fits) == 1:
        noise = "of scans (by family); one training each does not show the noise of training"
    return f"{first} {noise}; Holm-corrected, {ALPHA:g}{_chosen_on(rows)}"


def _chosen_on(rows: Sequence[Row]) -> str:
    """Return that figures are too good where the validation scans chose the epoch."""
    if all(row["keep"] == "last" for row in rows):
        return ""
    return "; the scans behind these figures also chose each training's epoch (train.keep: best)"


def by_family(row: Row, names: Sequence[str] = _BY_FAMILY) -> str:
    """Return the accuracy over one scan per family with its interval, or a dash."""
    accuracy, low, high = (row.get(name) for name in names)
    return "-" if accuracy is None else f"{accuracy:.3f} [{low:.3f}, {high:.3f}]"


def short(value: Any, digits: int = 0) -> str:
    """Return a value for a table cell: numbers with 3 significant digits, or `digits` decimals."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.{digits}f}" if digits else f"{value:.3g}"
    return str(value)


def best_recipe_yaml(record: TrialRecord, rows: Sequence[Row], spec: SweepSpec) -> bytes:
    """Return the leading trial's recipe as YAML for `bt train --recipe`."""
    others = [row["trial_id"] for row in rows if row["tied"] and row["trial_id"] != record.trial_id]
    score = record.mean(spec.metric)
    header = [
        f"# Trial {record.trial_id} of a sweep: the best mean {spec.metric}, {score:.4f} on",
        f"#   validation scans over {spec.folds} folds x {len(spec.seeds)} seeds. Not a figure for",
        "#   new scans: it was chosen by it.",
        f"# Tied with it: {', '.join(others) or 'none'}.",
    ]
    if spec.epochs is not None:
        header.append(f"# train.epochs is the sweep's {spec.epochs}; the recipe's own may be more.")
    body = yaml.safe_dump(record.recipe, sort_keys=False, allow_unicode=True)
    return ("\n".join(header) + "\n" + body).encode()
