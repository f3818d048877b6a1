"""Messages of the gRPC interface. `retriever_pb2.py` is made of `retriever.proto` (CONTRIBUTING.md)."""
