"""Figures as files, and as a part of a page: small, without ids that two figures share, in the colors of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from typing import TYPE_CHECKING

from raysweep.analysis.figures.style import SURFACE, VARIABLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 200  # of PNG files: more than twice the pixels of the page
LEAST, MOST = 0.85, 1.15  # of its size, within which a figure follows the width of the page
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}  # the same rows, the same file
_MARKER = re.compile(r"<(use|path) (?!id=)([^>]*?)/>")  # a path of its own where there are few
_VARIABLE_OF = re.compile("|".join(map(re.escape, VARIABLES)), re.IGNORECASE)


def svg_text(figure: Figure) -> str:
    """A file of its own."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata=_NO_METADATA)
    return _fewer_digits(stream.getvalue())


def png_bytes(figure: Figure) -> bytes:
    """On the light surface: a transparent one is not to be read where it is dark."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, facecolor=SURFACE, metadata={"Software": None})
    return stream.getvalue()


def inline(text: str, name: str, title: str, tips: Mapping[str, Sequence[str]] | None = None) -> str:
    """The element of a page for what `svg_text` gave.

    name: of the figure, unlike that of any other on the page;  title: what it is, for those who hear the page
    tips: by gid of a collection of markers what is said about each of them
    """
    body = text[text.index("<svg") :]
    body = re.sub(r"<style[^>]*>.*?</style>|<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    for gid, words in (tips or {}).items():
        body = _with_tips(body, gid, words)
    width, height = map(float, re.findall(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', body)[0])
    body = _without_what_says_nothing(body[body.index(">") + 1 :])
    body = re.sub(r' id="', f' id="{name}-', body)
    body = re.sub(r'href="#', f'href="#{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = _VARIABLE_OF.sub(lambda found: f"var(--{VARIABLES[found[0].lower()]})", body)
    body = re.sub(r"font: ([0-9.]+px) [^;\"]*|font-family: [^;\"]*", _own_font, body)
    body = re.sub(r"\n\s*", "\n", body)
    size = f"min-width: {LEAST * width:.0f}px; max-width: {MOST * width:.0f}px"
    head = (
        f'<svg role="img" aria-labelledby="{name}-title" viewBox="0 0 {width:g} {height:g}" style="{size}">'
    )
    return f'{head}<title id="{name}-title">{escape(title)}</title>{body}'.strip()


def _own_font(found: re.Match[str]) -> str:
    return f"font-size: {found[1]}" if found[1] else "font-family: inherit"


def _with_tips(body: str, gid: str, words: Sequence[str]) -> str:
    """Every marker of a group with its words, which browsers show beside the pointer."""
    start = body.find(f'<g id="{gid}">')
    if start < 0:
        return body
    end = body.find('<g id="', start + 1)
    markers = list(_MARKER.finditer(body[start:end]))
    if len(markers) != len(words):
        return body
    parts, place = [body[:start]], start
    for marker, said in zip(markers, words, strict=True):
        told = f"<{marker[1]} {marker[2]}><title>{escape(said)}</title></{marker[1]}>"
        parts += [body[place : start + marker.start()], told]
        place = start + marker.end()
    return "".join([*parts, body[place:]])


def _without_what_says_nothing(body: str) -> str:
    """Without ids that nothing refers to, rotations by nothing and empty groups."""
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", body)
    body = re.sub(r' transform="rotate\(-?0 [^"]*"', "", body)
    return re.sub(r"\s*<g ?/>|\n *(?=\n)", "", body)


def _fewer_digits(text: str) -> str:
    """Hundredths of a pixel, which halves the size. What is written in the figure stays as it is."""
    numbers = re.compile(r"-?\d+\.\d{3,}")
    shorter = partial(numbers.sub, lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."))
    return re.sub(r"<[^>]*>", lambda tag: shorter(tag[0]), text)
