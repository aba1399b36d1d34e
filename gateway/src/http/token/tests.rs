//! Tokens that are let in, and each way in which one is not.

use jsonwebtoken::{EncodingKey, Header, encode, get_current_timestamp};
use rcgen::KeyPair;
use serde_json::json;

use super::*;

/// A key of the provider, and its public form.
fn provider_key(id: &str) -> (EncodingKey, Jwk) {
    let key = EncodingKey::from_ec_der(&KeyPair::generate().unwrap().serialize_der());
    let mut public = Jwk::from_encoding_key(&key, Algorithm::ES256).unwrap();
    public.common.key_id = Some(id.to_owned());
    (key, public)
}

fn rules() -> Rules {
    Rules {
        issuer: "https://id.example".into(),
        audience: "millrace".into(),
        tenant_claim: "org".into(),
        namespaces_claim: Some("namespaces".into()),
    }
}

fn claims() -> Value {
    let now = get_current_timestamp();
    json!({"iss": "https://id.example", "aud": ["other", "millrace"], "sub": "u1", "org": "team a", "exp": now + 60,
           "nbf": now, "namespaces": ["team-a", "shared"]})
}

fn signed(key: &EncodingKey, algorithm: Algorithm, claims: &Value) -> String {
    encode(&Header { kid: Some("k1".into()), ..Header::new(algorithm) }, claims, key).unwrap()
}

#[test]
fn a_good_token_says_who_has_it() {
    let (key, public) = provider_key("k1");
    let caller = verify(&rules(), &public, &signed(&key, Algorithm::ES256, &claims())).unwrap();
    assert_eq!((caller.tenant.as_str(), caller.key.as_str()), ("team a", "oidc:u1"));
    let names: Vec<_> = caller.scopes.namespaces.iter().map(SubjectToken::as_str).collect();
    assert_eq!(names, ["team-a", "shared"]);
    let free = Rules { namespaces_claim: None, ..rules() };
    let caller = verify(&free, &public, &signed(&key, Algorithm::ES256, &claims())).unwrap();
    assert!(caller.scopes.namespaces.is_empty(), "all");
}

#[test]
fn each_wrong_claim_is_refused() {
    let (key, public) = provider_key("k1");
    let now = get_current_timestamp();
    for (name, value) in [
        ("iss", json!("https://id.example.evil")),
        ("aud", json!("other")),
        ("exp", json!(now - 60)),
        ("nbf", json!(now + 300)),
        ("org", json!("")),
        ("org", json!(7)),
        ("sub", Value::Null),
        ("namespaces", json!([])),
        ("namespaces", json!("")),
        ("namespaces", json!(["Team A"])),
        ("namespaces", json!([1])),
    ] {
        let mut wrong = claims();
        wrong[name] = value.clone();
        let token = signed(&key, Algorithm::ES256, &wrong);
        let error =
            verify(&rules(), &public, &token).err().unwrap_or_else(|| panic!("{name} {value} is let in"));
        assert_eq!(error, refused());
    }
    for name in ["iss", "aud", "exp", "sub", "org", "namespaces"] {
        let mut without = claims();
        without.as_object_mut().unwrap().remove(name);
        let token = signed(&key, Algorithm::ES256, &without);
        assert!(verify(&rules(), &public, &token).is_err(), "without {name}");
    }
}

#[test]
fn another_key_or_algorithm_is_refused() {
    let ((key, public), (other, _)) = (provider_key("k1"), provider_key("k1"));
    let good = signed(&key, Algorithm::ES256, &claims());
    assert!(verify(&rules(), &public, &signed(&other, Algorithm::ES256, &claims())).is_err());
    // The public key as the secret of a symmetric algorithm: what everybody knows signs nothing.
    let known = serde_json::to_string(&public).unwrap();
    let secret = EncodingKey::from_secret(known.as_bytes()).unwrap();
    let forged = signed(&secret, Algorithm::HS256, &claims());
    assert!(verify(&rules(), &public, &forged).is_err() && key_id_of(&forged).is_none());
    // A body under another's signature, and no signature at all.
    let parts: Vec<&str> = good.split('.').collect();
    let mut changed = claims();
    changed["org"] = json!("team b");
    let body = signed(&other, Algorithm::ES256, &changed);
    let body = body.split('.').nth(1).unwrap();
    for token in [format!("{}.{body}.{}", parts[0], parts[2]), format!("{}.{}.", parts[0], parts[1])] {
        assert!(verify(&rules(), &public, &token).is_err(), "{token}");
    }
    assert!(key_id_of("none").is_none() && key_id_of(&"x".repeat(TOKEN_BYTES_MAX + 1)).is_none());
    assert_eq!(key_id_of(&good), Some(Some("k1".into())));
}

#[test]
fn the_provider_is_reached_safely() {
    for good in ["https://id.example/a", "http://127.0.0.1:80/x", "http://localhost/x"] {
        assert!(address("--oidc-jwks", good).is_ok(), "{good}");
    }
    for wrong in ["http://id.example", "file:///etc/passwd", "id.example", "https://", ""] {
        let error = address("--oidc-jwks", wrong).unwrap_err().to_string();
        assert!(error.contains("--oidc-jwks"), "{error}");
    }
}
