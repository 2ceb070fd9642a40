"""The `bt` command: one subcommand per job module. Heavy imports wait until a job runs."""

import os
import sys
from collections.abc import Sequence

import typer

from bt_core.errors import UsageError
from cluster.token import use_token
from jobs import (
    audit,
    bench,
    bench_data,
    bench_figures,
    bench_pipeline,
    bench_score,
    bench_serve,
    cluster,
    compare,
    demo,
    ensemble,
    evaluate,
    explain,
    explore,
    jobs,
    keys,
    optimise,
    phantom,
    prepare,
    recipes,
    replay,
    report,
    score,
    serve,
    train,
    tune,
    weights,
)
from jobs.command import command

app = typer.Typer(
    name="bt",
    help="Train, evaluate and serve classifiers of brain-MRI scans on Ray. Not a medical device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench_app = typer.Typer(help="Measure, against plain loops in the same run where there are any.")

for _name, _module in {
    "demo": demo,
    "phantom": phantom,
    "audit": audit,
    "explore": explore,
    "prepare": prepare,
    "train": train,
    "tune": tune,
    "replay": replay,
    "ensemble": ensemble,
    "optimise": optimise,
    "evaluate": evaluate,
    "report": report,
    "compare": compare,
    "explain": explain,
    "score": score,
    "serve": serve,
}.items():
    app.command(_name)(command(_name, _module.run))
bench_app.command("train")(command("bench train", bench.run_train))
bench_app.command("score")(command("bench score", bench_score.run_score))
bench_app.command("audit")(command("bench audit", bench_data.run_audit))
bench_app.command("figures")(command("bench figures", bench_figures.run_figures))
bench_app.command("serve")(command("bench serve", bench_serve.run_serve))
bench_app.command("pipeline")(command("bench pipeline", bench_pipeline.run_pipeline))
bench_app.command("decode")(command("bench decode", bench_data.run_decode))
app.add_typer(bench_app, name="bench", no_args_is_help=True)
recipes_app = typer.Typer(help="What recipes there are, and what one of them builds.")
recipes_app.command("list")(command("recipes list", recipes.run_list))
recipes_app.command("show")(command("recipes show", recipes.run_show))
recipes_app.command("schema")(command("recipes schema", recipes.run_schema))
app.add_typer(recipes_app, name="recipes", no_args_is_help=True)
weights_app = typer.Typer(help="Initial weights for sites without internet.")
weights_app.command("list")(command("weights list", weights.run_list))
weights_app.command("check")(command("weights check", weights.run_check))
weights_app.command("stage")(command("weights stage", weights.run_stage))
app.add_typer(weights_app, name="weights", no_args_is_help=True)
keys_app = typer.Typer(help="API keys of a server.")
keys_app.command("add")(command("keys add", keys.run_add))
keys_app.command("list")(command("keys list", keys.run_list))
keys_app.command("revoke")(command("keys revoke", keys.run_revoke))
app.add_typer(keys_app, name="keys", no_args_is_help=True)
cluster_app = typer.Typer(help="Nodes of a Ray cluster on this machine.")
cluster_app.command("up")(command("cluster up", cluster.run_up))
cluster_app.command("join")(command("cluster join", cluster.run_join))
app.add_typer(cluster_app, name="cluster", no_args_is_help=True)
jobs_app = typer.Typer(help="Jobs that were submitted to a cluster.")
jobs_app.command("list")(command("jobs list", jobs.run_list))
jobs_app.command("follow")(command("jobs follow", jobs.run_follow))
jobs_app.command("stop")(command("jobs stop", jobs.run_stop))
app.add_typer(jobs_app, name="jobs", no_args_is_help=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `bt` with the given words, or those of this process."""
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            use_token(address)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(error.exit_code) from error
    app(args=list(argv) if argv is not None else None, prog_name="bt")


def main_of(name: str) -> None:
    """Run one command as `python -m jobs.NAME` does; it is `bt NAME`."""
    main([name, *sys.argv[1:]])


if __name__ == "__main__":
    main()
