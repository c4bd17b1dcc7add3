"""mmaccel probe: what is in a video file, and what reading frames of it would cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from rich.table import Table

    from mmaccel.cli.terminal import Terminal
    from mmaccel.codecs import VideoProbe
    from mmaccel.codecs.plan import DecodePlan, GroupStructure
    from mmaccel.codecs.sampling import Size

__all__ = ["run"]

# Groups that are shown one by one.
_MOST_ROWS = 24
_BAR = 40
_NUMBERED = {
    "index": "by the file's index; only the packets around wanted frames are read",
    "scan": "by reading all packets",
    "decoding": "by decoding: packets of this file do not tell its frames apart",
}


def run(
    terminal: Terminal, video: str, frames: int | None, fps: float | None, size: str | None, threads: int | None
) -> None:
    """Look into one video; raises VideoError for what is none, and for a request that it cannot satisfy."""
    from mmaccel.codecs import probe_video

    found = probe_video(video, frames, fps=fps, size=_size(size), threads=threads)
    terminal.show(_facts("file", _about(found)))
    if found.structure is not None:
        terminal.show(_facts("groups of pictures", _about_groups(found.structure)))
    if found.plan is not None:
        terminal.show(_facts("reading", _about_plan(found.plan, found.output)))
        if len(found.plan.groups) <= _MOST_ROWS:
            terminal.show(_groups(found.plan))
    terminal.show(_facts("decoders", {name: why or "can be used" for name, why in found.backends.items()}))
    terminal.finish(found.as_dict())


def _size(text: str | None) -> Size:
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() for side in sides):
        raise VideoError(f"--size {text}: write the shorter side, such as 224, or HEIGHTxWIDTH, such as 224x320")
    first, *second = (int(side) for side in sides)
    return (first, second[0]) if second else first


def _about(found: VideoProbe) -> dict[str, str]:
    turned = {None: "no picture can be decoded", 0: "upright"}.get(
        found.rotation, f"turned by {found.rotation} degrees"
    )
    scan = "interlaced" if found.interlaced else "progressive"
    rate = {None: "", True: ", varies", False: ", constant"}[found.rate_varies]
    return {
        "name": found.name,
        "container": found.container,
        "streams": ", ".join(f"{kind} {codec}" for kind, codec in found.streams),
        "codec": " ".join(filter(None, (found.codec, found.profile, found.pixel_format))),
        "pictures": f"{found.height} x {found.width} (height x width), {turned}, {scan}",
        "colours": f"matrix {found.matrix or 'not stated: BT.601 is taken'}, range {found.range or 'not stated'}",
        "duration": f"{found.duration:.3f} s",
        "frames": f"{'unknown' if found.frames is None else found.frames}, {found.fps:.3f} a second{rate}",
        "bit rate": "unknown" if found.bit_rate is None else f"{found.bit_rate / 1000:.0f} kbit/s",
        "damage": f"{found.cut} frames are cut off at the end" if found.cut else "the packets show none",
        "frames numbered": _NUMBERED[found.numbered_by],
    }


def _about_groups(of: GroupStructure) -> dict[str, str]:
    lengths = f"{of.shortest} / {of.median:g} / {of.longest} frames (shortest, median, longest)"
    leading = f"open: {of.leading} have pictures that are stored behind their keyframe and shown before it"
    start = "" if of.keyframe_first else "; the video starts inside of a group"
    share = "unknown to this codec"
    if of.disposable is not None and of.disposable_bytes is not None:
        share = f"{of.disposable:.0%} of the packets, {of.disposable_bytes:.0%} of the bytes"
    return {
        "groups": f"{of.count}: {lengths}{start}",
        "kind": leading if of.leading else "closed, as far as the packets tell",
        "reordering": f"{of.reorder_depth} frames deep" if of.reorder_depth else "none between packets",
        "no reference": share,
        "holes": f"in the times of {of.gaps} groups: nothing is left out there" if of.gaps else "none in the times",
    }


def _about_plan(plan: DecodePlan, output: tuple[int, int]) -> dict[str, str]:
    height, width = output
    same = f" ({plan.distinct} different ones)" if plan.distinct < plan.wanted else ""
    memory = 3 * plan.wanted * height * width / 2**20
    about = {
        "frames": f"{plan.wanted}{same} of {height} x {width}: {memory:.1f} MiB",
        "groups needed": str(len(plan.groups)),
        "decoded": f"{plan.decoded} frames; {plan.left_out} packets are left out; playing would decode {plan.played}",
        "parallel": f"at most {plan.speedup_bound:.2f} x one thread, with {plan.threads} threads",
    }
    if plan.snapping is not None:
        mean, largest = plan.snapping.mean_shift, plan.snapping.largest_shift
        off = f"off by {mean:.3f} s in the mean, {largest:.3f} s at most"
        about["keyframes instead"] = f"{plan.snapping.decoded} frames decoded, {off}"
    return about


def _facts(title: str, about: dict[str, str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True, min_width=17)
    table.add_column(overflow="fold")
    for name, value in about.items():
        table.add_row(name, Text(value))
    return table


def _groups(plan: DecodePlan) -> Table:
    from rich.table import Table

    table = Table(title="# decoded, - left out, . not reached", title_justify="left")
    for heading in ("keyframe", "frames", "wanted", "decoded", "left out"):
        table.add_column(heading, justify="right")
    table.add_column("")
    longest = max(group.length for group in plan.groups)
    for group in plan.groups:
        ends = [round(_BAR * part / longest) for part in (group.decoded, group.decoded + group.left_out, group.length)]
        bar = "#" * ends[0] + "-" * (ends[1] - ends[0]) + "." * (ends[2] - ends[1])
        numbers = (group.keyframe, group.length, group.wanted, group.decoded, group.left_out)
        table.add_row(*map(str, numbers), bar)
    return table
