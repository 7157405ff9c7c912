import typer

app = typer.Typer(help="skill")


@app.callback()
def _start() -> None:
    pass
