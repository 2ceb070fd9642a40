"""The options of `bt serve`."""

from typing import Annotated

import typer

Port = Annotated[int, typer.Option(min=1, max=65535, help="To listen on.")]
Host = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS",
        help="To listen on; others than this machine's need "
        "--keys and --audit, and a TLS proxy in front.",
    ),
]
Keys = Annotated[
    str | None, typer.Option(metavar="FILE", help="Who may ask; bt keys add makes it.")
]
Audit = Annotated[
    str | None, typer.Option(metavar="DIR", help="Folder for the log of who asked for what.")
]
ScansPerMinute = Annotated[
    int, typer.Option(min=0, help="Most that one key may send; 0: any number.")
]
Shadow = Annotated[
    str | None,
    typer.Option(
        metavar="BUNDLE",
        help="Another bundle that answers a share of the scans, too; where it disagrees is "
        "logged, and told to no client.",
    ),
]
ShadowShare = Annotated[
    float | None,
    typer.Option(min=0.0001, max=1.0, help="Of the scans that the shadow gets. [default: 0.05]"),
]
Swap = Annotated[
    bool,
    typer.Option(
        "--swap",
        help="Let this bundle answer in place of the one that a bt serve on the cluster of "
        "RAY_ADDRESS hosts, without a request that fails. If it cannot be loaded, nothing "
        "changes.",
    ),
]
ScoringSources = Annotated[
    list[str] | None,
    typer.Option(
        "--scoring-source",
        metavar="PREFIX",
        help="Folder or URI from which POST /v1/scoring-jobs may read. May be repeated.",
    ),
]
ScoringOutputs = Annotated[
    list[str] | None,
    typer.Option(
        "--scoring-output",
        metavar="PREFIX",
        help="Folder or URI below which these jobs may write. May be repeated.",
    ),
]
WithHaproxy = Annotated[
    bool,
    typer.Option(
        "--haproxy",
        help="Let HAProxy listen in place of Serve's own proxy, which takes a third of the "
        "time. It opens two ports, with its counts, to everybody who reaches this machine: "
        "for one behind a firewall.",
    ),
]
Traces = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Send a trace of each request to an OpenTelemetry collector, as in "
        "http://127.0.0.1:4318: times only, nothing of a scan.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any setting of cluster/serve_config.yaml's, as in --set num_replicas=2.",
    ),
]
