"""Reads a stream on a cluster of two nodes of this machine, then goes on with one; test_streams.py runs it in a process
of its own. Prints one JSON object: the nodes, who read what on which node, and where the dealers ran."""

import json

import numpy as np
import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster

from benchmarks.streams import CHUNK, SIDE, Board, FreeSamples, Reader, number_of
from raydet.data.index import index_of_images
from raydet.data.stream import NODE_LABEL, DataTasks, eval_batches, train_batches

BATCH, STEPS, IMAGES = 32, 40, 5 * CHUNK + 7


class Recorder(Reader):
    """A rank that says what it has got: positions and the node that made them."""

    def train(self, source, start, stop):
        samples = ray.get(source[0])
        batches = train_batches(source[0], samples, start, stop, BATCH, self)
        return [(batch.positions.tolist(), batch.rows.tolist()) for batch in batches]

    def validate(self, source):
        batches = eval_batches(source[0], ray.get(source[0]), BATCH, self, tasks=DataTasks())
        return [[position for batch in batches() for position in batch.positions.tolist()] for _ in range(2)]


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 10**8})
    nodes = [cluster.add_node(num_cpus=2, object_store_memory=10**8).node_id for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    none = np.empty((0, 4)), np.empty(0, int), np.empty(0, bool)
    images = [(number, f"{number}", SIDE, SIDE) for number in range(IMAGES)]
    index = index_of_images(images, [none] * IMAGES, root="/", class_names=["none"])
    source = [ray.put(FreeSamples(index, (), (SIDE, SIDE), CHUNK))]
    starts = []
    begin = 0
    for places in ([nodes[0], nodes[0], nodes[1], nodes[1]], [nodes[1], nodes[1]]):
        board = ray.remote(num_cpus=0, max_concurrency=len(places) + 1)(Board).remote()
        readers = [
            ray.remote(num_cpus=0, label_selector={NODE_LABEL: node})(Recorder).remote(rank, places, board)
            for rank, node in enumerate(places)
        ]
        stop = begin + STEPS * BATCH * len(places)
        trained = ray.get([each.train.remote(source, begin, stop) for each in readers])
        validated = ray.get([each.validate.remote(source) for each in readers])
        dealers = {
            name: [actor["Address"]["NodeID"] for actor in actors().values() if actor["ActorClassName"] == name]
            for name in ("_TrainDealer", "_EvalDealer")
        }
        starts.append({"places": places, "trained": trained, "validated": validated, "dealers": dealers})
        begin = stop
        ray.kill(board)  # whose threads would outlive the cluster
    print(json.dumps({"nodes": {node: number_of(node) for node in nodes}, "starts": starts}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
