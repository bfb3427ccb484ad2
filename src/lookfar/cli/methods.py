import typer
def add(app): pass
