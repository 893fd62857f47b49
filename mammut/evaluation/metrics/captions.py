"""Caption scores of the COCO caption evaluation, with Java or without.

The official tool (pycocoevalcap, the `eval` extra) needs Java for its tokenizer and for METEOR and
SPICE. If either is missing, this module computes BLEU, ROUGE-L and CIDEr in pure Python, with the
same numbers; METEOR and SPICE are then left out, and the result names the reason.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import pathlib
import shutil
import subprocess
import threading
from collections.abc import Sequence

import numpy as np

from mammut.evaluation.metrics.ptb_tokenizer import LINE_BREAKS, ptb_tokenize

_MAX_N = 4
_ROUGE_BETA = 1.2
_CIDER_SIGMA = 6.0
# One number for the set, one for each image.
_Score = tuple[float, list[float] | np.ndarray]


@dataclasses.dataclass(frozen=True)
class CaptionScores:
    """Caption metrics, and the tools that computed them.

    All metrics are shares from 0 to 1, except CIDEr, which goes from 0 to 10.

    The names of the metrics are `bleu_1` ... `bleu_4`, `rouge_l`, `cider`, and `meteor` and `spice`
    if they could be computed.
    """

    metrics: dict[str, float]  # of the whole set; BLEU and METEOR are not means over images
    per_image: dict[str, list[float]]  # in the order of the predictions
    tool: str  # the implementation of the metrics
    tokenizer: str
    left_out: dict[str, str]  # the reason, for each metric that is not computed


def caption_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, java: bool | None = None
) -> CaptionScores:
    """Scores captions as the COCO caption evaluation does.

    Each image has one caption, which is compared with the references of the image.

    CIDEr is CIDEr-D. Its document frequencies come from these references, so it depends on the set:
    of a single image it is 0. SPICE's jars (`stanford-corenlp-3.6.0*.jar` in
    `pycocoevalcap/spice/lib`) are never downloaded.

    Args:
      predictions: one caption for each image; it may be "".
      references: one or more captions for each image.
      java: None uses pycocoevalcap and Java if both are installed, False never does, True requires
        them.

    Raises:
      ValueError: no images, unequal lengths, an image without references, one string where a list
        of captions belongs, or `java=True` where Java or pycocoevalcap is missing.
    """
    if isinstance(predictions, str):
        raise ValueError(f"predictions must be a list of captions, got the string {predictions!r}")
    if not len(predictions):
        raise ValueError("caption scores need at least one image, got no predictions")
    if len(predictions) != len(references):
        raise ValueError(
            f"got {len(predictions)} predictions and references for {len(references)} images"
        )
    for position, captions in enumerate(references):
        if isinstance(captions, str) or not len(captions):
            raise ValueError(
                f"references[{position}] must be a list of one or more captions, got {captions!r}"
            )

    missing = _missing_for_java()
    if java is False:
        missing = "java=False was asked for"
    if missing and java:
        raise ValueError(f"java=True was asked for, but {missing}")
    texts = [LINE_BREAKS.sub(" ", text) for text in predictions]
    references = [[LINE_BREAKS.sub(" ", text) for text in captions] for captions in references]
    if not missing:
        try:
            # Two runs, as in the official tool: the first words of a line can change how the line
            # before it is split.
            candidates = _java_tokenize([[text] for text in texts])
            tokenized_references = _java_tokenize(references)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            missing = f"the Java tokenizer failed: {_one_line(error)}"
    if missing:
        candidates = [" ".join(ptb_tokenize(text)) for text in texts]
        tokenized_references = [
            [" ".join(ptb_tokenize(text)) for text in captions] for captions in references
        ]
        scores = _own_scores(candidates, tokenized_references)
        left_out = {"meteor": missing, "spice": missing}
        tool = "mammut"
        tokenizer = f"mammut's Python version of the PTB tokenizer ({missing})"
    else:
        candidates = [candidate for (candidate,) in candidates]
        scores, left_out = _official_scores(candidates, tokenized_references)
        tool = f"pycocoevalcap {importlib.metadata.version('pycocoevalcap')}"
        tokenizer = "PTB tokenizer of Stanford CoreNLP 3.4.1"
    return CaptionScores(
        metrics={name: float(score) for name, (score, _) in scores.items()},
        per_image={
            name: [float(value) for value in values] for name, (_, values) in scores.items()
        },
        tool=tool,
        tokenizer=tokenizer,
        left_out=left_out,
    )


# The metrics in Python. A text is its tokens, joined by spaces, as in pycocoevalcap.
# -------------------------------------------------------------------------------------------------


def _own_scores(candidates: list[str], references: list[list[str]]) -> dict[str, _Score]:
    candidate_ngrams = [_ngrams(text) for text in candidates]
    reference_ngrams = [[_ngrams(text) for text in captions] for captions in references]
    bleu = _bleu(candidate_ngrams, reference_ngrams)
    rouge = [
        _rouge_l(text, captions) for text, captions in zip(candidates, references, strict=True)
    ]
    cider = _cider(candidate_ngrams, reference_ngrams)
    return bleu | {
        "rouge_l": (float(np.mean(rouge)), rouge),
        "cider": (float(np.mean(cider)), cider),
    }


def _ngrams(text: str) -> list[collections.Counter]:
    """Counts the n-grams of 1, 2, 3 and 4 words."""
    words = text.split()
    return [collections.Counter(zip(*(words[i:] for i in range(n)))) for n in range(1, _MAX_N + 1)]


def _bleu(
    candidates: list[list[collections.Counter]], references: list[list[list[collections.Counter]]]
) -> dict[str, _Score]:
    """Computes BLEU-1..4 (Papineni et al., ACL 2002).

    The brevity penalty is by the closest reference length, the shorter of two equally close ones.
    """
    statistics = []
    for counts, captions in zip(candidates, references, strict=True):
        length = counts[0].total()
        lengths = [caption[0].total() for caption in captions]
        closest = min(lengths, key=lambda own: (abs(own - length), own))
        correct = []
        for n, ngrams in enumerate(counts):
            clipped = ngrams & functools.reduce(
                lambda a, b: a | b, (caption[n] for caption in captions)
            )
            correct.append(clipped.total())
        statistics.append([length, closest, *correct, *(max(0, length - n) for n in range(_MAX_N))])
    statistics = np.array(statistics)
    total = _bleu_of(statistics.sum(0).tolist())
    of_image = [_bleu_of(row) for row in statistics.tolist()]
    return {f"bleu_{n + 1}": (total[n], [row[n] for row in of_image]) for n in range(_MAX_N)}


def _bleu_of(statistics: list[int]) -> list[float]:
    """Computes BLEU-1..4 from counts.

    `statistics` are the lengths of candidate and reference, then the matched n-grams of each n,
    then the candidate's n-grams of each n.
    """
    length, reference_length = statistics[:2]
    matched = statistics[2 : 2 + _MAX_N]
    candidate = statistics[2 + _MAX_N :]
    # The official tool's guards against 0/0. Its scores of texts without a match, such as 2.09e-10,
    # come from them.
    tiny = 1e-15
    small = 1e-9
    scores = []
    product = 1.0
    for n, (correct, guessed) in enumerate(zip(matched, candidate, strict=True)):
        product *= (correct + tiny) / (guessed + small)
        scores.append(product ** (1 / (n + 1)))
    ratio = (length + tiny) / (reference_length + small)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return [score * penalty for score in scores]


def _rouge_l(candidate: str, references: list[str]) -> float:
    """Computes ROUGE-L (Lin, 2004).

    It is the F-measure of the best recall and the best precision over the references.
    """
    # As in the official tool, not `split()`: "" is then one empty word, and equal to another "".
    words = candidate.split(" ")
    common = [
        (_common_subsequence(words, reference.split(" ")), reference) for reference in references
    ]
    precision = max(length / len(words) for length, _ in common)
    recall = max(length / len(reference.split(" ")) for length, reference in common)
    if not precision:
        return 0.0
    return (1 + _ROUGE_BETA**2) * precision * recall / (recall + _ROUGE_BETA**2 * precision)


def _common_subsequence(a: list[str], b: list[str]) -> int:
    """Computes the length of the longest common subsequence of two texts.

    A whole row of the usual table is held in the bits of one number: bit i of `row` is 0 where the
    table steps up at `a[i]` (Hyyrö, 2004).
    """
    positions = collections.defaultdict(int)  # of each word, as bits
    for i, word in enumerate(a):
        positions[word] |= 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()


def _cider(
    candidates: list[list[collections.Counter]], references: list[list[list[collections.Counter]]]
) -> list[float]:
    """Computes CIDEr-D (Vedantam et al., CVPR 2015, section 5) of each image.

    The document frequencies come from the references.
    """
    log_images = math.log(len(references))
    frequency = collections.Counter()
    for captions in references:
        frequency.update({ngram for caption in captions for counts in caption for ngram in counts})
    rarity = {ngram: log_images - math.log(images) for ngram, images in frequency.items()}

    def weighted(caption: list[collections.Counter]) -> tuple[list[dict], list[float], int]:
        vectors = [
            {g: count * rarity.get(g, log_images) for g, count in counts.items()}
            for counts in caption
        ]
        norms = [math.sqrt(sum(value * value for value in vector.values())) for vector in vectors]
        return vectors, norms, caption[0].total()

    scores = []
    for candidate, captions in zip(candidates, references, strict=True):
        vectors, norms, length = weighted(candidate)
        total = 0.0
        for caption in captions:
            other_vectors, other_norms, other_length = weighted(caption)
            penalty = math.exp(-((length - other_length) ** 2) / (2 * _CIDER_SIGMA**2))
            for vector, norm, other, other_norm in zip(
                vectors, norms, other_vectors, other_norms, strict=True
            ):
                if norm and other_norm:
                    shared = sum(
                        min(value, other[g]) * other[g] for g, value in vector.items() if g in other
                    )
                    total += penalty * shared / (norm * other_norm)
        scores.append(10 * total / (_MAX_N * len(captions)))
    return scores


# The official tool
# -------------------------------------------------------------------------------------------------


def _missing_for_java() -> str:
    """Names the reason why the official tool cannot run.

    The reason is a clause; it is "" if the tool can run.
    """
    if importlib.util.find_spec("pycocoevalcap") is None:
        return "pycocoevalcap is not installed: pip install 'mammut-jax[eval]'"
    return "" if shutil.which("java") else "Java was not found on the PATH"


def _java_tokenize(groups: list[list[str]]) -> list[list[str]]:
    """Tokenizes groups of captions without line breaks.

    The tokens are joined by spaces.

    It runs the jar of pycocoevalcap, not its class, which writes into the installed package,
    prints, and can wait forever.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = pathlib.Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    texts = [text for group in groups for text in group]
    command = [
        "java",
        "-cp",
        str(jar),
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
    ]
    done = subprocess.run(
        command,
        input="".join(f"{text}\n" for text in texts).encode(errors="replace"),
        capture_output=True,
        timeout=120 + len(texts) / 100,
        check=True,
    )
    lines = done.stdout.decode().split("\n")
    if len(lines) != len(texts) + 1:
        raise ValueError(f"{len(texts)} captions went in and {len(lines) - 1} came out")
    kept = (
        " ".join(w for w in line.split(" ") if w and w not in ptbtokenizer.PUNCTUATIONS)
        for line in lines
    )
    return [[next(kept) for _ in group] for group in groups]


