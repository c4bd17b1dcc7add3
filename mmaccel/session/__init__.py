"""Streaming: a video that goes on, read frame by frame, and questions about what has been seen so far."""

from mmaccel.session.answer import Answer, StreamStats
from mmaccel.session.stream import StreamSession, stream

__all__ = ["Answer", "StreamSession", "StreamStats", "stream"]
