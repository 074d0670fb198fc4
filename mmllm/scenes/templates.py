"""What people say when they ask for what `questions.py` asks for: data of `wordings.py`.

`[a|b|]` is a choice, which may be empty. `{0}`, `{1}` are the groups of the pattern, `{bare}` the first one without its
article, `{many}` that one in the plural. A template names things in the order of the pattern. A template or a word that
begins with HELD_OUT, about every fifth, is never shown by training.
"""

from __future__ import annotations

from dataclasses import dataclass

HELD_OUT = "*"


@dataclass(frozen=True)
class Intent:
    """What a question asks: a pattern of `questions.py`, and templates that ask for the same."""

    pattern: str
    templates: tuple[str, ...]


_ONE = "the (.+?)"
INTENTS: tuple[Intent, ...] = (
    # two pictures
    Intent(r"are the two pictures the same or different\?", (
        "are [these|both] pictures the same or different?", "same or different?", "same picture or different [ones|]?",
        "*[do|would] you [say|think] the [two|] pictures are the same or different?",
        "do [both|these|the two] pictures show the same [thing|] or something different?",
        "tell me [if|whether] the [two|] pictures are the same or different.",
        "compare [the two|both|these] pictures[:|.] same or different?", "is it the same picture or a different one?",
        "are [the|both|these] pictures [equal|alike|identical] or different?",
        "are picture 1 and picture 2 the same or different?", "*is picture 1 the same as picture 2 or different?",
    )),
    Intent(r"which picture has more objects\?", (
        "which [one|] of the pictures has more objects?", "[in|on] which picture are [there|] more objects?",
        "where are [there|] more objects, in picture 1 or [in|] picture 2?", "which picture shows more objects?",
        "[please|] tell me which picture has more objects.", "does picture 1 or picture 2 have more objects?",
        "*which [one|picture] has [the most|most] objects?", "where [do|can] you see more objects?",
        "which picture [contains|has got] [more|the most] objects?",
        "*are there more objects in picture 1 or in picture 2?",
    )),
    Intent(r"which picture has (.+)\?", (
        "which picture shows {0}?", "[in|on] which picture is [there|] {0}?", "which [one|] of the pictures has {0}?",
        "where [do|can] you see {0}, in picture 1 or [in|] picture 2?", "[in|on] which picture [do|can] you see {0}?",
        "*[please|] tell me which picture has {0}.", "which picture contains {0}?", "show me the picture with {0}.",
        "*which one [has|shows] {0}?", "where is [there|] {0}, in picture 1 or [in|] picture 2?",
        "does picture 1 or picture 2 [have|show] {0}?", "which is the picture with {0}?", "find the picture with {0}.",
        "*[what|which] picture has got {0}?",
    )),
    # comparisons
    Intent(r"are the (.+) and the (.+) the same (color|shape|size)\?", (
        "do the {0} and the {1} have the same {2}?", "is the {2} of the {0} the same as [the {2}|that] of the {1}?",
        "does the {0} have the same {2} as the {1}?", "*have the {0} and the {1} got the same {2}?",
        "*is the {2} of the {0} and the {1} the same?", "are the {0} and the {1} [equal|alike] in {2}?",
        "are the {0} and the {1} of the same {2}?", "is the {0} the same {2} as the {1}?",
        "has the {0} the same {2} as the {1}?", "tell me [if|whether] the {0} and the {1} have the same {2}.",
        "the {0} and the {1}, same {2}?", "would you say the {0} and the {1} have the same {2}?",
    )),
    Intent(r"which is (larger|smaller), the (.+) or the (.+)\?", (
        "what is {0}, the {1} or the {2}?", "which one is {0}, the {1} or the {2}?",
        "of the {1} and the {2}, which [one|] is {0}?", "[please|] tell me which [one|] is {0}, the {1} or the {2}.",
        "*which of the two is {0}, the {1} or the {2}?", "is the {1} or the {2} {0}?",
        "between the {1} and the {2}, which [one|] is {0}?", "*what would you say is {0}, the {1} or the {2}?",
        "what looks {0}, the {1} or the {2}?", "which looks {0} to you, the {1} or the {2}?",
        "the {1} or the {2}, which [one|] is {0}?", "who looks {0}, the {1} or the {2}?",
    )),
    Intent(r"are there more (.+) than (.+)\?", (
        "[do|can] you see more {0} than {1}?", "is the number of {0} [higher|larger] than the number of {1}?",
        "does the picture [have|show] more {0} than {1}?", "are the {0} more than the {1}?", "more {0} than {1}?",
        "do you [count|find] more {0} than {1}?", "*would you say there are more {0} than {1}?",
        "[please|] tell me [if|whether] there are more {0} than {1}.", "is it true that there are more {0} than {1}?",
        "*are there more {0} than {1} in the picture?", "has the picture [got|] more {0} than {1}?",
    )),
    Intent(r"is the (.+) bar (taller|shorter) than the (.+) bar\?", (
        "does the {0} bar look {1} than the {2} bar?", "is the bar in {0} {1} than the bar in {2}?",
        "*[please|] tell me [if|whether] the {0} bar is {1} than the {2} [bar|one].", "*is {0} {1} than {2}?",
        "is the {0} one {1} than the {2} one?", "would you say the {0} bar is {1} than the {2} [bar|one]?",
        "is it true that the {0} bar is {1} than the {2} [bar|one]?", "is the {0} bar {1} than the {2} one?",
        "do you think the {0} bar is {1} than the {2} [bar|one]?", "the {0} bar is {1} than the {2} bar, right?",
    )),
    # places
    Intent(r"what shape is (left of|right of|above|below) the (.+)\?", (
        "which shape is {0} the {1}?", "*what is [the shape|] {0} the {1}?",
        "which shape [do|can] you see {0} the {1}?", "what shape [do|can] you [find|see] {0} the {1}?",
        "[please|] tell me the shape {0} the {1}.", "{0} the {1}, what shape is there?", "name the shape {0} the {1}.",
        "what do you see {0} the {1}?", "what lies {0} the {1}?", "what can be [seen|found] {0} the {1}?",
        "what shape lies {0} the {1}?", "*[please|] tell me what is {0} the {1}.",
    )),
    Intent(r"is the (.+) (left of|right of|above|below) the (.+)\?", (
        "[do|can] you find the {0} {1} the {2}?", "*does the {0} lie {1} the {2}?", "do you see the {0} {1} the {2}?",
        "[please|] tell me [if|whether] the {0} is {1} the {2}.", "is it true that the {0} is {1} the {2}?",
        "is the {0} [placed|located] {1} the {2}?", "would you say the {0} is {1} the {2}?",
        "*the {0} is {1} the {2}, right?", "can the {0} be [seen|found] {1} the {2}?",
        "do you think the {0} is {1} the {2}?", "is the {0} somewhere {1} the {2}?", "the {0}, is it {1} the {2}?",
    )),
    Intent(rf"where (?:in the picture )?is {_ONE}\?", (
        "where [can|could|do] i find the {0}?", "[please|] tell me where the {0} is.",
        "[in|on|at] which place is the {0}?", "where [do|can] you see the {0}?",
        "what is the [place|position|location] of the {0}?", "[in|on] [what|which] part of the picture is the {0}?",
        "where is the {0} [located|placed|to be found]?", "whereabouts is the {0}?",
        "where did they [draw|put] the {0}?", "show me where the {0} is.", "*where's the {0}?",
        "which [place|position] does the {0} have?", "the {0} is where?", "*where would i [look for|see|find] the {0}?",
        "*do you [know|see] where the {0} is?", "[find|locate] the {0}.", "where exactly is the {0}?",
        "can you [find|locate] the {0}?", "where on the picture is the {0}?", "*where does the {0} lie?",
        "[in|at] what position is the {0}?",
    )),
    # charts
    Intent(r"(?:what is the value of|how tall is) the (.+) bar\?", (
        "[what|which] value does the {0} bar [have|show]?", "how high is the {0} bar?", "which value has the {0} bar?",
        "[please|] tell me the value of the {0} bar.", "what number does the {0} bar [show|have]?",
        "how much is the {0} bar?", "what is the height of the {0} bar?", "read the {0} bar.", "*value of the {0} bar?",
        "*what is the {0} bar's value?", "how large is the {0} bar?", "how tall would you say the {0} bar is?",
        "how high does the {0} bar [go|reach]?", "*what does the {0} bar [show|say]?", "how long is the {0} bar?",
        "up to what [value|number] does the {0} bar go?", "can you [read|tell me] the value of the {0} bar?",
    )),
    Intent(r"which bar has the value (\d+)\?", (
        "*what bar has the value {0}?", "*which bar shows [the value|] {0}?",
        "which color has the bar with the value {0}?", "which bar is [at|] {0}?",
        "[please|] tell me which bar has the value {0}.", "the bar with value {0}, which one is it?",
        "what color is the bar with [the|] value {0}?", "which of the bars has [a|the] value [of|] {0}?",
        "which bar is {0} [high|tall]?", "which one has the value {0}?", "find the bar with the value {0}.",
    )),
    Intent(r"which bar is the (tallest|shortest)\?", (
        "what is the {0} bar?", "which [one|] of the bars is the {0} [one|]?", "what color is the {0} bar?",
        "[please|] tell me which bar is the {0}.", "name the {0} bar.", "*which color has the {0} bar?",
        "which [one|bar] is the {0} of all?", "which is the {0} bar?", "what color does the {0} bar have?",
        "*which bar would you say is the {0}?", "what is the color of the {0} bar?", "find the {0} bar.",
        "*which bar looks the {0}?", "[and|] the {0} bar?", "can you [see|find|tell me] which bar is the {0}?",
    )),
    # written text
    Intent(r"(?:what (word|number) is written\?|read the (word|number)\.)", (
        "which {0} is [written|shown]?", "which {0} [do|can] you see?", "[please|] tell me the {0}.",
        "what {0} [do|can] you see [here|]?", "what {0} [can|do] you read?",
        "*[what|which] {0} does the picture [show|have]?", "*[please|] read me the {0}.", "what does the {0} say?",
        "what {0} is on there?", "what is the {0}?", "what {0} is [shown|it|this|there]?",
        "which {0} is in the picture?", "*can you [read|tell me] the {0}?", "what {0} did they write?",
        "give me the {0}.", "say the {0}.", "*which {0} is it?", "the {0}?",
    )),
    Intent(r"what does it say\?", (
        "what is written [there|here|]?", "what does the picture say?", "what is written in the picture?",
        "*what [do|can] you read [there|here|]?", "can you read [it|this|that|the text]?", "read [it|the text].",
        "[please|] tell me what is written [there|here|].", "what does the text say?",
        "*what text [is|do you see] there?", "[please|] read [out|] what is written.", "what is on there?",
        "what did they write [there|here|]?", "can you read what it says?", "[please|] tell me what it says.",
        "what does this say?", "*what is the text?",
    )),
    # attributes
    Intent(r"what (color|shape) is it\?", (
        "which {0} is it?", "[which|what] {0} does it have?", "and its {0}?", "what is its {0}?", "its {0}?",
        "*[please|] tell me its {0}.", "what is the {0} of it?", "*and [what|which] {0} is it?", "*name its {0}.",
        "and the {0}?", "what {0} would that be?", "what {0} is that?",
    )),
    Intent(r"what size is it\?", (
        "*how large is it?", "is it large or small?", "what is its size?", "*is it small or large?", "its size?",
        "[please|] tell me its size.", "[which|what] size does it have?", "and its size?", "and how large is it?",
        "[which|what] size is that?", "large or small?",
    )),
    Intent(r"where is it\?", (
        "where can i find it?", "what is its [place|position|location]?", "where do you see it?", "and where is it?",
        "*[please|] tell me where it is.", "in which place is it?", "where is it [located|placed]?", "and its place?",
        "where is that?", "*where exactly is it?", "where does it lie?", "its [place|position]?",
    )),
    Intent(rf"(?:what color is|what is the color of) {_ONE}\?", (
        "[which|what] color does the {0} have?", "*which color is the {0}?", "[please|] tell me the color of the {0}.",
        "*the {0} has [which|what] color?", "name the color of the {0}.", "in [what|which] color is the {0}?",
        "what color [do|can] you see on the {0}?", "how is the {0} colored?", "which color has the {0}?",
        "[can|could] you [name|tell me] the color of the {0}?", "what color would you say the {0} is?",
        "what is the {0}'s color?", "the color of the {0}?", "color of the {0}?", "*the {0} is [which|what] color?",
        "*[please|] tell me what color the {0} is.", "what color has the {0} [got|]?",
        "of [what|which] color is the {0}?", "do you [know|see] what color the {0} is?",
        "what color did they give the {0}?", "the {0}, what color is it?",
    )),
    Intent(rf"(?:what shape is|what is the shape of) {_ONE}\?", (
        "[which|what] shape does the {0} have?", "which shape is the {0}?", "*[please|] tell me the shape of the {0}.",
        "what kind of shape is the {0}?", "name the shape of the {0}.", "what form does the {0} have?",
        "*what is the {0}?", "which shape has the {0}?", "[can|could] you [name|tell me] the shape of the {0}?",
        "*what shape would you say the {0} is?", "the shape of the {0}?", "shape of the {0}?",
        "*which shape is that, the {0}?",
        "[please|] tell me what [shape|] the {0} is.", "what is the {0}'s shape?", "what form is the {0}?",
        "what shape has the {0} [got|]?", "do you [know|see] what shape the {0} is?", "the {0} is what shape?",
        "what sort of shape is the {0}?",
    )),
    Intent(r"(?:what size is the (.+?)\?|is the (.+) small or large\?)", (
        "how large is the {0}?", "*is the {0} large or small?", "[please|] tell me the size of the {0}.",
        "what is the size of the {0}?", "[which|what] size does the {0} have?", "*which size has the {0}?",
        "is it a small or a large one, the {0}?", "*is the {0} large, or is it small?",
        "the {0}, is it large or small?", "*does the {0} look [large or small|small or large]?",
        "would you say the {0} is [large or small|small or large]?", "how large would you say the {0} is?",
        "[please|] tell me [if|whether] the {0} is large or small.", "is that {0} small or large?",
        "how large is that {0}?", "the size of the {0}?", "what is the {0}'s size?",
        "is the {0} a [large or a small|small or a large] one?", "which size is the {0}?", "the {0} is what size?",
    )),
    # counting and presence
    Intent(r"how many (.+) are there\?", (
        "*how many {0} [do|can] you [see|find|count]?", "what is the [total|] number of {0}?", "*count the {0}.",
        "*how many {0} are [in|on] [the|this] picture?", "how many {0} does the picture [have|show|contain]?",
        "*[please|] tell me how many {0} there are.", "how many {0} can be [seen|counted|found]?", "how many {0}?",
        "[can|could] you count the {0}?", "give me the number of {0}.", "how many {0} has the picture [got|]?",
        "how many {0} are [shown|visible] [here|]?", "the number of {0}?", "number of {0}?",
        "how many {0} would you say there are?", "[please|] count [all|] the {0} [in the picture|for me].",
        "how many {0} [did they draw|have they drawn]?", "do you know how many {0} there are?",
        "how many {0} is that?", "how many {0} [do we have|have we got] here?",
    )),
    Intent(r"is there anything (.+)\?", (
        "*[do|can] you see anything {0}?", "is something {0}?", "is there something {0}?", "*is anything {0}?",
        "does the picture have [anything|something] {0}?", "is there an object {0}?", "can you find anything {0}?",
        "anything {0}?", "do you see something {0}?",
        "[please|] tell me [if|whether] there is [anything|something] {0}.", "is there any object {0}?",
        "*did they [draw|put] anything {0}?", "can anything be [seen|found] {0}?",
    )),
    Intent(r"is there (an? .+)\?", (
        "[do|can] you see {0} [here|there|in the picture|]?", "does the picture [have|contain] {0}?", "*any {bare}?",
        "is {0} [in|on] [the|this] picture?", "does the picture show {0}?", "[can|do] you find {0}?",
        "is there {0} [in|on] the picture?", "[please|] tell me [if|whether] there is {0}.", "*is there any {bare}?",
        "are you able to see {0}?", "*have they drawn {0}?", "*does it [contain|have|show] {0}?", "any {many}?",
        "*are there [any|] {many} [here|]?", "[do|can] you see any {many}?", "any {bare} in [there|the picture|here]?",
        "is {0} [visible|shown]?", "can {0} be [seen|found]?", "are any {many} [visible|shown|there]?",
        "would you say there is {0}?", "did they draw {0}?", "has the picture [got|] {0}?",
        "do you [notice|find] {0}?", "does {0} [appear|exist] [here|in the picture]?",
    )),
    # follow-ups
    Intent(r"and the other one\?", (
        "[and|] what about the other one?", "and the other?", "[and|] how about the other one?", "*the other one?",
        "and for the other one?", "*and that of the other one?", "[and|] what is it for the other one?", "the other?",
    )),
    Intent(rf"and {_ONE}\?", (
        "[and|] what about the {0}?", "[and|] how about the {0}?", "*now the {0}?", "*and for the {0}?", "the {0}?",
        "and that of the {0}?", "then the {0}?", "[and|] what is it for the {0}?", "and also the {0}?",
    )),
    # captions
    Intent(r"(?:describe the picture\.|what is in the picture\?|what do you see\?|write a caption\.)", (
        "what does [the|this] picture show?", "*[please|] tell me what you see.", "what can you see [here|there|]?",
        "describe what you see.", "*[please|] give me a [caption|description].",
        "what is [shown|] [in|on] this picture?", "write a [caption|description] [of|for] [the|this] picture.",
        "tell me about [the|this] picture.", "[please|] describe [it|this|everything].", "caption [this|the] picture.",
        "*what is this a picture of?", "can you describe [the|this] picture [for me|]?",
        "[please|] say what is in the picture.", "*what is this?", "what can be seen [here|in the picture]?",
        "describe [the|this] picture [for me|to me|in one sentence].", "what objects are in the picture?",
        "*what is there to see?", "what is on the picture?", "what's this?",
        "[please|] [summarize|sum up] the picture.", "what do you [notice|see] [here|in this picture]?",
        "what have we got here?",
    )),
    # small talk
    Intent(r"hello\.|hi!", (
        "hello [there|]!", "*hi [there|].", "hey [there|]!", "good [morning|evening|afternoon|day].",
        "hello and good morning!", "hello, how are you?", "how are you?",
    )),
    Intent(r"who are you\?", (
        "what are you?", "[please|] tell me who you are.", "*what is your name?",
        "what kind of [model|program] are you?", "are you a [robot|model|person|human]?", "who am i talking to?",
        "please introduce yourself.",
    )),
    Intent(r"what can you do\?", (
        "*what do you do?", "how can you help me?", "what are you [able to do|good for]?", "what are your abilities?",
        "*[please|] tell me what you can do.", "what can i ask [you|]?", "help!", "how does this work?",
    )),
    Intent(r"thank you\.", (
        "thanks [a lot|].", "thank you very much!", "many thanks.", "great, thank you.", "*thanks!",
    )),
    Intent(r"goodbye\.", ("*bye [bye|].", "see you.", "good night.", "i have to go.", "farewell.", "bye!")),
)  # fmt: skip

