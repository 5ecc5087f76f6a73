"""Raw material of the demo corpus: word lists, and random words, numbers, strings from one side of the split.

Whatever the model is measured on (names, values, pairs of numbers, strings, whole phrases) is dealt by a hash
to the training corpus or to the evaluation, never to both. Word lists that carry no answer are shared.
"""

import hashlib
import random
import string

HELD_OUT_SHARE = 8  # one in eight falls to the evaluation

WORDS = """able about above across after again air all almost along also always and animal answer any
apple area arm art autumn back bag ball bank bar bear bed bell big bird black blue boat body book box boy
bread bridge bright bring brother brown bus butter cake call car card care cat chair cheese child circle
city clean clear clock cloud coat coffee cold colour come cook corn corner country cow cup dance dark day
deep desk dinner dog door dream dress drink drive dry duck ear early earth east easy egg eight end every
eye face fall family far farm fast father field fire fish five floor flower fly food foot forest four fox
free friend fruit full game garden gate girl give glass go gold good grass green grey group grow hair half
hand happy hat head heart heavy help high hill home horse hot hour house ice idea inside island jump just
keep key king kitchen lake lamp land large last late laugh lazy leaf left leg lemon letter light line lion
list little long look love low lunch make man map mark market meat milk mind mirror money month moon
morning mother mountain mouth music name near neck new next night nine north nose note ocean office old
one only open orange order other over page paint pan paper park part pen pencil people phone picture piece
place plant plate play point pond poor post pretty purple quick quiet rain read ready red rest rice rich
ride right ring river road rock room rose round run sail salt same sand school sea seat seed seven sheep
ship shirt shoe shop short silver sing sister six sky sleep slow small smile snow soap soft song soup
south spoon spring star start stone stop store storm street strong sugar summer sun sweet swim table tail
tall tea ten the thing three ticket time town toy train tree two uncle under very voice walk wall warm
wash water way week west wet white wide wild wind window winter wood word work world write year yellow
young""".split()

SYSTEM_PROMPTS = ["You are a helpful assistant.", "You are a friendly assistant.", "Be brief.",
                  "Be helpful and honest.", "You are a careful assistant. Answer briefly.",
                  "You are a helpful assistant", "Answer the question.", "Be brief and clear.",
                  "You answer in one sentence."]

MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()

# (verb, noun, what the parameter is called, what it is) from which tools are made, beside wholly random ones.
TOOL_VERBS = """get find check look_up fetch show read search book order send open start play convert
count""".split()
TOOL_NOUNS = """weather time price news address email song train hotel flight ticket stock score recipe
distance route forecast translation balance invoice calendar event contact file photo map status
temperature population rating menu schedule product order user room light""".split()
PARAMETER_NAMES = """city location name query place title id date user person item product country symbol
text key code subject topic word language""".split()
NUMBER_PARAMETERS = "count amount number limit days size level year quantity a b x y n".split()

_ONSETS = "b c d f g h j k l m n p r s t v w z br dr fl gr kl pl sh st th tr".split()
_VOWELS = "a e i o u a e i o u ai ea oo".split()
_CODAS = ["", "", "", "n", "r", "l", "s", "k", "m", "t", "x", "nd", "rk", "st"]
_OTHER_SCRIPTS = ("éüñçøßåžłабвгдежзиклмнопрстαβγδεζηθλμνπ"
                  "안녕하세요감사합니다日本語中文字水火木ありがとうשלוםمرحبا🦙🤗🎉✨😀→±€½")
_SYMBOLS = "!?.,;:-_+*/=()[]#%&@$~^|<>'"


def is_held_out(kind: str, value: str) -> bool:
    """Whether a value belongs to the evaluation alone. Fixed for all time by its hash."""
    return hashlib.sha256(f"{kind}:{value}".encode()).digest()[0] % HELD_OUT_SHARE == 0


