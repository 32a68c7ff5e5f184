"""`erofs-loader probe` says which planes and forms work here: those of the kernel table, and no other."""

BOOTS = ("probe",)


def host(host):
    """All pairs that this kernel must have."""
    return {"cells": [f"{plane}/{form}" for plane, form in host.cell.image.kernel.cells]}


def probe(guest):
    """The whole answer is kept as a fact."""
    from lib import expect
    from product import ROOT, loader

    ROOT.mkdir()
    with guest.step("probe"):
        done = loader("probe", "--json", ok=False)
        guest.fact("probe", done.stdout)
        guest.fact("exit", done.returncode)
        expect(done.returncode == 0, f"exit {done.returncode}: {done.stderr}")
