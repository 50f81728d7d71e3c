#!/usr/bin/python3
"""A provider written in Python: a small inventory with two operations, stock and
reserve, whose inputs and outputs are JSON. It needs grpcio and grpcio-tools.

    python3 examples/provider-python/inventory.py --listen 127.0.0.1:9000
    wasmatrix provider register inventory --type external --set address=127.0.0.1:9000

It shows the three things that a provider needs beside its operations: health, a
drain that loses no call, and fencing of instances that were replaced.
"""

import argparse
import concurrent.futures
import json
import pathlib
import queue
import signal
import sys
import tempfile
import threading
import time

import grpc
from grpc_tools import protoc

HERE = pathlib.Path(__file__).resolve().parent
NAME = "wasmatrix.v1.ProviderService"


def generate(protos, into):
    """Generates what grpc needs from external.proto, which imports nothing, and
    health.proto. A project of your own does that when it is built."""
    arguments = ["protoc", f"-I{protos}", f"-I{HERE}", f"--python_out={into}", f"--grpc_python_out={into}"]
    if protoc.main(arguments + ["wasmatrix/v1/external.proto", "health.proto"]) != 0:
        sys.exit("inventory.py: generating from the protos failed")
    sys.path.insert(0, str(into))


def servicers():
    """Defines the servicers; what they are made from was generated a moment ago."""
    import health_pb2
    import health_pb2_grpc
    from wasmatrix.v1 import external_pb2, external_pb2_grpc

    class Inventory(external_pb2_grpc.ProviderServiceServicer):
        def __init__(self, delay):
            self.delay = delay
            self.lock = threading.Lock()
            self.available = {"bolt": 100, "nut": 100}
            self.reserved = {}  # by request id, so that a repetition finds its answer
            self.newest = {}  # by instance: (created_index, generation)

        def Describe(self, request, context):
            # Both may be carried out twice: a second reserve with the same request id reserves nothing.
            return external_pb2.ProviderServiceDescribeResponse(
                version="inventory 1.0 (python)",
                operations=[
                    external_pb2.ProviderOperation(name="stock", idempotent=True),
                    external_pb2.ProviderOperation(name="reserve", idempotent=True),
                ],
            )

        def Invoke(self, request, context):
            # Permissions were checked before the call came here.
            try:
                given = json.loads(request.payload)
            except ValueError as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the payload is no JSON: {error}")
            time.sleep(self.delay)
            if not context.is_active():
                context.abort(grpc.StatusCode.CANCELLED, "nobody waits any more")  # nothing was done
            with self.lock:
                self.admit(request, context)
                if request.operation == "stock":
                    item = given.get("item", "")
                    answer = {"item": item, "available": self.available.get(item, 0)}
                elif request.operation == "reserve":
                    answer = self.reserve(given, context)
                else:
                    context.abort(grpc.StatusCode.UNIMPLEMENTED, f"operation {request.operation!r} is unknown")
            return external_pb2.ProviderServiceInvokeResponse(payload=json.dumps(answer).encode())

        def admit(self, request, context):
            """Refuses an instance that was replaced by a newer placement. It is called
            in the critical section of the effect; with a database it is the same
            transaction."""
            if not request.instance_id:
                return  # a user
            now = (request.created_index, request.generation)
            if now < self.newest.get(request.instance_id, (0, 0)):
                context.abort(
                    grpc.StatusCode.PERMISSION_DENIED,
                    f"generation {request.generation} of instance {request.instance_id} was superseded",
                )
            self.newest[request.instance_id] = now

        def reserve(self, given, context):
            request_id, item, quantity = given.get("request_id"), given.get("item"), given.get("quantity", 0)
            if not request_id or quantity < 1:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a reservation needs a request_id and a quantity of at least 1")
            if request_id in self.reserved:
                return self.reserved[request_id]
            left = self.available.get(item, 0)
            if left < quantity:
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"only {left} of {item} are left")
            self.available[item] = left - quantity
            self.reserved[request_id] = {"item": item, "quantity": quantity, "available": left - quantity}
            return self.reserved[request_id]

    class Health(health_pb2_grpc.HealthServicer):
        """Tells SERVING until stop is called, and NOT_SERVING from then on."""

        def __init__(self):
            self.lock = threading.Lock()
            self.status = health_pb2.HealthCheckResponse.SERVING
            self.watchers = []

        def stop(self):
            with self.lock:
                self.status = health_pb2.HealthCheckResponse.NOT_SERVING
                for watcher in self.watchers:
                    watcher.put(self.status)

        def Check(self, request, context):
            if request.service not in ("", NAME):
                context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
            return health_pb2.HealthCheckResponse(status=self.status)

        def Watch(self, request, context):
            changes = queue.Queue()
            with self.lock:
                self.watchers.append(changes)
                changes.put(self.status)
            context.add_callback(lambda: changes.put(None))
            while (status := changes.get()) is not None:
                yield health_pb2.HealthCheckResponse(status=status)
            with self.lock:
                self.watchers.remove(changes)

    return Inventory, Health, external_pb2_grpc, health_pb2_grpc


def serve(options):
    Inventory, Health, provider_grpc, health_grpc = servicers()
    # Each watcher of the health takes one thread for as long as it watches.
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(max_workers=32))
    health = Health()
    provider_grpc.add_ProviderServiceServicer_to_server(Inventory(options.delay), server)
    health_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port(options.listen)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server.start()
    address = options.listen if options.listen.startswith("unix:") else f"{options.listen.rsplit(':', 1)[0]}:{port}"
    print("listening at", address, flush=True)
    stop.wait()
    # Without losing a call: first no new ones come, then those under way finish.
    health.stop()
    time.sleep(0.2)
    server.stop(options.grace).wait()


def main():
    parser = argparse.ArgumentParser(description="an inventory for wasmatrix")
    parser.add_argument("--listen", default="127.0.0.1:9000", help="address to listen at: host:port or unix:/path")
    parser.add_argument("--delay", type=float, default=0, help="seconds that an operation takes, to try out drains")
    parser.add_argument("--grace", type=float, default=10, help="seconds that calls in flight may take once SIGTERM came")
    parser.add_argument("--protos", default=HERE.parent.parent / "proto", help="directory with wasmatrix/v1/external.proto")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as into:
        generate(options.protos, into)
        serve(options)


if __name__ == "__main__":
    main()
