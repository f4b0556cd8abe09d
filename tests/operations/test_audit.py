"""What an audit's answer means; the service itself is asked by `make audit`."""

from tests.audit import judge

SOUND = {"name": "a", "version": "1", "vulns": []}
WEAK = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"], "aliases": []}]}
UNKNOWN = {"name": "c", "skip_reason": "Dependency not found on PyPI"}


def test_a_weakness_fails_and_is_named() -> None:
    lines, code = judge({"dependencies": [SOUND, WEAK]})
    assert code == 1 and lines[0] == "b 2: PYSEC-1, mended in 2.1"
    assert lines[-1] == "2 packages audited, 1 known weaknesses, 0 unknown to the index"


def test_no_data_is_no_good_news() -> None:
    lines, code = judge({"dependencies": [UNKNOWN]})
    assert code == 0 and lines[-1] == "NOT AUDITED: anything; the index gave no data"
    assert judge({"dependencies": [SOUND, UNKNOWN]})[0][-1] == "NOT AUDITED: c"
