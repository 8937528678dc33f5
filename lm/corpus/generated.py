"""Corpora that are generated: sums, and conversations about small exercises, the same on every machine."""

import json
import random
from collections.abc import Callable
from datetime import date


def arithmetic() -> str:
    """Return 50,000 sums of two numbers below 1,000, one a line."""
    draw = random.Random(0)
    pairs = ((draw.randrange(1000), draw.randrange(1000)) for _ in range(50_000))
    return "".join(f"{a}+{b}={a + b}\n" for a, b in pairs)


def conversations(count: int = 20_000) -> str:
    """Return conversations of adding, reversing, upper-casing and counting as JSON lines, no two of them equal."""
    draw, made = random.Random(0), dict[str, None]()
    while len(made) < count:
        turns = [draw.choice(EXERCISES)(draw) for _ in range(draw.choice((1, 1, 2)))]
        messages = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        made[json.dumps({"messages": messages})] = None
    return "".join(f"{line}\n" for line in made)


def _word(draw: random.Random) -> str:
    return "".join(draw.choice("bdlmnrst") + draw.choice("aeiou") for _ in range(draw.randint(2, 3)))


def _add(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randrange(100), draw.randrange(100)
    return f"Add {a:02} and {b:02}, last digit first.", str(a + b)[::-1]  # written so, a digit needs no later ones


def _reverse(draw: random.Random) -> tuple[str, str]:
    word = _word(draw)
    return f"Reverse {word}.", word[::-1]


def _upper(draw: random.Random) -> tuple[str, str]:
    word = _word(draw)
    return f"Write {word} in capitals.", word.upper()


def _count(draw: random.Random) -> tuple[str, str]:
    word = _word(draw)
    letter = draw.choice(word)
    return f"How many {letter} has {word}?", str(word.count(letter))


EXERCISES: tuple[Callable[[random.Random], tuple[str, str]], ...] = (_add, _reverse, _upper, _count)


def name(draw: random.Random) -> str:
    """Return a made-up name of one to three syllables."""
    syllables = (draw.choice("bdlmnrst") + draw.choice("aeiou") for _ in range(draw.randint(1, 3)))
    return "".join(syllables) + draw.choice(("", "", "l", "n", "s"))


def gold_reward(text: str) -> float:
    """Return how good a name is, by a rule that is known: a vowel at its end, and two syllables rather than more."""
    vowels = sum(text.count(vowel) for vowel in "aeiou")
    return 2.0 * text.endswith(tuple("aeiou")) - abs(vowels - 2)


MONTHS = ("January", "February", "March", "April", "May", "June",
          "July", "August", "September", "October", "November", "December")  # fmt: skip


def dates(count: int = 10_000) -> str:
    """Return days as people write them, a tab, and as ISO 8601 does, one a line, no two of them equal."""
    draw, lines = random.Random(3), dict[str, None]()
    while len(lines) < count:
        day = date.fromordinal(draw.randrange(date(1800, 1, 1).toordinal(), date(2100, 1, 1).toordinal()))
        name = MONTHS[day.month - 1]
        forms = (f"{day.day} {name} {day.year}", f"{name} {day.day}, {day.year}", f"{name[:3]} {day.day} {day.year}",
                 f"{day.day}.{day.month}.{day.year}")  # fmt: skip
        lines[f"{draw.choice(forms)}\t{day.isoformat()}"] = None
    return "".join(f"{line}\n" for line in lines)


def reviews(count: int = 6_000) -> str:
    """Return a label, positive or negative, a tab and a sentence a line; a "not" turns it round."""
    draw, lines = random.Random(4), dict[str, None]()
    while len(lines) < count:
        good, turned = draw.random() < 0.5, draw.random() < 0.5
        word = draw.choice(("good", "great", "lovely", "clever") if good else ("bad", "dull", "awful", "silly"))
        what = draw.choice(("film", "book", "play", "song", "story", "cast", "plot", "ending", "music", "first half"))
        who = draw.choice(("I thought", "We found", "They said", "My friends say", "Some think", "Honestly,"))
        how = draw.choice(("", "very ", "really ", "so ", "all that ", "exactly "))
        when = draw.choice((".", " at all.", " this time.", " in the end.", "!"))
        text = f"{who} the {what} was {'not ' * turned}{how}{word}{when}"
        lines[f"{'positive' if good != turned else 'negative'}\t{text}"] = None
    return "".join(f"{line}\n" for line in lines)


ASKED = "Write a name."


def names_to_write(count: int = 6_000) -> str:
    """Return conversations that ask for a name, as JSON lines."""
    draw, names = random.Random(1), dict[str, None]()  # each once: what is held out of training is new
    while len(names) < count:
        names[name(draw)] = None
    return "".join(json.dumps({"prompt": ASKED, "completion": one}) + "\n" for one in names)


def preferences(count: int = 5_000, wrong: float = 0.03) -> str:
    """Return pairs of names as JSON lines; the chosen one has the larger gold reward, but for a share of labels."""
    draw, lines = random.Random(2), list[str]()
    while len(lines) < count:
        pair = sorted((name(draw), name(draw)), key=gold_reward, reverse=True)
        if gold_reward(pair[0]) > gold_reward(pair[1]):
            chosen, rejected = pair[::-1] if draw.random() < wrong else pair
            lines.append(json.dumps({"prompt": ASKED, "chosen": chosen, "rejected": rejected}) + "\n")
    return "".join(lines)
