"""Words to make names of."""

from __future__ import annotations

import random
import uuid

from benchmarks.quality.passkeys import listed

ADJECTIVES = listed("""able|agile|amber|ancient|ample|arctic|autumn|azure|bashful|blithe|bold|brave|breezy|brisk|bronze
|calm|candid|careful|cheery|chilly|clever|coastal|copper|cosmic|crimson|crisp|curious|dapper|daring|dewy|distant|dreamy
|eager|early|earnest|eastern|elder|elegant|faint|fancy|fearless|festive|fierce|flinty|fluent|fragile|frosty|gallant
|gentle|gilded|glad|glossy|golden|graceful|grand|hardy|hazel|hearty|hidden|hollow|honest|humble|icy|idle|jolly|keen
|kindly|lavish|leafy|limber|lively|lofty|lunar|marble|mellow|merry|mighty|misty|mossy|nimble|noble|northern|opal|orderly
|pale|patient|peppery|placid|polite|proud|quaint|quick|quiet|rapid|rosy|rustic|salty|scarlet|serene|shady|silent|silver
|sleepy|smooth|solar|spirited|steady|stout|sturdy|subtle|sunny|swift|tender|tidy|timid|tranquil|upbeat|velvet|vivid
|wandering|western|whimsical|windy|wise|witty|woven|young|zesty""")

NOUNS = listed("""acorn|anchor|antler|apricot|archway|aspen|badger|banjo|barley|basin|beacon|beaver|bellows|birch|bison
|bonnet|boulder|bramble|brook|bucket|cabin|cactus|canoe|canyon|castle|cedar|cello|cherry|chimney|cinder|cliff|clover
|cobble|comet|compass|cottage|crane|cricket|daisy|dolphin|drum|eagle|ember|falcon|feather|fern|fiddle|finch|flagon|forge
|fountain|fox|garden|gazelle|geyser|glacier|goblet|granary|grove|hammer|hamster|harbor|harvest|hazelnut|heron|hinge
|iris|island|ivy|jackal|jasmine|kayak|kettle|kingdom|lagoon|lantern|lark|lattice|ledger|lemon|lilac|lizard|locket|magnet
|maple|marsh|meadow|melon|mitten|monsoon|moose|mortar|nectar|nettle|nutmeg|oak|oasis|octopus|olive|orchard|otter|oyster
|paddle|pantry|parrot|pebble|pelican|pepper|pigeon|pillow|pine|piston|plateau|pond|poplar|prairie|quarry|quill|rabbit
|raven|reed|ribbon|river|robin|saddle|sage|salmon|satchel|shovel|sparrow|spruce|squirrel|summit|sundial|swan|tandem
|teapot|temple|thimble|thistle|tiger|timber|trellis|trumpet|tulip|tundra|turnip|turtle|umbrella|urn|valley|viola|walnut
|walrus|wharf|whistle|willow|window|wolf|wren|zephyr""")


def word_names(rng: random.Random, number: int) -> list[str]:
    """So many different pairs like `amber-otter`.

    Raises:
        ValueError: there aren't as many.
    """
    most = len(ADJECTIVES) * len(NOUNS)
    if number > most:
        raise ValueError(f"{number:,} names are needed and there are {most:,}")
    drawn = rng.sample(range(most), number)
    return [f"{ADJECTIVES[place // len(NOUNS)]}-{NOUNS[place % len(NOUNS)]}" for place in drawn]


def numbers(rng: random.Random, number: int) -> list[str]:
    """So many different numbers of seven digits."""
    return [str(value) for value in rng.sample(range(1_000_000, 10_000_000), number)]


def uuids(rng: random.Random, number: int) -> list[str]:
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(number)]