def _official_scores(
    candidates: list[str], references: list[list[str]]
) -> tuple[dict[str, _Score], dict[str, str]]:
    """Computes the scores that pycocoevalcap can compute here.

    It also returns the reasons why the other scores cannot be computed.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    truth = dict(enumerate(references))
    predicted = {image: [candidate] for image, candidate in enumerate(candidates)}
    bleu, bleu_of_image = Bleu(_MAX_N).compute_score(truth, predicted, verbose=0)
    scores = {f"bleu_{n + 1}": (bleu[n], bleu_of_image[n]) for n in range(_MAX_N)}
    scores["rouge_l"] = Rouge().compute_score(truth, predicted)
    # The official CIDEr fails on references without a word; nothing can match them.
    if any(text.split() for captions in references for text in captions):
        scores["cider"] = Cider().compute_score(truth, predicted)
    else:
        scores["cider"] = (0.0, [0.0] * len(candidates))
    left_out = {}
    for name, score in (("meteor", _meteor), ("spice", _spice)):
        try:
            scores[name] = score(truth, predicted)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            left_out[name] = _one_line(error)
    return scores, left_out


def _meteor(truth: dict[int, list[str]], predicted: dict[int, list[str]]) -> _Score:
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    # It waits for the Java process without a time limit. A killed process answers with an empty
    # line.
    watchdog = threading.Timer(300 + len(predicted) / 5, scorer.meteor_p.kill)
    watchdog.start()
    try:
        score, of_image = scorer.compute_score(truth, predicted)
    except (OSError, ValueError) as error:
        scorer.meteor_p.kill()
        with contextlib.suppress(OSError):
            # This flushes into the closed pipe: better here than in the destructor.
            scorer.meteor_p.stdin.close()
        message = scorer.meteor_p.stderr.read().decode(errors="replace").strip()
        message = message or "it gave no score"
        raise ValueError(f"the METEOR process failed: {message.splitlines()[0]}") from error
    finally:
        watchdog.cancel()
        if scorer.lock.locked():
            # The destructor takes the lock, and would wait forever after an error.
            scorer.lock.release()
    if not np.isfinite([score, *of_image]).all():
        raise ValueError("METEOR gave a score that is not a number")
    return score, of_image


def _spice(truth: dict[int, list[str]], predicted: dict[int, list[str]]) -> _Score:
    folder = pathlib.Path(importlib.util.find_spec("pycocoevalcap.spice").origin).parent / "lib"
    for jar in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        if not (folder / jar).exists():
            raise ValueError(
                f"the SPICE jar {jar} is not in pycocoevalcap/spice/lib, and is never downloaded"
            )
    from pycocoevalcap.spice.spice import Spice

    score, of_image = Spice().compute_score(truth, predicted)
    values = [image["All"]["f"] for image in of_image]
    if not np.isfinite([score, *values]).all():
        raise ValueError("SPICE gave a score that is not a number")
    return score, values


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
