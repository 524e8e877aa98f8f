"""Captions become what the published generators were trained on: one case for each rule, and some long ones."""

from __future__ import annotations

import sys

import pytest

from vistok.models.generators.caption_cleaning import clean_caption

CASES = {
    "nothing to do": ("a red house", "a red house"),
    "lower case, ends": ("  A Red House\n", "a red house"),
    "percent and plus of links": ("red%20house+and%20caf%C3%A9", "red house and café"),
    "hidden names": ("<PERSON> on a bike", "person on a bike"),
    "links": ("a boat https://example.com/boats/1 at sea", "a boat at sea"),
    "links without a scheme": ("a boat www.boats.co/red-boat/ at sea", "a boat at sea"),
    "markup": ("a <b>bold</b> move<br/> &lt;3", "a bold move <3"),
    "handles": ("photo by @jane_doe2 of a cat", "photo by of a cat"),
    "CJK": ("a 猫 cat ㈱ sat㇀", "a cat sat"),
    "other scripts stay": ("рыжий кот, chat à l'été", "рыжий кот, chat à l'été"),
    "dashes": ("a — b 〜 c", "a - b - c"),
    "quotes": ("a «small» ’n’ “fine” cat", 'a "small" \'n\' "fine" cat'),
    "curled and straight quotes together": ("‘’1", '"1'),
    "entities": ("this &amp;quot;that&amp;quot; those", "this that those"),
    "network addresses": ("host 192.168.10.1 up", "host up"),
    "ends of article numbers": ("shoe 3:45 @shop", "shoe"),
    "written newlines": (r"one\ntwo", "one two"),
    "short numbers with a hash": ("cat #12 of many", "cat of many"),
    "four digits with a hash": ("cat #1234 of many", "cat 1234 of many"),
    "long numbers with a hash": ("cat #12345 of many", "cat of many"),
    "long numbers": ("cat 1234567 of 12345", "cat of 12345"),
    "file names": ("see my_cat.JPG now", "see now"),
    "repeated quotes": ("a ''big'' dog", 'a "big" dog'),
    "repeated dots": ("wait... what", "wait what"),
    "punctuation": (
        "***SALE*** [new] {red} (big) 50° tea/coffee © 2020 • ½",
        "sale new red big 50° tea coffee 2020",
    ),
    "lone dots": ("a . b", "a b"),
    "few hyphens": ("well-known cat-lover", "well-known cat-lover"),
    "many hyphens": ("this-is-my_cute-cat", "this is my cute cat"),
    "forms of letters": ("a ｗｉｄｅ ﬁg", "a wide fig"),
    "letters and digits": ("lamp jc6640 on", "lamp on"),
    "letters, digits, letters": ("lamp jc6640vc on", "lamp on"),
    "digits, letters, digits": ("lamp 6640vc231 on", "lamp on"),
    "mixed numbers": ("lamp j2d1a2a on", "lamp on"),
    "shipping": ("lamp worldwide free shipping", "lamp"),
    "download": ("free download of a lamp", "of a lamp"),
    "clicks": ("lamp click for details", "lamp"),
    "image formats": ("lamp png images here", "lamp here"),
    "pages": ("lamp page 12 here", "lamp here"),
    "sizes": ("lamp 640x480 and 3.5×4 here", "lamp and here"),
    "colons": ("title : subtitle", "title: subtitle"),
    "space after commas": ("a,b", "a, b"),
    "decimals stay": ("3.5 m", "3.5 m"),
    "white space": ("a \t b\n\nc", "a b c"),
    "enclosing quotes": ('"a cat"', "a cat"),
    "punctuation at the ends": ("-a cat,", "a cat"),
    "hidden files": (".htaccess", ""),
    "nothing is left": ("### https://example.com", ""),
    "an empty text": ("", ""),
}


@pytest.mark.parametrize("case", CASES)
def test_rule(case: str) -> None:
    text, expected = CASES[case]
    assert clean_caption(text) == expected


def test_what_the_first_pass_uncovers_is_cleaned_by_the_second() -> None:
    assert clean_caption("100%2525 cotton") == "100% cotton"
    assert clean_caption("'_cat_'") == "cat"


def test_a_text_that_looks_like_a_file_is_no_warning(recwarn) -> None:
    assert clean_caption("cat.txt") == "cat. txt"
    assert not recwarn


@pytest.mark.parametrize("library", ["ftfy", "bs4"])
def test_without_its_libraries_the_error_says_what_to_install(monkeypatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vistok\[text\]'"):
        clean_caption("a cat")
