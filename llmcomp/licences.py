"""What licences, by the names that the Hub has for them, say of derivatives; and those of known calibration text.

A compressed model is a derivative of its source. This is no legal advice: it knows the Creative Commons' ND, and that
everything that is not on its short list wants to be read.
"""

from __future__ import annotations

import re

_NO_DERIVATIVES = re.compile(r"cc-by(-nc)?-nd-[\d.]+")
_FREE = {
    "apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "cc0-1.0", "unlicense",
    "cc-by-3.0", "cc-by-4.0", "wtfpl", "zlib", "openmdw-1.0",
}  # fmt: skip
_OF_DATA = {
    "Salesforce/wikitext": "CC BY-SA 3.0 and GFDL",
    "sample:lm": "PSF licence (documentation of Python's standard library)",
    "sample:classifier": "PSF licence (documentation of Python's standard library)",
    "sample": "PSF licence (documentation of Python's standard library)",
}
_SHIPS, _WIKITEXT = "text that ships with llmcomp", "WikiText-2"


def warning(licence: str | None, name: str | None = None) -> str | None:
    """One sentence where a derivative should not be published before the source's licence was read, else None.

    >>> warning("apache-2.0")
    >>> warning("cc-by-nc-nd-4.0")
    'The source is under cc-by-nc-nd-4.0, which forbids sharing derivatives, and a compressed model is one.'
    >>> warning("other", "mit, cc-by-nd-4.0")
    'The source is under cc-by-nd-4.0, which forbids sharing derivatives, and a compressed model is one.'
    """
    if licence is None:
        return "The source's card names no licence; ask its authors before you publish a derivative of it."
    for one in (licence, *re.split(r"[,\s]+", name or "")):
        if _NO_DERIVATIVES.fullmatch(one.lower()):
            return f"The source is under {one}, which forbids sharing derivatives, and a compressed model is one."
    if licence.lower() in _FREE:
        return None
    shown = f"{licence} ({name})" if name else licence
    return f"The source is under {shown}; a compressed model is a derivative, so its conditions hold for it, too."


def of_data(source: str, description: str) -> str:
    """The licence of calibration text, from what a report says of it.

    >>> of_data("default", "WikiText-2 train (Salesforce/wikitext, wikitext-2-raw-v1): 128 samples")
    'CC BY-SA 3.0 and GFDL'
    >>> of_data("mine.jsonl", "mine.jsonl: 128 samples")
    'not known to llmcomp'
    """
    if _SHIPS in description:
        return _OF_DATA["sample"]
    if _WIKITEXT in description:
        return _OF_DATA["Salesforce/wikitext"]
    return _OF_DATA.get(source, "not known to llmcomp")
