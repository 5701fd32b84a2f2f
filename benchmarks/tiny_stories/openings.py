"""How a third of the stories begin: openings with places for names and things, for variety."""

from __future__ import annotations

import random
import re

_WORDS = {
    "N": "Lily Tom Mia Ben Sara Max Anna Tim Lucy Sam Emma Jack Ella Leo Zoe Noah Amy Finn Rosie Omar Nina "
    "Kofi Mei Ravi",
    "C": "dog cat bird fish bear fox rabbit frog mouse duck lion turtle bee owl pig horse squirrel elephant "
    "monkey dragon",
    "T": "ball key box boat hat book drum kite shell stone lamp bell robot train doll cake apple flower map "
    "coin",
    "P": "park forest beach garden lake farm school hill river house shop castle cave town market library",
    "J": "little big red blue old happy sad brave shy kind funny tiny green clever lonely magic sleepy small",
}
_OPENINGS = """The J J T|The J C|The J J C|The J C and the J C|N and the J C went to the P
N and N went to the P|N found a T under the|N found a J T in the P|N had a J T|There was once a J C who
In a J P there lived a C|One morning, N woke up and|N and N were|A J C lived in the P|Deep in the P, a C
N was a J C|Mom gave N a J T|"Look!" said N. "A J T!"|Every day, the J C|One night, N heard
Long ago, in a J P,|N wanted a T|N saw a J C in the P|N and her C went to|N and his C went to|N lost a J T
One rainy day, a J C|The C was very J|N liked to play with|It was a sunny day and N|N made a J T for
The J T was"""


def random_opening(rng: random.Random) -> str:
    """The first words of a story."""
    pattern = rng.choice(re.split(r"[|\n]", _OPENINGS))
    text = re.sub(r"\b[NCTPJ]\b", lambda mark: rng.choice(_WORDS[mark[0]].split()), pattern)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
