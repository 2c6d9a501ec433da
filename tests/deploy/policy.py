"""A client whose library repeats calls by the policy of docs/how-to/configure-the-channel.md, and that does nothing about
a call that fails all the same but tell of it. Speaks like the workers of the conformance suite."""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import grpc
from fetchproxy.v1 import fetch_pb2 as pb
from fetchproxy.v1.fetch_pb2_grpc import FetchServiceStub
from google.protobuf.duration_pb2 import Duration

THREADS = 4
LEASE = 10
stop = threading.Event()
speaking = threading.Lock()


def main():
    for number in signal.SIGTERM, signal.SIGINT:
        signal.signal(number, lambda *_: stop.set())
    options = [("grpc.service_config", os.environ["SERVICE_CONFIG"])]
    # A channel each, which is a connection each: so many places at which one may break.
    threads = [threading.Thread(target=work, args=(options,)) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    say({"event": "ready"})
    for thread in threads:
        thread.join()
    say({"event": "stopped"})


def work(options):
    with channel_of(os.environ["FETCH_PROXY_ADDR"], options) as channel:
        service = FetchServiceStub(channel)
        request = pb.FetchRequest(
            stream=os.environ["STREAM"],
            consumer=os.environ["CONSUMER"],
            n=5,
            max_wait=Duration(seconds=5),
            lease=Duration(seconds=LEASE),
            codec=pb.CODEC_JSON,
            worker="policy",
        )
        while not stop.is_set():
            answer = told(service.Fetch, request, 15)
            for message in answer.messages if answer else ():
                settle(service, message)


def channel_of(address, options):
    if "FETCH_PROXY_CERT" not in os.environ:
        return grpc.insecure_channel(address, options)
    files = [Path(os.environ[f"FETCH_PROXY_{name}"]) for name in ("CA", "KEY", "CERT")]
    credentials = grpc.ssl_channel_credentials(*(file.read_bytes() for file in files))
    return grpc.secure_channel(address.removeprefix("https://"), credentials, options)


def settle(service, message):
    task = json.loads(message.text)
    # One beat a second, as long as the work takes.
    for _ in range(int(task.get("seconds", 0))):
        threading.Event().wait(1)
        lease = Duration(seconds=LEASE)
        told(service.Extend, pb.ExtendRequest(token=message.token, lease=lease), 10)
    answer = told(service.Ack, pb.AckRequest(token=message.token), 10)
    event = "acked" if answer else "lost"
    sequence, deliveries = message.stream_sequence, message.delivery_count
    say({"event": event, "sequence": sequence, "deliveries": deliveries, "id": task["id"]})


def told(call, request, timeout):
    try:
        return call(request, timeout=timeout)
    except grpc.RpcError as error:
        print(f"{error.code().name}: {error.details()}", file=sys.stderr)
        say({"event": "failed"})
        return None


def say(event):
    with speaking:
        print(json.dumps(event), flush=True)


main()
