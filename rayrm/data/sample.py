"""Generate the quickstart's sample preferences: short questions, graded responses, noisy labels.

Every question makes two demands (a capital, and that of France; fruits, and three of them), and the
quality of a response is the number of demands that it meets: 0, 1 or 2. A question has four
responses, of qualities 2, 1, 1 and 0. Each pair of unequal quality is a record, with chosen and
rejected drawn from a Bradley-Terry model of the qualities.

A response alone does not reveal its quality: what is wrong for one prompt is right for others, as
often and in the same frames. Held-out questions use entities and phrasings that do not occur in
training, so only the base model's own knowledge answers them.

Does not know about tokenizers, models, or how records become groups.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rayrm.errors import ConfigError

Record = dict[str, Any]
Split = Literal["train", "test"]
Demand = Callable[[str], bool]

# Log-odds that a response is chosen over one that meets one demand less.
GAP = 3.2
# Fraction of every bank of facts that is reserved for the test split.
HELD_OUT = 0.25


@dataclass(frozen=True)
class Question:
    """A prompt, its two demands on a response, and four responses of qualities 2, 1, 1 and 0."""

    skill: str
    prompt: str
    demands: tuple[Demand, Demand]
    responses: tuple[str, ...]

    def quality(self, response: str) -> int:
        """Return the number of demands that ``response`` (any text) meets: 0, 1 or 2."""
        return sum(demand(response) for demand in self.demands)


@dataclass(frozen=True)
class Facts:
    """The facts that the questions of one split use; the two splits share no entity."""

    split: Split
    # skill → (what is asked, its answer)
    pairs: dict[str, list[tuple[str, str]]]
    # (singular, plural, members)
    categories: list[tuple[str, str, list[str]]]
    # (infinitive, past, participle)
    verbs: list[tuple[str, str, str]]
    objects: list[str]


def write_sample(
    directory: Path, *, seed: int = 0, train_groups: int = 1280, test_groups: int = 240
) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``test.jsonl`` to ``directory`` and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "train.jsonl", directory / "test.jsonl"
    for path, records in zip(paths, generate(seed, train_groups, test_groups), strict=True):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return paths


def generate(seed: int, train_groups: int, test_groups: int) -> tuple[list[Record], list[Record]]:
    """Return training and held-out records, five per prompt; those of a prompt are adjacent.

    Records are in TRL's conversational preference format, with the skill as ``subset``.
    """
    return (
        [
            record
            for question in questions(seed, "train", train_groups)
            for record in _records(seed, question)
        ],
        [
            record
            for question in questions(seed, "test", test_groups)
            for record in _records(seed, question)
        ],
    )


def questions(seed: int, split: Split, count: int) -> list[Question]:
    """Return ``count`` questions with different prompts, alternating between the skills.

    Raises ConfigError if there are not that many prompts.
    """
    rng = random.Random(f"{seed} {split}")
    facts = split_facts(seed)[split]
    asked: dict[str, Question] = {}
    misses = 0
    while len(asked) < count:
        question = SKILLS[len(asked) % len(SKILLS)](rng, facts)
        misses = misses + 1 if question.prompt in asked else 0
        if misses == 1000:
            raise ConfigError(
                f"{count} {split} groups are more than the sample has prompts for: "
                f"skill {question.skill!r} ran out after {len(asked)} groups"
            )
        asked.setdefault(question.prompt, question)
    return list(asked.values())


def preference(better: int, worse: int) -> float:
    """Return the Bradley-Terry probability that quality ``better`` is chosen over ``worse``."""
    return 1 / (1 + math.exp(-GAP * (better - worse)))


def _records(seed: int, question: Question) -> list[Record]:
    rng = random.Random(f"{seed} {question.prompt}")
    order = rng.sample(question.responses, len(question.responses))
    records = []
    for i, first in enumerate(order):
        for second in order[i + 1 :]:
            qualities = question.quality(first), question.quality(second)
            if qualities[0] == qualities[1]:
                continue
            pair = (first, second) if rng.random() < preference(*qualities) else (second, first)
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in pair)
            prompt = [{"role": "user", "content": question.prompt}]
            records.append(
                {"prompt": prompt, "chosen": chosen, "rejected": rejected, "subset": question.skill}
            )
    return records


def baseline_accuracy(train: list[Record], test: list[Record]) -> float:
    """Return the held-out accuracy of a classifier that does not see the prompt.

    It is a logistic regression on the difference of chosen and rejected in counts of words, of
    pairs of words, and in length. A pair with equal scores counts as half correct.
    """
    import numpy as np
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression

    def difference(record: Record) -> Counter[str]:
        counts = _counts(record["chosen"][0]["content"])
        counts.subtract(_counts(record["rejected"][0]["content"]))
        return counts

    vectorizer = DictVectorizer()
    features = vectorizer.fit_transform(map(difference, train))
    labels = np.arange(len(train)) % 2
    # Every other pair is swapped, since the regression needs two classes.
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit(features.multiply(2 * labels[:, None] - 1).tocsr(), labels)
    margins = model.decision_function(vectorizer.transform(map(difference, test)))
    return float(np.mean(margins > 0) + np.mean(margins == 0) / 2)


def _counts(response: str) -> Counter[str]:
    words = re.findall(r"\w+|[^\w\s]", response)
    pairs = (f"{first} {second}" for first, second in itertools.pairwise(words))
    return Counter([*words, *pairs]) + Counter(
        {"<words>": len(words), "<characters>": len(response)}
    )


# --- the skills ---------------------------------------------------------------------------------


def ask_fact(skill: str, rng: random.Random, facts: Facts) -> Question:
    """Ask for a capital, an opposite or a definition.

    Responses: right, right for another question of the skill (two), right for another skill.
    """
    (asked, right), (_, wrong), (_, wrong_too) = rng.sample(facts.pairs[skill], 3)
    other_skill = rng.choice([other for other in facts.pairs if other != skill])
    _, stray = rng.choice(facts.pairs[other_skill])
    return Question(
        skill,
        _prompt(rng, facts, skill).format(asked),
        (_mentions(answer for _, answer in facts.pairs[skill]), _mentions([right])),
        _framed(rng, facts, right, wrong, wrong_too, stray),
    )


def ask_choice(rng: random.Random, facts: Facts) -> Question:
    """Ask for the member of a category in a list. Responses: in the list or not, member or not."""
    (kind, _, members), *others = rng.sample(facts.categories, 4)
    right, unlisted = rng.sample(members, 2)
    wrong, wrong_too, neither = (rng.choice(strangers) for _, _, strangers in others)
    listed = rng.sample([right, wrong, wrong_too], 3)
    article = "an" if kind[0] in "aeiou" else "a"
    return Question(
        "choice",
        _prompt(rng, facts, "choice").format(", ".join(listed), kind=f"{article} {kind}"),
        (_mentions(listed), _mentions(members)),
        _framed(rng, facts, right, wrong, unlisted, neither),
    )


def ask_list(rng: random.Random, facts: Facts) -> Question:
    """Ask for N members of a category. Responses: members or not, N of them or not."""
    (_, kinds, members), (_, _, strangers) = rng.sample(facts.categories, 2)
    (number, right), (_, wrong) = rng.sample(
        [("two", 2), ("three", 3), ("four", 4), ("five", 5)], 2
    )
    lists = [rng.sample(bank, size) for bank in (members, strangers) for size in (right, wrong)]
    frames = LIST_FRAMES[facts.split]
    return Question(
        "list",
        _prompt(rng, facts, "list").format(number, kinds),
        (_mentions(members), lambda response: response.count(",") == right - 1),
        tuple(rng.choice(frames).format(", ".join(items)) for items in lists),
    )


def ask_form(rng: random.Random, facts: Facts) -> Question:
    """Ask for a form of a verb. Responses: of that verb or not, in that form or not."""
    verb, other = rng.sample(facts.verbs, 2)
    (form, skill), (wrong_form, _) = rng.sample([(1, "past"), (2, "participle")], 2)
    return Question(
        "form",
        _prompt(rng, facts, skill).format(verb[0]),
        (_mentions(verb), _mentions(any_verb[form] for any_verb in facts.verbs)),
        _framed(rng, facts, verb[form], verb[wrong_form], other[form], other[wrong_form]),
    )


def ask_sentence(rng: random.Random, facts: Facts) -> Question:
    """Ask for a kind of sentence with a word. Responses: that word or not, that kind or not."""
    thing, other = rng.sample(facts.objects, 2)
    kind, wrong_kind = rng.sample(sorted(SENTENCES), 2)
    mark, prompts, _ = SENTENCES[kind]
    wanted = [(thing, kind), (thing, wrong_kind), (other, kind), (other, wrong_kind)]
    return Question(
        "sentence",
        rng.choice(prompts[facts.split]).format(thing),
        (_mentions([thing]), lambda response: response.endswith(mark)),
        tuple(rng.choice(SENTENCES[k][2][facts.split]).format(word) for word, k in wanted),
    )


def ask_format(rng: random.Random, facts: Facts) -> Question:
    """Ask for two words in a format. Responses: those words or not, that format or not."""
    first, second, *others = rng.sample(facts.objects, 4)
    right, wrong = rng.sample(sorted(FORMATS), 2)
    look, pattern, prompts = FORMATS[right]
    wrong_look, _, _ = FORMATS[wrong]
    return Question(
        "format",
        rng.choice(prompts[facts.split]).format(first, second),
        (_mentions([first, second]), lambda response: bool(re.fullmatch(pattern, response))),
        tuple(show(*words) for words in ((first, second), others) for show in (look, wrong_look)),
    )


SKILLS: Sequence[Callable[[random.Random, Facts], Question]] = (
    lambda rng, facts: ask_fact("capital", rng, facts),
    lambda rng, facts: ask_fact("opposite", rng, facts),
    lambda rng, facts: ask_fact("definition", rng, facts),
    ask_choice,
    ask_list,
    ask_form,
    ask_sentence,
    ask_format,
)


def _mentions(words: Iterable[str]) -> Demand:
    """Return the demand for at least one of ``words``, as a whole word, ignoring case."""
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)
    return lambda response: bool(pattern.search(response))


def _prompt(rng: random.Random, facts: Facts, skill: str) -> str:
    return rng.choice(PHRASINGS[skill][facts.split])


def _framed(rng: random.Random, facts: Facts, *answers: str) -> tuple[str, ...]:
    return tuple(rng.choice(FRAMES[facts.split]).format(answer) for answer in answers)


# --- the facts ----------------------------------------------------------------------------------


def split_facts(seed: int) -> dict[Split, Facts]:
    """Divide the entries of every bank between the two splits."""
    rng = random.Random(f"{seed} facts")
    banks = {}
    for name, text in BANKS.items():
        entries = [entry.split(":") for entry in " ".join(text.split()).split(",")]
        bank = [tuple(field.strip() for field in entry) for entry in entries]
        banks[name] = rng.sample(bank, len(bank))

    def facts(split: Split) -> Facts:
        part: dict[str, list[Any]] = {}
        for name, bank in banks.items():
            cut = round(HELD_OUT * len(bank))
            part[name] = bank[:cut] if split == "test" else bank[cut:]
        opposites = part["opposite"] + [(second, first) for first, second in part["opposite"]]
        return Facts(
            split=split,
            pairs={
                "capital": part["capital"],
                "opposite": opposites,
                "definition": part["definition"],
            },
            categories=[(one, many, members.split()) for one, many, members in part["category"]],
            verbs=part["verb"],
            objects=[name for (name,) in part["object"]],
        )

    return {"train": facts("train"), "test": facts("test")}


# skill → phrasings of its prompts
PHRASINGS: dict[str, dict[Split, tuple[str, ...]]] = {
    "capital": {
        "train": (
            "What is the capital of {}?",
            "Name the capital city of {}.",
            "Which city is the capital of {}?",
            "What is the capital city of {} called?",
            "Tell me the capital of {}.",
        ),
        "test": (
            "Which city does the government of {} sit in, being its capital?",
            "I am learning capitals. What is the one of {}?",
            "Do you know {}'s capital city?",
        ),
    },
    "opposite": {
        "train": (
            "What is the opposite of {}?",
            "Give me the opposite of the word {}.",
            "Which word is the opposite of {}?",
            "Name an antonym of {}.",
            "What is the contrary of {}?",
        ),
        "test": (
            "What is the reverse of {}?",
            "Find the word that means the reverse of {}.",
            "I am looking for a word that is opposite in meaning to {}.",
        ),
    },
    "definition": {
        "train": (
            "What do you call {}?",
            "Which word means {}?",
            "What is the word for {}?",
            "Name this: {}.",
            "Find one word for {}.",
        ),
        "test": (
            "I am thinking of {}. Guess the word.",
            "Crossword clue: {}. Solve it.",
            "What noun describes {}?",
        ),
    },
    "choice": {
        "train": (
            "Which of these is {kind}: {}?",
            "Pick {kind}: {}.",
            "One of these is {kind}: {}. Which?",
            "Choose {kind} from: {}.",
        ),
        "test": (
            "Only one of the following is {kind}: {}. Say it.",
            "Look at {}. Find {kind} among them.",
        ),
    },
    "list": {
        "train": ("List {} {}.", "Name {} {}.", "Give me {} {}.", "I need {} {}."),
        "test": ("Could you tell me {} {}, please?", "Write down {} {}."),
    },
    "past": {
        "train": (
            "What is the past tense of {}?",
            "Give the past form of {}.",
            "Fill in a form of {}: yesterday we ___ there.",
            "Write the past tense of {}.",
        ),
        "test": ("Change the verb {} to its past tense.", "How do you put {} into the past tense?"),
    },
    "participle": {
        "train": (
            "What is the -ing form of {}?",
            "Write the -ing form of {}.",
            "Fill in a form of {}: right now we are ___.",
            "Add the ending -ing to {}.",
        ),
        "test": ("Change the verb {} to its -ing form.", "How do you put {} into the -ing form?"),
    },
}

# sentences around an answer
FRAMES: dict[Split, tuple[str, ...]] = {
    "train": ("{}", "{}.", "It is {}.", "The answer is {}."),
    "test": ("That is {}.", "I would say {}.", "My answer: {}."),
}
LIST_FRAMES: dict[Split, tuple[str, ...]] = {
    "train": ("{}", "{}.", "Sure: {}."),
    "test": ("Here you go: {}.", "My list: {}"),
}

# kind of sentence → (final punctuation mark, prompts, responses)
SENTENCES: dict[str, tuple[str, dict[Split, tuple[str, ...]], dict[Split, tuple[str, ...]]]] = {
    "question": (
        "?",
        {
            "train": (
                "Write a question about a {}.",
                "Ask a question with the word {}.",
                "Turn the word {} into a short question.",
            ),
            "test": (
                "Think of a question for somebody with a {}.",
                "I need a question that has {} in it.",
            ),
        },
        {
            "train": (
                "Where is the {}?",
                "Who took my {}?",
                "Is this {} yours?",
                "How old is the {}?",
            ),
            "test": ("Why did she hide the {}?", "When did you get that {}?"),
        },
    ),
    "statement": (
        ".",
        {
            "train": (
                "Write a statement about a {}.",
                "Make a plain sentence with the word {}.",
                "Turn the word {} into a short statement.",
            ),
            "test": (
                "Think of a statement for somebody with a {}.",
                "I need a statement that has {} in it.",
            ),
        },
        {
            "train": (
                "The {} is here.",
                "He took my {}.",
                "This {} is yours.",
                "Her {} is very old.",
            ),
            "test": ("She tried to hide the {}.", "You got that {} yesterday."),
        },
    ),
    "exclamation": (
        "!",
        {
            "train": (
                "Write an exclamation about a {}.",
                "Shout a sentence with the word {}.",
                "Turn the word {} into a short exclamation.",
            ),
            "test": (
                "Think of an exclamation for somebody with a {}.",
                "I need an exclamation that has {} in it.",
            ),
        },
        {
            "train": ("What a {}!", "Give me back my {}!", "I love this {}!", "Look at the {}!"),
            "test": ("Wow, such a {}!", "Hurry, hide that {}!"),
        },
    ),
}

# format → (function that formats two words, pattern that recognises it, prompts)
FORMATS: dict[str, tuple[Callable[..., str], str, dict[Split, tuple[str, ...]]]] = {
    "capitals": (
        lambda a, b: f"{a}, {b}".upper(),
        r"[^a-z]+",
        {
            "train": (
                "Write {} and {} in capital letters.",
                "Type {} and {} in all caps.",
                "Repeat {} and {} with every letter capitalized.",
            ),
            "test": (
                "I want {} and {} to be in all capitals.",
                "Change {} and {} to capital letters.",
            ),
        },
    ),
    "bullets": (
        "- {}\n- {}".format,
        r"- .+\n- .+",
        {
            "train": (
                "Write {} and {} as a bulleted list.",
                "Make bullet points of {} and {}.",
                "Repeat {} and {}, each after a dash on its own line.",
            ),
            "test": (
                "Put {} and {} in a list with bullets.",
                "Show {} and {} as two bullet points.",
            ),
        },
    ),
    "numbers": (
        "1. {}\n2. {}".format,
        r"1\. .+\n2\. .+",
        {
            "train": (
                "Write {} and {} as a numbered list.",
                "Number these items: {} and {}.",
                "Repeat {} and {}, numbered from one to two.",
            ),
            "test": ("Put {} and {} in a list with numbers.", "Show {} and {} as items 1 and 2."),
        },
    ),
    "quotes": (
        '"{}", "{}"'.format,
        r'"[^"]+", "[^"]+"',
        {
            "train": (
                "Write {} and {} in quotation marks.",
                "Put quotes around {} and {}.",
                "Repeat {} and {}, each between double quotes.",
            ),
            "test": ("Quote the words {} and {}.", "Show {} and {} inside quotation marks."),
        },
    ),
    "brackets": (
        "({}), ({})".format,
        r"\([^()]+\), \([^()]+\)",
        {
            "train": (
                "Write {} and {} in brackets.",
                "Put parentheses around {} and {}.",
                "Repeat {} and {}, each between round brackets.",
            ),
            "test": ("Enclose {} and {} in parentheses.", "Show {} and {} inside brackets."),
        },
    ),
    "slash": (
        "{} / {}".format,
        r"[^/]+ / [^/]+",
        {
            "train": (
                "Write {} and {} with a slash between them.",
                "Join {} and {} by a slash.",
                "Repeat {} and {}, separated by a slash.",
            ),
            "test": ("Put a slash between {} and {}.", "Show {} and {} divided by a slash."),
        },
    ),
}

# Entries are separated by commas, the fields of an entry by colons. No word is in two banks.
CAPITALS = """
France: Paris, Germany: Berlin, Italy: Rome, Spain: Madrid, Portugal: Lisbon, Greece: Athens,
Austria: Vienna, Poland: Warsaw, Hungary: Budapest, Ireland: Dublin, England: London,
Scotland: Edinburgh, Norway: Oslo, Sweden: Stockholm, Denmark: Copenhagen, Finland: Helsinki,
Iceland: Reykjavik, Russia: Moscow, Ukraine: Kyiv, Belgium: Brussels, Switzerland: Bern,
the Netherlands: Amsterdam, Romania: Bucharest, Bulgaria: Sofia, Serbia: Belgrade, Croatia: Zagreb,
Albania: Tirana, Turkey: Ankara, Egypt: Cairo, Morocco: Rabat, Libya: Tripoli, Kenya: Nairobi,
Ethiopia: Addis Ababa, Uganda: Kampala, Ghana: Accra, Nigeria: Abuja, Senegal: Dakar,
Angola: Luanda, Zimbabwe: Harare, Zambia: Lusaka, Somalia: Mogadishu, Sudan: Khartoum,
Iran: Tehran, Iraq: Baghdad, Israel: Jerusalem, Lebanon: Beirut, Syria: Damascus, Jordan: Amman,
Saudi Arabia: Riyadh, Qatar: Doha, Afghanistan: Kabul, Pakistan: Islamabad, India: New Delhi,
Nepal: Kathmandu, Bangladesh: Dhaka, China: Beijing, Japan: Tokyo, South Korea: Seoul,
North Korea: Pyongyang, Taiwan: Taipei, Thailand: Bangkok, Vietnam: Hanoi, Indonesia: Jakarta,
Malaysia: Kuala Lumpur, the Philippines: Manila, Mongolia: Ulaanbaatar, Australia: Canberra,
Canada: Ottawa, Cuba: Havana, Jamaica: Kingston, Peru: Lima,
Chile: Santiago, Argentina: Buenos Aires, Colombia: Bogota, Venezuela: Caracas, Ecuador: Quito,
Uruguay: Montevideo, Bolivia: La Paz, Rwanda: Kigali, Latvia: Riga, Armenia: Yerevan,
Georgia: Tbilisi, Cyprus: Nicosia, Madagascar: Antananarivo, Mozambique: Maputo, Tanzania: Dodoma,
Mali: Bamako, Haiti: Port-au-Prince
"""

OPPOSITES = """
hot: cold, fast: slow, happy: sad, rich: poor, hard: soft, loud: quiet, full: empty, strong: weak,
wide: narrow, thick: thin, deep: shallow, early: late, positive: negative, male: female,
brave: cowardly, generous: stingy, polite: rude, calm: nervous, lazy: hardworking, smart: stupid,
beautiful: ugly, cheap: expensive, safe: dangerous, easy: difficult, smooth: rough, sharp: blunt,
sweet: sour, fresh: stale, tight: loose, straight: crooked, alive: dead, awake: asleep,
public: private, guilty: innocent, modern: ancient, natural: artificial, common: rare,
visible: invisible, possible: impossible, optimistic: pessimistic, major: minor,
vertical: horizontal, true: false, good: bad, temporary: permanent, internal: external,
superior: inferior, domestic: foreign, urban: rural, gradual: sudden, abundant: scarce,
mandatory: optional, active: passive, amateur: professional, bright: dim, bold: timid,
clever: foolish, even: odd, explicit: implicit, fierce: gentle, mild: severe, married: single,
outgoing: shy, precise: vague, sick: healthy, tame: wild, tiny: huge, vacant: occupied,
flexible: rigid, transparent: opaque, liquid: solid, proud: ashamed, legal: illegal
"""

DEFINITIONS = """
someone who flies planes: pilot, someone who bakes bread: baker,
someone who teaches pupils: teacher, someone who puts out fires: firefighter,
someone who cuts hair: barber, someone who fixes teeth: dentist, someone who grows crops: farmer,
someone who writes books: author, someone who paints pictures: painter,
someone who mends pipes: plumber, someone who designs houses: architect,
someone who sells meat: butcher, someone who treats pets: veterinarian,
someone who makes clothes: tailor, someone who works in a mine: miner,
someone who studies stars: astronomer, someone who travels in space: astronaut,
someone who acts in films: actor, someone who serves meals: waiter,
someone who steals things: thief, someone who wears a crown and rules: king,
someone who takes photographs: photographer, someone who defends people in court: lawyer,
someone who decides cases in court: judge, someone who operates on patients: surgeon,
someone who writes poems: poet, someone who leads an orchestra: conductor,
someone who catches criminals: detective, someone who fights in an army: soldier,
someone who cooks for a restaurant: chef, someone who rides in races: jockey,
someone who reports the news: journalist, someone who eats no meat: vegetarian,
someone whose parents died: orphan, a woman whose husband died: widow, a baby dog: puppy,
a baby cat: kitten, a baby sheep: lamb, a baby cow: calf, a baby hen: chick, a baby frog: tadpole,
a baby bear: cub, a baby horse: foal, meat from pigs: pork, meat from cows: beef,
what spiders make: web, what bees live in: hive, what bees make: honey, what hens lay: eggs,
a place where planes land: airport, a place where ships dock: harbor,
a place with thousands of books: library, a place where patients are treated: hospital,
a place where money is kept: bank, a place where films are shown: cinema,
a place where criminals are locked up: prison, a place to keep cars: garage,
a place with graves: cemetery, a place to buy medicine: pharmacy,
a place with endless sand: desert, a mountain that erupts: volcano,
land in the middle of the sea: island, a hollow in a mountain: cave,
the sand beside the sea: beach, a storm that spins round: tornado,
when the ground trembles: earthquake, the arch in the sky after a storm: rainbow,
a thing for hitting nails: hammer, a thing for cutting paper: scissors,
a thing for moving earth: shovel, a thing to sweep with: broom,
a device that tells the time: clock, a device that takes pictures: camera,
a device for looking at stars: telescope, a device for looking at germs: microscope,
a device that measures heat: thermometer, a device that shows the way: compass,
a thing that keeps you from getting wet: umbrella, a thing to sleep on: mattress,
a thing to dry yourself: towel, a thing to clean teeth: toothbrush,
a thing to write on a blackboard: chalk, a thing to open a lock: key,
a thing you look into to see yourself: mirror, a thing to help you see better: glasses,
a thing that keeps fingers warm: glove, a thing worn on the head: hat, a thing with a bulb: lamp,
a thing to cross a river: bridge, a glass hut for plants: greenhouse, a hundred years: century,
ten years: decade, sixty minutes: hour, sixty seconds: minute, twelve things: dozen,
two babies born together: twins, the centre of an atom: nucleus, the star that warms us: sun,
the force that makes things fall: gravity, the study of living things: biology,
the study of the past: history, what flows in the veins: blood,
all of the bones together: skeleton, a book of words and meanings: dictionary,
a book of maps: atlas, a story of one's own life: autobiography, a test for students: exam,
a meal in the morning: breakfast, a meal at noon: lunch, a meal in the open air: picnic,
a day off work: holiday, a dream that scares: nightmare, the day one was born: birthday,
a party for a bride: wedding, a doll moved by strings: puppet,
a beast with a trunk: elephant, the tallest beast: giraffe, a beast with stripes: zebra,
a beast with a pouch: kangaroo, a sea creature with eight arms: octopus,
a reptile with a shell: turtle, a long reptile with no legs: snake, a cat with a mane: lion,
a worm that makes silk: silkworm
"""

VERBS = """
eat: ate: eating, sing: sang: singing, swim: swam: swimming, run: ran: running, ride: rode: riding,
speak: spoke: speaking, break: broke: breaking, steal: stole: stealing, wake: woke: waking,
grow: grew: growing, throw: threw: throwing, draw: drew: drawing, blow: blew: blowing,
bring: brought: bringing, catch: caught: catching, teach: taught: teaching,
fight: fought: fighting, hold: held: holding, stand: stood: standing, feel: felt: feeling,
meet: met: meeting, send: sent: sending, spend: spent: spending, lose: lost: losing,
win: won: winning, begin: began: beginning, shoot: shot: shooting, lead: led: leading,
hear: heard: hearing, pay: paid: paying, walk: walked: walking, play: played: playing,
jump: jumped: jumping, dance: danced: dancing, smile: smiled: smiling, climb: climbed: climbing,
talk: talked: talking, carry: carried: carrying, plan: planned: planning,
travel: traveled: traveling, watch: watched: watching, wash: washed: washing,
paint: painted: painting, listen: listened: listening, bite: bit: biting, freeze: froze: freezing,
wear: wore: wearing, tear: tore: tearing, swear: swore: swearing, swing: swung: swinging,
stick: stuck: sticking, spin: spun: spinning, weep: wept: weeping, creep: crept: creeping,
bend: bent: bending, feed: fed: feeding, bleed: bled: bleeding, slide: slid: sliding,
strike: struck: striking, kneel: knelt: kneeling, kick: kicked: kicking, touch: touched: touching,
wait: waited: waiting, visit: visited: visiting, kiss: kissed: kissing,
hope: hoped: hoping, wish: wished: wishing, drop: dropped: dropping, hug: hugged: hugging,
chase: chased: chasing, knock: knocked: knocking, lift: lifted: lifting, cross: crossed: crossing,
burn: burned: burning
"""

OBJECTS = """
coin, basket, candle, ladder, bottle, kite, pencil, wallet, suitcase, blanket, pillow, bucket,
balloon, rope, lantern, magnet, ticket, notebook, envelope, button, ribbon, bracelet, necklace,
helmet, backpack, kettle, teapot, spoon, fork, plate, bowl, mug, jar, vase, sponge, soap, whistle,
map, postcard, puzzle, ball, stamp, feather, stone, leaf, cushion, carpet, curtain, brush, comb,
razor, needle, scarf, belt, sandal, boot, marble, tray, wheel, thread, flag
"""

CATEGORIES = """
fruit: fruits: apple banana pear peach plum cherry mango grape lemon strawberry,
vegetable: vegetables: carrot potato onion cabbage spinach broccoli cucumber lettuce celery turnip,
animal: animals: goat donkey tiger wolf monkey leopard camel rabbit deer fox,
bird: birds: eagle sparrow owl parrot pigeon swan hawk robin crow,
fish: fish: salmon tuna trout cod sardine herring mackerel carp,
insect: insects: ant butterfly mosquito beetle wasp moth grasshopper cockroach,
tree: trees: oak pine maple birch willow cedar elm spruce,
flower: flowers: tulip daisy lily sunflower orchid daffodil violet,
color: colors: blue green yellow purple brown pink gray,
metal: metals: iron gold silver copper aluminum tin zinc nickel titanium,
gas: gases: oxygen nitrogen hydrogen helium methane neon argon,
planet: planets: Mars Venus Jupiter Saturn Neptune Mercury Uranus,
vehicle: vehicles: car bus truck train bicycle motorcycle taxi tram,
tool: tools: screwdriver wrench drill pliers chisel spanner sander,
weapon: weapons: sword gun spear rifle dagger pistol cannon,
piece of furniture: pieces of furniture: chair table sofa bed desk wardrobe bookcase couch,
piece of clothing: pieces of clothing: shirt trousers jacket coat sweater skirt dress jeans,
drink: drinks: coffee tea juice milk lemonade beer soda cocoa,
spice: spices: pepper cinnamon ginger turmeric cumin nutmeg paprika,
musical instrument: musical instruments: piano guitar violin trumpet flute drum cello clarinet harp,
sport: sports: football tennis basketball hockey golf baseball volleyball rugby,
part of the body: parts of the body: arm leg foot knee elbow shoulder heart liver ankle,
weekday: weekdays: Monday Tuesday Wednesday Thursday Friday Saturday Sunday,
month: months: January February April June July August October December,
shape: shapes: circle square triangle rectangle pentagon hexagon oval,
language: languages: French Spanish German Italian Russian Arabic Chinese Portuguese,
religion: religions: Christianity Islam Buddhism Hinduism Judaism Sikhism,
family member: family members: mother father sister brother aunt uncle cousin grandmother,
emotion: emotions: anger joy sadness jealousy disgust surprise pride,
kind of weather: kinds of weather: snow fog wind hail thunder,
room of a house: rooms of a house: kitchen bedroom bathroom attic basement hallway,
building: buildings: church castle museum hotel palace temple,
school subject: school subjects: mathematics geography chemistry physics algebra economics
"""

BANKS = {
    "capital": CAPITALS,
    "opposite": OPPOSITES,
    "definition": DEFINITIONS,
    "category": CATEGORIES,
    "verb": VERBS,
    "object": OBJECTS,
}
