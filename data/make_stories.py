"""A teller of small stories that knows how surprising each of them is.

A language model's loss is its average surprise, -ln p(text), in nats. On real text nobody
knows how low it can go. Here we do, because we made the text: every choice is a draw with a
known probability p and adds -ln p. Their sum is -ln p(story), and summed over a file and
divided by its bytes it is THE FLOOR: a model that had learned this very grammar would have
that loss, and none can expect a lower one on text it has not seen. A training stack with a
defect stays visibly above it.

An example by hand. The grammar below chooses 1 of 2, 1 of 3, and "sat" with weight 3 of 4.
So p("A red hen sat.") = 1/2 * 1/3 * 3/4 = 1/8, which is ln 8 = 2.079 nats, or, over its 14
bytes, 0.149 nats per byte:

    >>> teller = Teller(15, read_grammar("story: A (red|blue) (cat|dog|hen) (3*sat|ran)."))
    >>> tell(teller), round(teller.nats, 3)
    ('A red hen sat.', 2.079)

WHY the sum is exact. If two ways of drawing gave the same text, p(text) would be the sum of
both, and our figure only an upper bound. That cannot happen: a choice is drawn where its
words are written, and no option of a choice, spelled out in any way, is the beginning of
another ("(happy|very happy)" will do, "(ran|ran home)" will not). So a reader who knows the
grammar can tell, from the left, which option each choice took: one text, one way.
"""

import argparse
import json
import math
import os
import random
import re
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

SEPARATOR = "\n<|endoftext|>\n"  # after every story, the last one too; costs 0 nats
BUNDLED = {"stories-train.txt": (1.9, 1), "stories-valid.txt": (0.15, 2)}  # megabytes, seed
NOTE = (
    "nats is the sum of -ln p over every choice in the file; floor_nats_per_byte, per byte of "
    "text without <|endoftext|>, is the loss that no model can be expected to beat on it."
)
PRONOUNS = {
    "boy": {"boy": "boy", "he": "he", "him": "him", "his": "his"},
    "girl": {"boy": "girl", "he": "she", "him": "her", "his": "her"},
}

