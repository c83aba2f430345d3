"""The tables of docs/proof.md are what `python -m benchmarks.proof` found."""

import json

from benchmarks import proof


def test_tables_are_the_results():
    page = proof.PAGE.read_text()
    for name, text in proof.tables(json.loads(proof.RESULTS.read_text())).items():
        assert f"<!-- {name} -->\n{text}<!-- end of {name} -->\n" in page, name
