"""The Open Inference Protocol V2 over gRPC, with the extra ``grpc``."""

from guardserve.rpc.server import RpcServer

__all__ = ["RpcServer"]
