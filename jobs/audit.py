"""`bt audit`: which scans of a source are copies of one another, and what that spoils."""

from bt_core import storage
from bt_core.errors import EXIT_INCOMPLETE, EXIT_OK, UsageError
from jobs.command import say_if_random
from jobs.options import OutOption, OverwriteOption, SourceArgument, TaskOption
from jobs.output_folders import output_folder


def run(
    source: SourceArgument,
    out: OutOption = "runs/audit",
    task: TaskOption = None,
    overwrite: OverwriteOption = False,
) -> int:
    """Find exact, mirrored, rotated, re-encoded and resized copies; write audit.html and .json.

    docket.csv lists the label conflicts for a person to settle, copies.parquet the pairs. Exit code
    3 says that some files could not be read, or that the source is cut short.
    """
    from bt_core.scans.archives import list_scans
    from bt_core.scans.identity import hash_key

    out = output_folder(out, source)
    if storage.exists(storage.join(out, "audit.json")) and not overwrite:
        raise UsageError(f"{out} holds an audit; choose another -o, or pass --overwrite")
    key, key_is_kept = hash_key()
    listing = list_scans(source, key)  # a wrong path is answered before Ray is imported
    from bt_core.data import audit, copies
    from bt_core.data.catalog import label_refs_if_known
    from bt_core.data.decode_stage import REF_COLUMNS
    from bt_core.data.families import FamilyStage
    from bt_core.data.pipeline import decode_pixels, survey
    from cluster.session import session

    if copies.has_decisions(storage.join(out, "docket.csv")):
        raise UsageError(f"{out}/docket.csv holds decisions; keep it, and choose another -o")
    refs = label_refs_if_known(listing.refs, task)
    with session():
        catalog, pairs = survey(refs, FamilyStage(key))
        catalog = copies.add_families(catalog, pairs)
        conflicts = copies.find_conflicts(catalog, pairs)
        chosen = audit.choose_pairs(catalog, pairs, conflicts)
        shown_refs = catalog.select(list(REF_COLUMNS)).take(audit.rows_of(pairs, chosen))
        pixels = decode_pixels(shown_refs, audit.PICTURE)
    figures = audit.audit_figures(catalog, pairs, conflicts, listing.skipped)
    shown = audit.draw_pairs(catalog, pairs, chosen, pixels)
    page = audit.audit_page(figures, storage.absolute(source), shown)
    storage.write_table(storage.join(out, "copies.parquet"), copies.pairs_table(catalog, pairs))
    storage.write_bytes(storage.join(out, "docket.csv"), copies.docket_csv(catalog, conflicts))
    storage.write_bytes(storage.join(out, "audit.html"), page)
    storage.write_json(storage.join(out, "audit.json"), figures)
    print(audit.audit_text(figures))
    say_if_random(key_is_kept, catalog["patient"])
    if conflicts:
        docket = storage.join(out, "docket.csv")
        print(f"fill in the column decision of {docket}, then bt prepare --resolve {docket}")
    print(f"audit in {storage.join(out, 'audit.html')}")
    is_whole = listing.is_whole and figures["num_readable"] == figures["num_scans"]
    return EXIT_OK if is_whole else EXIT_INCOMPLETE


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("audit")
