"""AutoML or plain training: what the words of a train-stage request ask for, and where the request goes.

The grammar is data. A cue names AutoML ("HPO"), asks for it ("tune") or for its opposite ("train once"). Words that
negate ("no", "don't", "skip", "without") turn a cue round if only linking words stand between the two, so that
"do not disable AutoML" is no wish to disable it and "no GPU" is no wish at all. Quoted text and paths do not count.
Doubt means auto, and the reason says so. English only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from kinegraph.errors import Problem, UserError, look_up

Policy = Literal["auto", "on", "off"]
Origin = Literal["explicit", "request", "default"]

POLICIES: dict[str, Policy] = {"auto": "auto", "on": "on", "off": "off"}
TRUTHS: dict[str, Policy] = {"true": "on", "false": "off", "yes": "on", "no": "off"}
"""YAML reads `automl_policy: off` as false."""

NOT_RUNNABLE = "AutoML is enabled but not runnable until schemas are generated"
MAX_CHARACTERS = 100_000
MAX_REACH = 25
"""Words over which a negation is looked for."""


@dataclass(frozen=True)
class PolicyDecision:
    """`origin` tells what decided: an explicit value, the words of the request, or neither (then auto)."""

    policy: Policy
    origin: Origin
    reason: str


@dataclass(frozen=True)
class Route:
    """Where a request goes: to the automl action or to the action itself."""

    uses_automl: bool
    reason: str


PARAMETERS = r"(?:hyper[ -]?param(?:eter)?s?|parameters?|settings)"
ONE_PARAMETER = r"(?:learning rates?|lr|dropout|momentum|weight decay|patience|window(?: size)?|batch size)"
SEARCHING = r"(?:tun(?:e|ing)|optimi[sz](?:e|ing)|(?:search|explor|vary|chang|touch|alter|adjust|sweep)(?:e|ing)?)"
TRAINING = r"(?:training(?: run| job)?|train(?: run| job)|run)"
NO_OTHER_NOUN = (
    r"(?! (?:set|clip|data|file|split|sample|example|epoch|view|person|class|label|action|motion|gesture)s?\b)"
)

LINKS = """
the a an any all this that my our your its such more further extra additional automatic fancy default whole entire
kind sort form part step phase stage of to for in it be been being is are was 's has have having had get make making
bother afford waste spend time budget interest interested point reason sense thanks i you we me us want think
believe feel like see would will should must can could may from model training train request job here now just only
at also really actually even ever again back turn turned switch switched set leave left stay stays remain or nor
both either and
"""
"""Words that may stand between a negation and what it negates."""

LEXICON: tuple[tuple[str, str], ...] = (
    ("word", r"fine[ -]?tun(?:e|es|ed|ing)|stay tuned"),
    # an idiom with a negation that negates nothing
    (
        "neutral",
        r"no problem|no worries|no matter|no hurry|no rush|no doubt|no wonder|(?:no|not) more than|not only"
        r"|why not|nothing (?:but|except)|if (?:possible|you can|needed|that is ok(?:ay)?)"
        r"|(?:see|check|know|test|find out) (?:if|whether)",
    ),
    (
        "plain",
        rf"(?:tune|optimi[sz]e|search) nothing|(?:plain|vanilla|ordinary) (?:\w+ )?{TRAINING}"
        r"|(?:train|run)(?:ing)? (?:it |this |the model )?plainly"
        r"|(?:train|run) (?:\w+ ){0,3}?(?:just |only |exactly )?once(?= (?:and|with|on|for|only|using|please)\b|$)"
        r"|once only|only once|just once"
        r"|(?:just |only |exactly |a ){0,3}(?:one|single|1)(?: |-)(?:training |train )?(?:run|job)\b"
        rf"|(?:just|only|exactly) (?:one|a single) training{NO_OTHER_NOUN}|one[ -](?:shot|off) (?:training|run)"
        rf"|(?:fixed|given|exactly the(?:se)?|exactly my|these exact|unchanged) {PARAMETERS}"
        rf"|{PARAMETERS} (?:fixed|unchanged|as they are|as given)",
    ),
    (
        "part",
        rf"{SEARCHING}(?: the| my)? {ONE_PARAMETER}",
    ),
    (
        "ask",
        rf"{SEARCHING}(?: for| over| through)?"
        rf"(?: (?:the|a|any|my|our|all|best|better|good|optimal)){{0,4}} {PARAMETERS}"
        rf"|find (?:me )?(?:the |a |some )?(?:best|better|good|optimal) (?:\w+ )?(?:{PARAMETERS}|{ONE_PARAMETER})"
        rf"|try (?:out )?(?:several|different|many|various|some|a few|other) (?:\w+ )?(?:{PARAMETERS}|configurations)"
        r"|tune|auto[ -]?tune|let auto[ -]?ml (?:choose|decide|find|pick|search|tune)",
    ),
    (
        "noun",
        r"(?:(?:use_)?auto[ -]?ml(?:[ _]policy)?|hpo|search(?=$)"
        r"|(?:hyper[ -]?)?param(?:eter)?s? (?:search|optimi[sz]ation|tuning|sweep)(?:e?s)?"
        r"|(?:grid|random|bayesian) (?:search|optimi[sz]ation)|(?:auto[ -]?)?tuning|sweep(?:s|ing)?|optuna"
        rf"|asha|hyperband|bohb)\b{NO_OTHER_NOUN}",
    ),
    (
        "flip",
        r"(?:turn|switch)(?:ing|ed)? off|(?:leav(?:e|ing)|left) out|get rid of|opt(?:ing)? out of|instead of"
        r"|(?:disabl|deactivat|exclud|remov|avoid|skipp?|omitt?|bypass|dropp?|forgett?|stopp?|suppress|refrain|prevent|forbid)"
        r"(?:e|es|ed|ing)?|rather than|without|w/o|no|not|never|cannot|neither|none|zero"
        r"|(?:do|does|did|is|are|was|wo|would|should|could|ca|must|need)n['’]?t",
    ),
    (
        "off",
        r"off|out|false|unnecessary|unneeded|unwanted|undesired|forbidden|disallowed|overkill"
        r"|too (?:slow|expensive|long)|a waste(?: of \w+)?",
    ),
    (
        "go",
        r"(?:us|enabl|activat|explor|prefer|start|launch|perform|appl|requir|allow|keep|kept|want|need|try|do|run|runn|go)"
        r"(?:e|es|ed|ing|s|y|ied|ies)?|(?:turn|switch)(?:ing|ed)? on|include|with|via|through|please|wanted|used",
    ),
    ("on", r"on|true|necessary|yes"),
    ("link", "|".join(LINKS.split())),
)
"""Kind of word or phrase -> pattern. The first kind that fits wins; the cues are nouns, asks, parts and plains."""

NEUTRAL = re.compile(dict(LEXICON)["neutral"])
CUES = ("noun", "ask", "part", "plain")
PASSED = ("link", "go", "on", "neutral", "sign")
"""Kinds that may stand between a negation and its cue; of other cues only after a conjunction."""
CONJUNCTIONS = ("or", "nor", "and", "/")
PARTICIPLES = re.compile(
    r"(?:disabl|deactivat|exclud|remov|avoid|skipp|omitt|bypass|dropp|stopp|suppress|turned off|switched off|left out)"
)
"""Negations that may end a predicate: "AutoML should be skipped"."""
ASKED_AFTER = re.compile(r"\w+ed$|please$")
"""What asks for AutoML right after its name: "AutoML wanted", but not "AutoML run"."""

QUOTED = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]{0,999}`|\"[^\"]{0,999}\"|“[^”]{0,999}”|«[^»]{0,999}»|(?<!\w)‘[^’\n]{0,999}’(?!\w)"
    r"|(?<!\w)'(?:[^'\n]|(?<=\w)'(?=\w)){0,999}'(?!\w)",
    re.DOTALL,
)
SETTING = re.compile(r"['\"]?(automl_policy)['\"]?\s*[:=]\s*['\"]?(auto|on|off|true|false)\b['\"]?")
"""What stands in a spec or a call, with or without quotes."""
PATHS = re.compile(
    r"(?<!\S)(?:\S*://\S*|(?:~|\.{0,2})/\S+|[^\s/]+/[^\s/]+/\S*)"
    r"|(?<![\w-])[\w-]{1,99}\.(?:ya?ml|npy|json|pkl|pth|onnx|csv|txt|py)\b"
)
ASIDES = re.compile(
    r", *(?:under (?:any|no) circumstances|for now|this time|please|in any case|at all|by any means) *,"
)
SENTENCE_END = re.compile(r"(?<=[.!?;\n])[\s]+|\n+")
CLAUSE_END = re.compile(
    r"[,;.!?()\[\]\n—–]+(?=\s|$)|[()\[\]—–]| - |:(?!\s*(?:on|off|auto|true|false|(?:en|dis)abled|yes|no(?!\s+\w))\b)"
    r"|\b(?:but|however|although|though|because|since|so|then|and|while|whereas|which|except that|given that)\b"
    r"|\bjust (?=train )"
)
CONDITIONS = re.compile(
    r"\b(?:if|unless|whether|depending|depends|not sure|unsure|no idea|wonder(?:ing)?|or not|should (?:i|we)|in case"
    r"|otherwise|(?:do|does)(?:n['’]?t| not) (?:know|care|mind|matter)|no preference|up to you|you decide|either way"
    r"|your choice|is it possible|would it be)\b"
)
"""Words that leave the cues of their sentence in doubt."""
HEDGES = re.compile(r"\b(?:maybe|perhaps|possibly|might|consider|optional(?:ly)?|probably)\b")
"""Words that leave the cues of their clause in doubt."""
POLITE = re.compile(
    r"^\W*(?:(?:so|and|hi|hello|please|now)\W+)*(?:can|could|would|will) (?:you|we|u|i ask you)\b|\bplease\b"
)
PAST = re.compile(
    r"\b(?:last (?:time|week|month|year|night|run|job)|previous(?:ly)?|earlier|yesterday|in the past|used to|have been"
    r"|(?:i|we|he|she|they|it|colleagues?|team) (?:already )?(?:trained|ran|used|did|had|tried|made|got))\b"
)
"""A clause that tells what was done does not say what to do."""
CORRECTIONS = re.compile(
    r"\b(?:actually|on second thoughts?|scratch that|correction|never mind|wait|i changed my mind)\b"
)

_SCANNER = re.compile(
    "|".join(f"(?P<{kind}>(?<!\\w)(?:{pattern})(?!\\w))" for kind, pattern in LEXICON)
    + r"|(?P<sign>[-:=/]+|['’]s(?!\w))|(?P<other>[\w'’]+|\S)"
)


@dataclass(frozen=True)
class _Word:
    kind: str
    text: str


@dataclass
class _Votes:
    """The phrases that ask for AutoML, against it, that leave it open, and that only name it."""

    on: list[str] = field(default_factory=list)
    off: list[str] = field(default_factory=list)
    doubt: list[str] = field(default_factory=list)
    named: list[str] = field(default_factory=list)

    def add(self, other: _Votes) -> None:
        for name in ("on", "off", "doubt", "named"):
            getattr(self, name).extend(getattr(other, name))


def resolve_automl_policy(text: str | None = None, explicit: str | bool | None = None) -> PolicyDecision:
    """Decide the AutoML policy of a train-stage request: an explicit value wins, else the words of the request.

    Doubtful or conflicting words mean auto, and the reason says so. Raises UserError for another explicit value or
    a request of over 100,000 characters.
    """
    if explicit is not None and str(explicit).strip():
        name = str(explicit).strip().lower()
        policy = look_up(POLICIES, TRUTHS.get(name, name), "automl_policy")
        return PolicyDecision(policy, "explicit", f"automl_policy is {policy}")
    if text is None or not text.strip():
        return PolicyDecision("auto", "default", "nothing was said about AutoML: auto is the default")
    if len(text) > MAX_CHARACTERS:
        expected = f"at most {MAX_CHARACTERS} characters"
        raise UserError(Problem("request", f"{len(text)} characters", expected, "Or say it with automl_policy."))
    return _decide(_read_request(text), _has_quoted_cue(text))


def choose_route(action: str, decision: PolicyDecision, automl_enabled: bool = True, not_runnable: str = "") -> Route:
    """Where a request goes. `not_runnable` says what keeps AutoML from running, such as a schema that is missing.

    Only train goes to AutoML, unless the policy is off, the model is not enabled for it, or it is not runnable.
    """
    if action != "train":
        return Route(False, f"{action} never goes to AutoML")
    if decision.policy == "off":
        return Route(False, decision.reason)
    if not automl_enabled:
        return Route(False, f"AutoML is not enabled for this model (policy {decision.policy})")
    if not_runnable:
        return Route(False, f"{NOT_RUNNABLE} ({not_runnable})")
    return Route(True, decision.reason)


def _decide(votes: _Votes, has_quoted_cue: bool) -> PolicyDecision:
    if votes.on and votes.off:
        reason = f"in doubt, auto: the request says both {_quote(votes.on)} and {_quote(votes.off)}"
    elif votes.doubt:
        reason = f"in doubt, auto: the request leaves {_quote(votes.doubt)} open"
    elif votes.off:
        return PolicyDecision("off", "request", f"the request says {_quote(votes.off)}")
    elif votes.on:
        return PolicyDecision("on", "request", f"the request says {_quote(votes.on)}")
    elif votes.named:
        reason = f"in doubt, auto: the request names {_quote(votes.named)} and does not say whether to use it"
    elif has_quoted_cue:
        reason = "auto is the default: the request names AutoML in quoted text only, which does not count"
    else:
        reason = "auto is the default: the request says nothing about AutoML"
    return PolicyDecision("auto", "default", reason)


def _quote(phrases: Sequence[str]) -> str:
    return " and ".join(f'"{phrase}"' for phrase in dict.fromkeys(phrases[:3]))


def _unwrap(text: str) -> str:
    """The text without quotes around the whole of it."""
    text = text.strip()
    match = QUOTED.match(text)
    return text.strip("`\"“”«»'‘’") if match and match.end() == len(text) else text


def _has_quoted_cue(text: str) -> bool:
    quoted = [word for match in QUOTED.finditer(_unwrap(text)) for word in _scan(match[0].lower())]
    return any(word.kind in CUES for word in quoted)


def _read_request(text: str) -> _Votes:
    text = QUOTED.sub(" quoted ", SETTING.sub(r"\1: \2", _unwrap(text).lower()))
    text = ASIDES.sub(" ", PATHS.sub(" path ", text))
    votes = _Votes()
    for sentence in SENTENCE_END.split(text):
        found = _read_sentence(sentence)
        if CORRECTIONS.search(sentence) and (found.on or found.off):
            votes = _Votes()
        votes.add(found)
    return votes


def _read_sentence(sentence: str) -> _Votes:
    """The votes of the clauses; "it" is AutoML where the clause before names it."""
    is_question = sentence.rstrip().endswith("?") and not POLITE.search(sentence)
    is_open = is_question or CONDITIONS.search(NEUTRAL.sub(" ", sentence)) is not None
    votes = _Votes()
    named_before = False
    for clause in CLAUSE_END.split(sentence):
        words = _scan(clause.strip())
        found = _read_clause(words, named_before)
        if words:
            named_before = any(word.kind == "noun" for word in words)
        if PAST.search(clause):
            found = _Votes(named=[*found.on, *found.off, *found.named])
        elif is_open or HEDGES.search(clause):
            found = _Votes(doubt=[*found.on, *found.off], named=found.named)
        votes.add(found)
    return votes


def _scan(clause: str) -> list[_Word]:
    words = []
    for match in _SCANNER.finditer(clause):
        assert match.lastgroup is not None
        words.append(_Word(match.lastgroup, match[0]))
    return words


def _read_clause(words: Sequence[_Word], names_it: bool) -> _Votes:
    votes = _Votes()
    for place, word in enumerate(words):
        is_pronoun = names_it and word.text in ("it", "that")
        if word.kind not in CUES and not is_pronoun:
            continue
        first, before = _walk_left(words, place)
        last, after, is_predicate = _walk_right(words, place) if word.kind in ("noun", "link") else (place, 0, False)
        phrase = " ".join(item.text for item in words[first : last + 1])
        flips = before + after
        is_asked = any(item.kind == "go" for item in words[first:place]) or is_predicate
        if is_pronoun and not flips:
            continue
        is_only_named = word.kind in ("noun", "link") and not flips and not is_asked
        if is_only_named or (word.kind == "part" and flips % 2 == 1):  # "don't tune the lr" is about the lr alone
            votes.named.append(phrase)
        elif (flips % 2 == 1) != (word.kind == "plain"):
            votes.off.append(phrase)
        else:
            votes.on.append(phrase)
    return votes


def _walk_left(words: Sequence[_Word], place: int) -> tuple[int, int]:
    """The first word that bears on the cue at `place`, and the number of negations from there on.

    Another cue is passed only over a conjunction: "no AutoML or HPO".
    """
    first, flips = place, 0
    for index in range(place - 1, max(place - MAX_REACH, 0) - 1, -1):
        kind = words[index].kind
        if kind in CUES and words[index + 1].text not in CONJUNCTIONS:
            break
        if kind == "flip":
            flips += 1
        elif kind not in (*PASSED, *CUES):
            break
        if kind in ("flip", "go"):
            first = index
    return first, flips


def _walk_right(words: Sequence[_Word], place: int) -> tuple[int, int, bool]:
    """The last word of a predicate on the noun at `place`, its negations, and whether it says on or needed.

    "AutoML should not be used", "AutoML off"; but not "AutoML on data that is not labelled".
    """
    flips = 0
    for index in range(place + 1, min(place + MAX_REACH, len(words))):
        kind = words[index].kind
        if kind == "off":
            return index, flips + 1, False
        if kind == "on" or (kind == "go" and (index > place + 1 or ASKED_AFTER.match(words[index].text))):
            return index, flips, True
        if kind == "flip":
            flips += 1
            if PARTICIPLES.match(words[index].text) or index == len(words) - 1:
                return index, flips, False
        elif kind not in ("link", "sign"):
            break
    return place, 0, False
