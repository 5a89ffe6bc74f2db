"""Signatures over a bundle in the format of sigstore's model-signing (OpenSSF Model Signing 1.0), with a key, offline.

A signature is a Sigstore bundle around a DSSE envelope; the envelope's payload is an in-toto statement that names the
SHA-256 of every file, the manifest among them. `model_signing verify key` checks ours, and `check_signature` checks
those of `model_signing sign key`. Ours are deterministic (RFC 6979): the same bundle and key give the same bytes.

https://github.com/ossf/model-signing-spec · https://github.com/secure-systems-lab/dsse
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hstu.artifact import MANIFEST, encode_json
from hstu.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey

_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_PAYLOAD = "application/vnd.in-toto+json"
_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_SERIALIZATION = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
_CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
_MAKE_KEY = "openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem; openssl ec -in KEY.pem -pubout -out PUB.pem"


def digests_of(manifest: Mapping[str, Any], identity: str) -> dict[str, str]:
    """What a signature is over: the SHA-256 of every file of a bundle, its manifest (the id) among them."""
    return {MANIFEST: identity, **{name: entry["sha256"] for name, entry in manifest["files"].items()}}


def sign(digests: Mapping[str, str], key: Path) -> bytes:
    """The signature over these files with the private key at `key`; InputError when that is none."""
    private = _private_key(key)
    payload = encode_json(_statement(digests))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": _PAYLOAD,
        "signatures": [
            {"sig": base64.b64encode(private.sign(_encoding(payload), _algorithm(private))).decode(), "keyid": ""}
        ],
    }
    material = {"publicKey": {"hint": fingerprint(private.public_key())}, "tlogEntries": []}
    return encode_json({"mediaType": _BUNDLE, "verificationMaterial": material, "dsseEnvelope": envelope})


def check_signature(signature: bytes, digests: Mapping[str, str], key: Path, *, source: str) -> str:
    """The fingerprint of the public key at `key`, with whose private half exactly these files were signed.

    Raises ArtifactError when they were not, InputError when the key is none.
    """
    from cryptography.exceptions import InvalidSignature

    public = _public_key(key)
    fix = "ask whoever made the bundle; do not serve it"
    try:
        bundle = json.loads(signature)
        (signed,) = bundle["dsseEnvelope"]["signatures"]
        payload = base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True)
        raw = base64.b64decode(signed["sig"], validate=True)
        kinds = bundle["mediaType"], bundle["dsseEnvelope"]["payloadType"]
    except (ValueError, RecursionError, KeyError, TypeError, binascii.Error):
        raise ArtifactError(f"{source}: not a signature", expected=_BUNDLE, fix=fix) from None
    if kinds != (_BUNDLE, _PAYLOAD):
        raise ArtifactError(f"{source}: a signature of another kind", got=kinds, expected=(_BUNDLE, _PAYLOAD), fix=fix)
    try:
        public.verify(raw, _encoding(payload), _algorithm(public))
    except InvalidSignature:
        raise ArtifactError(
            f"{source}: not signed with this key", expected=f"the key {fingerprint(public)[:12]} of {key}", fix=fix
        ) from None
    if _signed_digests(payload) != dict(digests):
        raise ArtifactError(f"{source}: the signature is of other files", expected="the files of this bundle", fix=fix)
    return fingerprint(public)


def fingerprint(public: EllipticCurvePublicKey) -> str:
    """SHA-256 of the key in PEM, as model-signing hints at it."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _statement(digests: Mapping[str, str]) -> dict[str, Any]:
    names = sorted(digests)
    whole = hashlib.sha256(b"".join(bytes.fromhex(digests[name]) for name in names)).hexdigest()
    resources = [{"name": name, "algorithm": "sha256", "digest": digests[name]} for name in names]
    return {
        "_type": _STATEMENT,
        "subject": [{"name": "bundle", "digest": {"sha256": whole}}],
        "predicateType": _PREDICATE,
        "predicate": {"serialization": _SERIALIZATION, "resources": resources},
    }


def _signed_digests(payload: bytes) -> dict[str, str] | None:
    """What a statement names, by file; None when it is not a statement about whole files by their SHA-256."""
    try:
        statement = json.loads(payload)
        predicate = statement["predicate"]
        ways = {name: predicate["serialization"][name] for name in _SERIALIZATION}
        resources = [(each["name"], each["algorithm"], each["digest"]) for each in predicate["resources"]]
        right = (statement["_type"], statement["predicateType"]) == (_STATEMENT, _PREDICATE) and ways == _SERIALIZATION
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    if not right or any(algorithm != "sha256" for _, algorithm, _ in resources):
        return None
    return {name: digest for name, _, digest in resources}


def _encoding(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is really signed."""
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD), _PAYLOAD.encode(), len(payload), payload)


def _algorithm(key: EllipticCurvePrivateKey | EllipticCurvePublicKey) -> ECDSA:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    return ECDSA(getattr(hashes, _CURVES[key.curve.name])(), deterministic_signing=True)


def _private_key(path: Path) -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_key_bytes(path), password=None)
    except (ValueError, TypeError) as error:  # TypeError: it asks for a password
        raise InputError(f"{path}: not a private key that can be read ({error})", fix=_MAKE_KEY) from None
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise _other_key(path, key)
    return key


def _public_key(path: Path) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_key_bytes(path))
    except ValueError as error:
        raise InputError(f"{path}: not a public key in PEM ({error})", fix=_MAKE_KEY) from None
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise _other_key(path, key)
    return key


def _other_key(path: Path, key: object) -> InputError:
    return InputError(
        f"{path}: not a key that model-signing takes",
        got=type(key).__name__.lstrip("_"),
        expected="ECDSA on P-256, P-384 or P-521",
        fix=_MAKE_KEY,
    )


def _key_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", fix=_MAKE_KEY) from None
