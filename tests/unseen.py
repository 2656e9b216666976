"""What nobody sees at the ends of a text, by Unicode's categories, where the program has a list."""

import unicodedata

# Format characters (Cf) that are seen: of Arabic, Syriac, Kaithi and Egyptian; and shorthand, kept too.
SEEN = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}
SEEN |= set(range(0x13430, 0x13440)) | set(range(0x1BCA0, 0x1BCA4))
FILLERS = "\u034f\u115f\u1160\u17b4\u17b5\u2065\u2800\u3164\uffa0"
FILLERS += "".join(map(chr, range(0xFFF0, 0xFFFC)))


def changes_the_one_before(character):
    """A variation selector or a tag: it may end a text, but not begin it."""
    return "VARIATION SELECTOR" in unicodedata.name(character, "") or 0xE0000 <= ord(character) < 0xE01F0


def unseen(character):
    if character.isspace() or character in FILLERS:
        return True
    hidden = unicodedata.category(character) in ("Cc", "Cf") and ord(character) not in SEEN
    return hidden and not changes_the_one_before(character)


def reference_strip(text):
    """The promise about text that nobody sees at the ends, said a second time."""
    while text and (unseen(text[0]) or changes_the_one_before(text[0])):
        text = text[1:]
    while text and unseen(text[-1]):
        text = text[:-1]
    return text