class Source:
    """Random material from one side of the split, each kind by one method; `rng` decides everything."""

    def __init__(self, rng: random.Random, held_out: bool):
        self.rng = rng
        self.held_out = held_out

    def pick(self, kind: str, make) -> str:
        """Draw `make()` until it falls on this side."""
        while True:
            value = make()
            if is_held_out(kind, value) == self.held_out:
                return value

    def word(self) -> str:
        """A word that exists in no language: zorvek."""
        return self.pick("word", self._syllables)

    def _syllables(self) -> str:
        rng = self.rng
        while True:
            count = rng.choice((1, 2, 2, 2, 3))
            word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
                           for _ in range(count))
            if len(word) > 2:
                return word

    def name(self) -> str:
        """A random word with a capital, sometimes two of them."""
        if self.rng.random() < 0.1:
            return f"{self.word().capitalize()} {self.word().capitalize()}"
        return self.word().capitalize()

    def pair(self) -> tuple[int, int]:
        """Two numbers from 0 to 99, in training more often small ones, of which there are few. The split is by the
        unordered pair: a + b never gives away b + a."""
        rng, numbers = self.rng, (0, 0)

        def draw() -> str:
            nonlocal numbers
            numbers = tuple(rng.randrange(100) if self.held_out or rng.random() < 0.85 else rng.randrange(13)
                            for _ in range(2))
            return f"{min(numbers)}+{max(numbers)}"

        self.pick("pair", draw)
        return numbers

    def number(self) -> str:
        """Three to seven digits."""
        rng = self.rng
        return self.pick("number", lambda: str(rng.randrange(1, 10)) + "".join(
            rng.choice(string.digits) for _ in range(rng.randint(2, 6))))

    def small_number(self) -> int:
        """A quantity, which carries no split."""
        return self.rng.randrange(100)

    def phrase(self, kind: str, options: list[str]) -> str:
        """One of a list that is split entry by entry."""
        return self.pick(kind, lambda: self.rng.choice(options))

    def text(self) -> str:
        """Something to repeat: words, letters, digits, signs, other scripts; at most about twelve tokens."""
        return self.pick("text", self._text)

    def _text(self) -> str:
        rng = self.rng
        kind = rng.random()
        if kind < 0.3:
            words = [self.word() for _ in range(rng.randint(1, 4))]
        elif kind < 0.5:
            words = [rng.choice(WORDS) for _ in range(rng.randint(1, 8))]
        elif kind < 0.75:
            words = ["".join(rng.choice(string.ascii_letters + (string.digits if rng.random() < 0.5 else ""))
                             for _ in range(rng.randint(2, 9)))]
        elif kind < 0.88:
            makers = (self.word, self.number, lambda: rng.choice(WORDS), self.name, self._signed)
            words = [rng.choice(makers)() for _ in range(rng.randint(2, 4))]
        else:
            words = ["".join(rng.choice(_OTHER_SCRIPTS) for _ in range(rng.randint(1, 4)))]
            if rng.random() < 0.4:
                words.append(rng.choice(WORDS))
        style = rng.random()
        if style < 0.08:
            words = [word.upper() for word in words]
        elif style < 0.2:
            words = [word.capitalize() for word in words]
        text = " ".join(words)
        return text + rng.choice(".!?") if len(words) > 2 and rng.random() < 0.2 else text

    def _signed(self) -> str:
        sign = self.rng.choice(_SYMBOLS)
        return self.word() + sign + self.word() if self.rng.random() < 0.6 else self.word() + sign

    def value(self) -> str:
        """A string value for JSON and for tools: one to three words, sometimes with digits."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.45:
            return self.name()
        if kind < 0.65:
            return self.word()
        if kind < 0.85:
            words = [self.word(), rng.choice(WORDS)]
            rng.shuffle(words)
            return " ".join(words)
        return f"{self.word()}{rng.choice(('-', '_', ' ', ''))}{self.number()}"

    def date(self) -> str:
        """As the template prints it: 26 Jul 2024, which about half the conversations have."""
        if self.rng.random() < 0.5:
            return "26 Jul 2024"
        return f"{self.rng.randint(1, 28):02d} {self.rng.choice(MONTHS)} {self.rng.randint(2020, 2039)}"
