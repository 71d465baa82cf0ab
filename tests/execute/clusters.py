"""clusters: a Ray cluster of two nodes on this machine."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def two_nodes(cpus: int) -> Iterator[Any]:
    """The cluster; cpus: of each node. Its port is its own: somebody else may have the usual one."""
    from ray.cluster_utils import Cluster

    with socket.socket() as found:
        found.bind(("", 0))
        port = found.getsockname()[1]
    head = {"num_cpus": cpus, "include_dashboard": False, "gcs_server_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=cpus)
        yield cluster
    finally:
        cluster.shutdown()
