"""The tokenizer of the COCO caption evaluation in pure Python.

The original is Stanford CoreNLP's tokenizer for the Penn Treebank.
"""

import dataclasses
import functools
import re

# Each of these characters ends a line for the official tokenizer, which works line by line: all
# captions after it would be shifted by one line.
LINE_BREAKS = re.compile("[\n\r\v\f\x85\u2028\u2029]")
_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_SPELLED = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", '"': "''",
    "¢": "cents", "£": "#", "¤": "$", "€": "$", "\x80": "$", "₠": "$", "&lt;": "<", "&gt;": ">",
    "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "…": "...",
}  # fmt: skip
_ASCII = str.maketrans(
    dict.fromkeys("‘‛‹\x91", "`") | dict.fromkeys("’›\x92", "'") | dict.fromkeys("“«\x93", "``")
    | dict.fromkeys("”»\x94", "''") | dict.fromkeys("–—―\x96\x97", "--")
)  # fmt: skip
_ENTITIES = {
    "&amp;": "&",
    "&apos;": "'",
    "&quot;": '"',
    "&nbsp;": " ",
    "&mdash;": "—",
    "&ndash;": "–",
}
# Periods that belong to the word before them: always; only after a capital; only before a number.
_ABBREVIATIONS = (
    "adj adm adv al ala alex apr ariz assn assoc asst attys? aug ave bancorp bhd bldg blvd brig "
    "bros calif capt cf cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det drs? "
    "elec ens esq est etc ext feb fla fri ft ga gen govs? hon inc ind insp intl invt jan jos jr "
    "jul jun kans? ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mrs? ms "
    "msgr mt mtg natl neb nev nov oct okla penn pfc ph plc ppte ppty pp?t[ey]s pres profs? pte "
    "pty pvt rd reps? rev rt sens? sept? seq sfc sgt spc sq sr ste? supts? sys tel tenn thu thurs "
    "treas tues? univ va vs vt wed wisc? wm wyo"
)
_CAPITAL_ABBREVIATIONS = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
_NUMBER_ABBREVIATIONS = "art ca figs? nos? op pp prop"
_SENTENCE_STARTS = (
    "A About According Additionally After An As At But He Her Here However If In It Last Many "
    "More Now Once One Other Our She Since So Some Such That The Their Then There These They This "
    "We What When While Yet You"
)


def ptb_tokenize(text: str) -> list[str]:
    """Tokenizes a caption as the COCO caption evaluation does, in pure Python.

    That is Stanford CoreNLP 3.4.1's PTBTokenizer with `-preserveLines -lowerCase`, without the
    punctuation that pycocoevalcap drops: "Can't stop (Mr. X)." gives `ca n't stop -lrb- mr. x
    -rrb-`. A token may contain no-break spaces ("1 1/2").

    The rules were derived from the output of the official tokenizer. Two differences are known. The
    official tokenizer also looks at the next caption: a final "K." is `k.` before "two dogs" and
    `k` before "A dog"; here it is always `k.`. And it keeps accents written as HTML (`&eacute;`) in
    their word.
    """
    text = LINE_BREAKS.sub(" ", text).replace("\xad", "")
    # Emoji and the like are dropped, but they end a word.
    text = re.sub("[\U00010000-\U0010ffff]", "\x01", text)
    text = re.sub("&[a-z]+;", lambda match: _ENTITIES.get(match[0], match[0]), text)
    lexer = _lexer()
    tokens = []
    position = 0
    while position < len(text):
        if text[position].isspace():
            position += 1
        elif plain := lexer.plain.match(text, position):
            tokens.append(plain[0].lower())
            position = plain.end()
        elif matches := [match for rule in lexer.rules if (match := rule.match(text, position))]:
            longest = max(matches, key=lambda match: match.end())  # the first of equals
            token = longest[0]
            if "token" in longest.re.groupindex:
                token = longest["token"]
            tokens.append(_normalized(token, lexer.contraction))
            position += len(token)
        else:
            position += 1
    return [token for token in tokens if token not in _DROPPED]


def _normalized(token: str, contraction: re.Pattern) -> str:
    if token in _SPELLED:
        return _SPELLED[token]
    if token.startswith(("..", ". ")):
        return "..."
    if token in ("---", "----"):
        return "--"
    # The official tokenizer keeps a curly apostrophe inside a word that is not a contraction.
    if not re.search(r"\w", token) or contraction.fullmatch(token):
        token = token.translate(_ASCII)
    return token.lower().replace(" ", "\xa0").replace("(", "-lrb-").replace(")", "-rrb-")


@dataclasses.dataclass(frozen=True)
class _Lexer:
    """The regular expressions of the tokenizer."""

    plain: re.Pattern  # a word before a space, which no rule splits
    # the longest match wins; its group `token`, if there is one, is the token
    rules: tuple[re.Pattern, ...]
    contraction: re.Pattern