# What no picture of this world answers. {thing} and {person} are names of what is not in it, {number} is a number.
UNKNOWN_QUESTIONS = (
    "*who [painted|made|drew|took|created|invented] [this|it|the picture|that]?",
    "who is [the artist|the author|the painter|the owner|this|that|he|she]?",
    "what is the weather [like|] [today|there|outside|tomorrow|]?",
    "*is it [raining|snowing|sunny|windy|hot|cold|late]?",
    "how old [is this picture|is the {person}|is this|is he|is she|am i]?", "how old are you?", "what is your age?",
    "what is your favorite [color|shape|food|movie|song|book|number|{thing}]?",
    "*who is the [president|king|queen|boss|leader|captain] [of {place}|]?", "what is the capital of {place}?",
    "*where was this [picture|] [taken|made|painted]?", "when was [this|it|the picture] [taken|made|painted|born]?",
    "where [are you from|do you live|do you come from|is {place}|am i|is my {thing}]?",
    "*what [time|day|year|month|season|date] is it [now|today|]?", "*how much does [it|this|a {thing}|that] cost?",
    "what is the price of [this|a {thing}|that]?", "how many [people|{thing}s] live in {place}?",
    "who are the people [in the picture|here|]?", "what happens next?", "what happened [here|before|yesterday]?",
    "why is [it there|it so|this funny|the sky so bright|the {person} sad]?", "why [did|do] [you|they] do that?",
    "who made you?", "*who [is|was] {name}?", "do you know {name}?", "*have you [met|seen] {name}?", "call {name}.",
    "[can you|could you|please|] write [a poem|a letter|some code|a story|an essay|an email] [about {thing}s|].",
    "*what is the [brand|make|model|price|owner|engine] of the {thing}?", "where can i buy [a|this] {thing}?",
    "*how [heavy|fast|expensive|warm|loud|deep|strong|rich|far away] is [it|the {thing}|this|{place}]?",
    "what does [it|this|the {thing}|a {thing}] [smell|taste|feel|sound] like?", "how does a {thing} work?",
    "what is the {person} [doing|wearing|saying|eating|holding|thinking|looking at|called]?",
    "is the {person} [smiling|happy|sad|tired|tall|old|young|asleep|angry|running]?", "where is the {person}?",
    "which [country|city|language|animal|planet|street] is this?", "what [language|animal|material|style|city] is it?",
    "who won the [game|war|race|election|match|prize]?", "what is the score?",
    "who [wrote|said|built|sang] [it|that]?",
    "what should i [eat|wear|do|cook|buy|read|watch] [today|tomorrow|tonight|now]?", "what is for [dinner|lunch]?",
    "how do i [get to the station|cook {thing}s|lose weight|learn english|fix my {thing}|get home|win|get to {place}]?",
    "is this [art|picture|{thing}] [any good|beautiful|famous|expensive|old|yours|real|modern]?",
    "translate [this|it|that] into [german|french|spanish|english|chinese].", "*how do you say {thing} in french?",
    "sing [me|] a song.", "tell me [a joke|a story|a secret|the truth|the news|about {place}|about {name}|a lie].",
    "what is the meaning of [life|this|love|{thing}]?", "what does {thing} mean?", "what is a {thing}?",
    "what kind of [animal|food|car|music|plant|person|{thing}] is [it|this|that]?", "is [this|it|that] a {thing}?",
    "do you [like|love|hate|want|need|eat|remember] [it|me|this|{thing}s|music|the {thing}|{name}]?",
    "do you [dream|sleep|think|feel pain|have feelings|have friends|have a {thing}|speak {thing}|believe in god]?",
    "can you [fly|swim|dance|cook|drive|hear me|speak french|play chess|count to {number}|help my {person}|lie]?",
    "what material is it made of?", "*what is {number} [plus|times|minus|divided by] {number}?", "solve x + {number}.",
    "how is the [economy|traffic|{person}|weather|food]?", "*is [{name}|the {person}|{place}] [here|rich|far|nice]?",
    "how long does it take [to get to {place}|to cook a {thing}|]?", "how tall is [{name}|the {person}]?",
    "what do [{thing}s|people|you] [eat|like|drink|want|need]?", "what did the {person} [say|do|buy|eat]?",
    "will it [rain|snow|work|be fine] [tomorrow|today|]?", "*will [you|the {person}] [win|come back|marry me]?",
    "are you [happy|alive|sure|hungry|single|tired|lying|there|married|busy]?",
    "i [love|hate|need|lost|like] [you|my {thing}].", "{thing}", "*{thing} {thing}", "{thing} {thing} {thing}?",
    "my {thing} is {thing}.", "the {person} and the {person}", "*what about {place}?",
    "[play|open|close|start|stop|delete|buy|send] [the|my|a] {thing}.", "turn [on|off] the {thing}.",
)  # fmt: skip
# The same questions as about the world, about a thing that is not in it.
UNKNOWN_THING_QUESTIONS = (
    "what color is the {thing}?", "what is the color of the {thing}?", "which color does the {thing} have?",
    "where is the {thing}?", "where can i find the {thing}?", "[please|] tell me where the {thing} is.",
    "*what size is the {thing}?", "is the {thing} [small or large|large or small]?", "how large is the {thing}?",
    "how many {thing}s are there?", "how many {thing}s [do|can] you see?", "*how many {thing}s are in the picture?",
    "is there a {thing}?", "[do|can] you see a {thing}?", "are there any {thing}s?", "any {thing}s?",
    "find the {thing}.", "is there a {thing} in the picture?", "does the picture show a {thing}?",
    "is the {thing} {side} the {shape}?", "what is {side} the {thing}?", "what shape is {side} the {thing}?",
    "is the {shape} {side} the {thing}?", "which is larger, the {thing} or the {shape}?",
    "are the {thing} and the {shape} the same color?", "is the {thing} {color}?", "is there a {color} {thing}?",
    "*where is the {color} {thing}?", "*count the {thing}s.", "*how many {color} {thing}s are there?",
    "which picture has a {thing}?", "*what shape is the {thing}?",
)  # fmt: skip
# What stands in the slots of the same names: words of what is not in the world.
UNKNOWN_WORDS: dict[str, tuple[str, ...]] = {
    "thing": tuple(
        """
    pentagon *hexagon rectangle *oval diamond arrow *cube ball ring line spiral *cloud flower octagon cylinder pyramid
    cone
    sphere ellipse trapezoid house horse cow pig lion tiger *elephant rabbit snake frog bear monkey
    chicken duck *shark whale bee spider *ant butterfly *dragon robot table chair bed *sofa window *wall roof
    floor kitchen bathroom garden street road bridge river lake sea mountain *hill forest *rock *stone sand island
    beach *desert planet earth rocket plane train truck bike bicycle ship wheel engine phone computer keyboard screen
    *camera television radio clock watch *bag *box bottle *glass plate fork *spoon bowl *pot pan bread butter cheese
    egg meat rice *soup cake pizza burger sandwich *banana lemon potato *tomato *onion carrot salad sugar salt pepper
    coffee tea beer wine juice shirt shoe sock dress coat glove scarf pocket *button necklace hair eye
    nose mouth ear *hand finger arm leg knee *heartbeat head *neck shoulder back brain blood *bone *skin pencil
    paper letter newspaper *magazine map flag guitar *piano drum violin *trumpet football racket net goal sword
    *shield castle church tower school hospital shop market office bank *hotel airport station museum theater cinema
    candle fire smoke ice *wind storm thunder *rainbow shadow mirror *ladder hammer nail *saw drill screw rope chain
    *basket bucket broom brush *soap towel *pillow blanket curtain carpet *vase toy doll *puzzle balloon gift ticket
    coin
    wallet money *card *ghost angel *devil witch *wizard giant dwarf statue painting sculpture *tattoo logo emoji
        """.split()  # noqa: SIM905
    ),
    "person": tuple(
        """
    man woman boy girl *child baby person *lady guy king queen president *doctor teacher nurse farmer soldier policeman
    *painter *artist *driver pilot cook waiter singer dancer actor player friend *mother father *sister brother uncle
    aunt
    grandmother neighbor boss student thief clown
        """.split()  # noqa: SIM905
    ),
    "place": tuple(
        """
    france germany spain *italy england *london paris berlin rome madrid china *japan india brazil canada america africa
    europe australia russia *egypt mexico sweden norway poland *greece turkey korea vienna tokyo *moscow
        """.split()  # noqa: SIM905
    ),
    "name": tuple(
        """
    *anna peter maria john mary *paul einstein *mozart shakespeare picasso napoleon *caesar *columbus newton obama
    taylor
    bob alice tom sarah emma lukas mohammed li elena
        """.split()  # noqa: SIM905
    ),
}
