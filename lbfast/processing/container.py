"""Containers of sound and moving pictures, opened so that what is inside cannot choose what else is opened.

A playlist, an ffconcat script or a manifest of segments names other files, local or not; FFmpeg tells them by their
content, whatever a file is called. So the demuxers are listed, and none of the list opens anything but the file itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from lbfast.processing.media import Source

_DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpegtsraw,mpeg,mpegvideo,m4v,h261,h263,h264,hevc,vvc,av1,obu,ivf,"
    "flv,live_flv,asf,asf_o,ogg,gif,apng,mxf,gxf,dv,nut,nuv,rm,wtv,vc1,vc1test,yuv4mpegpipe,mjpeg,mjpeg_2000,dirac,"
    "cavsvideo,wav,w64,flac,mp3,aac,ac3,eac3,ac4,dts,dtshd,truehd,mlp,aiff,au,caf,amr,amrnb,amrwb,ape,tta,wv,mpc,mpc8,"
    "tak,dsf,iff,voc,oma,loas,latm,shn,gsm,qcp,xwma,sox"
)


@contextlib.contextmanager
def opened(
    source: Source, kind: str, options: Mapping[str, str] | None = None, more: Mapping[str, str] | None = None
) -> Iterator[Any]:
    """PyAV's container of a file that is opened already.

    Args:
        source: the file.
        kind: what is looked for, for the message: "sound", "moving pictures".
        options: of the decoders that look for the streams' properties.
        more: options of the demuxer.

    Raises:
        MediaError: what FFmpeg raises, while opening or inside the block.
    """
    import av

    with source.decoding():
        local = source.path is not None
        if not local:
            source.file.seek(0)
        whitelists = {"protocol_whitelist": "file", "format_whitelist": _DEMUXERS}
        try:
            container = av.open(
                f"file:{source.path}" if local else source.file,
                options=dict(options or {}),
                container_options={**whitelists, **(more or {})},
            )
        except av.ArgumentError as error:  # FFmpeg's word for a demuxer that is not in the list
            raise source.error(f"without {kind}, or in a container that is not read") from error
        with container:
            yield container


def only(container: Any, stream: Any) -> None:
    """Leaves the other streams unread, where PyAV can (18): damage in their tables would end an MP4 file there."""
    import av.stream

    if hasattr(av.stream, "Discard"):
        for other in container.streams:
            if other.index != stream.index:
                other.discard = av.stream.Discard.all


def packets(source: Source, container: Any, stream: Any) -> Iterator[Any]:
    """A stream's packets, and the empty one at its end.

    MediaError where the tables of an MP4 file have more: FFmpeg ends without a word at one that lies beyond its end.
    """
    count = 0
    for packet in container.demux(stream):
        count += packet.size > 0
        yield packet
    if container.format.name.startswith("mov") and count < sum(entry.size > 0 for entry in stream.index_entries):
        raise source.error("that is truncated or has broken packets")