# How to read the grammar. Yours to change, as long as no option begins another one.
#
#   rule: a | b     a rule has options; an indented line goes on with the rule above
#   (a|b|3*c)       one of these, c three times as likely as a
#   <rule>          an option of that rule, drawn anew each time
#   {thing}         drawn from the rule `thing` at its first mention, the same ever after
#   {hero}          a girl or a boy; the others are named or "it", so every pronoun is clear
#   {he}            he or she, of the hero (also him, his and boy)
#   {He}            the same words with a capital letter
#   /               a new paragraph
#
# "a" becomes "an" by itself before a vowel, so no line says "an".
STORIES = """
story: <opening> <friendship> (<lost>|<wish>|<quarrel>|<brave>|<storm>|<lesson>|<swap>)
opening: {Hero} was a <trait> {boy} who (lived|worked) in a <worn> <home> near the {place}.
    | In a <worn> <home> (beside|behind|near|by) the {place} lived {hero}, a <trait> {boy}.
    | (Once|Long ago) there was a <trait> child (named|called) {hero} who had <beast>.
    | <Everybody> in the {place} knew {hero}, a <trait> {boy} in a <look> <cloth>.
friendship: {His} <good> friend {friend}, a <trait> {pet}, <liked> <pastime> and <hobby>.
    | {He} and {friend}, a <trait> {pet}, <often> (ate <food>|played|sat|met|rested) <spot>.
    | {He} <often> went <pastime> with {friend}, a <trait> {pet} who <liked> <hobby>.

lost: <treasure> <loss> <tears> / <comfort> <search> <find> / <lost_end>
treasure: <Hero> (had|owned) <a_new_thing> and took it (everywhere|to school|to bed|along).
    | <when>, {elder} <gave> {hero} <a_new_thing>, <food> and a <mood> (hug|smile|wink).
loss: But (after|before|during) (lunch|tea|supper|school|breakfast), it fell out of {his} <bag>.
    | But one <weather> <part>, {he} <found> only <bit> in its place.
tears: "<alas>! My {thing} is (gone|lost|missing)!" <hero_cried> {He} sat down <spot>.
    | <Hero> (felt|was) so <gloomy> that {he} (cried|wept|sobbed|sighed) <spot>.
comfort: {Friend} came <running> (over|along|by) with <food>. "<hush>, it may be <spot>,"
        <friend_said>
    | "<hush>, <let_us> look <spot>," <friend_said>
search: They <looked> <spot>, but <found> only <bit> (and|beside|on top of) <bit>.
    | <Hero> <looked> <spot>, {friend} <looked> <spot>, but there was only <bit>.
find: "<hooray>!" <friend_cried> {Friend} (pulled|drew|took|dug) out <bit> and <the_thing>!
    | <soon>, <beast> <went> by, and (just|right) <spot> (lay|was|stood) <the_thing>!
    | <soon>, {hero} saw (a bit of|something) {colour} <spot>. It was the {thing}!
lost_end: "A <good> friend is worth more than any {thing}," <hero_said>
    | <Hero> (felt|was) <glad>, thanked {friend} and put <the_thing> <indoors>.

wish: <longing> <too_dear> / (<lend>|<earn>)
longing: <when>, {hero} saw <a_new_thing> in a <look> (shop|store|window) and wished for it.
    | Every <weekday>, {hero} (dreamed|thought|talked|sang) of <a_new_thing>.
too_dear: "It costs <many> coins, and I have only <few>," <sighed> {hero}.
    | <Hero> (felt|was) <sad>, for it cost <many> coins, and {he} had only <few> and <bit>.
lend: <lending> <lend_talk> / <lend_end>
lending: <when>, {friend} came <running> (over|up|along|by) with <food> and a {colour} {thing}!
    | Now {friend} had a {colour} {thing}, <bit> and <bit>.
lend_talk: "(May|Can) I (hold|see|try|borrow) it?" asked {hero}. "<yes>, sit <spot>,"
        <friend_said>
    | {Friend} (saw|heard) that {hero} was <sad>. "<hush>, <let_us> share it," <friend_said>
lend_end: They <often> took turns with <the_thing> <spot>, ate <food> and were <glad>.
    | "A {thing} is more fun with a <good> friend and <food>," <hero_said>
earn: <earning> <paid> / <earn_end>
earning: "<hush>, help me and earn it," <elder_said> So {hero} <chore> and <chore>.
    | So {hero} worked for {elder}: {he} <chore>, <chore> and <chore>.
paid: After <many> days, {elder} <gave> {him} <food>, a <mood> smile and <the_thing>!
    | <when>, {elder} <gave> {him} <the_thing>, and <food> and <food> too!
earn_end: <Hero> had {his} wish, (felt|was) <glad> and kept <the_thing> <indoors>.
    | <Hero> <went> to share it with {friend}, who sat <spot> with <food>.

quarrel: <both> <claims> <tug> / <sorry> <forgiven> / <quarrel_end>
both: <when>, they <found> <a_new_thing> and <bit> <spot>.
    | <when>, {elder} <gave> them <food>, <food> and <a_new_thing> to share.
claims: "<claim>!" <hero_cried> "No, <counter>!" <friend_cried>
    | Both wanted <the_thing>, so {hero} grew <cross>, and {friend} grew <cross>.
tug: They (pulled|shouted|pushed|fought) and tugged until it (fell|flew|dropped) into <mud>.
    | <Hero> <went> (off|away) with it, but {he} slipped <spot>, and it fell into <mud>.
sorry: So {hero} <went> to {friend} with <food> and <food>. "<pardon>," <hero_said>
    | The next <part>, {he} met {friend} <spot>. "<pardon>," <hero_said>
forgiven: "I am sorry too," <friend_said> {Friend} <gave> {him} <food> and a <mood> smile.
    | {Friend} (smiled|nodded|laughed) <how>. "Now <let_us> be <good> friends," <friend_said>
quarrel_end: They washed the {thing} until it was {colour} again and kept it <spot>.
    | They gave <the_thing> to a <trait> child and played <spot> with <bit>.

brave: <afraid> / <advice> <test> <pass> / <brave_end>
afraid: (Only|Just) one thing (scared|frightened|worried) this <trait> {boy}: {fear}.
    | <Hero> was <very> (afraid|scared) of {fear} and <often> hid <spot> or <indoors>.
advice: "I was once afraid too, but it helps to {trick}," <friend_said>
    | "<hush>, <let_us> eat <food>, and then you (must|can) {trick}," <friend_said>
test: <when>, <beast> was stuck <spot>, and to help it, {he} had to face {fear}.
    | <when>, {elder} (sent|took) {hero} out for <food>, and {hero} had to face {fear} <spot>.
pass: <Hero> began to {trick}, and (slowly|bit by bit|soon) {he} (felt|was) <glad>.
    | "I can do it if I {trick}," <hero_said> And {he} did!
brave_end: {Friend} heard of it and <gave> {him} <food> and <food>. "<hooray>!" <friend_cried>
    | Now {he} tells every <trait> child who is afraid of {fear} to {trick}.

storm: <storm_comes> <whimper> / <rescue> <naming> / <storm_end>
storm_comes: <when>, {hero} was near <landmark> when a <wild> (storm|wind|rain) began.
    | <when>, {parent} <cried>, "A <wild> (storm|wind|rain) is coming! Hide <indoors>!"
whimper: Then {hero} heard a <faint> (cry|squeak|whimper) <spot>. It was a <poor> {baby}!
    | As {hero} <went> home, {he} saw a <poor> {baby} <spot>. It looked <sad>.
rescue: "<hush>," <hero_said> {He} wrapped it in a <look> {colour} {cloth}.
    | <Hero> took off {his} <look> {colour} {cloth} and put it around the {baby}.
naming: "I will call you {name}," <hero_said> And {name} (blinked|yawned|smiled) at {friend}.
    | All night the wind (howled|roared), but {name}, as {he} called it, (felt|was) <glad>.
storm_end: In the morning {name} <went> home, but it comes back for <food> every <weekday>.
    | And {name} the {baby} still sleeps <indoors>, in the {colour} {cloth}.

lesson: <errand> <warning> / <careless> <spill> / <confess> <lesson_end>
errand: <when>, {parent} asked {hero} to take {cake} and <food> to {elder}.
    | {Elder} was <sad> and wished for {cake}, so {parent} sent {hero} with a <look> <bag>.
warning: "(Remember|Try|Promise) to {careful}," <parent_said> "<yes>!" <hero_said>
careless: But {hero} <found> <beast> and <beast> and <went> after them.
    | But {hero} (thought|dreamed|sang) of <hobby> and <treats> and forgot to {careful}.
spill: {He} slipped <spot>, and the {cake} fell into <mud>!
    | {He} sat down <spot>, and <beast> (ate|took|found) the {cake}!
confess: <Hero> <went> home. "I did not {careful}," {he} <sighed>.
    | "Where did the {cake} go?" asked {parent}. {Hero} was <sad>, but {he} told the truth.
lesson_end: "<hush>, <let_us> bake more {cake}, and you will {careful}," <parent_said>
    | "I will {careful} now," <hero_said> And {he} did, and {friend} (felt|was) <glad>.

swap: <birthday> <first_swap> <second_swap> / <present> / <swap_end>
birthday: <when>, {friend} wished for a {thing}, but {hero} had only a {colour} {toy}.
    | "I wish for a {thing}," <friend_said> But {hero} had only a {colour} {toy}.
first_swap: {He} met {elder} <spot>. "Take my {toy}," <hero_said> {He} got {cake} for it.
    | "Will you swap that {toy} for {cake}?" asked {elder}. "<yes>!" <hero_said>
second_swap: {Hero} gave the {cake} to <beast>, and <spot> it found {him} a <look> {thing}!
    | Then a <trait> child <spot> took the {cake} and <gave> {him} a <look> {thing} for it.
present: <Hero> <went> to {friend} with the {thing}. "<hooray>!" <friend_cried>
    | {Friend} was <glad>. "Where did you find a {thing}?" it asked <how>.
swap_end: A {colour} {toy} became {cake}, the {cake} became a {thing}, and a wish came true.
    | "I gave my {toy} for it, but a <good> friend is worth more," <hero_said>

Hero: {Hero}|{He}
hero_said: <said> {hero}. | {hero} <said>. | {he} <said>. | {hero} <said> <how>.
    | <said> {hero} <how>.
friend_said: <said> {friend}. | {friend} <said>. | {friend} <said> <how>.
    | <said> {friend} <how>.
elder_said: <said> {elder}. | {elder} <said>. | {elder} <said> <how>. | <said> {elder} <how>.
parent_said: <said> {parent}. | {parent} <said>. | {parent} <said> <how>.
    | <said> {parent} <how>.
hero_cried: <cried> {hero}. | {he} <cried>. | {he} <cried> and grew <cross>.
friend_cried: <cried> {friend}. | {friend} <cried>.
Everybody: Everybody|Everyone|All the children|All the people
the_thing: the {thing}|the {colour} {thing}
a_new_thing: a <look> {colour} {thing}|a {colour} {thing}
beast: a <mood> <creature> | a <fur> <creature> | a <mood> <fur> <creature> | a <creature>
bit: a <shabby> <scrap> | a <scrap>
landmark: (a|the) (<worn> <mark>|<mark>)
spot: (under|behind|beside|near|by|next to|close to|in front of) <landmark>
indoors: (under|behind|beside|near|by|next to) (a|the) (<look> <chair>|<chair>)
chore: (washed|scrubbed|cleaned|dusted|painted|mended) (a|the) (<worn> <floor>|<floor>)
food: <taste> <dish> | <dish>

hero: boy|girl
boy: Ben|David|Jack|Leo
girl: Anna|Clara|Emma|Grace
friend: Pip|Pepper|Fluff|Ginger
pet: kitten|puppy|rabbit|duck|goat|lamb
name: Twig|Rocket|Noodle|Pebble
baby: foal|cub|fawn|chick
parent: Mum|Dad|Grandma|Grandpa
elder: the baker|the farmer|the teacher|the sailor
creature: owl|fox|frog|mole|hedgehog|turtle|robin|squirrel|crow|badger|otter|swan|toad|snail|cat
    |dog|bird|sheep|bear|beetle|deer|monkey|calf|cow|ant|bat|moth|crab|seal|wolf|lion|parrot
thing: ball|kite|drum|lantern
toy: whistle|ribbon|puzzle|flag
cake: plum cake|apple pie|lemon tart|ginger bread
cloth: scarf|coat|shawl|jacket
place: garden|park|forest|meadow|orchard|village|valley|yard|farmyard|market|town|harbour|wood
    |lane|zoo|cornfield|castle|camp|bay|glen|square|vineyard|courtyard|playground
home: house|hut|cottage|cabin|mill|tower|tent|barn|cave|tree house
colour: red|blue|green|yellow
taste: warm|fresh|sweet|hot|cold|soft|good|lovely|tasty|plain|fine|yummy
fear: dogs|spiders|snakes|ghosts
trick: count to ten|hum a tune|think of home|stand tall
careful: walk slowly|stay on the path|shut the gate|look both ways
when: One <weather> (morning|afternoon|day)|On <weekday> (morning|afternoon)
    |(Early|Late) one (spring|summer|autumn|winter) (morning|afternoon)
mark: bench|bush|bridge|tree|cart|table|hedge|log|gate|ladder|fence|barrel|rock|stool|stone
    |crate|bucket|arch|wagon|wall|shed|haystack|ditch|pump|post|swing|roof|statue|stump|oak|bin
chair: bed|shelf|chair|stove|chest|desk|sofa|cupboard|clock|mat
floor: floor|step|door|gate|fence|shelf|pot|cup|wall|window
dish: bread|soup|jelly|rice|porridge|pudding|stew|beans|plums|pears|nuts|buns|corn|peas|toast
    |fish|cheese|ham|honey|figs|eggs|grapes|milk|berries
fur: white|black|brown|grey|golden|spotted|striped
scrap: shoe|sock|stick|leaf|nail|shell|rag|potato|bone|nut|glove|feather|apple|cork|string|twig
shabby: old|tiny|dusty|muddy|dirty|wet|dry|flat|bent|thin|heavy|soft|long
hobby: (drawing|painting|counting|watching) <flyer>
flyer: ducks|clouds|stars|birds|boats|bees|flowers|leaves|balloons|hats
sad: <gloomy> | <very> <gloomy>
very: very|rather|quite|truly|really
gloomy: sad|unhappy|gloomy|upset|miserable|lonely|worried|glum|sorry|tearful
happy: happy|glad|proud|pleased|cheerful|merry|joyful|thankful|content|delighted
cross: <angry> | <very> <angry>
angry: cross|angry|mad|grumpy
part: morning|afternoon|evening|day|night
often: often|always|sometimes|usually|mostly
liked: loved|liked|enjoyed|dreamed of|never tired of
alas: Oh no|Oh dear|Dear me|Oh my|How awful
hush: Do not (cry|worry|fret|be sad)|Cheer up|Never mind|There, there|Stay calm|Be brave
let_us: we (can|will|could|should|must)|let us
yes: Yes|Of course|Sure|Gladly|With pleasure|Certainly|Why not|Very well
weather: sunny|windy|warm|cold|cloudy|bright|cool|misty|quiet|fine|breezy|mild|frosty|foggy
weekday: Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday
soon: Soon|Before long|After a while|At last|In the end|A little later|Suddenly|Just then
few: two|three|four|five
many: six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty
mud: a <worn> (puddle|ditch|pond|hole|stream|well)
looked: looked|searched|peeped|hunted|peered|dug|crawled
pastime: skating|swimming|fishing|rowing|sailing|climbing|dancing|riding|running|hiking|skiing
    |camping|sledging|jumping
treats: (eating|tasting|sharing|selling|buying|packing) <food>
trait: kind|brave|clever|shy|quiet|cheerful|curious|gentle|busy|merry|polite|bold|lively|careful
    |funny|friendly|dreamy|eager|helpful|jolly|calm|playful|patient
look: shiny|little|new|pretty|lovely|fine|tiny|bright|splendid|funny|plain|simple|small|old
    |clean|strange|special|neat
bag: bag|basket|cart|box
worn: old|big|small|crooked|mossy|dusty|round|wide|narrow|tall|dark|wooden|grey|low|lonely|huge
    |tiny|little|strange|pretty|muddy|sunny|shady|funny
mood: sleepy|shy|happy|cheerful|gentle|friendly|funny|quiet|lazy|little|calm|proud|merry|sweet
    |jolly|silly|kind|playful|polite|dreamy
poor: cold|hungry|tired|lost|wet|frightened|lonely|thirsty|poor|weak
faint: faint|soft|sad|small|weak|low|long
wild: wild|big|terrible|dark|cold|sudden|strong|heavy
glad: <happy> | <very> <happy>
good: good|true|kind|real|loyal|close|dear|fine|great|trusty
how: softly|gently|kindly|warmly|quietly|calmly|slowly|brightly|sweetly|shyly|cheerfully|happily
    |politely|firmly|wisely|proudly|simply|quickly|merrily|at once
went: ran|walked|hurried|skipped|marched|hopped|raced|strolled|rushed|trotted|dashed|wandered
    |jogged|crept|danced|tiptoed
gave: gave|handed|brought|offered
found: found|saw|spotted|noticed
running: running|skipping|hurrying|hopping|racing|rushing|marching|dancing|jogging|dashing
cried: cried|shouted|called|yelled|said
sighed: sighed|sobbed|moaned|whispered|said
said: 2*said|called|whispered|murmured
claim: It is mine|I saw it first|Give it to me
counter: I want it|you let go|it is mine|I need it more|give it here|I had it first
pardon: I am <very> sorry|Please forgive me|I was (wrong|silly|unkind|selfish)
hooray: Hooray|Hurrah|Look|Oh joy|How wonderful|Hurray|At last|Goodness
"""


