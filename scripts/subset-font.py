#!/usr/bin/env python3
"""Cuts the font of the pictures down to the characters they need.

    pip install fonttools cffsubr
    python3 scripts/subset-font.py FONT OUT TEXT...

FONT is a .ttf, .otf or .ttc file. Each TEXT is a UTF-8 text file, or a vocab.json: the Chinese
characters in them are kept, next to Latin, kana, punctuation and full-width forms.
"""

import argparse
import json
from pathlib import Path

import cffsubr
from fontTools import subset
from fontTools.ttLib import TTCollection, TTFont

# Kept whatever the texts are.
ALWAYS = [
    (0x0020, 0x007E),  # ASCII
    (0x00A0, 0x017F),  # Latin-1, Latin Extended-A
    (0x2010, 0x2027),  # general punctuation
    (0x2030, 0x203A),
    (0x20AC, 0x20AC),  # euro
    (0x2190, 0x2193),  # arrows
    (0x2212, 0x2212),  # minus
    (0x2581, 0x2581),  # the sign of a word's start
    (0x3000, 0x301F),  # CJK punctuation
    (0x3041, 0x30FF),  # kana
    (0xFE50, 0xFE57),  # small forms
    (0xFF01, 0xFF60),  # full-width forms
]
QUOTES = (0x2018, 0x2019, 0x201C, 0x201D)

# Entries of the name table.
FAMILY, UNIQUE, FULL, POSTSCRIPT = 1, 3, 4, 6
# Those, the copyright, the style, the version and the licence.
NAMES = [0, FAMILY, 2, UNIQUE, FULL, 5, POSTSCRIPT, 13, 14]


def is_han(char):
    code = ord(char)
    return 0x3400 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or 0x20000 <= code <= 0x3FFFF


def characters(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        text = "".join(json.loads(text))
    return {ord(char) for char in text if is_han(char)}


def load(path, family):
    if path.suffix != ".ttc":
        return TTFont(path)
    fonts = TTCollection(path).fonts
    for font in fonts:
        if font["name"].getDebugName(FAMILY) == family:
            return font
    names = ", ".join(font["name"].getDebugName(FAMILY) for font in fonts)
    raise SystemExit(f"{path}: no family {family!r}; it has {names}")


def narrow_quotes(font):
    """Quotes as wide as Latin ones: Chinese fonts have them as wide as Chinese characters."""
    narrow = {}
    table = font["GSUB"].table if "GSUB" in font else None
    for record in table.FeatureList.FeatureRecord if table else []:
        if record.FeatureTag == "pwid":
            for ix in record.Feature.LookupListIndex:
                for part in table.LookupList.Lookup[ix].SubTable:
                    narrow.update(getattr(part, "ExtSubTable", part).mapping)
    for cmap in font["cmap"].tables:
        for code in QUOTES:
            if code in getattr(cmap, "cmap", {}) and cmap.format != 14:
                cmap.cmap[code] = narrow.get(cmap.cmap[code], cmap.cmap[code])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("font", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--family", default="Noto Sans CJK TC", help="which one of a .ttc file")
    parser.add_argument("--name", default="QKV Sans", help="what to call the subset")
    args = parser.parse_args()

    wanted = {code for first, last in ALWAYS for code in range(first, last + 1)}
    for path in args.texts:
        wanted |= characters(path)

    options = subset.Options()
    options.hinting = False
    options.layout_features = []
    options.drop_tables += ["GSUB", "GPOS", "GDEF", "BASE", "VORG", "vhea", "vmtx", "DSIG"]
    options.notdef_outline = True
    options.glyph_names = False
    options.name_IDs = NAMES
    options.name_languages = [0x409]
    options.recalc_timestamp = False
    font = load(args.font, args.family)
    narrow_quotes(font)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=wanted)
    subsetter.subset(font)

    for record in list(font["name"].names):
        if record.nameID in (FAMILY, FULL, UNIQUE):
            record.string = args.name
        elif record.nameID == POSTSCRIPT:
            record.string = args.name.replace(" ", "")
    if "CFF " in font:
        cff = font["CFF "].cff
        cff.fontNames = [args.name.replace(" ", "") + "-Regular"]
        top = cff.topDictIndex[0]
        top.FullName = top.FamilyName = args.name
        cffsubr.subroutinize(font)
    font.save(args.out)

    missing = sorted(wanted - set(font.getBestCmap()))
    print(f"{args.out}: {args.out.stat().st_size} bytes, {len(font.getGlyphOrder())} glyphs")
    if missing:
        print("not in the font:", " ".join(f"U+{code:04X}" for code in missing))


if __name__ == "__main__":
    main()
