"""`smolrun warmup`: compile the kernels now instead of at the first answer."""

from __future__ import annotations

import time

import click

from smolrun.cli.options import LoadOptions, load_options, verbose_option


@click.command("warmup")
@click.argument("model", required=False)
@load_options()
@verbose_option
def command(model: str | None, load: LoadOptions) -> None:
    """Compile the kernels now.

    For this CPU and the formats of MODEL; they are kept for later runs.
    """
    import smolrun

    start = time.perf_counter()
    with load.load(model) as llm:
        # both passes: a prompt of several tokens, then tokens one by one
        llm.generate("one two three", max_tokens=2, sampling=smolrun.Sampling(temperature=0.0), ignore_eos=True)
    click.echo(f"ready in {time.perf_counter() - start:.1f} s", err=True)
