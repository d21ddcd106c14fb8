"""Tokens that cannot be guessed, told apart from lookalikes, and kept only as a digest."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlbox.identity import ROLE_SCOPES, Identity, Role, Scope, digest, new_token, well_formed


def test_a_new_token_is_well_formed_and_never_the_same() -> None:
    tokens = {new_token() for _ in range(1000)}
    assert len(tokens) == 1000
    assert all(well_formed(token) and len(token) == 5 + 43 + 6 for token in tokens)


def test_any_changed_letter_is_noticed() -> None:
    token = new_token()
    for place in range(len(token)):
        changed = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]
        assert not well_formed(changed)


@pytest.mark.parametrize("text", ["", "mlbx_", "Bearer x", "mlbx_" + "A" * 48, "mlbx_" + "A" * 50, "mlbx_" + "ä" * 49])
def test_a_lookalike_is_not_well_formed(text: str) -> None:
    assert not well_formed(text)


def test_a_token_keeps_its_check_when_a_letter_is_lost_or_added() -> None:
    token = new_token()
    assert not well_formed(token[:-1])
    assert not well_formed(token + "A")
    assert not well_formed(token.removeprefix("mlbx_"))


def test_a_digest_is_the_sha_256_of_the_token() -> None:
    assert digest("mlbx_x") == hashlib.sha256(b"mlbx_x").hexdigest()


@given(st.text(st.characters()))
def test_any_text_has_a_digest_and_is_or_is_not_well_formed(text: str) -> None:
    assert len(digest(text)) == 64
    assert not well_formed(text)


def test_a_role_has_the_scopes_of_the_lesser_roles() -> None:
    assert ROLE_SCOPES[Role.USER] < ROLE_SCOPES[Role.DEPLOYER] < ROLE_SCOPES[Role.ADMIN] == frozenset(Scope)
    assert Scope.DEPLOY not in ROLE_SCOPES[Role.USER]


def test_a_credential_is_good_for_its_scopes_and_admin_for_everything() -> None:
    reader = Identity(user="ann", uid=1000, role=Role.ADMIN, scopes=frozenset({Scope.READ}), how="token:1")
    admin = Identity(user="root", uid=0, role=Role.ADMIN, scopes=frozenset({Scope.ADMIN}), how="socket")
    assert [scope for scope in Scope if reader.may(scope)] == [Scope.READ]
    assert not reader.admin
    assert all(admin.may(scope) for scope in Scope)
    assert admin.admin
