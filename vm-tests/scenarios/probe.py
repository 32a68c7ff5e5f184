"""`erofs-loader probe` says which planes and forms work here: those of the kernel table, and no other."""

import json

PLANES = ("cachefiles", "fanotify", "none")
ONCE = "kernel"
BOOTS = ("probe",)


def host(host):
    """All pairs that this kernel must have."""
    cells = host.cell.image.kernel.cells
    return {"cells": [f"{plane}/{form}" for plane, form in cells if plane != "none"]}


def probe(guest):
    """The whole answer is kept as a fact."""
    from lib import expect
    from product import ROOT, loader

    ROOT.mkdir()
    with guest.step("probe"):
        done = loader("probe", "--json", ok=False)
        wanted = set(guest.task["cells"])
        expect(done.returncode == (0 if wanted else 13), f"exit {done.returncode}: {done.stderr}")
        findings = json.loads(done.stdout)
    with guest.step("it says the truth"):
        works = {f"{finding['plane']}/{finding['form']}" for finding in findings if finding["works"]}
        guest.fact("works", ", ".join(sorted(works)) or "nothing")
        expect(works == wanted, f"works: {works}, the table says {wanted}: {findings}")
    for finding in findings:
        if finding["works"] and (finding["plane"], finding["form"]) == ("fanotify", "encoded"):
            shares = "works" if finding["shares_page_cache"] else f"no, needs {finding['not_shared']}"
            guest.fact("page cache shared between images", shares)
    with guest.step("for the rest, what is missing and what to do"):
        for finding in findings:
            if not finding["works"]:
                guest.fact(f"{finding['plane']}/{finding['form']}", f"{finding['missing']}; {finding['remedy']}")
                expect(finding["missing"] and finding["remedy"], f"nothing said: {finding}")