@functools.cache
def _lexer() -> _Lexer:
    letter = (
        r"(?:[^\W\d_\xb2\xb3\xb9\xbc-\xbe\u2070-\u2079\u2080-\u2089\u2150-\u2189\u2460-\u24ff"
        r"\u2776-\u2793]"
        r"|[\u02c2-\u02df\u02e5-\u036f\u0483-\u0487\u0591-\u05bd\u064b-\u065e\u0900-\u0903"
        r"\u093e-\u094e\u0e31-\u0e4e])"
    )
    alnum = rf"(?:{letter}|\d)"
    quote = "['\x92’]"
    any_quote = "['`\x91\x92‘’‛]"
    word = rf"{letter}{alnum}*(?:[.!?]{letter}{alnum}*)*"
    part = rf"(?:[dol]{any_quote}{letter}|[DOL]{any_quote}{letter})?{alnum}+"
    hyphenated = rf"{part}(?:[-_\u058a\u2010\u2011]{part})*"
    slashed = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
    ending = rf"{quote}(?:[sdmSDM]|re|ve|ll|RE|VE|LL)"
    negation = rf"[nN]{any_quote}[tT]"
    ends_word = r"(?:[^A-Za-z]|$)"
    acronym = r"[A-Za-z](?:\.[A-Za-z])*"
    after_capital = "|".join(f"{name[0]}(?i:{name[1:]})" for name in _CAPITAL_ABBREVIATIONS.split())
    always = _ABBREVIATIONS.replace(" ", "|")
    numbered = _NUMBER_ABBREVIATIONS.replace(" ", "|")
    url_end = r"""[^\s"<>|()]+[^\s"<>|.!?(){},-]"""
    attribute = r"""[A-Za-z][\w:.-]*(?: *= *(?:'[^']*'|"[^"]*"|[A-Za-z][\w:.-]*))?"""
    rules = (
        # Two words written as one; contractions; words with an apostrophe of their own.
        r"(?i:(?P<token>can(?=not)|gon(?=na)|got(?=ta)|lem(?=me)|gim(?=me)|wan(?=na))(?:not|na|ta|me))",
        rf"(?P<token>'[tT])(?i:is|was){ends_word}",
        rf"(?P<token>[A-Za-z]*[A-MO-Za-mo-z]){negation}",
        negation,
        rf"(?i:cont{quote}d\.|c{quote}mon|ev{quote}ry|e{quote}er|li{quote}l|s{quote}mores|ol{quote}|somethin{quote}"
        rf"|dunkin{quote}|{quote}till?|{quote}cause|{quote}em|{quote}n{quote}?|[ldj]{quote}|y{quote}(?=[a-z]))",
        rf"{quote}[2-9]0[sS]|{quote}\d\d(?!\S)",
        rf"(?P<token>{word}|{hyphenated}){ending}{ends_word}",
        rf"(?P<token>{ending}){ends_word}",
        r"(?P<token>')[A-Za-z]\S",
        ending,
        rf"[A-HJ-XZn]{any_quote}{letter}{{2,}}",
        rf"{letter}+[aeiouyAEIOUY]{any_quote}[aeiouA-Z]{letter}*",
        # Words; with hyphens, slashes, ampersands, periods.
        word,
        hyphenated,
        rf"[A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:[A-Za-z0-9]+|{acronym}\.))+",
        rf"{slashed}(?:\\?/{slashed}){{1,2}}",
        r"[A-Z]+(?:[+&][A-Z]+)+|[Cc]\+\+|[CcFf]#|[A-Z]*\$",
        rf"(?:(?:Ed|Ph)\.D|(?i:{always})|{after_capital}|{acronym}|(?:anti|non)-U\.S)\.",
        rf"(?P<token>(?i:{numbered})\.) ?\d",
        rf"(?P<token>[A-Za-z])\.\s+(?:{_SENTENCE_STARTS.replace(' ', '|')})\s",
        rf"(?P<token>{hyphenated}\.)[,;:]",
        # Addresses, hash tags, HTML tags.
        r"""[A-Za-z0-9][^\s"<>|()@,;:]*@[^\s"<>|().,@]+(?:\.[^\s"<>|().,@]+)*|@[A-Za-z]\w*|#[A-Za-z]+""",
        rf"https?://{url_end}",
        r"""(?:www\.(?:[^\s"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}"""
        r"""|(?:[^\s"`'<>|.!?(){},_$-]+\.)+(?:com|net|org|edu))"""
        rf"(?:/{url_end})?",
        rf"</?[A-Za-z][\w:.-]*(?: +(?:{attribute})?)* */?>|<[!?][A-Za-z-][^>]*>",
        # Numbers, fractions, dates, telephone numbers.
        r"[-+]?(?:\d+(?:[.,:]\d+)*|(?:[.,:]\d+)+)",
        r"(?:\d{1,4}[- \xa0])?\d{1,4}(?:\\?/|\u2044)\d{1,4}",
        r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}",
        r"(?:\(\d{2,3}\)[ \xa0]?|(?:\+\+?)?(?:\d{2,4}[- \xa0])?\d{2,4}[- \xa0])"
        r"\d{3,4}[- \xa0]?\d{3,5}",
        r"(?:(?:\+\+?)?\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}",
        # Smileys, runs of one sign, and single signs; any other character is dropped.
        r"[<>]?[:;=][-o*']?[()\\{@|\[\]DPdpO](?![A-Za-z0-9])|\^_\^|[<>][-._][<>]|&(?:lt|gt|#\d+);",
        r"<<|>>|[!?]+|\*+|_+|@+|#+|-{5,}|-{2,4}|''|``|\.{3,}|\.(?: \.){2,}"
        r"|[“”«»\x93\x94]{2}|[‘’‹›\x91\x92]{2}",
        r"[!-/:-@\[-`{-~\x80\x91-\x97\xa1-\xa9\xab\xac\xae-\xb4\xb6-\xbf\xd7\xf7"
        r"\u2013-\u2023\u2026\u2030-\u2042\u2044\u2070\u2074-\u208e\u20a0\u20a4\u20ac\u2100-\u214f\u2153-\u215e\u2190-\u2bff\u3001\u3002\u3012\u30fb"
        r"\uff01-\uff65\uffe0-\uffe6]",
    )
    return _Lexer(
        plain=re.compile(r"(?!(?i:cannot|gonna|gotta|lemme|gimme|wanna) )[A-Za-z]+(?= )"),
        rules=tuple(re.compile(rule) for rule in rules),
        contraction=re.compile(f"{ending}|{negation}"),
    )
