"""Replicas of an artifact's server behind one address, by Ray Serve.

    pip install "sirius-compile[serve]" "ray[serve]"
    serve run examples.ray_serve:build model=/models/model.sirius replicas=2
    serve run examples.ray_serve:build model=/models/model.sirius replicas=1 most=8   # autoscaling

Each replica is `sirius serve`'s application with its own engine. Ray Serve starts the replicas,
passes requests to the least busy one, and replaces one that dies. Its address
(http://127.0.0.1:8000) speaks the same API. A replica allocates all of its memory when it starts:
see docs/scale.md.

Arguments (all but the first are optional): model, name, replicas, most, rows, queue, context, cpus,
gpus, threads.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from ray import serve
from ray.serve import Application


def build(arguments: dict[str, str]) -> Application:
    """The application that ``serve run`` starts; arguments as on its command line."""
    model, replicas = arguments["model"], int(arguments.get("replicas", 1))
    most = int(arguments.get("most", replicas))
    rows, queue = int(arguments.get("rows", 8)), int(arguments.get("queue", 64))
    cpus, gpus = float(arguments.get("cpus", 1)), float(arguments.get("gpus", 0))
    threads, context = int(arguments.get("threads", max(1, int(cpus)))), arguments.get("context")

    def application() -> FastAPI:
        """Called in the replica."""
        from sirius_runtime.loading import load
        from sirius_runtime.serve.app import make_app
        from sirius_runtime.serve.engine import Capacity
        from sirius_runtime.serve.server import make_served

        loaded = load(model, device=None if gpus else "cpu", threads=threads)
        longest = min(4096, loaded.program.model.max_seq_len)
        capacity = Capacity(rows=rows, queue=queue, context=int(context or longest))
        return make_app(make_served(loaded, arguments.get("name", Path(model).stem), capacity))

    @serve.deployment(
        name="sirius",
        # A request beyond a replica's capacity waits at the proxy, or goes to another replica.
        max_ongoing_requests=rows + queue,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        # A replica that drains completes its answers.
        graceful_shutdown_timeout_s=600,
        autoscaling_config={
            "min_replicas": replicas,
            "max_replicas": most,
            "target_ongoing_requests": rows,
        },
    )
    @serve.ingress(application)
    class Replica:
        """Nothing but the application."""

    return Replica.bind()
