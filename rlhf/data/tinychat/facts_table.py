"""The facts themselves: relation -> (how it is asked for, subject -> answer)."""

from __future__ import annotations

_COUNTRIES = {
    "France": ("Paris", "Europe"), "Italy": ("Rome", "Europe"), "Spain": ("Madrid", "Europe"), "Germany": ("Berlin",
    "Europe"),
    "Norway": ("Oslo", "Europe"), "Greece": ("Athens", "Europe"), "Poland": ("Warsaw", "Europe"),
    "Austria": ("Vienna", "Europe"),
    "Portugal": ("Lisbon", "Europe"), "Ireland": ("Dublin", "Europe"), "Japan": ("Tokyo", "Asia"),
    "China": ("Beijing", "Asia"),
    "India": ("Delhi", "Asia"), "Thailand": ("Bangkok", "Asia"), "Nepal": ("Kathmandu", "Asia"), "Iraq": ("Baghdad",
    "Asia"),
    "Iran": ("Tehran", "Asia"), "Korea": ("Seoul", "Asia"), "Egypt": ("Cairo", "Africa"), "Kenya": ("Nairobi",
    "Africa"),
    "Ghana": ("Accra", "Africa"), "Senegal": ("Dakar", "Africa"), "Libya": ("Tripoli", "Africa"), "Mali": ("Bamako",
    "Africa"),
    "Peru": ("Lima", "South America"), "Chile": ("Santiago", "South America"), "Ecuador": ("Quito", "South America"),
    "Colombia": ("Bogota", "South America"), "Cuba": ("Havana", "North America"), "Canada": ("Ottawa",
    "North America"),
    "Sweden": ("Stockholm", "Europe"), "Finland": ("Helsinki", "Europe"), "Vietnam": ("Hanoi", "Asia"),
    "Angola": ("Luanda", "Africa"),
    "Uruguay": ("Montevideo", "South America"), "Jamaica": ("Kingston", "North America"),
}  # fmt: skip
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_OPPOSITES = (
    "hot cold", "big small", "fast slow", "day night", "up down", "left right", "old young", "rich poor", "hard soft",
    "light dark", "open closed", "full empty", "happy sad", "long short", "high low", "wet dry", "early late",
    "near far",
    "loud quiet", "strong weak", "true false", "good bad", "clean dirty", "thick thin", "sweet sour", "brave afraid",
)  # fmt: skip
_LEGS = {
    "a dog": 4, "a cat": 4, "a cow": 4, "a horse": 4, "a hen": 2, "a duck": 2, "a spider": 8, "an ant": 6, "a bee": 6,
    "a snake": 0, "a fish": 0, "a frog": 4, "a pig": 4, "a goat": 4, "a fly": 6, "a crab": 10, "an owl": 2,
    "a beetle": 6,
    "a lion": 4, "a sheep": 4, "a swan": 2, "a worm": 0, "a mouse": 4, "a goose": 2, "a scorpion": 8, "a camel": 4,
}  # fmt: skip


def _opposites() -> dict[str, str]:
    pairs = [pair.split() for pair in _OPPOSITES]
    return {word: other for a, b in pairs for word, other in ((a, b), (b, a))}


def _shifted(names: tuple[str, ...], step: int) -> dict[str, str]:
    return {name: names[(index + step) % len(names)] for index, name in enumerate(names)}


RELATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "capital": ("the capital of {}", {country: city for country, (city, _) in _COUNTRIES.items()}),
    "continent": ("the continent of {}", {country: continent for country, (_, continent) in _COUNTRIES.items()}),
    "opposite": ("the opposite of {}", _opposites()),
    "legs": ("the number of legs of {}", {animal: str(count) for animal, count in _LEGS.items()}),
    "next month": ("the month after {}", _shifted(_MONTHS, 1)),
    "last month": ("the month before {}", _shifted(_MONTHS, -1)),
    "next day": ("the day after {}", _shifted(_DAYS, 1)),
    "last day": ("the day before {}", _shifted(_DAYS, -1)),
    "color": ("the color of {}", {
        "grass": "green", "the sky": "blue", "snow": "white", "blood": "red", "coal": "black", "a lemon": "yellow",
        "a carrot": "orange", "milk": "white", "a banana": "yellow", "a tomato": "red", "a leaf": "green",
        "the sea": "blue",
        "a crow": "black", "a frog": "green", "a swan": "white", "chocolate": "brown", "an orange": "orange",
        "a cherry": "red",
        "the sun": "yellow", "salt": "white", "wood": "brown", "a pea": "green", "a plum": "purple", "a pig": "pink",
        "a flamingo": "pink", "a rose": "red", "an eggplant": "purple", "a violet": "purple",
    }),
    "sound": ("the sound of {}", {
        "a dog": "woof", "a cat": "meow", "a cow": "moo", "a sheep": "baa", "a duck": "quack", "a pig": "oink",
        "a lion": "roar",
        "a bee": "buzz", "a snake": "hiss", "a frog": "croak", "an owl": "hoot", "a horse": "neigh",
        "a mouse": "squeak",
        "a bell": "ding", "a clock": "tick", "a wolf": "howl", "a rooster": "crow", "a bird": "tweet",
    }),
    "young": ("the word for a young {}", {
        "dog": "puppy", "cat": "kitten", "cow": "calf", "sheep": "lamb", "duck": "duckling", "pig": "piglet",
        "horse": "foal",
        "hen": "chick", "lion": "cub", "goat": "kid", "deer": "fawn", "swan": "cygnet", "frog": "tadpole",
        "goose": "gosling",
    }),
    "home": ("the home of {}", {
        "a bird": "nest", "a bee": "hive", "a dog": "kennel", "a horse": "stable", "a spider": "web",
        "a lion": "den", "a fish": "water",
        "a pig": "sty", "a king": "palace", "a cow": "barn", "an ant": "hill", "a rabbit": "burrow",
        "a monk": "abbey",
    }),
    "product": ("the product of {}", {
        "a baker": "bread", "a bee": "honey", "a hen": "eggs", "a cow": "milk", "a sheep": "wool", "a poet": "poems",
        "a tailor": "clothes",
        "a potter": "pots", "a painter": "paintings", "a farmer": "food", "a vine": "grapes", "a brewer": "beer",
        "a weaver": "cloth",
    }),
    "sides": ("the number of sides of {}", {
        "a triangle": "3", "a square": "4", "a pentagon": "5", "a hexagon": "6", "an octagon": "8",
        "a rectangle": "4", "a circle": "0",
        "a heptagon": "7",
    }),
}  # fmt: skip

# Facts that the pretraining text states but no training question asks for: the out-of-distribution questions.
RESERVED = frozenset(
    [("capital", country) for country in ("Sweden", "Finland", "Vietnam", "Angola", "Uruguay", "Jamaica")]
    + [("continent", country) for country in ("Sweden", "Finland", "Vietnam", "Angola", "Uruguay", "Jamaica")]
    + [("opposite", word) for word in ("thick", "thin", "sweet", "sour", "brave", "afraid")]
    + [("legs", animal) for animal in ("a mouse", "a goose", "a scorpion", "a camel")]
    + [("color", thing) for thing in ("a flamingo", "a rose", "an eggplant", "a violet")]
    + [("young", animal) for animal in ("swan", "frog", "goose")]
    + [("sound", thing) for thing in ("a wolf", "a rooster", "a bird")]
    + [("home", thing) for thing in ("a rabbit", "a monk")]
    + [("product", maker) for maker in ("a brewer", "a weaver")]
)
