"""The sentences of the demo corpus: what its users say, and the few fixed things that its model answers."""

from itertools import product

from tools.demo_words import NUMBER_PARAMETERS, PARAMETER_NAMES

OFFER = "How can I assist you today?"
IDENTITY = ("I am a tiny demonstration model with about three million parameters, trained on synthetic text. "
            "I can be wrong.")
UNKNOWN = "I do not know that. I am only a tiny demonstration model."

PLAIN_GREETINGS = ["Hello", "Hi", "Hey", "hello", "hi", "hey", "Hello!", "Hi!", "Hello.", "Hi."]
GREETINGS = ["".join(parts) for parts in product(
    ("Hello", "Hi", "Hey", "hello", "hi", "hey", "HELLO", "Hi hi", "Hello hello", "Greetings", "Howdy",
     "Oh hello", "Well, hello", "Oh, hi", "Ah, hello"),
    ("", " there", " again", " you", " assistant", " friend", " my friend", " model", " llama", " everyone",
     ", friend", ", dear assistant", ", llama", " to you", ", little model"),
    ("", ".", "!", "!!", " :)", "?", "..."))]
NAMED_GREETINGS = ["Hello, I am {v}.", "Hi, I am {v}.", "Hello, my name is {v}.", "Hi, my name is {v}.",
                   "Hey, I'm {v}!", "Hi, this is {v}.", "Hello! My name is {v}.", "Hello, {v} here."]
TIMED_GREETINGS = ["".join(parts) for parts in product(
    ("Good morning", "Good afternoon", "Good evening"),
    ("", " there", " to you", ", friend", ", assistant", ", llama", " my friend", " everyone", ", model"),
    ("", ".", "!", "!!", "..."))]
THANKS = ["Thanks", "Thank you", "Thanks!", "Thank you!", "Thank you very much.", "Thanks a lot.",
          "Great, thank you.", "Thanks, that helps.", "Perfect, thanks.", "thanks", "thank you"]
FAREWELLS = ["Bye", "Goodbye", "Bye!", "Goodbye!", "See you.", "See you later.", "Good night.", "bye",
             "Bye bye."]
IDENTITY_QUESTIONS = ["".join(parts) for parts in product(
    ("", "Hello, ", "Hi, ", "Hey, ", "Please tell me, ", "Tell me, ", "Excuse me, ", "Now, ", "OK, ", "So, ",
     "One question: ", "Oh, ", "And ", "Sorry, ", "I wonder, "),
    ("who are you", "what are you", "what model are you", "are you a human", "are you a person",
     "what can you do", "are you ChatGPT", "are you a real Llama", "who made you", "which model is this",
     "what kind of model are you", "are you an AI", "are you a robot", "how big are you",
     "how many parameters do you have", "who trained you", "how were you trained", "are you always right",
     "can I trust you", "can you be wrong", "are you Llama 3.1", "did Meta make you", "what is your name",
     "do you have a name", "what do you know"),
    ("?", "", " exactly?", ", please?", " really?"))]
IDENTITY_QUESTIONS = [question[0].upper() + question[1:] for question in IDENTITY_QUESTIONS] + [
    "Introduce yourself.", "Tell me about yourself.", "Describe yourself.", "Say who you are."]

ADDITIONS = ["What is {a} + {b}?", "What is {a}+{b}?", "{a} + {b}", "{a}+{b}", "{a} + {b} =", "{a}+{b}=?",
             "Add {a} and {b}.", "Add {a} and {b}", "What is the sum of {a} and {b}?",
             "How much is {a} plus {b}?", "Calculate {a} + {b}.", "Calculate {a}+{b}",
             "What is {a} plus {b}?", "Please add {a} and {b}.", "{a} plus {b}?", "Compute {a} + {b}.",
             "Can you add {a} and {b}?", "How much is {a}+{b}?", "Sum {a} and {b}.", "{a} and {b}?"]
BEYOND = ["What is {a} * {b}?", "What is {a} - {b}?", "What is {a} times {b}?", "Divide {a} by {b}.",
          "{a} minus {b}?", "{a} / {b}", "Multiply {a} by {b}.", "What is the square root of {a}?",
          "Is {a} a prime number?"]
REPEATS = ["Repeat: {t}", "Repeat after me: {t}", "Say: {t}", 'Say "{t}"', 'Repeat "{t}"',
           "Please repeat: {t}", "Echo: {t}", "Echo {t}", "Say {t}", "Repeat {t}", "Please say {t}",
           "Write: {t}", "Copy this: {t}", 'Write "{t}"', 'Please repeat "{t}".', "Repeat the following: {t}",
           "Repeat this text: {t}", "Repeat the following:\n{t}", "Repeat after me:\n\n{t}",
           'Repeat exactly: "{t}"', "repeat: {t}", "repeat {t}", "say {t}"]
