"""Files of tar shards that are no part of an example, counted by the reason."""

from collections.abc import Collection, Iterable

from mammut.data.tar_files import TarFile, shown

# The number of such files, and the name of the first, by what they are.
LeftOut = dict[str, tuple[int, str]]

_MAX_REASONS = 20
_OTHERS = "other files"


def count(left_out: LeftOut, file: TarFile, extensions: Collection[bytes]) -> None:
    """Counts a file whose extension is not one of `extensions`, or an entry that is no file."""
    reason = _reason(file, extensions)
    if reason not in left_out and len(left_out) >= _MAX_REASONS:
        reason = _OTHERS
    number, first = left_out.get(reason, (0, shown(file.name)))
    left_out[reason] = number + 1, first


def _reason(file: TarFile, extensions: Collection[bytes]) -> str:
    name = file.name.rpartition(b"/")[2]
    stem, _, extension = name.partition(b".")
    last = extension.rpartition(b".")[2].lower()
    if file.other:
        return file.other
    if not stem:
        return "hidden files"
    if not extension:
        return "files without an extension"
    if last in extensions:
        return "files with a second dot in their names"
    return f"files .{last.decode(errors='backslashreplace')}"


def summed(shards: Iterable[LeftOut]) -> LeftOut:
    """Adds the counts of several shards."""
    sums: LeftOut = {}
    for left_out in shards:
        for reason, (number, name) in left_out.items():
            before, first = sums.get(reason, (0, name))
            sums[reason] = before + number, first
    return sums


def described(left_out: LeftOut, extensions: Collection[bytes]) -> str:
    """Describes the files that are left out in one sentence, the most frequent reason first."""
    reasons = ", ".join(
        f"{number:,} {reason} (such as {name})"
        for reason, (number, name) in sorted(left_out.items(), key=lambda item: -item[1][0])
    )
    read = ", ".join(extension.decode() for extension in extensions)
    return f"{reasons} are left out, expected names of a key, one dot, and one of {read}"
