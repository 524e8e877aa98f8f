"""Continuous batching: requests join a running batch and leave it at any step."""

from vistok.decoding.serving.request import QueueFullError, Request, Ticket
from vistok.decoding.serving.server import Server

__all__ = ["QueueFullError", "Request", "Server", "Ticket"]