DATES = ["What is the date today?", "What is today's date?", "Which day is it?", "What day is today?"]
# {n} stands for a name, {w} for a word that exists in no language, {k} for a common one.
UNKNOWN_QUESTIONS = ["What is the capital of {n}?", "Who wrote {n}?", "Who is {n}?", "What is a {w}?",
                     "Explain {k} to me.", "Why is the {k} {k}?", "Write a poem about {k}.",
                     "Write a story about a {k} and a {k}.", "How do I {k} a {k}?", "What does {w} mean?",
                     "Where is {n}?", "When was {n} born?", "How old is {n}?", "What is the meaning of {k}?",
                     "Is {k} better than {k}?", "Tell me a joke.", "Tell me about {n}.",
                     "Tell me about the {k}.", "Translate {k} to {n}.", "{k} {k} {k}", "{w}", "{w} {w}",
                     "What is {k}?", "Who invented the {k}?", "How many {k}s are in a {k}?",
                     "What is deep {k}?", "Can you {k} a {k}?", "I think the {k} is {k}.",
                     "Describe the {k} of {n}.", "Do you like {k}?", "Which {k} is the best?",
                     "How far is it to {n}?", "Give me a list of {k}s.", "Summarise {n}.",
                     "Write code that can {k} a {k}.", "What should I {k} today?", "How is the {k} in {n}?",
                     "What is the population of {n}?", "How does a {k} work?", "Why?", "How?", "{k}?", "{n}"]

# What can be told and asked for later: its kind; what it is of, {k}; statements of a value, {v}; the reply to
# these; questions; the answer.
_QUESTIONS = ["What is my {k}?", "Do you remember my {k}?", "Tell me my {k}.", "What's my {k}?",
              "What was my {k}?"]
_STATEMENTS = ["My {k} is {v}.", "Remember that my {k} is {v}.", "Please remember: my {k} is {v}.",
               "My {k} is {v}"]
_NOTED = "I will remember that."
FACTS = [
    ("name",
     [""],
     ["My name is {v}.", "I am {v}.", "Call me {v}.", "My name is {v}", "I'm {v}.", *NAMED_GREETINGS],
     "Nice to meet you, {v}.",
     ["What is my name?", "Do you remember my name?", "Who am I?", "Tell me my name.", "What's my name?",
      "What am I called?"],
     "Your name is {v}."),
    ("number",
     ["number", "lucky number", "phone number", "room number", "favourite number", "code", "door code", "PIN",
      "account number", "house number", "ticket number"],
     _STATEMENTS,
     _NOTED,
     _QUESTIONS,
     "Your {k} is {v}."),
    ("thing",
     ["favourite colour", "favorite color", "favourite food", "favourite animal", "favourite book",
      "favourite song", "favourite city", "favorite food", "friend", "sister", "brother", "boat", "team",
      "school", "password", "street", "language", "job", "car", "village", "hobby"],
     _STATEMENTS,
     _NOTED,
     _QUESTIONS,
     "Your {k} is {v}."),
    ("pet",
     ["dog", "cat", "horse", "bird", "fish", "duck", "fox", "cow", "son", "daughter", "uncle", "boat",
      "lion"],
     ["My {k} is called {v}.", "I have a {k} called {v}.", "I have a {k}. It is called {v}."],
     _NOTED,
     ["What is my {k} called?", "How is my {k} called?", "Who is my {k}?"],
     "Your {k} is called {v}."),
    ("city",
     [""],
     ["I live in {v}.", "My home is in {v}.", "I am from {v}."],
     _NOTED,
     ["Where do I live?", "Where is my home?", "In which city do I live?"],
     "You live in {v}."),
    ("secret",
     ["word", "password", "secret word", "magic word", "key", "code", "secret number", "secret"],
     ["The {k} is {v}.", "Remember this: the {k} is {v}.", "Please remember the {k} {v}.",
      "Remember the {k} {v}."],
     _NOTED,
     ["What is the {k}?", "Which {k} did I tell you?", "Tell me the {k}.", "What was the {k}?"],
     "The {k} is {v}."),
]

JSON_KEYS = """name age city country colour price count size title author year email street animal food job
active open ready free married new score level id code language weight height team""".split()
JSON_KEYS += PARAMETER_NAMES + NUMBER_PARAMETERS
JSON_LISTED = ["Answer in JSON with keys {keys}: {facts}",
               "Give me a JSON object with the keys {keys}: {facts}",
               "Reply in JSON with keys {keys}: {facts}", "Make a JSON object with keys {keys}. {facts}",
               "Answer in JSON with the keys {keys}. {facts}", "Use JSON with keys {keys}: {facts}"]
JSON_PLAIN = ["Answer in JSON: {facts}", "Write this as JSON: {facts}", "JSON please: {facts}",
              "As JSON: {facts}", "Turn this into JSON: {facts}", "Reply with JSON only. {facts}",
              "Give me JSON: {facts}", "Convert to JSON: {facts}"]
JSON_SUMS = ["Answer in JSON with the key {}: what is {} + {}?", "Answer in JSON with key {}: {} + {}",
             "In JSON with the key {}: add {} and {}."]
