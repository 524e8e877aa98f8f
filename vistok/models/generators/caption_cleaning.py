"""Captions as LlamaGen's and NAR's text encoder expects them: without the litter of captions from the web.

The generators were trained on captions that had been through this cleaning, which began with DeepFloyd IF (2023) and
came to LlamaGen by way of PixArt (Chen et al. 2023): lower case, no links, markup, handles, file names or article
numbers, one kind of quote and dash. The order of the rules matters, and so does cleaning twice: what the first pass
leaves behind, such as entities that were escaped twice, the second one takes away.
"""

from __future__ import annotations

import html
import importlib
import re
import urllib.parse
import warnings
from collections.abc import Iterable
from typing import Any

FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
TOP_DOMAINS = "com|co|ru|net|org|edu|gov|it"

Rule = tuple[str, str]  # what to find, what to put there

BEFORE_MARKUP: tuple[Rule, ...] = (
    (r"<person>", "person"),  # how some data sets hide names
    (rf"\b(?:(?:https?|www):(?:/{{1,3}}|[a-z0-9%])|[a-z0-9.\-]+\.(?:{TOP_DOMAINS})[\w/-]*\b/?(?!@))", ""),
)
SYMBOLS: tuple[Rule, ...] = (
    (r"@\w+\b", ""),  # handles
    (r"[\u31c0-\u9fff]+", ""),  # CJK strokes, small kana, enclosed letters, units, hexagrams, ideographs
    (
        r"[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
        r"\ufe31\ufe32\ufe58\ufe63\uff0d]+",  # whatever Unicode calls a dash
        "-",
    ),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?|&amp", ""),
)
NUMBERS: tuple[Rule, ...] = (
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # network addresses
    (r"\d:\d\d\s+$", ""),  # ends of article numbers
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{FILE_TYPES})", ""),
)
PUNCTUATION: tuple[Rule, ...] = (
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
SHOP_TALK: tuple[Rule, ...] = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{FILE_TYPES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # 640x480, with the Latin or the Cyrillic letter, or the sign
)
SPACING: tuple[Rule, ...] = (
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)
ENDS: tuple[Rule, ...] = (
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)
MOST_JOINED_WORDS = 3  # hyphens and underscores beyond this stand for spaces, as in this-is-my-cute-cat


def clean_caption(text: str) -> str:
    """A caption as LlamaGen and NAR give it to their text encoder; it may end up empty.

    Raises:
        ModuleNotFoundError: `ftfy` or `beautifulsoup4` is not installed.
    """
    for _ in range(2):
        text = _clean_once(text)
    return text


def _clean_once(text: str) -> str:
    text = urllib.parse.unquote_plus(text).strip().lower()
    text = _without_markup(_apply(BEFORE_MARKUP, text))
    text = _apply((*SYMBOLS, *NUMBERS, *PUNCTUATION), text)
    if len(re.findall(r"[-_]", text)) > MOST_JOINED_WORDS:
        text = re.sub(r"[-_]", " ", text)
    text = html.unescape(html.unescape(_library("ftfy").fix_text(text))).strip()
    return _apply((*SHOP_TALK, *SPACING, *ENDS), text).strip()


def _apply(rules: Iterable[Rule], text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _without_markup(text: str) -> str:
    soup = _library("bs4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", soup.MarkupResemblesLocatorWarning)  # a caption may be a file name
        return soup.BeautifulSoup(text, features="html.parser").text


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "cleaning captions for LlamaGen and NAR needs ftfy and beautifulsoup4: run `pip install 'vistok[text]'`, "
            "or pass text features that were made elsewhere"
        ) from None
