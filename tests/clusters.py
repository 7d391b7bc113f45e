"""Several replicas, and several workers, on this machine."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys

import tensorflow as tf

_PROCESS = """
import sys
sys.path[:0] = {path!r}
import clusters
clusters.main()
"""


def mirrored(count):
    """A strategy for so many replicas, before TensorFlow has started."""
    [cpu] = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * count
    )
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)])


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def cluster(count):
    """`TF_CONFIG` of each of the workers on this machine."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
    return [
        json.dumps(
            {
                "cluster": {"worker": addresses},
                "task": {"type": "worker", "index": index},
            }
        )
        for index in range(count)
    ]


def results(module, kind, number, *calls):
    """What functions return on several replicas, or of several workers.

    Args:
        module: Name of the module of the functions.
        kind: `"replicas"`, or `"workers"` for a process for each.
        number: Of replicas, or of workers.
        *calls: Names of functions, each with its arguments, as JSON takes them.

    Returns:
        Of each process, what the calls have returned.
    """
    configs = cluster(number) if kind == "workers" else [None]
    code = _PROCESS.format(path=sys.path)
    asked = json.dumps([module, kind, number, calls])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, asked],
            env=os.environ | ({"TF_CONFIG": config} if config else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for config in configs
    ]
    try:
        outputs = [p.communicate(timeout=500) for p in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def main():
    """One of these processes."""
    name, kind, number, calls = json.loads(sys.argv[1])
    if kind == "workers":
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    else:
        strategy = mirrored(number)
    module = importlib.import_module(name)
    with strategy.scope():
        found = [getattr(module, call)(*args) for call, *args in calls]
    print(json.dumps(found))
