"""Measurements as lines of text."""

from typing import Any

GENERATION = (
    f"{'batch':>5} {'beams':>5} {'equal':>7} {'loop':<8} {'compile s':>9} {'ms/batch':>9} "
    f"{'IQR':>8} {'captions/s':>10} {'tokens/s':>9} {'ms/token':>8} {'speedup':>8}"
)
VIDEO = (
    f"{'videos':<10} {'batch':>5} {'beams':>5} {'clips/s':>9} {'ms/clip':>9} {'CPU ms/clip':>11} "
    f"{'compile s':>9}"
)
_STEPS = (
    f"{'batch':>6} {'px':>5} {'text':>5} {'images/s':>9} {'ms/step':>9} {'IQR':>8} "
    f"{'TFLOP/s':>8} {'MFU':>6} {'GiB':>7} {'temp GiB':>8} {'compile s':>9}"
)


def generation(row: dict[str, Any]) -> str:
    """Writes both loops on a batch.

    They are two lines under the heading `GENERATION`.
    """
    equal = f"{row['texts_equal']}/{row['batch']}"
    cases = {"cached": f"{row['batch']:>5} {row['beams']:>5} {equal:>7}", "uncached": " " * 19}
    ends = {"cached": f" {row['speedup']:>7.2f}x", "uncached": ""}
    return "\n".join(
        f"{case} {name:<8} {row[name]['compile_s']:>9.1f} {1000 * row[name]['seconds']:>9.1f} "
        f"{1000 * row[name]['seconds_iqr']:>8.1f} {row[name]['captions_per_s']:>10.1f} "
        f"{row[name]['new_tokens_per_s']:>9.0f} {row[name]['ms_per_token']:>8.2f}{ends[name]}"
        for name, case in cases.items()
    )


def steps(rows: list[dict[str, Any]]) -> str:
    """Writes training steps: a heading, then a line each."""
    lines = [_STEPS]
    for row in rows:
        memory = row["memory_gib"]
        lines.append(
            f"{row['batch']:>6} {row['image_size']:>5} {row['length']:>5} {row['per_s']:>9.1f} "
            f"{1000 * row['seconds']:>9.1f} {1000 * row['seconds_iqr']:>8.1f} "
            f"{row['tflops']:>8.3f} {row['mfu']:>6.1%} {memory['total']:>7.2f} "
            f"{memory['temporaries']:>8.2f} {row['compile_s']:>9.1f}"
        )
    return "\n".join(lines)


def parts(rows: dict[str, Any]) -> str:
    """Writes the parts of a step: a heading, then a line each."""
    lines = [f"{'part':<28} {'ms':>9} {'share':>7} {'of FLOPs':>8}"]
    for name, row in rows.items():
        flops = f"{row['flops_share']:>8.1%}" if "flops_share" in row else ""
        lines.append(
            f"{name:<28} {1000 * row['seconds']:>9.1f} {row['share']:>7.1%} {flops}".rstrip()
        )
    return "\n".join(lines)


def grown(measured: dict[str, Any]) -> str:
    """Writes the rows of one axis and its exponents."""
    exponents = ", ".join(f"{name} {value:.2f}" for name, value in measured["exponents"].items())
    if measured["axis"] != "devices":
        return f"{steps(measured['rows'])}\nexponents in {measured['axis']}: {exponents}"
    lines = [
        f"{'devices':>7} {'state GiB':>10} {'temp GiB':>9}   "
        "of one device; fake devices share the cores"
    ]
    for row in measured["rows"]:
        memory = row["memory_gib"]
        lines.append(
            f"{row['devices']:>7} {memory['state_and_batch']:>10.4f} {memory['temporaries']:>9.4f}"
        )
    return "\n".join([*lines, f"exponents in devices: {exponents}"])


def startup(measured: dict[str, Any]) -> str:
    """Seconds to the end of a first step, cold and warm."""
    names = list(measured["cold"])
    lines = [f"{'first step':<10} " + " ".join(f"{name + ' s':>10}" for name in names)]
    for case, seconds in measured.items():
        lines.append(f"{case:<10} " + " ".join(f"{seconds[name]:>10.1f}" for name in names))
    return "\n".join(lines)


def data(measured: dict[str, Any]) -> str:
    """Writes the rate of reading and its measured numbers."""
    numbers = ", ".join(
        f"{name} {value:.3g}" for name, value in measured.items() if isinstance(value, int | float)
    )
    return f"data {measured['spec']}: {numbers}"


def video(row: dict[str, Any]) -> str:
    """Writes a row of `mammut.performance.video_time`: a line under the heading `VIDEO`."""
    compile_s = f"{row['compile_s']:>9.1f}" if "compile_s" in row else ""
    return (
        f"{row['work']:<10} {row.get('batch', ''):>5} {row.get('beams', ''):>5} "
        f"{row['per_s']:>9.2f} {1000 / row['per_s']:>9.1f} {row['cpu_ms']:>11.1f} {compile_s}"
    ).rstrip()


def beside(row: dict[str, Any]) -> str:
    """Writes the training steps of both sides.

    It shows their losses, their times and ratios.
    """
    apart = ", ".join(
        f"{name} {value:.1e}" for name, value in row["losses"]["relative_difference"].items()
    )
    ours = row["losses"]["mammut"]
    lines = [
        f"same weights, batch of {row['batch']}: "
        f"contrastive loss {ours['contrastive_loss']:.6f}, "
        f"caption loss {ours['caption_loss']:.6f}, gradient norm {ours['grad_norm']:.4f}; "
        f"apart by (relative) {apart}",
        f"{'train step':<16} {'images/s':>9} {'ms':>9} {'IQR':>8}",
    ]
    for name, times in row["times"].items():
        label = name if name == "mammut" else f"peer, {name}"
        lines.append(
            f"{label:<16} {times['per_s']:>9.1f} {1000 * times['seconds']:>9.1f} "
            f"{1000 * times['seconds_iqr']:>8.1f}"
        )
    lines += [
        f"ahead of the peer, {mode}: {_interval(ratio)}" for mode, ratio in row["speedup"].items()
    ]
    return "\n".join(lines)


def beside_generation(row: dict[str, Any]) -> str:
    """Writes the generation of both sides.

    Where the peer's was not run, it says why.
    """
    case = f"{row['batch']} images, {row['beams']} beams, {row['new_tokens']} tokens"
    if "not_run" in row:
        return f"{case}: not run: {row['not_run']}"
    rates = ", ".join(
        f"{name} {times['captions_per_s']:.2f} captions/s" for name, times in row["times"].items()
    )
    equal = ""
    if "texts_equal" in row:
        equal = f", texts equal {row['texts_equal']}/{row['batch']}"
    alone = ""
    if row["peer_images_at_once"] == 1 and row["batch"] > 1:
        alone = ", the peer image by image"
    return f"{case}: {rates}{equal}{alone}; ahead of the peer: {_interval(row['speedup'])}"


def _interval(ratio: dict[str, float]) -> str:
    interval = f"95 %: {ratio['low']:.2f} to {ratio['high']:.2f}"
    return f"{ratio['ratio']:.2f}x ({interval}; fastest calls {ratio['of_fastest']:.2f}x)"