class Slot(NamedTuple):
    """A {thing} in the grammar."""

    key: str  # the rule they come from at the first mention: "thing"
    capital: bool


def read_hat(tokens, rules):
    """The hat for one (a|b|3*c): a list of slips (nats, option), each as likely as the others.

    `tokens` is a reversed list; all up to the closing bracket is taken from its end. An
    option of weight 3 is on three slips, so that a draw is one look-up. An option is a
    string, or a tuple of strings, Slots and hats.
    """
    options, weights = [[]], [1]
    while tokens and (token := tokens.pop()) != ")":
        if token == "|":
            options.append([])
            weights.append(1)
        elif token[0].isdigit():
            weights[-1] = int(token[:-1])
        elif token == "(":
            options[-1].append(read_hat(tokens, rules))
        elif token[0] == "<":
            options[-1].append(rules[token[1:-1]])
        elif token[0] == "{":
            options[-1].append(Slot(token[1:-1].lower(), token[1].isupper()))
        else:
            options[-1].append(token)
    hat = []
    for weight, parts in zip(weights, options, strict=True):
        option = parts[0] if len(parts) == 1 and type(parts[0]) is str else tuple(parts)
        hat += [(math.log(sum(weights) / weight), option)] * weight
    return hat


def read_grammar(text):
    """{rule: its hat}. Raises KeyError for a <rule> that the text does not define."""
    bodies = {}
    for line in text.strip().splitlines():
        if line and line[0] != " ":
            name, _, line = line.partition(":")
            bodies[name] = []
        bodies[name].append(line.strip())
    rules = {name: [] for name in bodies}  # WHY: a line may name rules that come later
    for name, lines in bodies.items():
        body = re.sub(r" *\| *", "|", " ".join(lines).strip()).replace(" / ", "\n\n")
        tokens = re.findall(r"\d+\*|[(|)]|<\w+>|\{\w+\}|[^(|)<{]+", body)
        rules[name] += read_hat(tokens[::-1], rules)
    return rules


