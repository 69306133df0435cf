"""Clients of a served model: the Open Inference Protocol V2 with binary tensors, sync and async."""

from guardserve.client.client import AsyncClient, Client
from guardserve.client.message import Outputs

__all__ = ["AsyncClient", "Client", "Outputs"]
