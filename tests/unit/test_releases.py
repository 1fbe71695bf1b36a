"""What happens with a release that no test has run."""

from __future__ import annotations

import warnings

import pytest

from megatron_maxscore import releases
from megatron_maxscore._replacements import Replacements


def test_a_newer_release_warns_once_and_goes_on(monkeypatch):
    monkeypatch.setattr(releases, "version", lambda: (0, 99))
    with warnings.catch_warnings(record=True) as caught:
        for _ in range(3):
            releases.warn_if_untested()
    (warning,) = [w for w in caught if "0.99 is newer than 0.19" in str(w.message)]
    assert "a symbol that is missing will be named" in str(warning.message)


def test_tested_releases_do_not_warn(monkeypatch):
    for own in ((0, 17), (0, 18), (0, 19)):
        monkeypatch.setattr(releases, "version", lambda own=own: own)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            releases.warn_if_untested()


def test_a_missing_symbol_is_named():
    with pytest.raises(ImportError, match=r"releases\.no_such_function does not exist"):
        Replacements("hooks").wrap(releases, "no_such_function", lambda original: original)
