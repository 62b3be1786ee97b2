"""`smolrun quantize`: a model written as a smaller GGUF file, by smolrun.quantize."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from smolrun.cli import progress
from smolrun.cli.options import LoadOptions, decode, load_options, verbose_option
from smolrun.cli.table import columns, size
from smolrun.errors import OptionError

SHIPPED = "the shipped text"


@click.command("quantize")
@click.argument("model")
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--format", "kind", default="q4_k_m", show_default=True, help="f32 f16 bf16 q8_0 q6_k q5_k_m q4_k_m ...")
@click.option(
    "--calibrate", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Text that says what matters."
)
@click.option(
    "--kl", "kl_text", is_flag=False, flag_value=SHIPPED, metavar="[FILE]", help="Measure the loss on a text."
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@load_options("context", "quantize", "kv", "precision", "speculate", "draft")
@verbose_option
def command(
    model: str,
    target: Path,
    kind: str,
    calibrate: Path | None,
    kl_text: str | None,
    as_json: bool,
    load: LoadOptions,
) -> None:
    """Write MODEL as the GGUF file TARGET.

    MODEL is a safetensors folder or a GGUF file, or a name that leads to one; llama.cpp reads what is written.
    """
    from smolrun.quantize import fidelity, quantize_file
    from smolrun.verify import sample_text

    def read(path: Path) -> str:
        return decode(path.read_bytes(), str(path))

    path = load.path(model)
    text = None if kl_text is None else sample_text() if kl_text is SHIPPED else read(Path(kl_text))
    settings = {**load.settings, **progress.loading()}
    force = settings.pop("force", False)
    if text is not None and "adapter" in settings:
        raise OptionError("--kl compares with MODEL, which is another one without the adapter: measure it alone")
    written = quantize_file(path, target, kind, calibrate=read(calibrate) if calibrate else None, **settings)
    if written.twice:
        formats = ", ".join(f"{count} {name}" for name, count in sorted(written.twice.items()))
        click.echo(f"rounded twice: {formats} of the source; from F16 or BF16 weights the loss is smaller", err=True)
    found = None if text is None else fidelity(path, target, text, force=force, **settings)
    if as_json:
        facts = {**dataclasses.asdict(written), "path": str(target), "bits_per_weight": written.bits_per_weight}
        click.echo(json.dumps(facts | {"fidelity": None if found is None else dataclasses.asdict(found)}))
        return
    formats = ", ".join(f"{count} {name}" for name, count in sorted(written.tensors.items()))
    rows = [
        ("file", str(target)),
        ("size", f"{size(written.bytes)}, {written.bits_per_weight:.2f} bits per weight"),
        ("tensors", formats),
    ]
    if found is not None:
        rows += [
            ("tokens", f"{found.tokens:,}"),
            ("perplexity", f"{found.target.ppl:.3f}, of the source {found.source_ppl:.3f}"),
            ("mean KL", f"{found.target.kl_mean:.2e}, 99 % below {found.target.kl_p99:.2e}"),
            ("top-1", f"{found.target.top1:.4f}"),
        ]
    click.echo(columns(rows))