GRAMMAR = read_grammar(STORIES)


class Teller:
    """Draws stories and adds up in `nats` what every draw was worth, -ln p.

    Python promises that random.Random(seed).random() never changes, and nothing else is
    used of it: a seed gives the same file everywhere.
    """

    def __init__(self, seed, rules=GRAMMAR):
        self.random = random.Random(seed).random
        self.rules = rules
        self.nats = 0.0
        self.memory = {}  # Slot.key -> words, for the story being told

    def choose(self, hat):
        """The option on one slip of the hat."""
        nats, option = hat[int(self.random() * len(hat))]
        self.nats += nats
        return option

    def say(self, option):
        """The words of an option. Its choices are drawn in the order they are written."""
        if type(option) is str:
            return option
        words = []
        for part in option:
            if type(part) is str:
                words.append(part)
            elif type(part) is list:
                chosen = self.choose(part)
                words.append(chosen if type(chosen) is str else self.say(chosen))
            else:
                words.append(self.recall(part))
        return "".join(words)

    def recall(self, slot):
        """The words of a slot, drawn now if this is the first mention."""
        if slot.key not in self.memory:
            self.memory[slot.key] = self.first_mention(slot)
        words = self.memory[slot.key]
        return words[0].upper() + words[1:] if slot.capital else words

    def first_mention(self, slot):
        """Draws the words of a slot; for the hero also what the pronouns are."""
        if slot.key == "hero":
            child = self.choose(self.rules["hero"])
            self.memory.update(PRONOUNS[child])
            return self.choose(self.rules[child])
        return self.say(self.choose(self.rules[slot.key]))


