"""The sample preferences of the quickstart: short questions, graded answers, noisy labels.

Every question makes two demands (name a capital, and it is France's; list fruits, and three of
them). The quality of a response is the number of demands that it meets: 0, 1 or 2. A question comes
with four responses, of qualities 2, 1, 1 and 0, and each pair of unequal ones is a record whose
label is drawn from a Bradley-Terry model over the qualities.

The words of a response say nothing without its prompt: what is wrong for one question is right for
another, equally often and in the same frames. Held-out questions are about entities that training
never shows, in phrasings that it never shows; what the base model knew is all there is to go by.

Knows nothing of tokenizers, of models, or of how records become groups.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Demand = Callable[[str], bool]

# Log-odds that a response wins against one that meets one demand less.
GAP = 3.0
# Share of every bank that only held-out questions use.
HELD_OUT = 0.3

CAPITALS = """
France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Greece Athens, Austria Vienna,
Poland Warsaw, Hungary Budapest, Ireland Dublin, England London, Scotland Edinburgh, Norway Oslo,
Sweden Stockholm, Denmark Copenhagen, Finland Helsinki, Iceland Reykjavik, Russia Moscow, Ukraine Kyiv,
Belgium Brussels, Switzerland Bern, Netherlands Amsterdam, Romania Bucharest, Bulgaria Sofia,
Serbia Belgrade, Croatia Zagreb, Albania Tirana, Turkey Ankara, Egypt Cairo, Morocco Rabat,
Libya Tripoli, Kenya Nairobi, Ethiopia Addis_Ababa, Uganda Kampala, Ghana Accra, Nigeria Abuja,
Senegal Dakar, Angola Luanda, Zimbabwe Harare, Zambia Lusaka, Somalia Mogadishu, Sudan Khartoum,
Iran Tehran, Iraq Baghdad, Israel Jerusalem, Lebanon Beirut, Syria Damascus, Jordan Amman,
Saudi_Arabia Riyadh, Qatar Doha, Afghanistan Kabul, Pakistan Islamabad, India New_Delhi,
Nepal Kathmandu, Bangladesh Dhaka, China Beijing, Japan Tokyo, South_Korea Seoul,
North_Korea Pyongyang, Taiwan Taipei, Thailand Bangkok, Vietnam Hanoi, Indonesia Jakarta,
Malaysia Kuala_Lumpur, Philippines Manila, Mongolia Ulaanbaatar, Australia Canberra,
New_Zealand Wellington, Canada Ottawa, Cuba Havana, Jamaica Kingston, Peru Lima, Chile Santiago,
Argentina Buenos_Aires, Colombia Bogota, Venezuela Caracas, Ecuador Quito, Uruguay Montevideo,
Bolivia La_Paz, Rwanda Kigali, Latvia Riga, Armenia Yerevan, Georgia Tbilisi, Cyprus Nicosia,
Madagascar Antananarivo, Mozambique Maputo, Tanzania Dodoma, Mali Bamako, Haiti Port-au-Prince
"""

OPPOSITES = """
hot cold, big small, fast slow, happy sad, rich poor, hard soft, loud quiet, full empty, wet dry,
strong weak, wide narrow, thick thin, deep shallow, early late, near far, always never,
everything nothing, love hate, friend enemy, war peace, east west, north south, borrow lend,
push pull, end start, laugh cry, arrive depart, accept reject, attack defend, create destroy,
increase decrease, expand contract, remember forget, succeed fail, enter exit, rise sink,
success failure, victory defeat, birth death, front back, top bottom, maximum minimum,
positive negative, plus minus, male female, brave cowardly, generous stingy, polite rude, kind cruel,
calm nervous, lazy hardworking, smart stupid, beautiful ugly, cheap expensive, safe dangerous,
simple complicated, easy difficult, smooth rough, sharp blunt, sweet sour, fresh stale, raw cooked,
tight loose, straight crooked, alive dead, awake asleep, present absent, public private,
guilty innocent, modern ancient, natural artificial, common rare, visible invisible,
possible impossible, optimistic pessimistic, major minor, vertical horizontal, import export,
hero villain, heaven hell, true false, good bad, temporary permanent, profit loss, include exclude,
heavy light, young old, day night, summer winter, left right, inside outside, buy sell, clean dirty
"""

CATEGORIES = """
fruit fruits: apple banana pear peach plum cherry mango grape lemon strawberry
vegetable vegetables: carrot potato onion cabbage spinach broccoli cucumber lettuce celery turnip
animal animals: cow pig sheep goat horse donkey tiger wolf monkey leopard camel rabbit
bird birds: eagle sparrow owl parrot pigeon swan hawk robin crow
fish fish: salmon tuna trout cod sardine herring mackerel carp
insect insects: ant bee butterfly mosquito beetle wasp moth grasshopper
tree trees: oak pine maple birch willow cedar elm spruce
flower flowers: tulip daisy lily sunflower orchid daffodil violet
color colors: red blue green yellow purple brown white black pink gray
metal metals: iron gold silver copper aluminum tin zinc nickel titanium
gas gases: oxygen nitrogen hydrogen helium methane neon argon
planet planets: Mars Venus Jupiter Saturn Neptune Mercury Uranus
vehicle vehicles: car bus truck train bicycle motorcycle taxi tram
tool tools: screwdriver wrench drill pliers chisel saw
weapon weapons: sword gun spear rifle dagger pistol cannon
piece_of_furniture pieces_of_furniture: chair table sofa bed desk wardrobe bookcase couch
piece_of_clothing pieces_of_clothing: shirt trousers jacket coat sweater skirt dress jeans
drink drinks: coffee tea juice milk water lemonade beer wine
spice spices: pepper cinnamon ginger turmeric cumin nutmeg paprika
musical_instrument musical_instruments: piano guitar violin trumpet flute drum cello clarinet harp
sport sports: football tennis basketball hockey golf baseball volleyball rugby
part_of_the_body parts_of_the_body: arm leg hand foot knee elbow shoulder neck heart liver
day_of_the_week days_of_the_week: Monday Tuesday Wednesday Thursday Friday Saturday Sunday
month months: January February April June July August October December
shape shapes: circle square triangle rectangle pentagon hexagon oval
language languages: English French Spanish German Italian Russian Arabic Chinese
religion religions: Christianity Islam Buddhism Hinduism Judaism Sikhism
family_member family_members: mother father sister brother aunt uncle cousin grandmother
emotion emotions: anger fear joy sadness jealousy disgust surprise
kind_of_weather kinds_of_weather: rain snow fog wind hail thunder
room_of_a_house rooms_of_a_house: kitchen bedroom bathroom attic basement hallway
building buildings: church castle museum hotel palace temple
school_subject school_subjects: mathematics geography chemistry physics algebra economics
"""

DEFINITIONS = """
someone who flies planes: pilot; someone who bakes bread: baker; someone who teaches pupils: teacher;
someone who puts out fires: firefighter; someone who cuts hair: barber; someone who fixes teeth: dentist;
someone who grows crops: farmer; someone who writes books: author; someone who paints pictures: painter;
someone who mends pipes: plumber; someone who designs houses: architect; someone who sells meat: butcher;
someone who treats sick pets: veterinarian; someone who makes clothes: tailor; someone who works in a mine: miner;
someone who studies stars: astronomer; someone who travels in space: astronaut; someone who acts in films: actor;
someone who serves meals: waiter; someone who steals things: thief; someone who wears a crown and rules: king;
someone who takes photographs: photographer; someone who defends people in court: lawyer;
someone who decides cases in court: judge; someone who operates on patients: surgeon;
someone who writes poems: poet; someone who leads an orchestra: conductor; someone who catches criminals: detective;
someone who fights in an army: soldier; someone who cooks for a restaurant: chef; someone who rides in races: jockey;
someone who reports the news: journalist; someone who eats no meat: vegetarian; someone whose parents died: orphan;
a woman whose husband died: widow; a young dog: puppy; a young cat: kitten; a young sheep: lamb; a young cow: calf;
a young chicken: chick; a young frog: tadpole; a young bear: cub; a young horse: foal; the meat of a pig: pork;
the meat of a cow: beef; frozen water: ice; the house of a bird: nest; the house of a spider: web; the house of a bee: hive;
what bees make: honey; what hens lay: eggs; the season after summer: autumn; the light after dark: dawn;
a place where planes land: airport; a place where trains stop: station; a place where ships dock: harbor;
a place with books to borrow: library; a place where the sick are treated: hospital; a place where money is kept: bank;
a place where films are shown: cinema; a place where criminals are locked up: prison; a place to keep cars: garage;
a place where the dead are buried: cemetery; a place where wine is made: winery; a place to buy medicine: pharmacy;
a dry place full of sand: desert; a mountain that erupts: volcano; land with water all around: island;
a large group of trees: forest; water that falls over a cliff: waterfall; a river of ice: glacier;
a hole in a mountain: cave; the edge of the sea: beach; a storm that spins: tornado; the shaking of the ground: earthquake;
colours in the sky after rain: rainbow; a tool for driving nails: hammer; a tool for cutting paper: scissors;
a tool for digging: shovel; a tool for sweeping: broom; a device that tells the time: clock;
a device for taking pictures: camera; a device for seeing far things: telescope; a device for seeing tiny things: microscope;
a device that measures heat: thermometer; a device that shows north: compass; a thing to keep off the rain: umbrella;
a thing to sleep on: mattress; a thing to dry yourself: towel; a thing to clean teeth: toothbrush;
a thing to write on a blackboard: chalk; a thing to open a lock: key; a thing you look into to see yourself: mirror;
a thing to help you see better: glasses; a thing worn on the hand in winter: glove; a thing worn on the head: hat;
a thing worn on the finger: ring; a thing that lights a room: lamp; a thing to cross a river: bridge;
a glass house for plants: greenhouse; a hundred years: century; ten years: decade; sixty minutes: hour; sixty seconds: minute;
seven days: week; twelve months: year; twelve things: dozen; two babies born together: twins;
the centre of an atom: nucleus; the star that warms us: sun; the force that makes things fall: gravity;
the study of living things: biology; the study of the past: history; the red liquid in the body: blood;
the bones of a body: skeleton; a fear of something: phobia; a book of words and meanings: dictionary;
a book of maps: atlas; a story of one's own life: autobiography; a test at school: exam; a meal in the morning: breakfast;
a meal at noon: lunch; a meal in the open air: picnic; a day off work: holiday; a dream that scares: nightmare;
the day one was born: birthday; a party for getting married: wedding; a doll moved by strings: puppet;
an animal with a trunk: elephant; an animal with a very long neck: giraffe; an animal with black and white stripes: zebra;
an animal with a pouch: kangaroo; an animal with eight arms: octopus; a bird that cannot fly but swims: penguin;
a reptile with a shell: turtle; a long reptile with no legs: snake; a cat with a mane: lion; an insect that makes silk: silkworm
"""

VERBS = """
go went going, see saw seeing, eat ate eating, drink drank drinking, sing sang singing, swim swam swimming,
run ran running, write wrote writing, drive drove driving, ride rode riding, speak spoke speaking,
break broke breaking, choose chose choosing, steal stole stealing, wake woke waking, take took taking,
give gave giving, come came coming, know knew knowing, grow grew growing, throw threw throwing,
fly flew flying, draw drew drawing, blow blew blowing, think thought thinking, buy bought buying,
bring brought bringing, catch caught catching, teach taught teaching, fight fought fighting,
find found finding, hold held holding, stand stood standing, tell told telling, sell sold selling,
feel felt feeling, keep kept keeping, sleep slept sleeping, leave left leaving, meet met meeting,
send sent sending, spend spent spending, build built building, lose lost losing, win won winning,
begin began beginning, ring rang ringing, sit sat sitting, shoot shot shooting, lead led leading,
hear heard hearing, say said saying, pay paid paying, make made making, walk walked walking,
play played playing, jump jumped jumping, cook cooked cooking, dance danced dancing, work worked working,
smile smiled smiling, help helped helping, climb climbed climbing, talk talked talking,
clean cleaned cleaning, carry carried carrying, study studied studying, stop stopped stopping,
plan planned planning, travel traveled traveling, shout shouted shouting, open opened opening,
watch watched watching, wash washed washing, paint painted painting, listen listened listening,
hide hid hiding, bite bit biting, dig dug digging, shake shook shaking, fall fell falling, forget forgot forgetting
"""

NAMES = """
Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Leo Maria Nick Olivia Peter Quinn Ruth Sam Tina
Victor Wendy Adam Bella Carl Diana Eric Fiona George Helen Ivan Julia Kevin Laura Mark Nora Oscar Paula
Robert Sarah Thomas Vera Walter Alice Brian Cathy Daniel Edith Felix Gina Hugo Jane Karl Linda Martin Nancy
Paul Rachel Simon Susan
"""

OBJECTS = """
key coin basket candle ladder bottle kite pencil wallet suitcase blanket pillow bucket balloon rope lantern
magnet ticket notebook envelope button ribbon bracelet necklace helmet backpack kettle teapot spoon fork
plate bowl mug jar vase clock broom sponge soap whistle map postcard puzzle doll ball stamp shell feather
stone leaf cushion carpet curtain brush comb razor needle scarf belt sandal boot
"""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")

# What a right and a wrong answer are wrapped in alike: (training, held out).
FRAMES = (
    ("{}", "{}.", "It is {}.", "The answer is {}."),
    ("That is {}.", "I would say {}.", "My answer: {}."),
)
LIST_FRAMES = (("{}", "{}.", "Sure: {}."), ("Here you go: {}.", "My list: {}"))

# skill → (training, held out) phrasings.
PHRASINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "capital": (
        (
            "What is the capital of {}?",
            "Name the capital city of {}.",
            "Which city is the capital of {}?",
            "{}: what is its capital?",
            "Tell me the capital of {}.",
        ),
        (
            "Which city does the government of {} sit in, being its capital?",
            "I am learning capitals. What is the one of {}?",
            "Do you know {}'s capital city?",
        ),
    ),
    "opposite": (
        (
            "What is the opposite of {}?",
            "Give me the opposite of the word {}.",
            "Which word is the opposite of {}?",
            "Name an antonym of {}.",
            "What is the contrary of {}?",
        ),
        (
            "If something is not {}, but the reverse, what is it?",
            "Find the word that means the reverse of {}.",
            "{} has an opposite. Which word?",
        ),
    ),
    "definition": (
        (
            "What do you call {}?",
            "Which word means {}?",
            "What is the word for {}?",
            "Name this: {}.",
            "How do we call {} in English?",
        ),
        (
            "I am thinking of {}. Guess the word.",
            "Crossword clue: {}. Solve it.",
            "What noun describes {}?",
        ),
    ),
    "choice": (
        (
            "Which of these is a {kind}: {options}?",
            "Pick the {kind}: {options}.",
            "One of these is a {kind}: {options}. Which?",
            "Choose the {kind} from: {options}.",
        ),
        (
            "Only one of the following is a {kind}: {options}. Say it.",
            "Look at {options}. Find the {kind} among them.",
        ),
    ),
    "list": (
        (
            "List {number} {kinds}.",
            "Name {number} {kinds}.",
            "Give me {number} {kinds}.",
            "I need {number} {kinds}.",
        ),
        (
            "Could you tell me {number} {kinds}, please?",
            "Write down {number} {kinds}.",
        ),
    ),
    "past": (
        (
            "What is the past tense of {}?",
            "Give the past form of {}.",
            "Fill in a form of {}: yesterday we ___ there.",
            "Last week she ___ (verb: {}).",
        ),
        (
            "Put the verb {} into the simple past.",
            "It happened a long time ago: I ___ it. Use {}.",
        ),
    ),
    "ing": (
        (
            "What is the -ing form of {}?",
            "Give the present participle of {}.",
            "Fill in a form of {}: right now we are ___.",
            "At the moment she is ___ (verb: {}).",
        ),
        (
            "Put the verb {} into the gerund.",
            "It is happening now: I am ___ it. Use {}.",
        ),
    ),
    "who": (
        (
            "{0} has a {3}, {1} has a {4} and {2} has a {5}. Who has the {6}?",
            "{0} found a {3}. {1} found a {4}. {2} found a {5}. Who found the {6}?",
            "{0} bought a {3}, {1} a {4}, {2} a {5}. Who bought the {6}?",
        ),
        (
            "The {3} belongs to {0}, the {4} to {1}, the {5} to {2}. Whose is the {6}?",
            "{0} lost a {3}, while {1} lost a {4} and {2} lost a {5}. Who misses the {6}?",
        ),
    ),
    "sum": (
        (
            "What is {} plus {}?",
            "{} + {} = ?",
            "Add {} and {}.",
            "How much is {} + {}?",
        ),
        (
            "Compute the sum of {} and {}.",
            "I have {} apples and get {} more. How many do I have?",
        ),
    ),
}

# format → (how two words look in it, how to recognise it, training phrasings, held-out phrasings).
FORMATS: dict[str, tuple[Callable[[str, str], str], str, tuple[str, ...], tuple[str, ...]]] = {
    "capitals": (
        lambda a, b: f"{a}, {b}".upper(),
        r"[^a-z]+",
        (
            "Write {} and {} in capital letters.",
            "Type {} and {} in all caps.",
            "Repeat {} and {} with every letter capitalized.",
        ),
        ("Put {} and {} in upper case.", "Shout the words {} and {} in big letters."),
    ),
    "bullets": (
        lambda a, b: f"- {a}\n- {b}",
        r"- .+\n- .+",
        (
            "Write {} and {} as a bulleted list.",
            "Make bullet points of {} and {}.",
            "Repeat {} and {}, each after a dash on its own line.",
        ),
        ("Put {} and {} in a list with bullets.", "Show {} and {} as two bullet points."),
    ),
    "numbers": (
        lambda a, b: f"1. {a}\n2. {b}",
        r"1\. .+\n2\. .+",
        (
            "Write {} and {} as a numbered list.",
            "Number these items: {} and {}.",
            "Repeat {} and {}, numbered from one to two.",
        ),
        ("Put {} and {} in a list with numbers.", "Show {} and {} as items 1 and 2."),
    ),
    "quotes": (
        lambda a, b: f'"{a}", "{b}"',
        r'"[^"]+", "[^"]+"',
        (
            "Write {} and {} in quotation marks.",
            "Put quotes around {} and {}.",
            "Repeat {} and {}, each between double quotes.",
        ),
        ("Quote the words {} and {}.", "Show {} and {} inside quotation marks."),
    ),
    "brackets": (
        lambda a, b: f"({a}), ({b})",
        r"\([^()]+\), \([^()]+\)",
        (
            "Write {} and {} in brackets.",
            "Put parentheses around {} and {}.",
            "Repeat {} and {}, each between round brackets.",
        ),
        ("Enclose {} and {} in parentheses.", "Show {} and {} inside brackets."),
    ),
    "exclamation": (
        lambda a, b: f"{a}! {b}!",
        r"[^!]+! [^!]+!",
        (
            "Write {} and {} with exclamation marks.",
            "Put an exclamation mark after {} and after {}.",
            "Repeat {} and {}, each followed by an exclamation point.",
        ),
        ("Exclaim {} and {}.", "Show {} and {} ending in an exclamation mark."),
    ),
}


def _words(text: str) -> list[str]:
    return [word.replace("_", " ") for word in text.split()]


def _facts(text: str) -> list[tuple[str, ...]]:
    return [tuple(_words(fact)) for fact in text.split(",")]


def _definitions(text: str) -> list[tuple[str, str]]:
    pairs = (fact.split(":") for fact in text.split(";"))
    return [(" ".join(clue.split()), word.strip()) for clue, word in pairs]


def _categories(text: str) -> list[tuple[str, str, tuple[str, ...]]]:
    rows = (line.split(":") for line in text.strip().splitlines())
    return [(*_words(names), tuple(_words(members))) for names, members in rows]  # type: ignore[misc]


def mentions(words: Iterable[str]) -> Demand:
    """A demand: the response holds one of ``words`` as a whole word, in any case."""
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)
    return lambda response: pattern.search(response) is not None


@dataclass(frozen=True)
class Question:
    """A prompt, what it demands of a response, and four responses of qualities 2, 1, 1 and 0."""

    skill: str
    prompt: str
    responses: tuple[str, str, str, str]
    demands: tuple[Demand, Demand]

    def quality(self, response: str) -> int:
        """Number of demands that ``response`` meets: 0, 1 or 2."""
        return sum(demand(response) for demand in self.demands)


@dataclass(frozen=True)
class Facts:
    """What one split may ask about and answer with, and the index of its phrasings."""

    split: int
    capitals: list[tuple[str, ...]]
    opposites: list[tuple[str, ...]]
    definitions: list[tuple[str, str]]
    categories: list[tuple[str, str, tuple[str, ...]]]
    verbs: list[tuple[str, ...]]
    names: list[str]
    objects: list[str]
    sums: list[tuple[int, int]]

    def phrase(self, rng: random.Random, skill: str) -> str:
        return rng.choice(PHRASINGS[skill][self.split])

    def framed(self, rng: random.Random, answers: Iterable[str]) -> tuple[str, ...]:
        return tuple(rng.choice(FRAMES[self.split]).format(answer) for answer in answers)

    def stray(self, rng: random.Random, skill: str) -> str:
        """A right answer to some question of another skill."""
        banks = {
            "capital": [capital for _, capital in self.capitals],
            "opposite": [word for pair in self.opposites for word in pair],
            "definition": [word for _, word in self.definitions],
        }
        return rng.choice(banks[rng.choice([other for other in banks if other != skill])])


def split_facts(seed: int) -> tuple[Facts, Facts]:
    """The facts for training and the held-out ones; no word of the latter is in the former."""
    rng = random.Random(seed)
    banks: dict[str, list[Any]] = {
        "capitals": _facts(CAPITALS),
        "opposites": _facts(OPPOSITES),
        "definitions": _definitions(DEFINITIONS),
        "categories": _categories(CATEGORIES),
        "verbs": _facts(VERBS),
        "names": _words(NAMES),
        "objects": _words(OBJECTS),
        "sums": [(a, b) for a in range(1, 13) for b in range(1, 13) if a <= b],
    }
    train: dict[str, list[Any]] = {}
    held_out: dict[str, list[Any]] = {}
    for name, bank in banks.items():
        rng.shuffle(bank)
        cut = round(HELD_OUT * len(bank))
        held_out[name], train[name] = bank[:cut], bank[cut:]
    return Facts(split=0, **train), Facts(split=1, **held_out)


def ask_capital(rng: random.Random, facts: Facts) -> Question:
    (country, right), (_, other), (_, another) = rng.sample(facts.capitals, 3)
    prompt = facts.phrase(rng, "capital").format(country)
    answers = facts.framed(rng, (right, other, another, facts.stray(rng, "capital")))
    anywhere = mentions(capital for _, capital in facts.capitals)
    return Question("capital", prompt, answers, (anywhere, mentions([right])))


def ask_opposite(rng: random.Random, facts: Facts) -> Question:
    pairs = [rng.sample(pair, 2) for pair in rng.sample(facts.opposites, 3)]
    (word, right), (_, other), (_, another) = pairs
    prompt = facts.phrase(rng, "opposite").format(word)
    answers = facts.framed(rng, (right, other, another, facts.stray(rng, "opposite")))
    known = mentions(word for pair in facts.opposites for word in pair)
    return Question("opposite", prompt, answers, (known, mentions([right])))


def ask_definition(rng: random.Random, facts: Facts) -> Question:
    (clue, right), (_, other), (_, another) = rng.sample(facts.definitions, 3)
    prompt = facts.phrase(rng, "definition").format(clue)
    answers = facts.framed(rng, (right, other, another, facts.stray(rng, "definition")))
    known = mentions(word for _, word in facts.definitions)
    return Question("definition", prompt, answers, (known, mentions([right])))


def ask_choice(rng: random.Random, facts: Facts) -> Question:
    (kind, _, members), *others = rng.sample(facts.categories, 4)
    right, unlisted = rng.sample(members, 2)
    wrong, wrong_too, unlisted_too = (rng.choice(members) for _, _, members in others)
    options = [right, wrong, wrong_too]
    rng.shuffle(options)
    listing = f"{options[0]}, {options[1]} or {options[2]}"
    prompt = facts.phrase(rng, "choice").format(kind=kind, options=listing)
    answers = facts.framed(rng, (right, wrong, unlisted, unlisted_too))
    return Question("choice", prompt, answers, (mentions(options), mentions(members)))


def ask_list(rng: random.Random, facts: Facts) -> Question:
    (_, kinds, members), (_, _, strangers) = rng.sample(facts.categories, 2)
    right, wrong = rng.sample(range(2, 6), 2)
    prompt = facts.phrase(rng, "list").format(number=NUMBERS[right], kinds=kinds)
    lists = (
        rng.sample(members, right),
        rng.sample(members, wrong),
        rng.sample(strangers, right),
        rng.sample(strangers, wrong),
    )
    frames = LIST_FRAMES[facts.split]
    answers = tuple(rng.choice(frames).format(", ".join(items)) for items in lists)
    return Question(
        "list", prompt, answers, (mentions(members), lambda r: len(r.split(", ")) == right)
    )


def ask_form(rng: random.Random, facts: Facts) -> Question:
    (verb, *right), (_, *wrong) = rng.sample(facts.verbs, 2)
    form = rng.randrange(2)
    prompt = facts.phrase(rng, ("past", "ing")[form]).format(verb)
    answers = facts.framed(rng, (right[form], right[1 - form], wrong[form], wrong[1 - form]))
    return Question(
        "form",
        prompt,
        answers,
        (mentions(right), mentions(verb[1 + form] for verb in facts.verbs)),
    )


def ask_who(rng: random.Random, facts: Facts) -> Question:
    people = rng.sample(facts.names, 4)
    objects = rng.sample(facts.objects, 3)
    asked = rng.randrange(3)
    prompt = facts.phrase(rng, "who").format(*people[:3], *objects, objects[asked])
    right = people[asked]
    others = [person for person in people[:3] if person != right]
    answers = facts.framed(rng, (right, *others, people[3]))
    return Question("who", prompt, answers, (mentions(people[:3]), mentions([right])))


def ask_sum(rng: random.Random, facts: Facts) -> Question:
    a, b = rng.sample(rng.choice(facts.sums), 2)
    prompt = facts.phrase(rng, "sum").format(a, b)
    total = a + b
    close = [n for n in range(2, 25) if 1 <= abs(n - total) <= 2]
    far = [n for n in range(2, 25) if abs(n - total) > 4]
    numbers = (total, *rng.sample(close, 2), rng.choice(far))
    answers = facts.framed(rng, map(str, numbers))
    return Question("sum", prompt, answers, (mentions(map(str, [*close, total])), mentions([str(total)])))


def ask_format(rng: random.Random, facts: Facts) -> Question:
    a, b, c, d = rng.sample(facts.objects, 4)
    right, wrong = rng.sample(sorted(FORMATS), 2)
    look, pattern, *phrasings = FORMATS[right]
    other_look = FORMATS[wrong][0]
    prompt = rng.choice(phrasings[facts.split]).format(a, b)
    answers = (look(a, b), other_look(a, b), look(c, d), other_look(c, d))
    return Question(
        "format", prompt, answers, (mentions([a, b]), lambda r: re.fullmatch(pattern, r) is not None)
    )


SKILLS: tuple[Callable[[random.Random, Facts], Question], ...] = (
    ask_capital,
    ask_opposite,
    ask_definition,
    ask_choice,
    ask_list,
    ask_form,
    ask_who,
    ask_sum,
    ask_format,
)


def questions(rng: random.Random, facts: Facts, count: int) -> list[Question]:
    """``count`` questions with different prompts, the skills in turn."""
    seen: set[str] = set()
    asked: list[Question] = []
    while len(asked) < count:
        question = SKILLS[len(asked) % len(SKILLS)](rng, facts)
        if question.prompt not in seen:
            seen.add(question.prompt)
            asked.append(question)
    return asked


def probability(better: int, worse: int) -> float:
    """Bradley-Terry: the chance that a response of the first quality is preferred."""
    return 1 / (1 + math.exp(-GAP * (better - worse)))


def records_of(rng: random.Random, question: Question) -> list[Record]:
    """One record a pair of responses with unequal quality, in random order."""
    graded = [(response, question.quality(response)) for response in question.responses]
    records = []
    for i, (first, first_quality) in enumerate(graded):
        for second, second_quality in graded[i + 1 :]:
            if first_quality == second_quality:
                continue
            wins = rng.random() < probability(first_quality, second_quality)
            chosen, rejected = (first, second) if wins else (second, first)
            records.append(
                {
                    "prompt": [{"role": "user", "content": question.prompt}],
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                    "subset": question.skill,
                }
            )
    return records


def generate(seed: int, train_groups: int, test_groups: int) -> tuple[list[Record], list[Record]]:
    train, test = [], []
    for facts, count, records, name in zip(
        split_facts(seed), (train_groups, test_groups), (train, test), ("train", "test"), strict=True
    ):
        rng = random.Random(f"{seed} {name}")
        for question in questions(rng, facts, count):
            records += records_of(rng, question)
    return train, test


def baseline_accuracy(train: list[Record], test: list[Record]) -> float:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    import numpy as np
    import scipy.sparse as sp

    def texts(records, side):
        return [r[side][0]["content"] for r in records]

    counter = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]", lowercase=False)
    counter.fit(texts(train, "chosen") + texts(train, "rejected"))

    def features(records):
        sides = []
        for side in ("chosen", "rejected"):
            t = texts(records, side)
            length = np.array([[len(x) / 10, len(x.split())] for x in t])
            sides.append(sp.hstack([counter.transform(t), sp.csr_matrix(length)]).tocsr())
        return sides[0] - sides[1]

    x = features(train)
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit(sp.vstack([x, -x]), np.array([1] * x.shape[0] + [0] * x.shape[0]))
    return float((model.decision_function(features(test)) > 0).mean())
