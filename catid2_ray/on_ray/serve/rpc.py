"""The same retrieve call over gRPC: messages of `proto/retriever.proto`, made of the requests and answers of the HTTP interface.

One converter for all fields: a field of the interface that the messages lack is a failing test, not a silent loss. Ray's proxy
calls the replica's method `Retrieve`; to tell it of the service, name `add_to_server` in `grpc_options` (serve_config.yaml).
"""

import json
from collections.abc import Iterable, Mapping

import grpc
from google.protobuf.json_format import MessageToDict, ParseDict
from pydantic import ValidationError

from catid2_ray.errors import InputError, QueryError, StorageError
from catid2_ray.on_ray.serve.api import RetrieveRequest, RetrieveResponse
from catid2_ray.on_ray.serve.proto import retriever_pb2
from catid2_ray.on_ray.serve.refusals import Unserved

SERVICE = "catid2.v1.Retriever"
OK = grpc.StatusCode.OK
NOTHING = retriever_pb2.RetrieveResponse()
_CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


def add_to_server(servicer, server) -> None:
    """What protoc would have generated; by hand, so that it binds nobody to a version of grpcio."""
    handler = grpc.unary_unary_rpc_method_handler(
        servicer.Retrieve,
        request_deserializer=retriever_pb2.RetrieveRequest.FromString,
        response_serializer=retriever_pb2.RetrieveResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Retrieve": handler}),))


def stub(channel: grpc.Channel):
    """A call of the service: RetrieveRequest → RetrieveResponse, for Python callers."""
    return channel.unary_unary(
        f"/{SERVICE}/Retrieve",
        request_serializer=retriever_pb2.RetrieveRequest.SerializeToString,
        response_deserializer=retriever_pb2.RetrieveResponse.FromString,
    )


def request_of(message: retriever_pb2.RetrieveRequest) -> RetrieveRequest:
    """Raises QueryError, which says what a 422 would say."""
    fields = MessageToDict(message, preserving_proto_field_name=True)
    try:
        if (text := fields.pop("filter_json", None)) is not None:
            fields["filter"] = json.loads(text)
        return RetrieveRequest.model_validate(fields)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])) or 'request'}: {fault['msg']}" for fault in error.errors()]
        raise QueryError("; ".join(faults)) from None
    except (ValueError, RecursionError) as error:
        raise QueryError(f"filter_json is no JSON: {error}") from None


def message_of(response: RetrieveResponse) -> retriever_pb2.RetrieveResponse:
    return ParseDict(response.model_dump(exclude_none=True), retriever_pb2.RetrieveResponse())


def headers_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> Mapping[str, str]:
    """A call's metadata as headers; gRPC gives names in lower case."""
    return {name: value for name, value in metadata or () if isinstance(value, str)}


def code_of(error: Exception) -> grpc.StatusCode:
    if isinstance(error, Unserved):
        return _CODES[error.status]
    if isinstance(error, StorageError):
        return grpc.StatusCode.UNAVAILABLE
    return grpc.StatusCode.INVALID_ARGUMENT if isinstance(error, InputError) else grpc.StatusCode.INTERNAL
