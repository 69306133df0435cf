"""The inference service: the Open Inference Protocol V2 over HTTP."""