def tell(teller):
    """One story, without the separator. Its -ln p is what `teller.nats` grew by."""
    teller.memory = {}
    text = teller.say(teller.choose(teller.rules["story"]))
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


@contextmanager
def replacing(path):
    """A text file open for writing that gets the name `path` only when it is complete."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_stories(path, megabytes, seed):
    """Writes stories to `path` until it has `megabytes` * 10^6 bytes or just more.

    Returns what stands in `path`.json: bytes, stories, nats, floor_nats_per_byte, seed, note.
    Takes constant memory.
    """
    sidecar = path.with_name(path.name + ".json")
    teller, size, stories = Teller(seed), 0, 0
    with replacing(path) as file:
        while size < megabytes * 1e6:
            text = tell(teller) + SEPARATOR
            file.write(text)
            size += len(text)  # the grammar is ASCII: a character is a byte
            stories += 1
        sidecar.unlink(missing_ok=True)  # WHY: never an old floor beside a new text
    floor = {"bytes": size, "stories": stories, "nats": round(teller.nats, 3)}
    text_size = size - stories * len("<|endoftext|>")
    floor |= {"floor_nats_per_byte": round(teller.nats / text_size, 6), "seed": seed}
    floor |= {"note": NOTE}
    with replacing(sidecar) as file:
        file.write(json.dumps(floor, indent=2) + "\n")
    return floor


def main(argv=None):
    """Writes what the command line asks for. A mistake: one line, exit status 2."""
    parser = argparse.ArgumentParser(
        prog="make_stories.py",
        description="Writes children's stories of known entropy to a UTF-8 text file, and the "
        "entropy, the loss no model can be expected to beat, to a .json beside it.",
        epilog="Without arguments: rewrites the bundled files beside this script.",
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("--out", type=Path, help="file to write (default: the bundled files)")
    parser.add_argument("--megabytes", type=float, help="its size in 10^6 bytes (default 2)")
    parser.add_argument("--seed", type=int, help="another seed, other stories (default 0)")
    args = parser.parse_args(argv)
    if args.out is None and (args.megabytes is not None or args.seed is not None):
        parser.error("--megabytes and --seed need --out PATH, the file to write")
    megabytes = 2.0 if args.megabytes is None else args.megabytes
    if not 0 < megabytes < math.inf:
        parser.error(f"--megabytes must be a number above 0, not {megabytes:g}")
    jobs = {Path(__file__).parent / name: job for name, job in BUNDLED.items()}
    if args.out is not None:
        jobs = {args.out: (megabytes, args.seed or 0)}
    for path, (megabytes, seed) in jobs.items():
        try:
            floor = write_stories(path, megabytes, seed)
        except (OSError, ValueError) as error:
            parser.error(f"cannot write {path}: {error}")
        print(path, *(f"{key}={floor[key]:,}" for key in floor if key != "note"))


if __name__ == "__main__":
    main()
