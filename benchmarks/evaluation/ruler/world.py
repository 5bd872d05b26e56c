"""A made-up world to ask about, for `qa_1` and `qa_2` where no SQuAD or HotpotQA file is given.

People and institutions that don't exist, a paragraph each, so that no model knows the answers from its training. The
sentences come from few patterns: easier to search than an encyclopedia, and distractors are more alike.
"""

from __future__ import annotations

import random
from functools import cache

from benchmarks.evaluation.ruler.qa import Question, Source
from benchmarks.quality.passkeys import listed

PEOPLE = 1500
"""With as many institutions: some 270,000 tokens of paragraphs."""
FIRST = listed("""Adela|Anselm|Beatrix|Benno|Cosima|Cyril|Delia|Dorian|Edda|Emeric|Fabia|Florian|Gerda|Gideon|Hedwig
|Horatio|Ilona|Ivo|Jarmila|Joachim|Kasimir|Klara|Leopold|Livia|Magnus|Mathilde|Nestor|Odile|Osric|Petronella|Quirin
|Ramona|Roland|Sabine|Severin|Tabea|Tobias|Ursula|Valentin|Wanda|Xaver|Yvette|Zacharias|Zelda""")
LAST = listed("""Abernathy|Ashgrove|Bellamy|Birkenfeld|Blackwood|Brandvold|Castellan|Corwen|Dunmore|Eberhardt|Ellsworth
|Fairbourne|Farnholt|Galloway|Grimaldi|Halvorsen|Harrowgate|Ingersoll|Jessamine|Kaltenbach|Kingsley|Langstrom|Lindqvist
|Marchetti|Merriweather|Montague|Nordahl|Oakhurst|Pemberton|Quillfeather|Ravensworth|Rosenthal|Sandoval|Silverberg
|Thornbury|Underhill|Vandermeer|Westergaard|Winterbourne|Yarborough|Zimmerhof""")
TOWNS = listed("""Aldermoor|Bexhaven|Brackwater|Calderstone|Carrowmore|Dunhollow|Eastmere|Elmsford|Fallowfield|Fenwick
|Glimmerdale|Greystoke|Hartwell|Hollowbrook|Inverleigh|Kestrelby|Kingsbarrow|Larkspur|Lindenau|Lowmarch|Marrowdale
|Millhaven|Northwick|Oldcastle|Orchardton|Pinecrest|Quarrydale|Ravenglass|Redcliff|Rosewater|Saltmarsh|Silverford
|Stonebridge|Thistledown|Tidewell|Umberleigh|Valewood|Westerholm|Whitepool|Wychwood""")
TRADES = listed("""a bridge engineer|a botanist|a clockmaker|a composer|a geologist|a glassblower|a historian|a painter
|a physician|a shipbuilder|a surveyor|a translator""")
HABITS = listed("""collected old maps|kept bees|played the viola|grew roses|climbed mountains|restored furniture
|wrote poems|bred pigeons|sailed a small boat|baked bread for the neighbours|watched the stars|carved chess pieces""")
KINDS = listed("""Academy|Archive|Botanical Garden|Clock Museum|College|Concert Hall|Gallery|Hospital|Library
|Observatory|Press|Theatre""")
ADDRESS = listed("""by the river|on the market square|behind the old wall|near the station|on a hill|in a former mill
|beside the harbour|at the northern gate""")


@cache
def world() -> tuple[Source, Source]:
    """For single questions and for those that need two paragraphs; always the same."""
    rng = random.Random("a made-up world")
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    people = rng.sample(names, PEOPLE)
    paragraphs: list[str] = []
    single: list[Question] = []
    born: dict[str, str] = {}
    for number, name in enumerate(people):
        town, home = rng.sample(TOWNS, 2)
        born[name] = town
        year = rng.randrange(1780, 1930)
        age, trade, habit = rng.randrange(19, 35), rng.choice(TRADES), rng.choice(HABITS)
        paragraphs.append(
            f"{name} was {trade} who was born in {town} in {year}. At the age of {age} {name.split()[0]} moved to "
            f"{home}, where the first commissions came slowly. In later years {name.split()[0]} {habit} and taught "
            f"{rng.randrange(3, 40)} students."
        )
        single.append(Question(f"In which town was {name} born?", (town,), (number,)))
        single.append(Question(f"To which town did {name} move?", (home,), (number,)))
        single.append(Question(f"In which year was {name} born?", (str(year),), (number,)))
    double: list[Question] = []
    titles = [f"{last} {kind}" for last in LAST for kind in KINDS]
    titles += [f"{town} {title}" for title in titles for town in TOWNS[:5]]
    for title, founder in zip(titles[:PEOPLE], rng.sample(people, PEOPLE), strict=True):
        paragraphs.append(
            f"The {title} was founded in {rng.randrange(1850, 1960)} by {founder}. It stands {rng.choice(ADDRESS)} and "
            f"employs {rng.randrange(5, 90)} people. Its opening was celebrated for {rng.randrange(2, 9)} days."
        )
        gold = (len(paragraphs) - 1, people.index(founder))
        double.append(Question(f"In which town was the founder of the {title} born?", (born[founder],), gold))
    return Source("made-up world", paragraphs, single), Source("made-up world", paragraphs, double)
