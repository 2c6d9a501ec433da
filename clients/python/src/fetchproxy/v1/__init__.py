"""The contract: `fetch_pb2` and `fetch_pb2_grpc`, which the build generates."""
